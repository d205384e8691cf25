"""Decoding one image that nobody has looked at before, of a data set or from a visitor."""

import io
import os
import warnings
from collections.abc import Mapping
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


def decode_image(image: Any, apply_orientation: bool = True) -> PILImage.Image:
    """Open one image of a row as RGB.

    Grey images get three equal channels, 16-bit ones keep their upper 8 bits, CMYK and palettes are converted. What is
    transparent shows the colour stored under it, and of an animation the first frame is taken: both as the authors do
    (`convert("RGB")`).

    Args:
        image: PIL image, path, or mapping with `bytes` or `path`.
        apply_orientation: turn the image as its EXIF orientation says, as transformers' `load_image` does at
            inference. The authors train on the pixels as stored.

    Returns:
        PIL image of mode RGB, fully loaded.

    Raises:
        ValueError: with the reason, if there is no image, its format is none of `FORMATS`, it cannot be decoded
            completely, its longest side is above `MAX_SIDE`, or its values have no known range (32-bit integers and
            floats).
    """
    if isinstance(image, Mapping):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    name = f"{image}: " if isinstance(image, str | os.PathLike) else ""
    try:
        if isinstance(image, PILImage.Image):
            return _rgb(image, apply_orientation)
        if name and not os.path.isfile(image):
            raise _Unusable("no such file")
        if (os.path.getsize(image) if name else image.getbuffer().nbytes) == 0:
            raise _Unusable("an image of 0 bytes")
        with warnings.catch_warnings():
            # The size is checked below, before a pixel is decoded
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
            with PILImage.open(image, formats=_readable()) as opened:
                return _rgb(opened, apply_orientation)
    except _Unusable as error:
        raise ValueError(f"{name}{error}") from None
    except PILImage.UnidentifiedImageError as error:
        raise ValueError(f"{name}not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:
        # A broken file makes Pillow raise nearly anything
        raise ValueError(f"{name}an image that cannot be decoded ({type(error).__name__}: {error})") from error


def _readable() -> list[str]:
    """Those of `FORMATS` that this build of Pillow has."""
    PILImage.init()
    return [name for name in FORMATS if name in PILImage.OPEN]


def _rgb(image: PILImage.Image, apply_orientation: bool) -> PILImage.Image:
    if not 0 < min(image.size) <= max(image.size) <= MAX_SIDE:
        raise _Unusable(f"an image of {image.width} x {image.height} pixels; its sides may have 1 to {MAX_SIDE}")
    if image.mode in ("I", "F"):
        raise _Unusable(
            f"an image of mode {image.mode!r}, whose values have no known range: store 8 or 16 bits per channel"
        )
    if apply_orientation:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # convert() would clip at 255, which leaves a white image
        image = PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
