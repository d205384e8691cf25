"""Converts a row of LLaVA (`conversations`) or TRL (`messages`, `prompt` and `completion`) to messages and images."""

import zlib
from collections.abc import Mapping
from typing import Any

from datasets import Features, Image, List, Value
from PIL import Image as PILImage

from modeling_movekd.images import path_in_folder
from train.data.sources import parse_line


IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

FEATURES = Features(
    {
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})},
        ),
        "images": List(Image(decode=False)),
        "row_index": Value("int64"),
        "source": Value("string"),
        "modality_length": Value("int64"),
        "problem": Value("string"),
    }
)
# The messages of a bad row. No token of it is trained on, but the batch keeps its number of rows
STAND_IN = [{"role": role, "content": [{"type": "text", "text": "."}]} for role in ("user", "assistant")]


class _BadRow(Exception):
    """The row cannot be used; the message is the reason."""


def convert_row(
    row: Any,
    index: int,
    folder: str | None = None,
    name: str = "",
    offset: int = 0,
    sharded: bool = False,
    version: int | None = None,
) -> dict[str, Any]:
    """
    Convert a row to the columns of `FEATURES`. A bad row gets its `problem`, stand-in messages and no images.

    Args:
        row (`Mapping`): Fields of LLaVA or TRL, or only `line` with a line of JSON Lines.
        index (`int`): Position in the data set.
        folder (`str`, *optional*): Absolute path of the image folder.
        name (`str`, *optional*): Name of the data set in reports.
        offset (`int`, defaults to 0): `row_index` of the first row.
        sharded (`bool`, defaults to `False`): Whether `index` is a position in one of several shards. Reports then
            also name the row by its `id` or a checksum of its text.
        version (`int`, *optional*): Version of this code, for the caller's cache of the results.

    Raises:
        ValueError: if an image path leads out of the folder, or is relative and there is no folder.
    """
    source = f"{name} row {index}".strip()
    if isinstance(row, Mapping) and set(row) == {"line"} and isinstance(row["line"], bytes):
        row = parse_line(row["line"])
    if sharded and isinstance(row, Mapping):
        turns = row.get("conversations") or row.get("messages") or (row.get("prompt"), row.get("completion"))
        checksum = f"checksum {zlib.crc32(repr(turns).encode('utf-8', 'replace')):08x}"
        known_as = checksum if row.get("id") is None else f"id {row['id']}"
        source += f" of its shard ({known_as})"
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    length, problem = 0, None
    try:
        if isinstance(row, ValueError):
            raise _BadRow(str(row))
        if not isinstance(row, Mapping):
            raise _BadRow(f"expected a mapping, got {type(row).__name__}")
        images = _images(row, source, folder)
        if row.get("conversations") is not None:
            messages, length = _from_llava(row["conversations"], len(images))
        else:
            messages, length = _from_trl(row, len(images))
        _check_roles(messages)
        length = max(length, 1) if images else -max(length, 1)
    except _BadRow as reason:
        messages, images, length, problem = STAND_IN, [], 0, str(reason)
    return {
        "messages": messages,
        "images": images,
        "row_index": offset + index,
        "source": source,
        "modality_length": length,
        "problem": problem,
    }


def _images(row: Mapping[str, Any], source: str, folder: str | None) -> list[Any]:
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
            raise _BadRow(f"{field} is an image with neither bytes nor path")
        image = image["path"]
    if image == "":
        raise _BadRow(f"{field} is an empty image path")
    if isinstance(image, str):
        _check_text(image, field)
        if folder is None:
            raise ValueError(f"{_capital(source)} names the image file {image!r}: give the image_folder it lies in.")
        try:
            return {"bytes": None, "path": path_in_folder(folder, image)}
        except ValueError as error:
            raise ValueError(f"{_capital(source)}: {error}.") from None
    if isinstance(image, PILImage.Image):
        return image
    raise _BadRow(f"{field} is an image of type {type(image).__name__}, expected a path, a picture or a mapping")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:] if text.startswith("row ") else text


