"""Reads, edits and splits checkpoints that are converted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


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
