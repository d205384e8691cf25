"""The images of a row: those that its fields name, and each as a row of its own where no text is needed."""

import zlib
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from modeling_movekd.images import path_in_folder
from train.data.json_rows import parse_line


IMAGE_FIELDS = ("image", "images")
# The columns of a conversation without its text
IMAGE_FEATURES = Features(
    {
        "images": List(Image(decode=False)),
        "row_index": Value("int64"),
        "source": Value("string"),
        "problem": Value("string"),
    }
)


class BadRow(Exception):
    """The row cannot be used; the message is the reason."""


def convert_images(
    row: Any, index: int, folder: str | None = None, name: str = "", offset: int = 0, sharded: bool = False
) -> list[dict[str, Any]]:
    """
    Convert a row to one row of `IMAGE_FEATURES` for each of its images; none for a row without an image.

    The arguments are those of [`~train.data.conversations.convert_row`]. The `row_index` is that of the row, whatever
    the number of its images.
    """
    source, problem = f"{name} row {index}".strip(), None
    row, images = parsed(row), list[Any]()
    try:
        check_row(row)
        images = images_of_row(row, source, folder)
    except BadRow as reason:
        problem = str(reason)
    common = {"row_index": offset + index, "problem": problem}
    shard = " of its shard" if sharded else ""
    if problem is not None:
        return [common | {"images": [], "source": source + shard}]
    converted = []
    for number, image in enumerate(images):
        each = f"{source} image {number}" if len(images) > 1 else source
        each += f"{shard} ({_checksum(image)})" if sharded else ""
        converted.append(common | {"images": [image], "source": each})
    return converted


def convert_image_batch(
    batch: Mapping[str, list[Any]], indices: list[int], version: int | None = None, **kwargs: Any
) -> dict[str, list[Any]]:
    """[`convert_images`] for `Dataset.map(batched=True)`. The `version` of this code is for its cache alone."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    converted = [
        image for row, index in zip(rows, indices, strict=True) for image in convert_images(row, index, **kwargs)
    ]
    return {column: [row[column] for row in converted] for column in IMAGE_FEATURES}


def only_images(rows: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """
    Drop all columns but `image` and `images`, or else the only column of type `Image`, which becomes `image`.

    Raises:
        ValueError: if it is not clear where the images are.
    """
    columns = rows.column_names or list(next(iter(rows), {}))
    if kept := [column for column in columns if column in IMAGE_FIELDS] or (["line"] if columns == ["line"] else []):
        return rows.select_columns(kept)
    found = [column for column, feature in (rows.features or {}).items() if _holds_images(feature)]
    if len(found) != 1:
        raise ValueError(
            f"{name or 'The data set'} has the columns {columns}, of which {found or 'none'} hold images. Rename the "
            "column to train on to 'image'."
        )
    return rows.select_columns(found).rename_column(found[0], "image")


def _holds_images(feature: Any) -> bool:
    return isinstance(feature, Image) or (isinstance(feature, List) and isinstance(feature.feature, Image))


def _checksum(image: Any) -> str:
    content = image.tobytes() if isinstance(image, PILImage.Image) else image["bytes"] or image["path"].encode()
    return f"checksum {zlib.crc32(content):08x}"


def parsed(row: Any) -> Any:
    """The row of a line of JSON Lines, as a stream gives it, or the `ValueError` that says why it has none."""
    if isinstance(row, Mapping) and set(row) == {"line"} and isinstance(row["line"], bytes):
        return parse_line(row["line"])
    return row


def check_row(row: Any) -> None:
    """Raise a `BadRow` if there is no row to convert."""
    if isinstance(row, ValueError):
        raise BadRow(str(row))
    if not isinstance(row, Mapping):
        raise BadRow(f"expected a mapping, got {type(row).__name__}")


def images_of_row(row: Mapping[str, Any], source: str, folder: str | None) -> list[Any]:
    """
    The images that `image` or `images` of a row name, undecoded.

    Raises:
        BadRow: if one of them is no image.
        ValueError: if a path leads out of the folder, or is relative and there is no folder.
    """
    field = "image" if row.get("image") is not None else "images"
    images = row.get(field)
    if images is None:
        return []
    images = list(images) if isinstance(images, list | tuple) else [images]
    return [_image(image, f"{field!r}[{number}]", source, folder) for number, image in enumerate(images)]


def _image(image: Any, field: str, source: str, folder: str | None) -> Any:
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            # datasets would prefer a file with the name of `path` to the bytes
            return {"bytes": image["bytes"], "path": None}
        if not image.get("path"):
            raise BadRow(f"{field} is an image with neither bytes nor path")
        image = image["path"]
    if image == "":
        raise BadRow(f"{field} is an empty image path")
    if isinstance(image, str):
        check_text(image, field)
        if folder is None:
            raise ValueError(f"{_capital(source)} names the image file {image!r}: give the image_folder it lies in.")
        try:
            return {"bytes": None, "path": path_in_folder(folder, image)}
        except ValueError as error:
            raise ValueError(f"{_capital(source)}: {error}.") from None
    if isinstance(image, PILImage.Image):
        return image
    raise BadRow(f"{field} is an image of type {type(image).__name__}, expected a path, a picture or a mapping")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if text.startswith("row ") else text


def check_text(text: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{field} holds half a character ({text[error.start]!r})") from None
