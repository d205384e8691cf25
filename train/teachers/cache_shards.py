"""The files of a feature cache: how features are encoded, which file holds which rows, what its header says."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from train.teachers.features import TeacherFeatures


BLANK = "blank"
CACHE_DTYPES = ("float16", "int8")
WAY_OUT = "Run `python -m train.feature_cache` with this recipe again: it makes what is missing, truncated or other."
# In place of the checksum of an image that could not be decoded
UNREADABLE = -1


def encode(features: TeacherFeatures, dtype: str) -> dict[str, torch.Tensor]:
    """
    Features as they are stored, on their device.

    Args:
        features: Of a batch of images.
        dtype: `"float16"`, or `"int8"`: 255 steps from the least to the largest value of each channel in each image.

    Returns:
        `tokens` of shape `(batch_size, h * w, width)`; for int8 `scale` and `offset`, float32 `(batch_size, width)`:
        a value is `tokens * scale + offset`; `cls` and `cls_attention` in float32 where the teacher gives them.

    Raises:
        ValueError: for values that are not finite, or too large for float16.
    """
    tokens = features.tokens.float()
    largest = tokens.abs().max()
    if not largest.isfinite():
        raise ValueError("The teacher's features are not finite; set its dtype to float32.")
    if dtype == "float16":
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(f"The teacher's features reach {largest:.4g}, beyond float16; cache them as int8.")
        encoded = {"tokens": tokens.half()}
    else:
        least, most = tokens.amin(dim=1), tokens.amax(dim=1)
        scale, offset = (most - least) / 254, (most + least) / 2
        steps = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
        codes = ((tokens - offset.unsqueeze(1)) / steps).round().clamp(-127, 127)
        encoded = {"tokens": codes.to(torch.int8), "scale": scale, "offset": offset}
    for name in ("cls", "cls_attention"):
        if (value := getattr(features, name)) is not None:
            encoded[name] = value.float()
    return encoded


def decode(encoded: Mapping[str, torch.Tensor], grid: tuple[int, int]) -> TeacherFeatures:
    """The inverse of [`encode`], in float32."""
    tokens = encoded["tokens"].float()
    if "scale" in encoded:
        tokens = tokens * encoded["scale"].unsqueeze(1) + encoded["offset"].unsqueeze(1)
    return TeacherFeatures(tokens, grid, encoded.get("cls"), encoded.get("cls_attention"))


def check_shard(
    path: Path, header: Mapping[str, str], tensors: Mapping[str, Sequence[Any]], images: int
) -> dict[str, str]:
    """
    The header of one shard, once it is what it should be.

    Args:
        header: The entries it must have.
        tensors: By name the dtype and the shape of what is kept of one image.
        images: How many it must hold.

    Raises:
        ValueError: naming the shard, if it is missing, truncated, or of something else.
    """
    if not path.is_file():
        raise ValueError(f"The feature cache lacks the shard {path}. {WAY_OUT}")
    try:
        with safe_open(path, "pt") as file:
            found, names = file.metadata() or {}, set(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names & tensors.keys()}
    except SafetensorError as error:
        raise ValueError(f"The shard {path} is truncated or no safetensors file ({error}). {WAY_OUT}") from error
    if other := [name for name in header if found.get(name) != header[name]]:
        name = other[0]
        raise ValueError(f"The shard {path} is of another {name}: {found.get(name)}, not {header[name]}. {WAY_OUT}")
    needed = {name: [images, *shape] for name, (_, shape) in tensors.items()}
    if shapes != needed:
        raise ValueError(f"The shard {path} holds {shapes}, not {needed}. {WAY_OUT}")
    return found


class ShardLayout:
    """
    Which shard holds which images: those of `rows_per_shard` rows with images each, in the order of the data.

    Args:
        rows: As [`rows_of`] gives them.
        index: Content of `index.json`.
    """

    def __init__(self, rows: Mapping[str, list[Any]], index: Mapping[str, Any]) -> None:
        self.index = index
        self.images: dict[int, list[str]] = dict(zip(rows["row_index"], rows["images"], strict=True))
        with_images = [row for row, images in self.images.items() if images]
        size = index["rows_per_shard"]
        starts = range(0, len(with_images), size)
        self.rows = {f"{number:06d}": with_images[start : start + size] for number, start in enumerate(starts)}
        self.keys = {
            shard: [[row, position] for row in of_shard for position in range(len(self.images[row]))]
            for shard, of_shard in self.rows.items()
        }
        self.keys[BLANK] = [[-1, 0]]
        self.places = {
            (row, position): (shard, place)
            for shard, keys in self.keys.items()
            for place, (row, position) in enumerate(keys)
        }

    @property
    def shards(self) -> list[str]:
        return list(self.keys)

    def path(self, folder: Path, name: str, shard: str) -> Path:
        return folder / name / f"{shard}.safetensors"

    def header(self, name: str, shard: str) -> dict[str, str]:
        """What the header of a shard says of it."""
        fields = {field: self.index[field] for field in ("data", "geometry", "dtype")}
        fields |= {"teacher": self.index["teachers"][name], "rows": self.keys[shard]}
        return {field: json.dumps(value) for field, value in fields.items()}

    def check(self, folder: Path, name: str, shard: str) -> dict[str, str]:
        """As [`check_shard`]."""
        tensors = self.index["teachers"][name]["tensors"] | {"checksums": ["int64", []]}
        return check_shard(self.path(folder, name, shard), self.header(name, shard), tensors, len(self.keys[shard]))
