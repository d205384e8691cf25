"""
Decode and crop images from a data set or a visitor, which may be broken or malicious.

`spaces/images.py` is a copy of this file, since the Space imports nothing of this package.
"""

import io
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image as PILImage
from PIL import ImageOps


# Formats of photographs. Pillow reads many more, and starts other programs for some (Ghostscript for EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Longest side of an image in pixels. A square of this side takes 270 MB, and from there on Pillow warns of a
# decompression bomb.
MAX_SIDE = 9459
# More than cameras, editors and web tools write. The size of an image does not bound the work of decoding it: each
# scan of a JPEG file passes over all pixels, and each tile of a JPEG 2000 file is decoded by itself.
MAX_SCANS = 100
MAX_SEGMENTS = 5000
MAX_FRAMES = 2000
MAX_TILES = 10_000
MAX_PPM_HEADER = 10_000  # bytes, comments included, which Pillow reads one by one
MAX_PPM_TEXT = 10**6  # bytes of a file with its pixels as decimal numbers, which takes a second to decode
# A marker of a JPEG file, besides restarts and those without a length. In the coded pixels, 0 follows each 255.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")
# The size, origin, and tiles of a JPEG 2000 codestream
_SIZ = re.compile(rb"\xff\x4f\xff\x51.{4}(.{32})", re.DOTALL)
_BITS_PER_SAMPLE = 258  # a tag of TIFF
# Runs this file, which needs Pillow alone, without the package and its slow imports.
_CHILD = "import runpy, sys; runpy.run_path(sys.argv[1])['_answer_parent'](sys.argv[2])"


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
        ValueError: If the image is missing, broken, too large, in another format than `FORMATS`, has more scans,
            frames or tiles than usual files, or has values without a known range (32-bit integers and floats).
    """
    if isinstance(image, Mapping):
        image = image["path"] if image.get("bytes") is None else image["bytes"]
    name = f"{image}: " if isinstance(image, str | os.PathLike) else ""
    try:
        if isinstance(image, PILImage.Image):
            return _rgb(image, apply_orientation, max_side)
        if name and not os.path.isfile(image):
            raise _Unusable("no such file")
        content = Path(image).read_bytes() if name else bytes(image)
        if not content:
            raise _Unusable("an image of 0 bytes")
        _check_scans(content)
        _check_ppm_header(content)
        with warnings.catch_warnings():
            # `_rgb` checks the size before a pixel is decoded.
            warnings.simplefilter("ignore", PILImage.DecompressionBombWarning)
            with PILImage.open(io.BytesIO(content), formats=_readable_formats()) as opened:
                _check_frames(opened, content)
                _check_tiles(opened, content, max_side)
                return _rgb(opened, apply_orientation, max_side)
    except _Unusable as error:
        raise ValueError(f"{name}{error}") from None
    except PILImage.UnidentifiedImageError as error:
        raise ValueError(f"{name}not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:
        # Pillow raises nearly any exception for a broken file.
        raise ValueError(f"{name}an image that cannot be decoded ({type(error).__name__}: {error})") from error


def decode_in_time(content: bytes, seconds: float, max_side: int = MAX_SIDE) -> PILImage.Image:
    """
    Decode an image that comes over a network, in a process of its own.

    The process is ended when the time is over. No file can then hold up a server, or crash it by a fault in a decoder.

    Args:
        content (`bytes`): The image file.
        seconds (`float`): The longest time.
        max_side (`int`, *optional*, defaults to `MAX_SIDE`): Longest side in pixels.

    Raises:
        ValueError: As [`decode_image`], and if decoding takes longer.
    """
    command = [sys.executable, "-P", "-c", _CHILD, __file__, str(max_side)]
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=max(seconds, 0.01), check=False)
    except subprocess.TimeoutExpired:
        raise ValueError("an image whose decoding takes too long: send it smaller, or as a plain PNG file") from None
    header, _, pixels = done.stdout.partition(b"\n")
    if done.returncode:
        raise ValueError(f"an image that cannot be decoded (the decoder ended with {done.returncode})")
    answer = json.loads(header)
    if "error" in answer:
        raise ValueError(answer["error"])
    return PILImage.frombytes("RGB", tuple(answer["size"]), pixels)


def _answer_parent(max_side: str) -> None:
    """Decode the image on standard input, and write a line of JSON and the pixels to standard output."""
    try:
        image = decode_image({"bytes": sys.stdin.buffer.read()}, max_side=int(max_side))
    except ValueError as error:
        sys.stdout.buffer.write(json.dumps({"error": str(error)}).encode() + b"\n")
    else:
        sys.stdout.buffer.write(json.dumps({"size": image.size}).encode() + b"\n" + image.tobytes())


def _check_scans(content: bytes) -> None:
    """Refuse a JPEG file with too many scans or segments. Pillow itself reads the segments when it opens a file."""
    if not content.startswith(b"\xff\xd8"):
        return
    position = scans = segments = 0
    while (marker := _MARKER.search(content, position)) and marker[1] != b"\xd9":
        position = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2])
        segments += 1
        scans += marker[1] == b"\xda"
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise _Unusable(
                f"a JPEG file of more than {MAX_SCANS} scans or {MAX_SEGMENTS} segments: save it again without them"
            )


def _check_ppm_header(content: bytes) -> None:
    """Refuse a PPM file whose format, width, height and largest value do not come soon, or that is a long text."""
    start = content[:MAX_PPM_HEADER]
    numbers = 2 if content[1:2] in b"14" else 3
    is_short = len(content) < MAX_PPM_HEADER or len(re.sub(rb"#[^\r\n]*", b"", start).split()) > numbers
    if content[:2] in (b"P1", b"P2", b"P3") and len(content) > MAX_PPM_TEXT:
        raise _Unusable(f"a PPM file in plain text of more than {MAX_PPM_TEXT} bytes: save it in the binary form")
    if start[:1] == b"P" and start[1:2].isdigit() and not is_short:
        raise _Unusable(
            f"a PPM file whose header is longer than {MAX_PPM_HEADER} bytes: save it again without comments"
        )


def _check_frames(image: PILImage.Image, content: bytes) -> None:
    if image.format == "GIF":
        frames = _count_gif_frames(content)
    elif image.format == "TIFF":
        frames = _count_pages(content)
    else:
        frames = getattr(image, "n_frames", 1)
    if frames > MAX_FRAMES:
        raise _Unusable(f"an image of more than {MAX_FRAMES} frames: send the first one alone")


# For these two formats Pillow would read every frame to count them.
def _count_gif_frames(content: bytes) -> int:
    """Count the frames of a GIF file up to one above `MAX_FRAMES`."""

    def table(flags: int) -> int:
        return 3 * 2 ** (flags % 8 + 1) if flags & 128 else 0

    frames, position = 0, 13 + table(content[10])
    try:
        while frames <= MAX_FRAMES and content[position] in b"!,":
            if content[position] == ord("!"):  # an extension
                position += 2
            else:
                frames += 1
                position += 11 + table(content[position + 9])
            while size := content[position]:
                position += size + 1
            position += 1
    except IndexError:
        pass  # The file ends early, perhaps after a whole first frame.
    return frames


def _count_pages(content: bytes) -> int:
    """Count the pages of a TIFF file up to one above `MAX_FRAMES`, which also ends a circle."""
    order: Literal["little", "big"] = "little" if content.startswith(b"II") else "big"
    is_big = int.from_bytes(content[2:4], order) == 43  # BigTIFF
    start, address, entry = (8, 8, 20) if is_big else (4, 4, 12)
    count_bytes = address if is_big else 2
    position, pages = int.from_bytes(content[start : start + address], order), 0
    while 0 < position < len(content) and pages <= MAX_FRAMES:
        entries = int.from_bytes(content[position : position + count_bytes], order)
        position += count_bytes + entry * entries
        position = int.from_bytes(content[position : position + address], order)
        pages += 1
    return pages


def _check_tiles(image: PILImage.Image, content: bytes, max_side: int) -> None:
    """Refuse a JPEG 2000 codestream that is larger than its file's header says, or cut into too many tiles."""
    if image.format != "JPEG2000":
        return
    for match in _SIZ.finditer(content):
        numbers = [int.from_bytes(match[1][start : start + 4]) for start in range(0, 32, 4)]
        right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = numbers
        if max(right - left, bottom - top) > max_side:
            raise _Unusable(f"an image of {right - left} x {bottom - top} pixels; its sides may have 1 to {max_side}")
        columns, rows = ((right - tile_left) // max(tile_width, 1), (bottom - tile_top) // max(tile_height, 1))
        if (columns + 1) * (rows + 1) > MAX_TILES:
            raise _Unusable(f"a JPEG 2000 file of more than {MAX_TILES} tiles: save it again with larger ones")


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
    if image.mode == "La":
        image = image.convert("LA")
    if getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (12,):
        image = image.point(lambda value: value * 16)  # Pillow keeps the values, up to 4095
    if apply_orientation:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # `convert` alone would clip at 255, which leaves a white image.
        upper_bytes = image.tobytes()[image.mode != "I;16B" :: 2]
        image = PILImage.frombytes("L", image.size, upper_bytes)
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
    same pixels. For anyres, and for a processor that neither crops nor pads, the image stays whole, to be stretched.
    """
    if getattr(image_processor, "image_grid_pinpoints", None) is not None:
        return image
    if getattr(image_processor, "do_pad", False):
        return pad_to_square(image, color(image_processor.image_mean))
    return center_square(image) if getattr(image_processor, "do_center_crop", False) else image
