"""
Teachers' features on disk, read back by row instead of running the teachers.

A cache folder holds:
- `index.json`: the teachers, the data and the geometry that the features are of;
- `rows.json`: the rows and the names of their images;
- `{teacher}/{shard}.safetensors`: the features of the images of some rows, and a `blank` shard of one black image.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import nn

from modeling_movekd.files import read_json
from train.teachers.cache_shards import BLANK, RUN_AGAIN, UNREADABLE, ShardLayout, decode, in_current_spelling
from train.teachers.config import TeacherConfig, teacher_commit
from train.teachers.features import FrozenTeacher, TeacherFeatures


INDEX_NAME, ROWS_NAME = "index.json", "rows.json"
INDEX_FIELDS = ("data", "geometry", "dtype", "rows_per_shard", "teachers")
# A recipe sets these fields of a teacher, or leaves them to the model's files
TEACHER_FIELDS = (
    *("model", "loader", "file", "revision", "output", "layout", "dtype"),
    *("image_size", "mean", "std", "interpolation", "fit"),
)
# Batches carry floats as integers of the same bits, since Trainer casts float inputs to bfloat16 under DeepSpeed
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.int8: torch.int8}


def image_bytes(image: Mapping[str, Any]) -> bytes:
    """The undecoded file of an image of a row."""
    return image["bytes"] if image.get("bytes") is not None else Path(image["path"]).read_bytes()


def rows_of(*datasets: Dataset) -> dict[str, list[Any]]:
    """
    Name the images of all rows, without opening any.

    Returns:
        `row_index`, and `images` with a list of names for each row. The name of an image file is its folder and file
        name, so that the image folder may move; the name of an embedded image is its size in bytes.
    """
    rows: dict[int, list[str]] = {}
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "A feature cache needs a data set of known length, not a stream. Set `streaming: false`, or leave out "
                "`feature_cache` and run the teachers."
            )
        # Read the underlying table, since selecting the rows in use would copy their images
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
                    f"Two rows have the `row_index` {row}, one with the images {rows[row]}, one with {stored[row]}. A "
                    "feature cache needs a `row_index` of its own for each row."
                )
    return {"row_index": list(rows), "images": list(rows.values())}


def requested_teacher(config: TeacherConfig) -> dict[str, Any]:
    """The fields that decide a teacher's features, as the recipe sets them; `None` if left to the model's files."""
    fields = {field: getattr(config, field, None) for field in TEACHER_FIELDS}
    return json.loads(json.dumps(fields | {"weights": _weights_hash(config)}))


def read_index(folder: Path) -> dict[str, Any]:
    """
    Read `index.json`.

    Raises:
        ValueError: if the file is broken.
    """
    index = _read(folder / INDEX_NAME)
    if missing := [name for name in INDEX_FIELDS if name not in index]:
        raise ValueError(f"{folder / INDEX_NAME} is broken: it lacks {missing}. {RUN_AGAIN}")
    return json.loads(in_current_spelling(json.dumps(index)))


def read_rows(folder: Path, index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """
    Read `rows.json`.

    Raises:
        ValueError: if the file is broken, or not the one that `index.json` was written with.
    """
    rows = _read(folder / ROWS_NAME)
    if (found := fingerprint(rows)) != (expected := index["data"]["fingerprint"]):
        raise ValueError(
            f"{folder / ROWS_NAME} is broken: its fingerprint is {found}, not {expected} as in {INDEX_NAME}. "
            f"{RUN_AGAIN}"
        )
    return rows


def fingerprint(rows: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is broken ({error}). {RUN_AGAIN}") from error


def loaded_teacher(teacher: FrozenTeacher) -> dict[str, Any]:
    """
    The entry of a teacher in `index.json`: as [`requested_teacher`], completed from the loaded teacher. `asked` keeps
    the fields as requested, `commit` is the commit on the Hub if the local cache knows it.
    """
    asked = requested_teacher(teacher.config)
    pixels = json.loads(json.dumps(dataclasses.asdict(teacher.preprocessor)))
    return {
        **asked,
        **pixels,
        "commit": teacher_commit(teacher.config),
        "grid": list(teacher.grid),
        "width": teacher.width,
        "summary_width": teacher.summary_width,
        "asked": asked,
    }


def _weights_hash(config: TeacherConfig) -> str | None:
    """A hash over both ends of each file of a local teacher; `None` for a teacher on the Hub, which has a revision."""
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
    """Raise a `ValueError` on the first field that differs."""
    for field in (*needed, *(field for field in cached if field not in needed)):
        if cached.get(field) != needed.get(field):
            raise ValueError(
                f"{what}: `{field}` is {cached.get(field)!r} in the cache, {needed.get(field)!r} in this run. Use the "
                "recipe of the cache, or write a new cache to another folder."
            )


class CachedTeacher(nn.Module):
    """
    Replaces a [`~train.teachers.features.FrozenTeacher`], with features from a cache instead of weights.

    Args:
        config (`TeacherConfig`): The teacher.
        cache (`FeatureCache`): The cache with its features.
    """

    def __init__(self, config: TeacherConfig, cache: "FeatureCache") -> None:
        super().__init__()
        entry = cache.index["teachers"][config.name]
        self.name, self.config, self.cache = config.name, config, cache
        self.grid: tuple[int, int] = (entry["grid"][0], entry["grid"][1])
        self.width: int = entry["width"]
        self.summary_width: int | None = entry.get("summary_width")
        self._dtypes = {name: getattr(torch, dtype) for name, (dtype, _) in entry["tensors"].items()}

    def forward(self, cached: Mapping[str, torch.Tensor]) -> TeacherFeatures:
        """Decode the entry of this teacher in the result of [`FeatureCache.read`]."""
        return decode({name: value.view(self._dtypes[name]) for name, value in cached.items()}, self.grid)


Teacher = FrozenTeacher | CachedTeacher


class FeatureCache:
    """
    Reads the folder that `python -m train.feature_cache` wrote. Can be pickled, since no file stays open.

    Args:
        folder (`str` or `Path`): Folder of the cache.
        teachers (`Sequence[TeacherConfig]`): The teachers of the recipe.

    Raises:
        ValueError: if the cache lacks a teacher or a shard, or was written for other teachers or preprocessing.
    """

    def __init__(self, folder: str | Path, teachers: Sequence[TeacherConfig]) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX_NAME).is_file():
            raise ValueError(f"`feature_cache` {folder} has no {INDEX_NAME}. {RUN_AGAIN}")
        self.index = read_index(self.folder)
        self.names = [config.name for config in teachers]
        for config in teachers:
            if config.name not in self.index["teachers"]:
                raise ValueError(
                    f"`feature_cache` {folder} has the teachers {list(self.index['teachers'])}, this run needs "
                    f"{config.name}. {RUN_AGAIN}"
                )
            self._check_teacher(config)
        self.layout = ShardLayout(self.folder, read_rows(self.folder, self.index), self.index)
        self._verified: set[tuple[str, str]] = set()
        for name in self.names:
            for shard in self.layout.keys:
                self.layout.check(name, shard)

    @property
    def facts(self) -> dict[str, Any]:
        """
        The entries of a model card: `dtype`, and for each teacher `model`, `revision` as requested, `commit`, and the
        `relative_error` and `largest_error` measured over the data.
        """
        teachers = {}
        for name in self.names:
            entry = self.index["teachers"][name] | self.index.get("errors", {}).get(name, {})
            fields = ("model", "revision", "commit", "relative_error", "largest_error")
            teachers[name] = {field: entry.get(field) for field in fields}
        return {"dtype": self.index["dtype"], "teachers": teachers}

    def _check_teacher(self, config: TeacherConfig) -> None:
        cached, needed = self.index["teachers"][config.name], requested_teacher(config)
        if needed["weights"] is None:  # the teacher is on the Hub, or not on this machine
            needed["weights"] = cached["weights"]
        for field, value in needed.items():
            # A field left to the model's files must have been left to them when the cache was written
            if value != cached["asked"][field] and (value is None or value != cached[field]):
                check_same(f"Teacher {config.name}", {field: cached[field]}, {field: value})

    def check_summaries(self) -> None:
        """Check that the cache was written by a version that stores summaries, for `summary_heads`."""
        if old := [name for name in self.names if "summary_width" not in self.index["teachers"][name]]:
            raise ValueError(
                f"`summary_heads` is true, but `feature_cache` {self.folder} is of an earlier version, which stored "
                f"no summaries of {old}. Write a new cache to another folder, or set `summary_heads: false`."
            )

    def check_geometry(self, geometry: Mapping[str, Any]) -> None:
        """Check that images are cut as for the cache; `geometry` is the collator's `teacher_geometry`."""
        check_same(f"`feature_cache` {self.folder}", self.index["geometry"], geometry)

    def check_data(self, dataset: Dataset) -> None:
        """Check that the cache has every row of the data set, with the same images. The order may differ."""
        rows = rows_of(dataset)
        for row, images in zip(rows["row_index"], rows["images"], strict=True):
            cached = self.layout.images.get(row)
            if cached != images:
                raise ValueError(
                    f"`feature_cache` {self.folder} does not belong to this data: row {row} has the images {cached} "
                    f"in the cache of {len(self.layout.images)} rows, {images} in the data of {len(rows['images'])}. "
                    "Write a cache of this data to a new folder."
                )

    def read(
        self, rows: Sequence[tuple[int, Sequence[Any]]], num_blank_images: int
    ) -> dict[str, dict[str, torch.Tensor]]:
        """
        Read the features of the images of a batch.

        Args:
            rows (`Sequence`): `row_index` and undecoded images of each row.
            num_blank_images (`int`): Number of black images that follow.

        Returns:
            By teacher, the tensors of [`~train.teachers.cache_shards.encode`], floats as integers of the same bits.

        Raises:
            ValueError: if the cache lacks a row, or its features are of other images.
        """
        locations: list[tuple[str, int, int | None]] = []
        for row, images in rows:
            cached = len(self.layout.images.get(row, ()))
            if len(images) != cached:
                raise ValueError(
                    f"Row {row} has {len(images)} images, and {cached} in the feature cache {self.folder}. Write a "
                    "cache of this data to a new folder."
                )
            for number, image in enumerate(images):
                locations.append((*self.layout.locations[row, number], zlib.crc32(image_bytes(image))))
        locations += [(BLANK, 0, None)] * num_blank_images
        return {name: self._read(name, locations) for name in self.names}

    def _read(self, teacher: str, locations: Sequence[tuple[str, int, int | None]]) -> dict[str, torch.Tensor]:
        read: dict[str, list[torch.Tensor]] = {name: [] for name in self.index["teachers"][teacher]["tensors"]}
        for shard, position, checksum in locations:
            if (teacher, shard) not in self._verified:
                self.layout.verify(teacher, shard)
                self._verified.add((teacher, shard))
            path = self.layout.path(teacher, shard)
            try:
                with safe_open(path, "pt") as file:
                    cached = int(file.get_slice("checksums")[position])
                    for name, values in read.items():
                        values.append(file.get_slice(name)[position])
            except (SafetensorError, OSError) as error:
                raise ValueError(f"The shard {path} cannot be read ({error}). {RUN_AGAIN}") from error
            if cached == UNREADABLE:
                raise ValueError(
                    f"Image {position} of the shard {path} could not be decoded when the cache was written. Delete "
                    "the shard and run `python -m train.feature_cache` again."
                )
            if checksum is not None and checksum != cached:
                raise ValueError(
                    f"Image {position} of the shard {path} has the checksum {cached}, the image of this name in the "
                    f"data {checksum}: the features are of another image. Write a cache of this data to a new folder."
                )
        stacked = {name: torch.stack(values) for name, values in read.items()}
        return {name: value.view(_BITS[value.dtype]) for name, value in stacked.items()}
