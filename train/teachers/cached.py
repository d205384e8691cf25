"""Teachers' features on disk: the format, and reading them back by row in place of running the teachers.

A folder holds `index.json` (what the features are of), `rows.json` (the rows and the names of their images), and of
each teacher `{teacher}/{shard}.safetensors` with the features of the images of some rows, and one shard, `blank`, of a
black image. Every shard says in its header what it belongs to. [`train.feature_cache`] writes it all.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import nn

from train.teachers.cache_shards import BLANK, UNREADABLE, WAY_OUT, ShardLayout, decode
from train.teachers.config import TeacherConfig, teacher_commit
from train.teachers.features import FrozenTeacher, TeacherFeatures


if TYPE_CHECKING:
    from train.data.collator import MoveKDCollator

INDEX_NAME, ROWS_NAME = "index.json", "rows.json"
# What a header and the index agree on; a field of a teacher's own comes from its configuration and its preprocessor
TEACHER_FIELDS = ("model", "loader", "file", "revision", "output", "layout", "dtype")
PIXEL_FIELDS = ("image_size", "mean", "std", "interpolation", "fit")
# Integers of the same bits: Trainer casts floating-point inputs to bfloat16 under DeepSpeed
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.int8: torch.int8}


def image_bytes(image: Mapping[str, Any]) -> bytes:
    """The file of one image of a row, undecoded."""
    return image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()


def rows_of(*datasets: Dataset) -> dict[str, list[Any]]:
    """
    Which images the rows have, without reading any: `row_index`, and `images`, for each row a list of names. A name is
    the end of the path, folder and file, so that an image folder may move; of an image inside the data, its length.

    Raises:
        ValueError: if the data is a stream, or a `row_index` stands for two rows with different images.
    """
    rows: dict[int, list[str]] = {}
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"A feature cache needs data of known rows, not a stream ({type(dataset).__name__}). Set `streaming: "
                "false`, or leave out `feature_cache` and run the teachers."
            )
        # From the table below the data set: taking the rows in use out of it would copy their images
        images: list[list[str]] = []
        for chunk in dataset.data.column("images").chunks:
            flat = pc.list_flatten(chunk)
            lengths = pc.binary_length(pc.struct_field(flat, "bytes")).to_pylist()
            paths = pc.struct_field(flat, "path").to_pylist()
            names = iter(
                "/".join(path.rsplit(os.sep, 2)[-2:]) if length is None else f"{length} bytes"
                for length, path in zip(lengths, paths, strict=True)
            )
            counts = pc.list_value_length(chunk).to_pylist()
            images += [[next(names) for _ in range(count or 0)] for count in counts]
        stored = dict(zip(dataset.data.column("row_index").to_pylist(), images, strict=True))
        for row in dataset["row_index"][:]:
            if rows.setdefault(row, stored[row]) != stored[row]:
                raise ValueError(
                    f"`row_index` {row} of the data stands for a row with the images {rows[row]} and for another with "
                    f"{stored[row]}; a feature cache needs rows told apart by it."
                )
    return {"row_index": list(rows), "images": list(rows.values())}


def geometry_of(collator: "MoveKDCollator") -> dict[str, Any]:
    """How the collator cuts the images for the teachers."""
    image_processor = collator.processor.image_processor
    anyres = getattr(image_processor, "image_grid_pinpoints", None) is not None
    crop = "whole" if anyres else "pad" if image_processor.do_pad else "centre_square"
    pads_in_own_colour = crop == "pad" and collator.geometry == "shared"
    return {
        "geometry": collator.geometry,
        "crop": crop,
        "background": [round(value, 6) for value in image_processor.image_mean] if pads_in_own_colour else None,
        "apply_orientation": collator.apply_orientation,
    }


def teacher_facts(config: TeacherConfig) -> dict[str, Any]:
    """What the recipe says of a teacher's features; `None` where it leaves it to the model's own files."""
    facts = {field: getattr(config, field, None) for field in (*TEACHER_FIELDS, *PIXEL_FIELDS)}
    return json.loads(json.dumps(facts | {"weights": _weights(config)}))


def live_facts(teacher: FrozenTeacher) -> dict[str, Any]:
    """
    As [`teacher_facts`], with what the loaded teacher read from its files, and the `commit` these are of, if known;
    `asked` holds what the recipe said.
    """
    asked = teacher_facts(teacher.config)
    pixels = json.loads(json.dumps(dataclasses.asdict(teacher.preprocessor)))
    return {
        **asked,
        **pixels,
        "commit": teacher_commit(teacher.config),
        "grid": list(teacher.grid),
        "width": teacher.width,
        "asked": asked,
    }


def _weights(config: TeacherConfig) -> str | None:
    """A hash over the ends of a local teacher's files; `None` for one on the Hub, which has a revision."""
    path = Path(config.model.removeprefix("local-dir:"))
    suffixes = (".json", ".safetensors", ".bin", ".pth", ".pt")
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes) if path.is_dir() else [path]
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            digest.update(content.read(1 << 20))
            content.seek(max(size - (1 << 20), 0))
            digest.update(content.read())
    return digest.hexdigest()[:16]


