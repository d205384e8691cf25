"""Weights of a checkpoint streamed from files to files: tensors stay mapped on disk until they are written."""

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from modeling_movekd.files import save_json


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_SIZE = 5 * 10**9
SMALL_SHARD_SIZE = 10**9


class WeightFiles:
    """
    The tensors of some weight files by key, read one file at a time.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): By key a tensor of the same shape and dtype on the meta device.
        largest (`int`): Bytes of the largest file.
        mapped (`bool`): Whether every file can be mapped into memory, so that a tensor costs nothing until it is used.

    Raises:
        ValueError: for a file that cannot be read, a `.bin` that holds more than tensors, or a key in two files.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.paths: dict[str, Path] = {}
        self.largest, self.mapped = 0, True
        self._path: Path | None = None
        self._open: dict[str, torch.Tensor] = {}
        for path in paths:
            self.largest = max(self.largest, path.stat().st_size)
            for key, tensor in self._open_file(path).items():
                if key in self.paths:
                    raise ValueError(f"{key} is both in {self.paths[key]} and in {path}; which is right is not told.")
                self.paths[key] = path
                self.tensors[key] = torch.empty_like(tensor, device="meta")
        self.close()

    def _open_file(self, path: Path) -> dict[str, torch.Tensor]:
        if path != self._path:
            self.close()
            self._open = load_safetensors(path) if path.suffix == ".safetensors" else self._load_bin(path)
            self._path = path
        return self._open

    def _load_bin(self, path: Path) -> dict[str, torch.Tensor]:
        tensors, mapped = load_bin(path)
        self.mapped = self.mapped and mapped
        return tensors

    def read(self, key: str) -> torch.Tensor:
        """The tensor under a key, mapped where the format allows it."""
        return self._open_file(self.paths[key])[key]

    def close(self) -> None:
        self._path, self._open = None, {}


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}. Download it again.") from error


def load_bin(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors of a `.bin` file, and whether they are mapped. Nothing but tensors is ever unpickled."""
    mapped = True
    try:
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # a file older than the zip format
            mapped = False
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; it may run code when it is read, so it is not. Use "
            "safetensors, or a file from whom you trust, saved again as tensors alone."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download it again.") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} is no state dict: it must hold tensors by key and nothing else.")
    return content, mapped


@dataclass
class Piece:
    """
    A step of a conversion: tensors to read, and what is written for them.

    Args:
        parts: (files, key) of each tensor to read.
        build: From those tensors, in their order, the tensors to write by key. Also called with tensors on the meta
            device, to plan.
    """

    parts: Sequence[tuple[WeightFiles, str]]
    build: Callable[[list[torch.Tensor]], dict[str, torch.Tensor]]

    def plan(self) -> dict[str, torch.Tensor]:
        """What will be written, on the meta device."""
        planned = self.build([files.tensors[key] for files, key in self.parts])
        return {key: tensor.to("meta") for key, tensor in planned.items()}

    def read(self) -> dict[str, torch.Tensor]:
        return self.build([files.read(key) for files, key in self.parts])


def write_weights(pieces: Sequence[Piece], folder: Path, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """
    Write pieces as `model.safetensors`, or as shards with an index, in the pieces' order. In memory at any time is one
    output shard, which is never larger than the largest file read (or 1 GB), or than `max_shard_size`.
    """
    planned = [piece.plan() for piece in pieces]
    files = {id(files): files for piece in pieces for files, _ in piece.parts}.values()
    largest = max((file.largest for file in files if all(file.mapped for file in files)), default=0)
    split = split_torch_state_dict_into_shards(
        {key: tensor for tensors in planned for key, tensor in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=min(max_shard_size, max(largest, SMALL_SHARD_SIZE)),
    )
    total = sum(tensor.nbytes for tensors in planned for tensor in tensors.values())
    waiting: dict[str, torch.Tensor] = {}
    remaining = iter(pieces)
    with tqdm(total=total, desc="converting", unit="B", unit_scale=True) as bar:
        for name, keys in split.filename_to_tensors.items():
            while not all(key in waiting for key in keys):
                waiting.update(next(remaining).read())
            shard = {key: waiting.pop(key).contiguous() for key in keys}
            save_file(shard, folder / name, metadata={"format": "pt"})
            bar.update(sum(tensor.nbytes for tensor in shard.values()))
            del shard
    for file in files:
        file.close()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        save_json(index, folder / "model.safetensors.index.json")
