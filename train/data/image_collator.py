"""Collates rows of images to a batch, and the part of a batch of conversations that concerns images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from modeling_movekd.images import color, decode_image, shared_crop
from train.teachers.cached import FeatureCache
from train.teachers.preprocessing import ResizedImages, TeacherPreprocessor


GEOMETRIES = ("shared", "per_teacher")


@dataclass
class ImageCollator:
    """
    Collates rows of `images` for distillation without a language model. Can be pickled, so that loader workers decode,
    crop and resize.

    Args:
        image_processor: The student's image processor.
        teacher_preprocessors (`Mapping[str, TeacherPreprocessor]`, *optional*): By teacher.
        geometry (`str`, defaults to `"shared"`): As of [`~train.data.collator.MoveKDCollator`].
        apply_orientation (`bool`, defaults to `True`): Turn images as their EXIF orientation says.
        feature_cache (`FeatureCache`, *optional*): Read the teachers' features instead of making their pixels.

    Returns (of a call):
        `pixel_values`: float32 `(num_images, 3, size, size)`. A row that cannot be used has a black image in its
            place, so that all batches have the same shape.
        `teacher_pixel_values`: By teacher, uint8 `(num_images, 3, size, size)`, see [`teacher_pixels`].
        `cached_features`: With a feature cache instead, by teacher the result of `FeatureCache.read`.
        `image_weights`: float32 `(num_images,)`, 0 for the black image of a row that cannot be used, else 1.
        `num_blank_images`: 0.
        `image_rows`: int64 `(num_images,)`, the position in the batch of each image's row.
        `bad_rows`: List of (row, reason) for the rows that cannot be used.
    """

    image_processor: Any
    teacher_preprocessors: Mapping[str, TeacherPreprocessor] = field(default_factory=dict)
    geometry: str = "shared"
    apply_orientation: bool = True
    feature_cache: FeatureCache | None = None

    def __post_init__(self) -> None:
        check_geometry(self.geometry)
        if is_anyres(self.image_processor):
            raise ValueError(
                "The student's image processor cuts tiles (anyres), which distillation without a language model has "
                "no use for. Set `image_aspect_ratio` to 'square' or 'pad'."
            )
        if self.feature_cache is not None:
            self.feature_cache.check_geometry(self.teacher_geometry)

    @property
    def teacher_geometry(self) -> dict[str, Any]:
        """How images are cut for the teachers, see [`crop_facts`]."""
        return crop_facts(self.image_processor, self.geometry, self.apply_orientation)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        decoded, problems = decode_rows(rows, self.apply_orientation)
        images = [image for of_row in decoded for image in of_row or [black_image(self.image_processor)]]
        image_rows = [position for position, of_row in enumerate(decoded) for _ in range(max(1, len(of_row)))]
        batch: dict[str, Any] = {
            "pixel_values": self.image_processor(images, return_tensors="pt")["pixel_values"],
            "image_weights": torch.tensor([float(bool(decoded[position])) for position in image_rows]),
            "num_blank_images": 0,
            "image_rows": torch.tensor(image_rows, dtype=torch.long),
            "bad_rows": named_problems(rows, problems),
        }
        if self.teacher_preprocessors:
            batch["teacher_pixel_values"] = teacher_pixels(
                images, self.teacher_preprocessors, self.image_processor, self.geometry
            )
        if self.feature_cache is not None:
            batch["cached_features"] = self._cached(rows, decoded)
        return batch

    def _cached(
        self, rows: Sequence[Mapping[str, Any]], decoded: list[list[Image.Image]]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """The features of the rows in their order, those of the black image for a row that cannot be used."""
        assert self.feature_cache is not None
        numbers = row_numbers(rows)
        usable = [position for position, of_row in enumerate(decoded) if of_row]
        shown = [(numbers[position], rows[position]["images"]) for position in usable]
        read = self.feature_cache.read(shown, len(rows) - len(usable))
        places = [position for position in usable for _ in decoded[position]]
        places += [position for position, of_row in enumerate(decoded) if not of_row]
        order = torch.tensor(places).argsort(stable=True)
        return {name: {key: value[order] for key, value in tensors.items()} for name, tensors in read.items()}


def check_geometry(geometry: str) -> None:
    if geometry not in GEOMETRIES:
        raise ValueError(f"Unknown geometry {geometry!r}: choose from {GEOMETRIES}.")


def decode_rows(
    rows: Sequence[Mapping[str, Any]], apply_orientation: bool
) -> tuple[list[list[Image.Image]], dict[int, str]]:
    """The images of each row, none for a row that cannot be used, and by position why it cannot."""
    images: list[list[Image.Image]] = []
    problems = {}
    for position, row in enumerate(rows):
        try:
            if row.get("problem") is not None:
                raise ValueError(row["problem"])
            images.append([decode_image(image, apply_orientation) for image in row.get("images") or []])
        except ValueError as error:
            images.append([])
            problems[position] = str(error)
    return images, problems


def row_numbers(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """The `row_index` of each row, or else its position."""
    return [int(row.get("row_index", position)) for position, row in enumerate(rows)]


def named_problems(rows: Sequence[Mapping[str, Any]], problems: Mapping[int, str]) -> list[tuple[str, str]]:
    """Problems by position as pairs of the row's name and the reason."""
    numbers = row_numbers(rows)
    return [
        (rows[position].get("source") or f"row {numbers[position]}", reason) for position, reason in problems.items()
    ]


