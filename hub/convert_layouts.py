"""The layouts of the checkpoints that a conversion reads: which of our weights each of their keys holds."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from hub.convert_original_keys import pack_experts
from hub.weights import Piece, WeightFiles
from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.vision_movekd import CLIP_TEXT_KEYS


VISION, PROJECTOR, LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
DISTILLER = "distiller."
# Buffers that older versions of transformers saved and every version computes by itself
_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")
# Layouts of transformers' LLaVA, before and after version 4.52, most specific first
_TRANSFORMERS_PREFIXES = (
    ("language_model.model.", LANGUAGE),
    ("language_model.lm_head.", "lm_head."),
    ("model.vision_tower.vision_model.", VISION),
    ("vision_tower.vision_model.", VISION),
    ("vision_tower.", VISION),
    ("multi_modal_projector.", PROJECTOR),
    ("image_newline", "model.image_newline"),
)
# Their settings of these scale or cap the logits outside of the head, which a joined model would lose without a word
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")

Rename = Callable[[str], tuple[str, int | None]]
# Of one of our weights, by expert (`None` if it is not packed): the files and their key
Places = dict[int | None, tuple[WeightFiles, str]]


@dataclass
class Origin:
    """Weight files of one layout: `rename` gives our key and which expert of it (`None` if it is not packed)."""

    files: WeightFiles
    rename: Rename


@dataclass
class Collected:
    """Where each of our weights comes from, and the keys of the sources that are not used, with the reason."""

    places: dict[str, Places] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def rename_transformers(key: str) -> tuple[str, int | None]:
    """Layouts of `llava-hf`."""
    for prefix, ours in _TRANSFORMERS_PREFIXES:
        if key.startswith(prefix):
            return ours + key.removeprefix(prefix), None
    return key, None


def rename_clip(key: str) -> tuple[str, int | None]:
    """A CLIP checkpoint, whole or its vision model alone."""
    return (key if key.startswith(CLIP_TEXT_KEYS) else VISION + key.removeprefix("vision_model.")), None


def language_rename(config: PreTrainedConfig) -> Rename:
    """
    For a causal language model of transformers.

    Raises:
        ValueError: if its logits are not a linear head's alone.
    """
    if scaled := {name: value for name in _LOGIT_FIELDS if (value := getattr(config, name, None)) not in (None, 1)}:
        raise ValueError(f"The language model has {scaled}; one that does more for its logits is not supported.")
    with torch.device("meta"), init.no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    base = f"{model.base_model_prefix}."

    def rename(key: str) -> tuple[str, int | None]:
        if key.startswith(f"{head}."):
            return "lm_head." + key.removeprefix(f"{head}."), None
        return LANGUAGE + key.removeprefix(base), None

    return rename


def empty_model(config: PreTrainedConfig) -> MoveKDForConditionalGeneration:
    """The model on the meta device: keys and shapes without weights."""
    with torch.device("meta"), init.no_init_weights():
        return MoveKDForConditionalGeneration(config)


def expected_weights(model: MoveKDForConditionalGeneration) -> dict[str, torch.Tensor]:
    """What its checkpoint holds."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def collect(origins: Iterable[Origin], model: MoveKDForConditionalGeneration) -> Collected:
    """
    Find the place of every key of the sources.

    Raises:
        ValueError: for keys that have no place and no known reason to be dropped, or that share one.
    """
    expected, found = expected_weights(model), Collected()
    vision = model.config.vision_config
    unknown, doubled = [], []
    for origin in origins:
        for key in origin.files.tensors:
            target, expert = origin.rename(key)
            if target in expected or target.startswith(DISTILLER):
                places = found.places.setdefault(target, {})
                if expert in places:
                    doubled.append(f"{key} ({places[expert][0].paths[places[expert][1]]}, {origin.files.paths[key]})")
                places[expert] = (origin.files, key)
            elif reason := _reason_to_drop(target, vision.num_hidden_layers, model):
                found.dropped[key] = reason
            else:
                unknown.append(key)
    if unknown or doubled:
        raise ValueError(f"Weights without a place in the model: {sorted(unknown)}; given twice: {sorted(doubled)}.")
    return found