def _check_text(text: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRow(f"{field} holds half a character ({text[error.start]!r})") from None


def _turn(role: str, text: str, num_images: int) -> dict[str, Any]:
    """A message with its images in front of its text, as in the original code."""
    content: list[dict[str, str | None]] = [{"type": "image", "text": None} for _ in range(num_images)]
    if num_images:
        text = text.replace(IMAGE_TOKEN, "").strip()
    if text or not content:
        content.append({"type": "text", "text": text})
    return {"role": role, "content": content}


def _placeholders(counts: list[int], num_images: int) -> list[int]:
    """Images of each turn: its placeholders, or at most one per turn if only that fits (the original rule)."""
    if sum(counts) == num_images:
        return counts
    single = [min(count, 1) for count in counts]
    if sum(single) == num_images:
        return single
    raise _BadRow(f"{sum(counts)} image placeholders for {num_images} images")


def _from_llava(conversations: Any, num_images: int) -> tuple[list[dict[str, Any]], int]:
    if not isinstance(conversations, list | tuple) or not conversations:
        raise _BadRow("'conversations' is not a list of turns")
    for number, turn in enumerate(conversations):
        field = f"'conversations'[{number}]"
        if not isinstance(turn, Mapping):
            raise _BadRow(f"{field} is a {type(turn).__name__}, expected a turn")
        if turn.get("from") is None:
            raise _BadRow(f"{field} is without 'from'")
        if not isinstance(turn["from"], str) or turn["from"] not in ROLES:
            raise _BadRow(f"{field} has an unknown 'from' {turn['from']!r}, expected one of {sorted(ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise _BadRow(f"{field} is without a text in 'value'")
        _check_text(turn["value"], f"{field}['value']")
    # The original sampler counts words before anything is dropped
    length = sum(len(turn["value"].split()) for turn in conversations)
    turns = conversations[1:] if conversations[0]["from"] == "gpt" else conversations
    shown = _placeholders([turn["value"].count(IMAGE_TOKEN) for turn in turns], num_images)
    return [_turn(ROLES[turn["from"]], turn["value"], n) for turn, n in zip(turns, shown, strict=True)], length


def _from_trl(row: Mapping[str, Any], num_images: int) -> tuple[list[dict[str, Any]], int]:
    if row.get("messages") is not None:
        messages = row["messages"]
    elif row.get("prompt") is not None and row.get("completion") is not None:
        prompt, completion = row["prompt"], row["completion"]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        completion = (
            [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        )
        if any(isinstance(message, Mapping) and message.get("role") == "assistant" for message in prompt):
            raise _BadRow("answers inside 'prompt' would be trained on: write the row as 'messages'")
        messages = [*prompt, *completion]
    else:
        raise _BadRow("neither 'conversations' nor 'messages' nor 'prompt' and 'completion'")
    if not isinstance(messages, list | tuple) or not messages:
        raise _BadRow("'messages' is not a list of messages")
    parsed = [_parse_message(message, f"message {number}") for number, message in enumerate(messages)]
    length = sum(len(text.split()) for _, text, _ in parsed)
    if parsed[0][0] == "assistant":
        parsed = parsed[1:]
    counts = [count for _, _, count in parsed]
    if num_images and not any(counts):
        # TRL's rule for messages of plain strings: the images belong to the first question
        first_user = next((number for number, (role, _, _) in enumerate(parsed) if role == "user"), None)
        counts = [num_images if number == first_user else 0 for number in range(len(parsed))]
    shown = _placeholders(counts, num_images)
    return [_turn(role, text, n) for (role, text, _), n in zip(parsed, shown, strict=True)], length


def _parse_message(message: Any, field: str) -> tuple[str, str, int]:
    """Role, text and number of image placeholders of a TRL message."""
    if not isinstance(message, Mapping) or message.get("role") not in list(ROLES.values()):
        raise _BadRow(f"{field} is without a role among {sorted(ROLES.values())}")
    content = message.get("content")
    if not isinstance(content, str | list | tuple):
        raise _BadRow(f"{field} has a 'content' that is neither text nor a list of parts")
    text, count = "", 0
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and not any(part.get(key) is not None for key in ("image", "url", "path", "base64")):
            count += 1
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
            count += part["text"].count(IMAGE_TOKEN)
        else:
            raise _BadRow(
                f"{field} has a content part that is neither {{'type': 'image'}} nor a text; "
                "pictures belong in 'images'"
            )
    _check_text(text, f"{field}, 'content'")
    return message["role"], text, count


def _check_roles(messages: list[dict[str, Any]]) -> None:
    """Check that questions and answers alternate and end with an answer; a system message may come first."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles and roles[0] == "system" else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise _BadRow(f"wrong order of roles {roles}: questions and answers take turns, and an answer is last")
