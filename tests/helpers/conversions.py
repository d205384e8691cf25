"""Reads, edits and splits checkpoints that are converted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


# What no weight may be, and a part of the error that says so
BAD_WEIGHTS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": (lambda weight: weight.index_fill(0, torch.tensor([0]), torch.nan), "not finite"),
    "infinite": (lambda weight: weight.half().index_fill(0, torch.tensor([0]), -torch.inf), "not finite"),
    "complex": (lambda weight: weight.to(torch.complex64), "torch.complex64|C64"),
    "bool": (lambda weight: weight > 0, "torch.bool|BOOL"),
    "integer": (lambda weight: weight.to(torch.int8), "torch.int8|I8"),
    "float8": (lambda weight: weight.to(torch.float8_e4m3fn), "torch.float8_e4m3fn|F8_E4M3"),
}


def change_weight(folder: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor of `model.safetensors`."""
    weights = load_file(folder / "model.safetensors")
    weights[key] = change(weights[key]).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def split(folder: Path, suffix: str, shards: int = 3, order: Callable[[str], Any] = str) -> list[Path]:
    """Split a checkpoint's weights into shards; neighboring keys are in different shards."""
    single = folder / "model.safetensors"
    weights = load_file(single)
    single.unlink()
    keys = sorted(weights, key=order)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index, paths = {}, []
    for shard in range(shards):
        path = folder / f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        tensors = {key: weights[key].clone() for key in keys[shard::shards]}
        save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
        index |= dict.fromkeys(tensors, path.name)
        paths.append(path)
    name = f"{single.name if suffix == 'safetensors' else 'pytorch_model.bin'}.index.json"
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return paths


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in sorted(folder.glob("model*.safetensors")) for key, value in load_file(path).items()}


def assert_equal_weights(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype and torch.equal(actual[key], value), key


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if "dest" in path.name]
