"""Converts a MoVE-KD checkpoint to the original layout, which the authors' code loads."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from hub.checkpoint_parts import load_image_processor, read_config
from hub.convert_layouts import DISTILLER, empty_model, expected_weights, vocabulary_keys
from hub.convert_original_config import config_to_original
from hub.convert_original_keys import is_packed, key_to_original, unpack_experts
from hub.files import new_folder, resolve_source, weight_files
from hub.weights import MAX_SHARD_SIZE, WeightConversion, WeightFiles, renamed, write_weights
from modeling_movekd import MoveKDConfig
from modeling_movekd.files import CONVERSION_NAME, DISTILLER_NAME, TRAINING_FACTS_NAME, read_json, save_json


TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def convert_to_original(
    folder: Path,
    dest: str | Path,
    vision_model: str | None = None,
    language_model: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> Path:
    """Write a MoVE-KD checkpoint in the original layout. The arguments are those of [`hub.convert.convert`]."""
    config = read_config(folder)
    if not isinstance(config, MoveKDConfig):
        raise ValueError(f"{folder} holds an encoder alone; the original layout needs a whole model.")
    # Without that field, `<image>` is the first token behind the original vocabulary
    fields = config.to_dict()
    vocab_size = fields.get("original_vocab_size", fields["image_token_index"])
    distiller = WeightFiles([folder / DISTILLER_NAME] if (folder / DISTILLER_NAME).is_file() else [])
    adapters = {
        key: original for key in distiller.tensors if (original := key_to_original(DISTILLER + key)) != DISTILLER + key
    }
    original_config = config_to_original(
        config,
        vision_model or _vision_model(folder),
        distilled=bool(adapters),
        vocab_size=vocab_size,
        pads=getattr(load_image_processor(folder, config), "do_pad", False),
    )
    conversions = _conversions(folder, config, vocab_size)
    conversions += [renamed(distiller, key, original) for key, original in adapters.items()]
    tokenizer = _tokenizer_files(folder, language_model)
    with new_folder(dest) as temporary:
        write_weights(conversions, temporary, max_shard_size)
        for name, content in tokenizer.items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                save_json(content, temporary / name)
        save_json(_generation_config(folder, config, vocab_size), temporary / "generation_config.json")
        save_json(original_config, temporary / "config.json")
    dropped = sorted(distiller.tensors.keys() - adapters.keys())
    print(f"Wrote {dest} in the original layout.")
    if dropped:
        print(f"Dropped heads and statistics that the original layout does not have: {dropped}")
    return Path(dest)


def _conversions(folder: Path, config: MoveKDConfig, vocab_size: int) -> list[WeightConversion]:
    files, model = WeightFiles(weight_files(folder)), empty_model(config)
    shapes = [{key: it.shape for key, it in weights.items()} for weights in (expected_weights(model), files.tensors)]
    if differing := sorted(key for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key)):
        raise ValueError(
            f"{folder} does not hold the weights of its configuration. Missing, left over or of another shape: "
            f"{differing}."
        )
    if vocab_size > config.text_config.vocab_size:
        raise ValueError(
            f"`original_vocab_size` of {folder} is {vocab_size}, but the model has {config.text_config.vocab_size} "
            "tokens. Save or convert the checkpoint again."
        )
    num_experts, vocabulary = config.vision_config.num_experts, vocabulary_keys(model)
    return [
        WeightConversion([(files, key)], _converter(key, num_experts, vocab_size if key in vocabulary else None))
        for key in files.tensors
    ]


def _converter(
    key: str, num_experts: int, rows: int | None
) -> Callable[[list[torch.Tensor]], dict[str, torch.Tensor]]:
    if not num_experts:
        # The original code wraps the MLP (`original_module`) only where it has experts
        return lambda parts: {key_to_original(key).replace("original_module.", ""): parts[0][:rows]}
    if is_packed(key):
        return lambda parts: {
            key_to_original(key, expert): part.clone()
            for expert, part in enumerate(unpack_experts(key, parts[0], num_experts))
        }
    return lambda parts: {key_to_original(key): parts[0][:rows]}


def _generation_config(folder: Path, config: MoveKDConfig, vocab_size: int) -> dict:
    """The generation options without the tokens that the original vocabulary does not have."""
    options = read_json(folder / "generation_config.json")
    suppressed = options.pop("suppress_tokens", None) or []
    if suppressed := [token for token in suppressed if token < vocab_size and token != config.image_token_index]:
        options["suppress_tokens"] = suppressed
    return options


def _vision_model(folder: Path) -> str:
    for name in (CONVERSION_NAME, TRAINING_FACTS_NAME):
        if (folder / name).is_file() and (vision_model := read_json(folder / name).get("vision_model")):
            return vision_model
    raise ValueError(f"{folder} does not say which CLIP checkpoint its tower was made from. Give `--vision-model`.")


def _tokenizer_files(folder: Path, language_model: str | None) -> dict[str, Path | dict]:
    """The files of the SentencePiece tokenizer as it was before `<image>` was added, by name."""
    if language_model is not None:
        source = resolve_source(language_model, weights=False)
        files = {name: source / name for name in ("tokenizer.model", *TOKENIZER_FILES)}
        return {name: path for name, path in files.items() if path.is_file()}
    kept = read_json(folder / CONVERSION_NAME).get("tokenizer", {}) if (folder / CONVERSION_NAME).is_file() else {}
    if not kept or not (folder / "tokenizer.model").is_file():
        raise ValueError(
            f"{folder} has no SentencePiece tokenizer, which the original code needs. Give `--language-model`."
        )
    return {"tokenizer.model": folder / "tokenizer.model", **kept}