def check_same(what: str, cached: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: naming the first field in which they differ, and both values.
    """
    for field in (*needed, *(field for field in cached if field not in needed)):
        if cached.get(field) != needed.get(field):
            raise ValueError(
                f"{what}: `{field}` is {cached.get(field)!r} in the cache, {needed.get(field)!r} in this run. Use the "
                "recipe that the cache was made with, or make another in a new folder."
            )


class CachedTeacher(nn.Module):
    """
    Stands where a [`~train.teachers.features.FrozenTeacher`] would, without its weights.

    Attributes: `name`, `config`, `grid` `(h, w)`, `width` (channels), `cache`.
    """

    def __init__(self, config: TeacherConfig, cache: "FeatureCache") -> None:
        super().__init__()
        facts = cache.index["teachers"][config.name]
        self.name, self.config, self.cache = config.name, config, cache
        self.grid: tuple[int, int] = (facts["grid"][0], facts["grid"][1])
        self.width: int = facts["width"]
        self._dtypes = {name: getattr(torch, dtype) for name, (dtype, _) in facts["tensors"].items()}

    def forward(self, cached: Mapping[str, torch.Tensor]) -> TeacherFeatures:
        """
        Args:
            cached: What [`FeatureCache.read`] gave for this teacher, on any device.
        """
        return decode({name: value.view(self._dtypes[name]) for name, value in cached.items()}, self.grid)


Teacher = FrozenTeacher | CachedTeacher


class FeatureCache:
    """
    Reads a folder that [`train.feature_cache`] wrote; picklable, holds no file open.

    Args:
        folder: Where it is.
        teachers: Those whose features are needed, as the recipe has them.

    Raises:
        ValueError: if there is no cache, it lacks a teacher or a shard, a shard is truncated, or a teacher or its
            preprocessing is another than the recipe's; naming what differs and both values.
    """

    def __init__(self, folder: str | Path, teachers: Sequence[TeacherConfig]) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX_NAME).is_file():
            raise ValueError(f"`feature_cache` {folder} has no {INDEX_NAME}. {WAY_OUT}")
        self.index = json.loads((self.folder / INDEX_NAME).read_text(encoding="utf-8"))
        for config in teachers:
            if config.name not in self.index["teachers"]:
                raise ValueError(
                    f"`feature_cache` {folder} has the teachers {list(self.index['teachers'])}, this run needs "
                    f"{config.name}. {WAY_OUT}"
                )
            self._check_teacher(config)
        self.names = [config.name for config in teachers]
        layout = ShardLayout(json.loads((self.folder / ROWS_NAME).read_text(encoding="utf-8")), self.index)
        self.layout = layout
        for name in self.names:
            for shard in layout.shards:
                layout.check(self.folder, name, shard)

    @property
    def facts(self) -> dict[str, Any]:
        """
        What a model card needs to say about it: `dtype`, and by teacher the `model`, the `revision` asked for, the
        `commit` that was read, and the errors measured over the data, `relative_error` and `largest_error`.
        """
        teachers = {}
        for name in self.names:
            teacher, errors = self.index["teachers"][name], self.index.get("errors", {}).get(name, {})
            known = {field: teacher.get(field) for field in ("model", "revision", "commit")}
            teachers[name] = known | {field: errors.get(field) for field in ("relative_error", "largest_error")}
        return {"dtype": self.index["dtype"], "teachers": teachers}

    def _check_teacher(self, config: TeacherConfig) -> None:
        cached, needed = self.index["teachers"][config.name], teacher_facts(config)
        if needed["weights"] is None:  # on the Hub, or not on this machine
            needed["weights"] = cached["weights"]
        for field, value in needed.items():
            # What the recipe leaves to the model's files must have been left to them then too
            if value != cached["asked"][field] and (value is None or value != cached[field]):
                check_same(f"Teacher {config.name}", {field: cached[field]}, {field: value})

    def check_geometry(self, collator: "MoveKDCollator") -> None:
        """
        Raises:
            ValueError: if the collator cuts images in another way than for the cache, naming the field.
        """
        check_same(f"`feature_cache` {self.folder}", self.index["geometry"], geometry_of(collator))

    def check_data(self, dataset: Dataset) -> None:
        """
        Every row of the data is in the cache, with the same images; it may hold more, and in another order.

        Raises:
            ValueError: naming the first row that is not, and both values.
        """
        rows = rows_of(dataset)
        for row, images in zip(rows["row_index"], rows["images"], strict=True):
            cached = self.layout.images.get(row)
            if cached != images:
                raise ValueError(
                    f"`feature_cache` {self.folder} does not belong to this data: row {row} has the images {cached} "
                    f"in the cache of {len(self.layout.images)} rows, {images} in the data of {len(rows['images'])}. "
                    "Make a cache of this data in a new folder."
                )

    def read(
        self, rows: Sequence[tuple[int, Sequence[Any]]], num_blank_images: int
    ) -> dict[str, dict[str, torch.Tensor]]:
        """
        Features of the images of a batch.

        Args:
            rows: Of each row the `row_index` and the undecoded images.
            num_blank_images: How many black images follow after those.

        Returns:
            By teacher, what [`~train.teachers.cache_shards.encode`] made, one entry per image, floats as
            integers of the same bits.

        Raises:
            ValueError: if a row is not in the cache, or its images are others than those the features are of.
        """
        places: list[tuple[str, int, int | None]] = []
        for row, images in rows:
            if len(images) != len(self.layout.images.get(row, ())):
                raise ValueError(
                    f"Row {row} has {len(images)} images, {len(self.layout.images.get(row, ()))} in the feature cache "
                    f"{self.folder}: it does not belong to this data."
                )
            for position, image in enumerate(images):
                places.append((*self.layout.places[row, position], zlib.crc32(image_bytes(image))))
        places += [(BLANK, 0, None)] * num_blank_images
        return {name: self._read(name, places) for name in self.names}

    def _read(self, name: str, places: Sequence[tuple[str, int, int | None]]) -> dict[str, torch.Tensor]:
        tensors = self.index["teachers"][name]["tensors"]
        read: dict[str, list[torch.Tensor]] = {tensor: [] for tensor in tensors}
        for shard, position, checksum in places:
            path = self.layout.path(self.folder, name, shard)
            try:
                with safe_open(path, "pt") as file:
                    cached = int(file.get_slice("checksums")[position])
                    for tensor in tensors:
                        read[tensor].append(file.get_slice(tensor)[position])
            except (SafetensorError, OSError) as error:
                raise ValueError(f"The shard {path} cannot be read ({error}). {WAY_OUT}") from error
            if cached == UNREADABLE:
                raise ValueError(
                    f"Image {position} of the shard {path} could not be decoded when the cache was made. Delete the "
                    "shard and run `python -m train.feature_cache` again."
                )
            if checksum is not None and checksum != cached:
                raise ValueError(
                    f"Image {position} of the shard {path} has the checksum {cached}, the data's image of that name "
                    f"{checksum}: the features are of another image. Make a cache of this data in a new folder."
                )
        stacked = {tensor: torch.stack(values) for tensor, values in read.items()}
        return {tensor: value.view(_BITS[value.dtype]) for tensor, value in stacked.items()}