def is_anyres(image_processor: Any) -> bool:
    return getattr(image_processor, "image_grid_pinpoints", None) is not None


def pads(image_processor: Any) -> bool:
    return bool(getattr(image_processor, "do_pad", False)) and not is_anyres(image_processor)


def black_image(image_processor: Any) -> Image.Image:
    size = image_processor.crop_size or image_processor.size
    return Image.new("RGB", (size["width"], size["height"]))


def crop_facts(image_processor: Any, geometry: str, apply_orientation: bool) -> dict[str, Any]:
    """How images are cut for the teachers, as a feature cache stores and compares it."""
    cuts = getattr(image_processor, "do_center_crop", False) and not is_anyres(image_processor)
    crop = "pad" if pads(image_processor) else "center_square" if cuts else "whole"
    pads_with_mean = crop == "pad" and geometry == "shared"
    return {
        "geometry": geometry,
        "crop": crop,
        "background": [round(value, 6) for value in image_processor.image_mean] if pads_with_mean else None,
        "apply_orientation": apply_orientation,
    }


def teacher_pixels(
    images: Sequence[Image.Image],
    preprocessors: Mapping[str, TeacherPreprocessor],
    image_processor: Any,
    geometry: str,
    tiles: bool = False,
) -> dict[str, ResizedImages]:
    """
    The pixels of each teacher, as bytes: the teacher normalizes them on its device.

    Args:
        images (`Sequence[PIL.Image.Image]`): RGB images.
        preprocessors (`Mapping[str, TeacherPreprocessor]`): By teacher.
        image_processor: The student's image processor.
        geometry (`str`): One of `GEOMETRIES`.
        tiles (`bool`, defaults to `False`): Cut each image for anyres: the whole image, then its tiles row by row.

    Returns:
        By teacher, as [`TeacherPreprocessor.resize`]. Teachers of the same pixels have the same object.
    """
    images, shared, padded = list(images), geometry == "shared", pads(image_processor)
    if shared and preprocessors and not padded:
        images = [shared_crop(image, image_processor) for image in images]
    if tiles:
        grids, size = image_processor.image_grid_pinpoints, image_processor.crop_size["height"]
        images = [crop for image in images for crop in (image, *cut_tiles(image, grids, size))]
    resized: dict[tuple[Any, ...], ResizedImages] = {}
    pixels = {}
    for name, preprocessor in preprocessors.items():
        background = color(image_processor.image_mean if shared else preprocessor.mean) if padded else None
        fit = None if shared or padded else preprocessor.fit
        key = (preprocessor.image_size, preprocessor.interpolation, background, fit)
        if key not in resized:
            resized[key] = preprocessor.resize(images, stretch=fit is None, background=background)
        pixels[name] = resized[key]
    return pixels


def cut_tiles(image: Image.Image, grids: Sequence[Sequence[int]], tile_size: int) -> list[Image.Image]:
    """
    Cut an image into tiles as `LlavaNextImageProcessor` does, but at the image's own resolution.

    Grid, position and black margins are the same. The tiles of a large image keep its pixels; a small image is
    enlarged to the student's tiles.

    Args:
        image (`PIL.Image.Image`): RGB image.
        grids (`Sequence`): `(height, width)` in pixels of the possible grids, `image_grid_pinpoints`.
        tile_size (`int`): Side of a tile in these pixels.

    Returns:
        Square tiles, row by row, without the whole image that `image_size_to_num_patches` counts too.
    """
    height, width = select_best_resolution((image.height, image.width), [list(grid) for grid in grids])
    # transformers reads only the shape
    shape = np.broadcast_to(np.uint8(0), (image.height, image.width, 3))
    new_height, new_width = get_patch_output_size(shape, (height, width), ChannelDimension.LAST)
    shrinking = max(image.height / new_height, image.width / new_width, 1.0)
    side = math.ceil(tile_size * shrinking)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    edges = (left, top, left + new_width, top + new_height)
    left, top, right, bottom = (round(edge * side / tile_size) for edge in edges)
    canvas = Image.new("RGB", (width // tile_size * side, height // tile_size * side))
    resized = image.resize((max(right - left, 1), max(bottom - top, 1)), Image.Resampling.BICUBIC)
    canvas.paste(resized, (left, top))
    corners = [(x, y) for y in range(0, canvas.height, side) for x in range(0, canvas.width, side)]
    return [canvas.crop((x, y, x + side, y + side)) for x, y in corners]
