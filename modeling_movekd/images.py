"""Decoding one image that nobody has looked at before, of a data set or from a visitor."""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageOps


# The formats of photographs. Pillow knows many more, some of which run other programs (EPS starts Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Longest side of an image in pixels. Padded to a square it takes 3 bytes per pixel, which is 270 MB here; Pillow warns
# of a decompression bomb from the same number of pixels on.
MAX_SIDE = 9459


class _Unusable(Exception):
    """An image that is refused before it is decoded; its text is the reason."""


def decode_image(image: Any, apply_orientation: bool = True, max_side: int = MAX_SIDE) -> PILImage.Image:
    """Open one image of a row as RGB.

    Grey images get three equal channels, 16-bit ones keep their upper 8 bits, CMYK and palettes are converted. What is
    transparent shows the colour stored under it, and of an animation the first frame is taken: both as the authors do
    (`convert("RGB")`).

    Args:
        image: PIL image, path, or mapping with `bytes` or `path`.
        apply_orientation: turn the image as its EXIF orientation says, as transformers' `load_image` does at
            inference. The authors train on the pixels as stored.
        max_side: longest side in pixels, at most `MAX_SIDE`; a larger image is refused before it is decoded.

    Returns:
        PIL image of mode RGB, fully loaded.

    Raises:
        ValueError: with the reason, if there is no image, its format is none of `FORMATS`, it cannot be decoded
            completely, its longest side is above `max_side`, or its values have no known range (32-bit integers and
            floats).
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
            # The size is checked below, before a pixel is decoded
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
            with PILImage.open(image, formats=_readable()) as opened:
                return _rgb(opened, apply_orientation, max_side)
    except _Unusable as error:
        raise ValueError(f"{name}{error}") from None
    except PILImage.UnidentifiedImageError as error:
        raise ValueError(f"{name}not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:
        # A broken file makes Pillow raise nearly anything
        raise ValueError(f"{name}an image that cannot be decoded ({type(error).__name__}: {error})") from error


def path_in_folder(folder: str | os.PathLike, name: str) -> str:
    """
    The path of an image by the name that a data set gives it. Links are not resolved: those in the folder lead where
    whoever made it wants them to, as a snapshot's in the Hub's cache do.

    Raises:
        ValueError: if the name leads out of the folder.
    """
    folder = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.commonpath([folder, path]) != folder:
        raise ValueError(f"the image path {name!r} leads out of the image folder {folder!r}")
    return path


def _readable() -> list[str]:
    """Those of `FORMATS` that this build of Pillow has."""
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
        # convert() would clip at 255, which leaves a white image
        image = PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def pad_to_square(image: PILImage.Image, background: tuple[int, int, int]) -> PILImage.Image:
    """The image in the middle of a square of its longer side, as LLaVA pads.

    Args:
        image: RGB image.
        background: colour of the margins, 0 to 255.
    """
    if image.width == image.height:
        return image
    side = max(image.size)
    square = PILImage.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def color(mean: Sequence[float]) -> tuple[int, int, int]:
    """A mean of pixels in [0, 1] as a colour, rounded down as LLaVA does."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def center_square(image: PILImage.Image) -> PILImage.Image:
    """The central square of the image's shorter side."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def shared_crop(image: PILImage.Image, image_processor: Any) -> PILImage.Image:
    """What the student's image processor makes of an RGB image before its resize, so that other encoders get the same:
    padded to a square where it pads, whole for anyres (to be stretched), the central square otherwise."""
    if getattr(image_processor, "image_grid_pinpoints", None) is not None:
        return image
    if getattr(image_processor, "do_pad", False):
        return pad_to_square(image, color(image_processor.image_mean))
    return center_square(image)
