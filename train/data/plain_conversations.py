"""Converts many plain LLaVA rows at once to an Arrow table, and others row by row."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from train.data.conversations import FEATURES, IMAGE_TOKEN, ROLES, convert_row


def convert_rows(rows: Sequence[Any], first: int, folder: str | None, name: str, offset: int) -> pa.Table:
    """
    [`~train.data.conversations.convert_row`] for consecutive rows.

    Args:
        rows (`Sequence`): The rows.
        first (`int`): Position of the first row in its data set.
        folder, name, offset: As in `convert_row`.

    Returns:
        `pa.Table`: The columns of `FEATURES`.
    """
    plain = _PlainRows(folder)
    others = []
    for index, row in enumerate(rows, first):
        if not plain.add(index, row):
            others.append(index)
    try:
        table = plain.table(name, offset)
    except UnicodeEncodeError:  # half a character
        plain, others = _PlainRows(folder), list(range(first, first + len(rows)))
        table = plain.table(name, offset)
    if not others:
        return table
    converted = [convert_row(rows[index - first], index, folder, name, offset) for index in others]
    table = pa.concat_tables([table, Dataset.from_list(converted, FEATURES).data.table])
    return table.take(np.argsort(plain.indices + others))


@lru_cache(maxsize=1000)
def _takes_turns(speakers: tuple[str, ...]) -> bool:
    """Whether questions and answers take turns, the first is a question, and the last an answer."""
    roles = [ROLES.get(speaker) for speaker in speakers]
    return bool(roles) and len(roles) % 2 == 0 and roles == list(islice(cycle(("user", "assistant")), len(roles)))


class _PlainRows:
    """
    Columns of plain rows: `conversations` of `from` and `value` that take turns, with at most one image, whose
    placeholder is in the first question.
    """

    def __init__(self, folder: str | None) -> None:
        self.prefix = None if folder in (None, "/") else f"{folder}/"
        self.indices: list[int] = []
        self.lengths: list[int] = []
        self.paths: list[str | None] = []  # by row
        self.num_messages: list[int] = []  # by row
        self.texts: list[str] = []  # by message

    def add(self, index: int, row: Any) -> bool:
        """Add a row, unless it is not plain."""
        try:
            image, turns = row.get("image"), row["conversations"]
            texts = [turn["value"] for turn in turns]
            takes_turns = _takes_turns(tuple([turn["from"] for turn in turns]))
            joined = "\n".join(texts)
        except (AttributeError, KeyError, TypeError):
            return False
        if not takes_turns or not texts[1].strip() or (image is None and row.get("images") is not None):
            return False
        if joined.count(IMAGE_TOKEN) != (image is not None):
            return False
        length = len(joined.split())
        if image is None:
            length = -length
        else:
            if IMAGE_TOKEN not in texts[0] or not self._is_plain_path(image):
                return False
            texts[0] = texts[0].replace(IMAGE_TOKEN, "").strip()
            image = f"{self.prefix}{image}"
        self.indices.append(index)
        self.lengths.append(length)
        self.paths.append(image)
        self.num_messages.append(len(texts))
        self.texts += texts
        return True

    def _is_plain_path(self, image: Any) -> bool:
        """Whether the path stays in the folder and is in its normal form."""
        if type(image) is not str or not image or self.prefix is None:
            return False
        return image[0] not in "/." and image[-1] != "/" and "/." not in image and "//" not in image

    def table(self, name: str, offset: int) -> pa.Table:
        with_image = np.array([path is not None for path in self.paths], dtype=bool)
        first = _offsets(self.num_messages)[:-1]
        # The parts of a message are its image, if it has one, and its text, unless an image stands alone
        num_images = np.zeros(len(self.texts), dtype=np.int64)
        num_images[first[with_image]] = 1
        has_text = np.ones(len(self.texts), dtype=np.int64)
        has_text[first] = [
            bool(self.texts[index]) or not shown for index, shown in zip(first, with_image, strict=True)
        ]
        ends = np.cumsum(num_images + has_text)
        source = np.full(ends[-1] if len(ends) else 0, -1)  # of each part, the message that its text is from
        source[(ends - 1)[has_text == 1]] = np.flatnonzero(has_text)
        is_text = source >= 0
        texts = pa.array(self.texts, pa.string()).take(pa.array(source, mask=~is_text))
        kinds = pa.array(["image", "text"]).take(pa.array(is_text.astype(np.int64)))
        parts = pa.StructArray.from_arrays([kinds, texts], ["type", "text"])
        roles = pa.array(["user", "assistant"]).take(pa.array(np.arange(len(self.texts)) % 2))
        content = _lists(num_images + has_text, parts)
        messages = pa.StructArray.from_arrays([roles, content], ["role", "content"])
        paths = pa.array([path for path in self.paths if path is not None], pa.string())
        images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
        columns = {
            "messages": _lists(self.num_messages, messages),
            "images": _lists(with_image, images),
            "row_index": pa.array([offset + index for index in self.indices], pa.int64()),
            "source": pa.array([f"{name} row {index}".strip() for index in self.indices], pa.string()),
            "modality_length": pa.array(self.lengths, pa.int64()),
            "problem": pa.nulls(len(self.indices), pa.string()),
        }
        return pa.table(columns).cast(FEATURES.arrow_schema)


def _offsets(counts: Any) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _lists(counts: Any, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(_offsets(counts), pa.int32()), values)