def _reason_to_drop(target: str, depth: int, model: MoveKDForConditionalGeneration) -> str | None:
    if _BUFFERS.fullmatch(target):
        return "a buffer that is computed"
    if target.startswith(CLIP_TEXT_KEYS):
        return "CLIP's text model"
    if target == "lm_head.weight":
        return "tied to the embedding"
    if target == "model.image_newline":
        return "of tiles, which the model does not use"
    if not model.config.vision_config.add_pooling_layer:
        layer = re.match(rf"{re.escape(VISION)}encoder\.layers\.(\d+)\.", target)
        if target.startswith(f"{VISION}post_layernorm.") or (layer and int(layer.group(1)) >= depth):
            return "behind the layer that feeds the projector"
    return None


def make_pieces(
    found: Collected, model: MoveKDForConditionalGeneration, may_be_new: tuple[str, ...] = ()
) -> tuple[list[Piece], list[Piece], list[str]]:
    """
    Steps that fill every weight of the model, those that fill the distiller, and the keys that are newly drawn.

    Args:
        may_be_new: Parts of the keys that the sources may lack and that are then drawn as for a new model.

    Raises:
        ValueError: for weights that would stay empty, experts missing, or shapes that do not fit; with the keys.
    """
    expected = expected_weights(model)
    new = [key for key in expected if key not in found.places]
    if missing := [key for key in new if not any(part in key for part in may_be_new)]:
        raise ValueError(f"The source lacks {len(missing)} weights, which would stay random: {missing}.")
    vocabulary = vocabulary_keys(model)
    pieces, distiller, wrong = [], [], []
    order: dict[Path, int] = {}
    for places in found.places.values():
        for files, key in places.values():
            order.setdefault(files.paths[key], len(order))

    def first_file(places: Places) -> int:
        return min(order[files.paths[key]] for files, key in places.values())

    # In the order of the files, so that each is read once
    for key, places in sorted(found.places.items(), key=lambda item: first_file(item[1])):
        piece = _piece(key, places, expected[key].shape[0] if key in vocabulary else None)
        planned = piece.plan().popitem()[1]
        if key.startswith(DISTILLER):
            distiller.append(piece)
        elif planned.shape != expected[key].shape:
            wrong.append(f"{key}: {tuple(planned.shape)} instead of {tuple(expected[key].shape)}")
        else:
            pieces.append(piece)
    if wrong:
        raise ValueError(f"Weights of other shapes than the configuration asks for: {wrong}.")
    if new:
        drawn = new_weights(model, new, embedding_dtype(found, model))
        pieces.append(Piece([], lambda _: drawn))
    return pieces, distiller, new


def _piece(key: str, places: Places, rows: int | None) -> Piece:
    if None not in places:
        indices = sorted(places, key=lambda index: index or 0)
        if indices != list(range(len(indices))):
            raise ValueError(f"{key} needs the experts 0 to {len(indices) - 1}; the checkpoint has {indices}.")
        return Piece([places[index] for index in indices], lambda parts: {key: pack_experts(key, parts)})
    if rows is not None:
        return Piece([places[None]], lambda parts: {key: add_rows(parts[0], rows)})
    return Piece([places[None]], lambda parts: {key: parts[0]})


def add_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """
    Enlarge an embedding or a head, `(vocabulary, hidden_size)`, to `rows`. New rows are the mean of the others: such a
    token's logit is the mean of all logits, so that it is never the largest.
    """
    added = rows - weight.shape[0]
    if added <= 0:
        return weight
    mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(added, -1)])


def embedding_dtype(found: Collected, model: MoveKDForConditionalGeneration) -> torch.dtype:
    """The dtype of the language model's embedding, which stands for the checkpoint's."""
    ((files, key),) = found.places[_embedding_key(model)].values()
    return files.tensors[key].dtype


def vocabulary_keys(model: PreTrainedModel) -> set[str]:
    """The weights with a row for each token."""
    return {_embedding_key(model), "lm_head.weight"}


def _embedding_key(model: PreTrainedModel) -> str:
    embedding = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is embedding) + ".weight"


def new_weights(
    model: MoveKDForConditionalGeneration, keys: Iterable[str], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Weights drawn by the model's own rules, for these keys alone; the model itself stays on the meta device."""
    drawn: dict[str, torch.Tensor] = {}
    owners: dict[str, list[str]] = {}
    for key in keys:
        owners.setdefault(key.rpartition(".")[0], []).append(key)
    for name, owned in owners.items():
        module = model.get_submodule(name)
        module.to_empty(device="cpu", recurse=False)
        initialiser = model.model.vision_tower if name.startswith(VISION) else model
        initialiser._init_weights(module)
        drawn |= {key: module.get_parameter(key.rpartition(".")[2]).data.to(dtype) for key in owned}
        module.to(device="meta")
    return drawn
