"""Decode and crop images from a data set or a visitor, which may be broken or malicious."""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps


# Formats of photographs. Pillow reads many more, and starts other programs for some (Ghostscript for EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Longest side of an image in pixels. A square of this side takes 270 MB, and from there on Pillow warns of a
# decompression bomb.
MAX_SIDE = 9459


class _Unusable(Exception):
    """An image is refused before it is decoded. The message is the reason."""


def decode_image(image: Any, apply_orientation: bool = True, max_side: int = MAX_SIDE) -> PILImage.Image:
    """
    Decode an image as RGB.

    Gray images get three equal channels, and 16-bit images keep their upper 8 bits. As in the original code, a
    transparent pixel shows the color stored under it, and an animation shows its first frame.

    Args:
        image (`PIL.Image.Image`, `str`, `os.PathLike` or `Mapping`): An image, a path, or a mapping with `bytes` or
            `path`.
        apply_orientation (`bool`, *optional*, defaults to `True`): Whether to rotate the image as its EXIF orientation
            says, as transformers' `load_image` does. The original code trains on the pixels as stored.
        max_side (`int`, *optional*, defaults to `MAX_SIDE`): Longest side in pixels. Larger images are refused before
            they are decoded.

    Raises:
        ValueError: If the image is missing, broken, too large, in another format than `FORMATS`, or has values without
            a known range (32-bit integers and floats).
    """
    if isinstance(image, Mapping):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    name = f"{image}: " if isinstance(image, str | os.PathLike) else ""
    try:
        if isinstance(image, PILImage.Image):
            return _rgb(image, apply_orientation, max_side)
        if name and not os.path.isfile(image):
            raise _Unusable("no such file")
        if (os.path.getsize(image) if name else image.getbuffer().nbytes) == 0:
            raise _Unusable("an image of 0 bytes")
        with warnings.catch_warnings():
            # `_rgb` checks the size before a pixel is decoded.
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
            with PILImage.open(image, formats=_readable_formats()) as opened:
                return _rgb(opened, apply_orientation, max_side)
    except _Unusable as error:
        raise ValueError(f"{name}{error}") from None
    except PILImage.UnidentifiedImageError as error:
        raise ValueError(f"{name}not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:
        # Pillow raises nearly any exception for a broken file.
        raise ValueError(f"{name}an image that cannot be decoded ({type(error).__name__}: {error})") from error


def path_in_folder(folder: str | os.PathLike, name: str) -> str:
    """
    Return the path of an image that a data set names, and refuse names that lead out of the folder.

    Links are not resolved, because the snapshots in the Hub's cache consist of links.
    """
    folder = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.commonpath([folder, path]) != folder:
        raise ValueError(f"the image path {name!r} leads out of the image folder {folder!r}")
    return path


def _readable_formats() -> list[str]:
    """Return the formats of `FORMATS` that this build of Pillow supports."""
    PILImage.init()
    return [name for name in FORMATS if name in PILImage.OPEN]


def _rgb(image: PILImage.Image, apply_orientation: bool, max_side: int) -> PILImage.Image:
    if not 0 < min(image.size) <= max(image.size) <= max_side:
        raise _Unusable(f"an image of {image.width} x {image.height} pixels; its sides may have 1 to {max_side}")
    if image.mode in ("I", "F"):
        raise _Unusable(
            f"an image of mode {image.mode!r}, whose values have no known range: store it with 8 bits per channel"
        )
    if apply_orientation:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # `convert` alone would clip at 255, which leaves a white image.
        image = PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def pad_to_square(image: PILImage.Image, background: tuple[int, int, int]) -> PILImage.Image:
    """Center the image on a square of its longer side, as LLaVA does."""
    if image.width == image.height:
        return image
    side = max(image.size)
    square = PILImage.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def color(mean: Sequence[float]) -> tuple[int, int, int]:
    """Turn a mean of pixels in [0, 1] into a color, rounded down as in LLaVA."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def center_square(image: PILImage.Image) -> PILImage.Image:
    """Crop the central square of the image's shorter side."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def shared_crop(image: PILImage.Image, image_processor: Any) -> PILImage.Image:
    """
    Crop or pad an RGB image as the student's image processor does before it resizes, so that other encoders see the
    same pixels. For anyres the image stays whole, to be stretched.
    """
    if getattr(image_processor, "image_grid_pinpoints", None) is not None:
        return image
    if getattr(image_processor, "do_pad", False):
        return pad_to_square(image, color(image_processor.image_mean))
    return center_square(image)
