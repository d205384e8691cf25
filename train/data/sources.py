"""Reads rows from a file, a folder or the Hub, without converting them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value, load_dataset, load_from_disk
from PIL import Image as PILImage

from modeling_movekd.images import FORMATS


# Names of splits as `datasets` knows them, and files that only `datasets` reads
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
PACKED = (".parquet", ".arrow", ".tar", ".zip")


def open_rows(source: Any, split: str, subset: str | None, streaming: bool) -> Any:
    """
    Open a source as a list, a `Dataset`, or, with `streaming`, an `IterableDataset` if the format allows it. A JSON
    file, and without `streaming` a JSON Lines file, is returned as its path.
    """
    if not isinstance(source, str | os.PathLike):
        rows = source if isinstance(source, Dataset) else list(source)
        _only_train("The data set", split)
        return rows.to_iterable_dataset() if streaming and isinstance(rows, Dataset) else rows
    path = Path(source)
    if path.is_file():
        _only_train(path, split)
    if path.suffix == ".jsonl" and path.is_file() and streaming:
        lines = Features({"line": Value("binary")})
        return IterableDataset.from_generator(_read_line_texts, lines, {"path": str(path)})
    if path.suffix in (".json", ".jsonl") and path.is_file():
        return path
    if path.suffix == ".parquet" and path.is_file():
        return load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
    if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
        saved = load_from_disk(str(path))
        if isinstance(saved, Dataset):
            _only_train(path, split)
        elif split not in saved:
            raise ValueError(f"{path} has the splits {list(saved)}, not {split!r}.")
        rows = saved if isinstance(saved, Dataset) else saved[split]
        return rows.to_iterable_dataset() if streaming else rows
    if path.exists() and not path.is_dir():
        raise ValueError(f"Cannot read {path}: expected .json, .jsonl or .parquet, a folder, or a data set id.")
    if path.suffix in (".json", ".jsonl", ".parquet"):
        raise ValueError(f"There is no file {path}.")
    return load_dataset(str(source), subset, split=split, streaming=streaming)


def open_image_folder(folder: str | os.PathLike, split: str) -> Dataset | None:
    """
    The image files in a folder and all folders in it, by path; `None` if the folder holds files of a data set.

    Folders named like a split, with no other beside them, are splits; other names do not matter. `datasets` itself
    needs minutes where this needs seconds.

    Raises:
        ValueError: if there is no image, or no such split.
    """
    root = Path(folder)
    if (root / "state.json").is_file() or (root / "dataset_dict.json").is_file():
        return None
    splits = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    if splits and set(splits) <= set(SPLITS):
        if split not in splits:
            raise ValueError(f"{root} has the splits {splits}, not {split!r}.")
        root /= split
    PILImage.init()
    suffixes = tuple(suffix for suffix, form in PILImage.registered_extensions().items() if form in FORMATS)
    paths: list[str] = []
    seen: set[str] = set()
    others = 0
    for place, folders, files in os.walk(os.path.abspath(root), followlinks=True):
        # A link may lead back to a folder above
        is_new = (real := os.path.realpath(place)) not in seen
        seen.add(real)
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        names = sorted(name for name in files if is_new and not name.startswith("."))
        if any(name.lower().endswith(PACKED) for name in names):
            return None
        found = [os.path.join(place, name) for name in names if name.lower().endswith(suffixes)]
        others += len(names) - len(found)
        paths += found
    if not paths:
        raise ValueError(f"{root} has no image among {others} files. Images end with one of {', '.join(suffixes)}.")
    if root == Path(folder):
        _only_train(folder, split)
    return Dataset.from_dict({"image": paths})


def _only_train(source: Any, split: str) -> None:
    if split != "train":
        raise ValueError(
            f"{source} has no splits, so no {split!r}. To evaluate on a part of its rows, set validation_share."
        )


def _read_line_texts(path: str) -> Iterator[dict[str, bytes]]:
    with open(path, "rb") as lines:
        for line in lines:
            if line.strip():
                yield {"line": line.strip()}


def undecoded_images(dataset: Dataset) -> Dataset:
    """Keep the images in all columns undecoded, as bytes or path."""

    def undecoded(feature: Any) -> Any:
        if isinstance(feature, Image):
            return Image(decode=False)
        return List(undecoded(feature.feature)) if isinstance(feature, List) else feature

    for name, feature in dataset.features.items():
        if undecoded(feature) != feature:
            dataset = dataset.cast_column(name, undecoded(feature))
    return dataset
