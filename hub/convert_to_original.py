"""The way back: a MoVE-KD checkpoint in the authors' layout, which their code loads."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from hub.checkpoint_parts import load_image_processor
from hub.convert_layouts import DISTILLER, empty_model, expected_weights, vocabulary_keys
from hub.convert_original_config import config_to_original
from hub.convert_original_keys import is_packed, key_to_original, unpack_experts
from hub.files import new_folder, resolve_source, weight_files
from hub.weights import MAX_SHARD_SIZE, Piece, WeightFiles, write_weights
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
    """
    Write a checkpoint of ours in the authors' layout; see [`hub.convert.convert`].

    Raises:
        ValueError: if the tower lacks layers, or the model is none that the authors' code runs; if weights are missing
            or left over; if the folder has no image processor; if neither the folder nor the arguments tell what their
            files must name.
    """
    config = MoveKDConfig.from_pretrained(folder)
    files = WeightFiles(weight_files(folder))
    distiller = WeightFiles([folder / DISTILLER_NAME] if (folder / DISTILLER_NAME).is_file() else [])
    vision_model = vision_model or _vision_model(folder)
    # `<image>` is the first id after the authors' vocabulary, where training has not noted how large that was
    vocab_size = getattr(config, "original_vocab_size", config.image_token_index)
    adapters = {
        key: theirs for key in distiller.tensors if (theirs := key_to_original(DISTILLER + key)) != DISTILLER + key
    }
    pads = getattr(load_image_processor(folder, config), "do_pad", False)  # what tells `square` from `pad`
    original_config = config_to_original(config, vision_model, bool(adapters), vocab_size, pads)
    model = empty_model(config)
    if differing := sorted(expected_weights(model).keys() ^ files.tensors.keys()):
        raise ValueError(
            f"The weights of {folder} are not those of its configuration; missing or left over: {differing}."
        )

    num_experts, vocabulary = config.vision_config.num_experts, vocabulary_keys(model)
    pieces = [
        Piece([(files, key)], _writer(key, num_experts, vocab_size if key in vocabulary else None))
        for key in files.tensors
    ]
    pieces += [Piece([(distiller, key)], _rename(theirs)) for key, theirs in adapters.items()]
    tokenizer = _tokenizer_files(folder, language_model)
    generation_config = read_json(folder / "generation_config.json")
    suppressed = [token for token in generation_config.pop("suppress_tokens", None) or [] if token < vocab_size]
    if suppressed := [token for token in suppressed if token != config.image_token_index]:
        generation_config["suppress_tokens"] = suppressed
    with new_folder(dest) as temporary:
        write_weights(pieces, temporary, max_shard_size)
        for name, content in tokenizer.items():
            if isinstance(content, Path):
                shutil.copyfile(content, temporary / name)
            else:
                save_json(content, temporary / name)
        save_json(generation_config, temporary / "generation_config.json")
        save_json(original_config, temporary / "config.json")
    dropped = sorted(distiller.tensors.keys() - adapters.keys())
    print(f"Wrote {dest} in the authors' layout." + (f" Dropped, with no place there: {dropped}" if dropped else ""))
    return Path(dest)


def _rename(theirs: str) -> Callable[[list[torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda parts: {theirs: parts[0]}


def _writer(key: str, num_experts: int, rows: int | None) -> Callable[[list[torch.Tensor]], dict[str, torch.Tensor]]:
    if not num_experts:
        # Without experts their MLP is CLIP's own
        return lambda parts: {key_to_original(key).replace("original_module.", ""): parts[0][:rows]}
    if is_packed(key):
        return lambda parts: {
            key_to_original(key, expert): part.clone()
            for expert, part in enumerate(unpack_experts(key, parts[0], num_experts))
        }
    return lambda parts: {key_to_original(key): parts[0][:rows]}


def _vision_model(folder: Path) -> str:
    for name in (CONVERSION_NAME, TRAINING_FACTS_NAME):
        if (folder / name).is_file() and (vision_model := read_json(folder / name).get("vision_model")):
            return vision_model
    raise ValueError(f"{folder} does not tell which CLIP checkpoint its tower was made from; give `--vision-model`.")


def _tokenizer_files(folder: Path, language_model: str | None) -> dict[str, Path | dict]:
    """The SentencePiece tokenizer as it was before `<image>` was added, by file name."""
    if language_model is not None:
        source = resolve_source(language_model, weights=False)
        files = {name: source / name for name in ("tokenizer.model", *TOKENIZER_FILES)}
        return {name: path for name, path in files.items() if path.is_file()}
    kept = read_json(folder / CONVERSION_NAME).get("tokenizer", {}) if (folder / CONVERSION_NAME).is_file() else {}
    if not kept or not (folder / "tokenizer.model").is_file():
        raise ValueError(f"{folder} has no SentencePiece tokenizer for the authors' code; give `--language-model`.")
    return {"tokenizer.model": folder / "tokenizer.model", **kept}
