"""Answers on disk, so that an interrupted run goes on where it stopped."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Answers:
    """
    Answers on disk, one JSON line each, written as they are given.

    Args:
        path: File that takes new answers. A line that an interruption has cut short is removed from it.
        identity: What answers depend on beside their question: the model and how it is asked.
        others: More files to take answers from.

    Raises:
        ValueError: if those there were given by another identity, with both.
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
        """Bytes up to the end of the last complete line."""
        complete = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                if (identity := row.get("identity")) != self.identity:
                    raise ValueError(
                        f"{path}, line {number}, is an answer of {identity}; asked is {self.identity}. Remove the "
                        "file to begin anew, or choose another folder."
                    )
                self._texts[row["key"]] = row["answer"]
                complete += len(line)
        return complete

    def get(self, key: str) -> str | None:
        """The answer noted under that key, if there is one."""
        return self._texts.get(key)

    def add(self, key: str, answer: str, **facts: Any) -> None:
        """
        Note an answer; it is on disk when this returns.

        Args:
            key: Tells its question from others.
            facts: What else its line says.
        """
        row = {"identity": self.identity, "key": key} | facts | {"answer": answer}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._texts[key] = answer
