"""The layouts that a conversion reads: how their keys map to ours, and which tensors fill each of our weights."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from hub.convert_original_keys import pack_experts, replace_prefix
from hub.weights import WeightConversion, WeightFiles
from modeling_movekd import MoveKDForConditionalGeneration
from modeling_movekd.base_encoders_movekd import CLIP_TEXT_KEYS
from modeling_movekd.modeling_movekd import refuse_scaled_logits


VISION, PROJECTOR, LANGUAGE = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
DISTILLER = "distiller."
# Buffers that older versions of transformers saved
_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|embeddings\.position_ids)")
# LLaVA in transformers, before and after version 4.52, most specific first
_TRANSFORMERS_PREFIXES = (
    ("language_model.model.", LANGUAGE),
    ("language_model.lm_head.", "lm_head."),
    ("model.vision_tower.vision_model.", VISION),
    ("vision_tower.vision_model.", VISION),
    ("vision_tower.", VISION),
    ("multi_modal_projector.", PROJECTOR),
    ("image_newline", "model.image_newline"),
)
# Maps a key to ours, and to the index of the expert where ours packs all experts of a layer (else `None`)
Rename = Callable[[str], tuple[str, int | None]]
# The tensors (files, key) that fill one of our weights, by the index of the expert, or by `None`
Inputs = dict[int | None, tuple[WeightFiles, str]]


@dataclass
class WeightSource:
    """Weight files of one layout."""

    files: WeightFiles
    rename: Rename


@dataclass
class KeyMapping:
    """
    How the weights of a source map to ours.

    Args:
        inputs: By our key, the tensors that fill it.
        dropped: By the source's key, why it is not used.
    """

    inputs: dict[str, Inputs] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def rename_transformers(key: str) -> tuple[str, int | None]:
    """For the layouts of `llava-hf`."""
    return replace_prefix(key, _TRANSFORMERS_PREFIXES), None


def rename_clip(key: str) -> tuple[str, int | None]:
    """For a whole CLIP checkpoint, or its vision model alone."""
    return (key if key.startswith(CLIP_TEXT_KEYS) else VISION + key.removeprefix("vision_model.")), None


def language_rename(config: PreTrainedConfig) -> Rename:
    """For a causal language model of transformers."""
    refuse_scaled_logits(config)
    with torch.device("meta"), init.no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    prefixes = ((f"{head}.", "lm_head."), (f"{model.base_model_prefix}.", LANGUAGE), ("", LANGUAGE))
    return lambda key: (replace_prefix(key, prefixes), None)


def empty_model(config: PreTrainedConfig) -> MoveKDForConditionalGeneration:
    """The model on the meta device: keys and shapes without weights."""
    with torch.device("meta"), init.no_init_weights():
        return MoveKDForConditionalGeneration(config)


def expected_weights(model: MoveKDForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint of the model holds."""
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def map_keys(sources: Iterable[WeightSource], model: MoveKDForConditionalGeneration) -> KeyMapping:
    """Map every key of the sources to one of the model or the distiller, or to a reason to drop it."""
    expected, mapping = expected_weights(model), KeyMapping()
    unknown, repeated = [], []
    for source in sources:
        for key in source.files.tensors:
            target, expert = source.rename(key)
            if target in expected or target.startswith(DISTILLER):
                inputs = mapping.inputs.setdefault(target, {})
                if expert in inputs:
                    files, other = inputs[expert]
                    repeated.append(f"{key} ({files.paths[other]}, {source.files.paths[key]})")
                inputs[expert] = (source.files, key)
            elif reason := _reason_to_drop(target, model):
                mapping.dropped[key] = reason
            else:
                unknown.append(key)
    if unknown:
        raise ValueError(f"The model has no weights for {sorted(unknown)}. Remove them from the source to convert it.")
    if repeated:
        raise ValueError(f"These weights are stored twice: {sorted(repeated)}. Remove one of the files.")
    return mapping


def _reason_to_drop(target: str, model: MoveKDForConditionalGeneration) -> str | None:
    vision = model.config.vision_config
    if _BUFFERS.fullmatch(target):
        return "a buffer that the model computes"
    if target.startswith(CLIP_TEXT_KEYS):
        return "CLIP's text model"
    if target == "lm_head.weight":
        return "tied to the embedding"
    if target == "model.image_newline":
        return "used with tiles alone, which the model does not use"
    if not vision.add_pooling_layer:
        layer = re.match(rf"{re.escape(VISION)}encoder\.layers\.(\d+)\.", target)
        is_unused = layer is not None and int(layer.group(1)) >= vision.num_hidden_layers
        if is_unused or target.startswith(f"{VISION}post_layernorm."):
            return "behind the layer that feeds the projector"
    return None


