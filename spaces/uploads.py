"""Read and limit what visitors send. Each `ValueError` here is a sentence for the visitor."""

import time
from collections.abc import Collection, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from errors import NOT_ANSWERED
from gradio_client.utils import is_file_obj_with_meta, is_http_url_like, traverse
from images import decode_in_time
from PIL import Image


MAX_FILE_MB = 20
MAX_SIDE = 8000
DECODING_SECONDS = 10  # for all images of a conversation
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


def decode(path: str | None, name: str = "The image", end: float | None = None) -> Image.Image:
    """
    Decode an image as RGB, upright and with no side above `KEPT_SIDE`.

    Args:
        path (`str`, *optional*): The file.
        name (`str`, *optional*, defaults to `"The image"`): Name in errors.
        end (`float`, *optional*): When to give up, by `time.monotonic`. Defaults to `DECODING_SECONDS` from now.
    """
    if not path:
        raise ValueError(f"{name} is missing: choose one first.")
    most = MAX_FILE_MB * 2**20
    try:
        if (size := Path(path).stat().st_size) > most:
            raise ValueError(
                f"{name} has {size:,} bytes; at most {most:,} ({MAX_FILE_MB} MB) are taken. Send it smaller."
            )
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{name} is no longer kept here. Clear the conversation and send it again.") from error
    left = DECODING_SECONDS if end is None else end - time.monotonic()
    try:
        image = decode_in_time(content, left, max_side=MAX_SIDE)
    except ValueError as error:
        raise ValueError(f"{name} cannot be used: {error}.") from error
    image.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
    return image


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
    messages, number, end = [], 0, time.monotonic() + DECODING_SECONDS
    for role, paths, text in turns:
        content: list[dict[str, Any]] = []
        for path in paths:
            number += 1
            name = "The image" if count == 1 else f"Image {number} of the conversation"
            content.append({"type": "image", "image": decode(path, name, end)})
        messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
    return messages
