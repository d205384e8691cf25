"""Converts a row of one of `FORMATS` to messages and images."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Features, Image, List, Value

from train.data.image_rows import BadRow, check_row, check_text, images_of_row, parsed


IMAGE_TOKEN = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FORMATS = (
    "'conversations' of 'from' and 'value' (LLaVA, ShareGPT)",
    "'messages' of 'role' and 'content', or 'prompt' and 'completion' (TRL)",
    "'texts' of 'user' and 'assistant' (FineVision, The Cauldron)",
    "an image with a 'text' or 'caption' (ImageFolder)",
)
CAPTIONS = ("text", "caption")

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
        row (`Mapping`): Fields of one of `FORMATS`, or only `line` with a line of JSON Lines.
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
    row = parsed(row)
    if sharded and isinstance(row, Mapping):
        source += f" of its shard ({_known_as(row)})"
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    length, problem = 0, None
    try:
        check_row(row)
        images = images_of_row(row, source, folder)
        turns = _turns(row, bool(images))
        # The original sampler counts words before a leading answer is dropped
        counted = [part for turn in turns for part in turn.parts if turn.must_place or part != IMAGE_TOKEN]
        length = sum(len(part.split()) for part in counted)
        turns = turns[1:] if turns[0].role == "assistant" else turns
        _check_turns(turns)
        messages = [
            _message(turn, shown) for turn, shown in zip(turns, _images_of_turns(turns, len(images)), strict=True)
        ]
        length = max(length, 1) if images else -max(length, 1)
    except BadRow as reason:
        messages, images, length, problem = STAND_IN, [], 0, str(reason)
    return {
        "messages": messages,
        "images": images,
        "row_index": offset + index,
        "source": source,
        "modality_length": length,
        "problem": problem,
    }


def _known_as(row: Mapping[str, Any]) -> str:
    texts = {field: row[field] for field in sorted(set(row) - {"image", "images"}, key=str)}
    checksum = f"checksum {zlib.crc32(repr(texts).encode('utf-8', 'replace')):08x}"
    return checksum if row.get("id") is None else f"id {row['id']}"


@dataclass
class _Turn:
    """
    A message as it stands in a row.

    Args:
        role (`str`): `"user"`, `"assistant"` or `"system"`.
        parts (`list[str]`): Its texts in order, with `<image>` where an image belongs.
        field (`str`): Name in reports.
        must_place (`bool`, defaults to `False`): Whether the format places every image by `<image>`.
    """

    role: str
    parts: list[str]
    field: str
    must_place: bool = False

    @property
    def placeholders(self) -> int:
        return sum(part.count(IMAGE_TOKEN) for part in self.parts)


def _turns(row: Mapping[str, Any], has_images: bool) -> list[_Turn]:
    if row.get("conversations") is not None:
        conversations = row["conversations"]
        if isinstance(conversations, list | tuple) and any(
            isinstance(turn, Mapping) and turn.get("from") is None and turn.get("role") is not None
            for turn in conversations
        ):
            return _from_trl(conversations)
        return _from_llava(conversations)
    if row.get("messages") is not None:
        return _from_trl(row["messages"])
    if row.get("prompt") is not None and row.get("completion") is not None:
        return _from_trl(_prompt_and_completion(row["prompt"], row["completion"]))
    if row.get("texts") is not None:
        return _from_texts(row["texts"])
    for field in CAPTIONS:
        if has_images and row.get(field) is not None:
            return [_Turn("user", [], "question"), _Turn("assistant", [_text(row[field], repr(field))], repr(field))]
    raise BadRow(
        f"its fields {sorted(map(str, row))} have neither 'conversations' nor 'messages' nor another known format. "
        f"Rows may have {'; '.join(FORMATS)}"
    )


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{field} is a {type(value).__name__}, expected a text")
    check_text(value, field)
    return value


def _from_llava(conversations: Any) -> list[_Turn]:
    if not isinstance(conversations, list | tuple) or not conversations:
        raise BadRow("'conversations' is not a list of turns")
    turns = []
    for number, turn in enumerate(conversations):
        field = f"'conversations'[{number}]"
        if not isinstance(turn, Mapping):
            raise BadRow(f"{field} is a {type(turn).__name__}, expected a turn")
        if turn.get("from") is None:
            raise BadRow(f"{field} is without 'from'")
        if not isinstance(turn["from"], str) or turn["from"] not in ROLES:
            raise BadRow(f"{field} has an unknown 'from' {turn['from']!r}, expected one of {sorted(ROLES)}")
        if not isinstance(turn.get("value"), str):
            raise BadRow(f"{field} is without a text in 'value'")
        turns.append(_Turn(ROLES[turn["from"]], [_text(turn["value"], f"{field}['value']")], field, must_place=True))
    return turns


def _prompt_and_completion(prompt: Any, completion: Any) -> list[Any]:
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    if any(isinstance(message, Mapping) and message.get("role") == "assistant" for message in prompt):
        raise BadRow("answers inside 'prompt' would be trained on: write the row as 'messages'")
    return [*prompt, *completion]


def _from_texts(texts: Any) -> list[_Turn]:
    if isinstance(texts, Mapping) and all(isinstance(values, list) for values in texts.values()):
        # A column of lists, as older data sets store it
        texts = [dict(zip(texts, values, strict=True)) for values in zip(*texts.values(), strict=False)]
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(turn, Mapping) for turn in texts):
        raise BadRow("'texts' is not a list of 'user' and 'assistant'")
    return [
        _Turn(role, [_text(turn.get(role), f"'texts'[{number}][{role!r}]")], f"'texts'[{number}][{role!r}]")
        for number, turn in enumerate(texts)
        for role in ("user", "assistant")
    ]


def _from_trl(messages: Any) -> list[_Turn]:
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRow("'messages' is not a list of messages")
    return [_parse_message(message, f"message {number}") for number, message in enumerate(messages)]


def _parse_message(message: Any, field: str) -> _Turn:
    roles = sorted(set(ROLES.values()))
    if not isinstance(message, Mapping) or message.get("role") not in roles:
        raise BadRow(f"{field} is without a role among {roles}")
    content = message.get("content")
    if not isinstance(content, str | list | tuple):
        raise BadRow(f"{field} has a 'content' that is neither text nor a list of parts")
    parts = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image" and not any(part.get(key) is not None for key in ("image", "url", "path", "base64")):
            parts.append(IMAGE_TOKEN)
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(_text(part["text"], f"{field}, 'content'"))
        else:
            raise BadRow(
                f"{field} has a content part that is neither {{'type': 'image'}} nor a text; "
                "pictures belong in 'images'"
            )
    return _Turn(message["role"], parts, field)


def _check_turns(turns: list[_Turn]) -> None:
    """
    Check that questions and answers alternate and end with an answer, that an answer has a text, and that questions
    alone have images. A system message may come first.
    """
    roles = [turn.role for turn in turns]
    asked = roles[1:] if roles and roles[0] == "system" else roles
    if not asked or asked != ["user", "assistant"] * (len(asked) // 2):
        raise BadRow(f"wrong order of roles {roles}: questions and answers take turns, and an answer is last")
    for turn in turns:
        if turn.role != "user" and turn.placeholders:
            raise BadRow(f"{turn.field}, of role {turn.role!r}, contains {IMAGE_TOKEN}, which belongs in a question")
    if not any(part.strip() for turn in turns if turn.role == "assistant" for part in turn.parts):
        raise BadRow("every answer is empty")


def _images_of_turns(turns: list[_Turn], num_images: int) -> list[int]:
    """Images of each turn: its placeholders, or at most one per turn if only that fits (the original rule)."""
    counts = [turn.placeholders for turn in turns]
    if num_images and not any(counts) and not turns[0].must_place:
        # TRL's rule: the images belong to the first question
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        return [num_images if number == first else 0 for number in range(len(turns))]
    single = [min(count, 1) for count in counts]
    for shown in (counts, single):
        if sum(shown) == num_images:
            return shown
    raise BadRow(f"{sum(counts)} image placeholders for {num_images} images")


def _message(turn: _Turn, num_images: int) -> dict[str, Any]:
    """
    A turn as a message. A single image comes before the text, as in the original code; several keep their places.
    """
    image: dict[str, str | None] = {"type": "image", "text": None}
    text = "\n".join(part for part in turn.parts if part)
    content: list[dict[str, str | None]]
    if num_images > 1 and num_images == turn.placeholders:
        content = []
        for number, piece in enumerate(text.split(IMAGE_TOKEN)):
            content += [image] if number else []
            content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        return {"role": turn.role, "content": content}
    if num_images:
        text = "\n".join(filter(None, (part.replace(IMAGE_TOKEN, "") for part in turn.parts))).strip()
    content = [image] * num_images
    if text or not content:
        content = [*content, {"type": "text", "text": text}]
    return {"role": turn.role, "content": content}
