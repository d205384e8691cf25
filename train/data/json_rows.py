"""Reads JSON and JSON Lines files in blocks of rows, so that a file need not fit into memory."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson


# Larger blocks are slower: their objects no longer fit into the processor's caches
BLOCK = 1 << 20
CUTS_TRIED = 30
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(path: Path) -> Iterator[list[Any]]:
    """
    The rows of a `.json` or `.jsonl` file in lists of some hundreds. In JSON Lines, a line that cannot be parsed is a
    `ValueError` in place of its row.

    Raises:
        ValueError: if a `.json` file holds no list, or is not valid.
    """
    yield from _lines(path) if path.suffix == ".jsonl" else _elements(path)


def _lines(path: Path) -> Iterator[list[Any]]:
    with path.open("rb") as file:
        while lines := file.readlines(BLOCK):
            yield [parse_line(stripped) for line in lines if (stripped := line.strip())]


def _elements(path: Path) -> Iterator[list[Any]]:
    """
    The elements of a JSON list.

    The file is cut between elements, which are found by the bytes between the first two and the name of the second's
    first field. Such bytes may also be inside an element, but a list that ends there is not valid. What cannot be cut
    and parsed so is left to Python's parser, which needs the whole file, and says what is wrong with it.
    """
    count = 0
    with path.open("rb") as file:
        rest = file.read(BLOCK).removeprefix(BYTE_ORDER_MARK).lstrip()
        separator = start = b""
        while more := file.read(max(BLOCK, len(rest))):
            if not separator:
                separator, start = _between_elements(rest)
            if separator and (separator + start) in rest:
                rows, end = _parse_beginning(rest, separator + start)
                if rows is None:
                    break
                yield rows
                count += len(rows)
                rest = b"[" + rest[end + len(separator) :]
            rest += more
        rows = None if more else _parse_list(rest)
    yield _read_whole(path)[count:] if rows is None else rows


def _between_elements(text: bytes) -> tuple[bytes, bytes]:
    """The bytes between the first two elements of a JSON list, and those up to the end of the second's first name."""
    beginning = text.decode("utf-8", "ignore")
    first = re.match(r"\[\s*", beginning)
    try:
        _, end = json.JSONDecoder().raw_decode(beginning, first.end() if first else 0)
    except (ValueError, RecursionError):
        return b"", b""
    found = re.compile(r'(\s*,\s*)(\{\s*"(?:[^"\\]|\\.)*")').match(beginning, end)
    return (found[1].encode(), found[2].encode()) if found else (b"", b"")


def _parse_beginning(text: bytes, marker: bytes) -> tuple[list[Any] | None, int]:
    """The elements of a JSON list up to the last `marker` that is between two of them, and its position."""
    end = len(text)
    for _ in range(CUTS_TRIED):
        end = text.rfind(marker, 0, end + len(marker) - 1)
        if end < 0:
            break
        if (rows := _parse_list(text[:end] + b"]")) is not None:
            return rows, end
    return None, -1


def _parse_list(block: bytes) -> list[Any] | None:
    """A JSON list, or `None` if it is not valid. Python's parser takes what is only faulty by the standard (`NaN`)."""
    try:
        rows = orjson.loads(block)
    except ValueError:
        try:
            rows = json.loads(block.decode())
        except (ValueError, RecursionError):
            return None
    return rows if isinstance(rows, list) else None


def _read_whole(path: Path) -> list[Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: {error.reason}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON {_position(text, error)}: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read.") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a JSON {type(rows).__name__}, expected a list of rows.")
    return rows


def _position(text: str, error: json.JSONDecodeError) -> str:
    """Row and field of an error in a JSON list, found by parsing the rows in front of it again."""
    decoder, separator = json.JSONDecoder(), re.compile(r"[^\s,]|$")
    number, start = -1, text.find("[") + 1
    try:
        while start < error.pos:
            number += 1
            start = separator.search(text, start).start()  # type: ignore[union-attr]
            _, start = decoder.raw_decode(text, start)
    except json.JSONDecodeError:
        pass
    fields = re.findall(r'"(\w+)"\s*:', text[start : error.pos])
    return f"in row {max(number, 0)}" + (f", field {fields[-1]!r}" if fields else "")


def parse_line(line: bytes) -> Any:
    """The row of a line of JSON Lines, or the `ValueError` that says why it has none."""
    try:
        return orjson.loads(line)
    except ValueError:
        pass  # Python's parser also takes what is only faulty by the standard
    try:
        return json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        return ValueError("not valid JSON: it is nested too deeply to be read")
    except ValueError as error:
        fields = re.findall(r'"(\w+)"\s*:', line[: getattr(error, "pos", 0)].decode("utf-8", "replace"))
        return ValueError(f"not valid JSON{f' in field {fields[-1]!r}' if fields else ''}: {error}")