def make_conversions(
    mapping: KeyMapping,
    model: MoveKDForConditionalGeneration,
    may_be_new: tuple[str, ...] = (),
    min_rows: int = 0,
) -> tuple[list[WeightConversion], list[WeightConversion], list[str]]:
    """
    The conversions that fill every weight of the model.

    Args:
        may_be_new: Parts of keys. A weight with one of them in its key is initialized where the sources lack it.
        min_rows: Rows that the embedding and the head must have. Rows are only added for `<image>` and padding.

    Returns:
        The conversions for the model, those for the distiller, and the keys that are initialized.
    """
    expected = expected_weights(model)
    new = [key for key in expected if key not in mapping.inputs]
    if missing := [key for key in new if not any(part in key for part in may_be_new)]:
        raise ValueError(f"The source lacks {len(missing)} weights: {missing}. Download it again, or convert another.")
    vocabulary = vocabulary_keys(model)
    conversions, distiller, wrong = [], [], []
    # In the order of the files, so that each file is read once
    paths = [files.paths[key] for inputs in mapping.inputs.values() for files, key in inputs.values()]
    order = {path: index for index, path in enumerate(dict.fromkeys(paths))}
    first_file = {
        target: min(order[files.paths[key]] for files, key in inputs.values())
        for target, inputs in mapping.inputs.items()
    }
    for key in sorted(mapping.inputs, key=lambda key: first_file[key]):
        rows = expected[key].shape[0] if key in vocabulary else None
        if rows is not None:
            _check_rows(mapping.inputs[key], min_rows)
        conversion = _conversion(key, mapping.inputs[key], rows)
        shape = conversion.shapes()[key].shape
        if key.startswith(DISTILLER):
            distiller.append(conversion)
        elif shape != expected[key].shape:
            wrong.append(f"{key}: {tuple(shape)} instead of {tuple(expected[key].shape)}")
        else:
            conversions.append(conversion)
    if wrong:
        raise ValueError(f"Weights do not have the shapes that the configuration says: {wrong}. Download them again.")
    if new:
        initialized = new_weights(model, new, embedding_dtype(mapping, model))
        conversions.append(WeightConversion([], lambda _: initialized))
    return conversions, distiller, new


def _check_rows(inputs: Inputs, min_rows: int) -> None:
    for files, key in inputs.values():
        shape = files.tensors[key].shape
        if shape[:1].numel() < min_rows:
            raise ValueError(
                f"`{key}` of {files.paths[key]} has the shape {tuple(shape)}, but the configuration or the tokenizer "
                f"says {min_rows} tokens. Download the weights again, or take the tokenizer that belongs to them."
            )


def _conversion(key: str, inputs: Inputs, rows: int | None) -> WeightConversion:
    if None not in inputs:
        indices = sorted(inputs, key=lambda index: index or 0)
        if indices != list(range(len(indices))):
            raise ValueError(
                f"`{key}` needs the experts 0 to {len(indices) - 1}; the checkpoint has {indices}. Download it again."
            )
        return WeightConversion([inputs[index] for index in indices], lambda parts: {key: pack_experts(key, parts)})
    if rows is not None:
        return WeightConversion([inputs[None]], lambda parts: {key: add_rows(parts[0], rows)})
    return WeightConversion([inputs[None]], lambda parts: {key: parts[0]})


def add_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """
    Enlarge an embedding or a head, `(vocab_size, hidden_size)`, to `rows`.

    New rows are the mean of the others: the logit of a new token is the mean of all logits, and never the largest.
    """
    added = rows - weight.shape[0]
    if added <= 0:
        return weight
    mean = weight.mean(dim=0, keepdim=True, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(added, -1)])


def embedding_dtype(mapping: KeyMapping, model: MoveKDForConditionalGeneration) -> torch.dtype:
    """The dtype of the language model's embedding, which is taken as the dtype of the checkpoint."""
    ((files, key),) = mapping.inputs[_embedding_key(model)].values()
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
    """Initialize these weights as the model does; the model itself stays on the meta device."""
    weights: dict[str, torch.Tensor] = {}
    by_module: dict[str, list[str]] = {}
    for key in keys:
        by_module.setdefault(key.rpartition(".")[0], []).append(key)
    for name, own_keys in by_module.items():
        module = model.get_submodule(name)
        module.to_empty(device="cpu", recurse=False)
        part = model.model.vision_tower if name.startswith(VISION) else model
        part._init_weights(module)
        weights |= {key: module.get_parameter(key.rpartition(".")[2]).data.to(dtype) for key in own_keys}
        module.to(device="meta")
    return weights
