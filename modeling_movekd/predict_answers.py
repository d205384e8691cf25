"""Answers on disk, which let an interrupted run continue."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Answers:
    """
    A file of answers, one JSON line each.

    Args:
        path (`Path`): File for new answers. An incomplete last line is removed.
        identity (`str`): The model and its settings, which all answers must come from.
        others (`Iterable[Path]`, *optional*): More files with answers.

    Raises:
        ValueError: If a file has answers of another identity.
    """

    def __init__(self, path: Path, identity: str, others: Iterable[Path] = ()) -> None:
        self.identity = identity
        self._texts: dict[str, str] = {}
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        for part in sorted({path, *others} if path.is_file() else others):
            complete = self._read(part)
            if part == path and complete < part.stat().st_size:
                os.truncate(part, complete)

    def _read(self, path: Path) -> int:
        """Read the answers of a file, and return the number of bytes of its complete lines."""
        complete = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                if (identity := row.get("identity")) != self.identity:
                    raise ValueError(
                        f"{path}, line {number}, is an answer of {identity}, but this run is {self.identity}. Remove "
                        "the file to begin anew, or choose another folder."
                    )
                self._texts[row["key"]] = row["answer"]
                complete += len(line)
        return complete

    def get(self, key: str) -> str | None:
        """Return the answer of a question, if there is one."""
        return self._texts.get(key)

    def add(self, key: str, answer: str, **fields: Any) -> None:
        """Append an answer, with more fields for its line, to the file."""
        row = {"identity": self.identity, "key": key} | fields | {"answer": answer}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._texts[key] = answer
