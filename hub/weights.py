"""Weights that are streamed from files to files: a tensor stays on disk until it is written."""

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from hub.export_options import DTYPE_NAMES
from modeling_movekd.files import save_json
from modeling_movekd.inference import check_finite


DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}
MAX_SHARD_SIZE = 5 * 10**9
SMALL_SHARD_SIZE = 10**9
# Float8 and integers come from quantization. Without their scales, which no layout here has, they mean nothing.
WEIGHT_DTYPES = (*DTYPES.values(), torch.float64)


class WeightFiles:
    """
    The tensors of several weight files, by key. One file is open at a time.

    Attributes:
        tensors (`dict[str, torch.Tensor]`): For each key a tensor of its shape and dtype on the meta device.
        paths (`dict[str, Path]`): The file of each key.
        largest (`int`): Bytes of the largest file.
        mapped (`bool`): Whether all files can be memory-mapped, which `.bin` files older than the zip format cannot.
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
                    raise ValueError(f"`{key}` is in both {self.paths[key]} and {path}. Remove one of the files.")
                self.paths[key] = path
                self.tensors[key] = torch.empty_like(tensor, device="meta")
        self.close()

    def _open_file(self, path: Path) -> dict[str, torch.Tensor]:
        if path != self._path:
            self.close()
            if path.suffix == ".safetensors":
                self._open = load_safetensors(path)
            else:
                self._open, mapped = load_bin(path)
                self.mapped = self.mapped and mapped
            self._path = path
        return self._open

    def read(self, key: str) -> torch.Tensor:
        """
        Raises:
            ValueError: If values are not finite.
        """
        tensor = self._open_file(self.paths[key])[key]
        check_finite(tensor, f"`{key}` of {self.paths[key]}")
        return tensor

    def check_dtype(self, key: str) -> None:
        """
        Raises:
            ValueError: If the tensor is not of a dtype that weights have.
        """
        tensor = self.tensors[key]
        if tensor.dtype not in WEIGHT_DTYPES or tensor.layout != torch.strided:
            raise ValueError(
                f"`{key}` of {self.paths[key]} is {tensor.dtype} ({tensor.layout}); weights are "
                f"{', '.join(str(dtype) for dtype in WEIGHT_DTYPES)}. Save the model again, not quantized."
            )

    def check(self) -> None:
        """Check the dtypes and the values of all tensors; one file is open at a time."""
        for key in self.tensors:
            self.check_dtype(key)
            self.read(key)
        self.close()

    def close(self) -> None:
        self._path, self._open = None, {}


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}. Download it again.") from error


def load_bin(path: Path) -> tuple[dict[str, torch.Tensor], bool]:
    """The tensors of a `.bin` file, and whether they are memory-mapped. No code of the file is run."""
    mapped = True
    try:
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # a file older than the zip format
            mapped = False
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged. Reading it could run code: use safetensors "
            "instead, or save the tensors alone again."
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Download it again.") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} is no state dict. It must hold tensors by key and nothing else.")
    return content, mapped


@dataclass
class WeightConversion:
    """
    Tensors that are read together, and the function that turns them into the tensors to write.

    Args:
        inputs: (files, key) of each tensor to read.
        convert: Takes the tensors in the order of `inputs`, and returns the tensors to write by key. It must also work
            with tensors on the meta device.
    """

    inputs: Sequence[tuple[WeightFiles, str]]
    convert: Callable[[list[torch.Tensor]], dict[str, torch.Tensor]]

    def shapes(self) -> dict[str, torch.Tensor]:
        """The tensors to write, on the meta device. Refuses inputs of a dtype that weights do not have."""
        for files, key in self.inputs:
            files.check_dtype(key)
        outputs = self.convert([files.tensors[key] for files, key in self.inputs])
        return {key: tensor.to("meta") for key, tensor in outputs.items()}

    def run(self) -> dict[str, torch.Tensor]:
        return self.convert([files.read(key) for files, key in self.inputs])


def renamed(files: WeightFiles, key: str, new_key: str) -> WeightConversion:
    """Copy one tensor to another key."""
    return WeightConversion([(files, key)], lambda tensors: {new_key: tensors[0]})


def write_weights(conversions: Sequence[WeightConversion], folder: Path, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """
    Run conversions in their order, and write `model.safetensors` or shards, with an index.

    One shard is in memory at a time. It is at most as large as `max_shard_size`, and as the largest file read (1 GB if
    that is smaller).
    """
    shapes = [conversion.shapes() for conversion in conversions]
    files = {id(files): files for conversion in conversions for files, _ in conversion.inputs}.values()
    largest = max((file.largest for file in files if all(file.mapped for file in files)), default=0)
    split = split_torch_state_dict_into_shards(
        {key: tensor for tensors in shapes for key, tensor in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=min(max_shard_size, max(largest, SMALL_SHARD_SIZE)),
    )
    total = sum(tensor.nbytes for tensors in shapes for tensor in tensors.values())
    converted: dict[str, torch.Tensor] = {}
    remaining = iter(conversions)
    with tqdm(total=total, desc="converting", unit="B", unit_scale=True) as bar:
        for name, keys in split.filename_to_tensors.items():
            while not all(key in converted for key in keys):
                converted.update(next(remaining).run())
            shard = {key: converted.pop(key).contiguous() for key in keys}
            save_file(shard, folder / name, metadata={"format": "pt"})
            bar.update(sum(tensor.nbytes for tensor in shard.values()))
            del shard
    for file in files:
        file.close()
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    save_json(index, folder / "model.safetensors.index.json")
