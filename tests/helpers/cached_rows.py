"""Rows with any number of images, and a cache of their teachers' features."""

from typing import Any

from tests.helpers.colored_rows import llava_rows
from train.cache_writer import CacheArguments, cache_features


TEXT_ONLY = (0, 1, 2, 3, 5, 11, 12, 13, 14, 15)


def mixed_rows() -> list[dict[str, Any]]:
    """24 rows, of which ten are text alone, one has two images and one has three."""
    rows = llava_rows(24, text_only=TEXT_ONLY)
    for row in rows:
        row["image"] = [row["image"]] if row["image"] is not None else None
    for index, others in ((4, [6]), (10, [8, 9])):
        rows[index]["image"] = [*rows[index]["image"], *(rows[other]["image"][0] for other in others)]
        marks = "<image>\n" * len(rows[index]["image"])
        rows[index]["conversations"][0]["value"] = f"{marks}What colour are they?"
    return rows


def write(cached: tuple[Any, ...], cache_dtype: str = "float16", rows_per_shard: int = 5) -> dict[str, Any]:
    return cache_features(*cached, CacheArguments(cache_dtype, rows_per_shard))
