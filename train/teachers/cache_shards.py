"""The files of a feature cache: how features are encoded, which shard holds which images, and what its header says."""

import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from modeling_movekd.files import save_text
from train.teachers.features import TeacherFeatures


BLANK = "blank"
RUN_AGAIN = (
    "Run `python -m train.feature_cache` with this recipe again: it rewrites missing, damaged and outdated files."
)
# Checksum of an image that could not be decoded
UNREADABLE = -1


def in_current_spelling(text: str) -> str:
    """JSON of a cache, in which former versions wrote `centre_crop` and `centre_square`."""
    return text.replace('"centre_crop"', '"center_crop"').replace('"centre_square"', '"center_square"')


def shard_checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of the bytes of all tensors of a shard, in the order of their names."""
    value = 0
    for name in sorted(tensors):
        content: Any = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content, value)
    return f"{value:08x}"


def encode(features: TeacherFeatures, dtype: str) -> dict[str, torch.Tensor]:
    """
    Encode features for storage.

    Args:
        features (`TeacherFeatures`): Of a batch of images.
        dtype (`str`): `"float16"`, or `"int8"` with 255 steps between the smallest and the largest value of each
            channel of each image.

    Returns:
        `tokens` of shape `(batch_size, h * w, width)`. For int8 also `scale` and `offset`, float32 of shape
        `(batch_size, width)`: a value is `tokens * scale + offset`. `cls`, `cls_attention` and `summary` in float32 if
        the teacher has them; with `cls` there is no `summary`, which is the same.
    """
    tokens = features.tokens.float()
    largest = tokens.abs().max()
    if not largest.isfinite():
        raise ValueError("The features are not finite. Set the teacher's `dtype` to float32.")
    if dtype == "float16":
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(f"The features reach {largest:.4g}, too large for float16. Set `cache_dtype` to int8.")
        encoded = {"tokens": tokens.half()}
    else:
        least, most = tokens.amin(dim=1), tokens.amax(dim=1)
        scale, offset = (most - least) / 254, (most + least) / 2
        steps = torch.where(scale > 0, scale, 1.0).unsqueeze(1)
        codes = ((tokens - offset.unsqueeze(1)) / steps).round().clamp(-127, 127)
        encoded = {"tokens": codes.to(torch.int8), "scale": scale, "offset": offset}
    for name in ("cls", "cls_attention", "summary"):
        if (value := getattr(features, name)) is not None and not (name == "summary" and "cls" in encoded):
            encoded[name] = value.float()
    return encoded


def decode(encoded: Mapping[str, torch.Tensor], grid: tuple[int, int]) -> TeacherFeatures:
    """The inverse of [`encode`], in float32."""
    tokens = encoded["tokens"].float()
    if "scale" in encoded:
        tokens = tokens * encoded["scale"].unsqueeze(1) + encoded["offset"].unsqueeze(1)
    cls = encoded.get("cls")
    return TeacherFeatures(tokens, grid, cls, encoded.get("cls_attention"), encoded.get("summary", cls))


class ShardLayout:
    """
    Which shard holds which images. A shard holds `rows_per_shard` rows that have images, in the order of the data.

    Args:
        folder (`Path`): Folder of the cache.
        rows (`Mapping`): Content of `rows.json`, see [`~train.teachers.cached.rows_of`].
        index (`Mapping`): Content of `index.json`.

    Attributes:
        images: By `row_index`, the names of the row's images.
        rows: By shard, the `row_index` of its rows.
        keys: By shard, `[row_index, number of the image in its row]` of each stored image.
        locations: By `(row_index, number)`, the shard and the position in it.
    """

    def __init__(self, folder: Path, rows: Mapping[str, list[Any]], index: Mapping[str, Any]) -> None:
        self.folder, self.index = folder, index
        self.images: dict[int, list[str]] = dict(zip(rows["row_index"], rows["images"], strict=True))
        with_images = [row for row, images in self.images.items() if images]
        size = index["rows_per_shard"]
        starts = range(0, len(with_images), size)
        self.rows = {f"{number:06d}": with_images[start : start + size] for number, start in enumerate(starts)}
        self.keys = {
            shard: [[row, number] for row in of_shard for number in range(len(self.images[row]))]
            for shard, of_shard in self.rows.items()
        }
        self.keys[BLANK] = [[-1, 0]]
        self.locations = {
            (row, number): (shard, position)
            for shard, keys in self.keys.items()
            for position, (row, number) in enumerate(keys)
        }

    def path(self, teacher: str, shard: str) -> Path:
        return self.folder / teacher / f"{shard}.safetensors"

    def header(self, teacher: str, shard: str) -> dict[str, str]:
        """The metadata of a shard, which says what its features are of."""
        fields = {field: self.index[field] for field in ("data", "geometry", "dtype")}
        fields |= {"teacher": self.index["teachers"][teacher], "rows": self.keys[shard]}
        return {field: json.dumps(value) for field, value in fields.items()}

    def check(self, teacher: str, shard: str) -> dict[str, str]:
        """
        Check a shard without reading its features.

        Returns:
            Its header.

        Raises:
            ValueError: if the shard is missing, truncated or outdated.
        """
        path = self.path(teacher, shard)
        if not path.is_file():
            raise ValueError(f"The feature cache lacks the shard {path}. {RUN_AGAIN}")
        try:
            with safe_open(path, "pt") as file:
                found = file.metadata() or {}
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"The shard {path} is truncated or not a safetensors file ({error}). {RUN_AGAIN}"
            ) from error
        for field, value in self.header(teacher, shard).items():
            if (other := in_current_spelling(found.get(field, "nothing"))) != value:
                raise ValueError(f"The shard {path} is of another {field}: {other}, not {value}. {RUN_AGAIN}")
        tensors = self.index["teachers"][teacher]["tensors"] | {"checksums": ["int64", []]}
        expected = {name: [len(self.keys[shard]), *shape] for name, (_, shape) in tensors.items()}
        if shapes != expected:
            raise ValueError(f"The shard {path} holds {shapes}, not {expected}. {RUN_AGAIN}")
        return found

    def verify(self, teacher: str, shard: str) -> None:
        """
        Compare a shard with the checksum in its header; shards of earlier versions have none.

        Reading a whole shard is slow, so that a file beside the shard notes its size and time of change, for the other
        processes and later runs.

        Raises:
            ValueError: if the shard cannot be read or was changed.
        """
        path = self.path(teacher, shard)
        note = path.with_name(f".{shard}.verified")
        try:
            state = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
            if note.is_file() and note.read_text(encoding="utf-8") == state:
                return
            with safe_open(path, "pt") as file:
                expected = (file.metadata() or {}).get("checksum")
                found = shard_checksum({name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The shard {path} cannot be read ({error}). {RUN_AGAIN}") from error
        if expected not in (None, found):
            raise ValueError(
                f"The shard {path} is damaged: its checksum is {found}, and was {expected} when it was written. "
                f"{RUN_AGAIN}"
            )
        with suppress(OSError):  # a cache may be read-only
            save_text(state, note)
