"""Read and limit what visitors send. Each `ValueError` here is a sentence for the visitor."""

import time
import warnings
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from errors import NOT_ANSWERED
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
from PIL import Image, ImageOps, UnidentifiedImageError


# Formats of photographs. Pillow starts other programs for some other formats (EPS).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE_MB = 20
MAX_SIDE = 10_000
MAX_MEGAPIXELS = 64
KEPT_SIDE = 2048  # larger images are reduced to this side, which is several times that of any tower
MAX_IMAGES = 8
MAX_CHARACTERS = 4_000
KEPT_SECONDS = 3600


def refuse_addresses(inputs: Any) -> None:
    """Refuse addresses instead of files, because Gradio would download a file of any size."""

    def check(file: dict[str, Any]) -> dict[str, Any]:
        if is_http_url_like(file["path"]):
            raise ValueError("Send the image as a file: addresses are not opened here.")
        return file

    traverse(inputs, check, is_file_obj_with_meta)


def decode(path: str | None, name: str = "The image") -> Image.Image:
    """
    Decode an image as RGB, upright and with no side above `KEPT_SIDE`.

    Images of 16 bits keep their upper 8, as in training. Values without a known range are refused: floats and 32-bit
    integers, which Pillow also makes of a 16-bit PGM.
    """
    if not path:
        raise ValueError(f"{name} is missing: choose one first.")
    try:
        most = MAX_FILE_MB * 2**20
        if (size := Path(path).stat().st_size) > most:
            raise _Refused(
                f"{name} has {size:,} bytes; at most {most:,} ({MAX_FILE_MB} MB) are taken. Send it smaller."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the sides are checked below
            with Image.open(path, formats=_readable()) as opened:
                _check_sides(opened, name)
                if opened.mode in ("I", "F"):
                    raise _Refused(f"{name} has values without a known range. Send it with 8 bits per channel.")
                image = ImageOps.exif_transpose(opened)
                if image.mode.startswith("I;16"):
                    # `convert` alone would clip at 255.
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: at most {MAX_MEGAPIXELS} megapixels are taken.") from error
    except FileNotFoundError as error:
        raise ValueError(f"{name} is no longer kept here. Clear the conversation and send it again.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that can be read here ({', '.join(FORMATS)}).") from error
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:
        # Pillow raises nearly any exception for a broken file.
        raise ValueError(f"{name} is broken and cannot be read.") from error
    image.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
    return image


class _Refused(Exception):
    pass


def _readable() -> list[str]:
    """Return the formats of `FORMATS` that this build of Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _check_sides(image: Image.Image, name: str) -> None:
    if max(image.size) > MAX_SIDE or image.width * image.height > MAX_MEGAPIXELS * 1_000_000:
        raise _Refused(
            f"{name} has {image.width} x {image.height} pixels; sides of {MAX_SIDE} and {MAX_MEGAPIXELS} megapixels "
            "are the limits. Send it smaller."
        )


def delete_old(folder: Path, own: Collection[bytes], seconds: float = KEPT_SECONDS) -> None:
    """
    Delete old files below a folder, except those with the contents `own`. Gradio deletes uploads by itself, but keeps
    copies of the pictures that it writes.
    """
    for path in folder.rglob("*"):
        try:
            if path.is_file() and time.time() - path.stat().st_mtime > seconds and path.read_bytes() not in own:
                path.unlink()
        except FileNotFoundError:
            pass  # Gradio has deleted it


def keep_deleting(folder: Path, own: Collection[bytes], every: float = 60) -> None:
    """Call [`delete_old`] every so many seconds until the process ends."""
    while True:
        time.sleep(every)
        delete_old(folder, own)


def read_content(content: Any) -> tuple[list[str], str]:
    """Return the image paths and the text of a message, in any of Gradio's forms."""
    paths, texts = [], []
    for part in content if isinstance(content, list | tuple) else [content]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and (found := part.get("path") or (part.get("file") or {}).get("path")):
            paths.append(found)
        elif isinstance(part, dict) and part.get("text"):
            texts.append(part["text"])
    return paths, "\n".join(texts)


def read_conversation(history: Sequence[dict[str, Any]], message: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Convert a conversation to the form that chat templates take, with decoded images. Questions without an answer,
    which were refused or stopped before the first word, are left out.
    """
    turns = []
    for question, answer in pairwise(history):
        refused = (answer.get("metadata") or {}).get("title") == NOT_ANSWERED
        if (question["role"], answer["role"]) == ("user", "assistant") and not refused:
            turns += [(turn["role"], *read_content(turn["content"])) for turn in (question, answer)]
    turns.append(("user", list(message.get("files") or []), (message.get("text") or "").strip()))
    if not turns[-1][2]:
        raise ValueError("Write a question, with or without images.")
    if len(turns[-1][2]) > MAX_CHARACTERS:
        raise ValueError(f"The question has {len(turns[-1][2])} characters; at most {MAX_CHARACTERS} are taken.")
    count = sum(len(paths) for _, paths, _ in turns)
    if count > MAX_IMAGES:
        raise ValueError(
            f"The conversation has {count} images; at most {MAX_IMAGES} are taken. Clear it, or send fewer."
        )
    messages, number = [], 0
    for role, paths, text in turns:
        content: list[dict[str, Any]] = []
        for path in paths:
            number += 1
            name = "The image" if count == 1 else f"Image {number} of the conversation"
            content.append({"type": "image", "image": decode(path, name)})
        messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
    return messages
