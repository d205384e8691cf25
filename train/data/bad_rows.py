"""Rows that a run cannot use: they are counted over all processes and listed in a file, and too many stop the run."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object

from modeling_movekd.files import new_file


logger = logging.getLogger(__name__)

BAD_ROWS_NAME = "bad_rows.jsonl"


class BadRows:
    """
    The rows that cannot be used, each with its reason, and the limits on their number.

    Malformed rows are found when a data set is read, undecodable images when a batch is made. Each row counts once,
    except that a stream may know a row only by its position in a shard.

    Args:
        folder (`str`, *optional*): Where `bad_rows.jsonl` is written, one `{"row", "reason"}` per line.
        max_share (`float`, defaults to 0.01): Largest share of `total` that may be bad.
        max_rows (`int`, *optional*): Largest number of bad rows, in addition to the share.
        writes (`bool`, defaults to `True`): Whether this process writes the file.
        resume (`bool`, defaults to `False`): Start with the rows that the file lists, instead of removing the file.

    Attributes:
        total: Number of rows that the share refers to. Whoever reads a data set adds to it.
        reasons: By row, why it cannot be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        max_share: float = 0.01,
        max_rows: int | None = None,
        writes: bool = True,
        resume: bool = False,
    ) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_bad_row_share is {max_share}. Set it to a share between 0 and 1.")
        if max_rows is not None and max_rows < 0:
            raise ValueError(f"max_bad_rows is {max_rows}. Set it to 0 or more rows.")
        self.path = None if folder is None else Path(folder) / BAD_ROWS_NAME
        self.max_share, self.max_rows, self.writes = max_share, max_rows, writes
        self.total = 0
        self.reasons: dict[str, str] = {}
        if resume and self.path is not None and self.path.is_file():
            with self.path.open(encoding="utf-8") as lines:
                self.reasons = {entry["row"]: entry["reason"] for entry in map(json.loads, lines)}
        elif writes and self.path is not None:
            self.path.unlink(missing_ok=True)

    def add(self, rows: Iterable[tuple[str, str]]) -> None:
        """Record rows with their reasons, warn of the new ones, and raise a `ValueError` if there are too many."""
        self._record(rows)
        self._check()

    def add_from_all(self, rows: list[tuple[str, str]]) -> None:
        """As `add`, with the rows of every process. All processes must call it together."""
        self._record(gather_object(rows))
        # A process that raises ends the others, and the file must be written by then
        PartialState().wait_for_everyone()
        self._check()

    def _record(self, rows: Iterable[tuple[str, str]]) -> None:
        new = {row: reason for row, reason in rows if row not in self.reasons}
        if not new:
            return
        self.reasons |= new
        first = _first(new)
        logger.warning("%d of %d rows cannot be used. They are skipped. New: %s", len(self.reasons), self.total, first)
        self._write()

    def _check(self) -> None:
        count = len(self.reasons)
        over_share = count > self.max_share * self.total
        if not over_share and (self.max_rows is None or count <= self.max_rows):
            return
        limit, option = (
            (f"{self.max_share:.2%}", "max_bad_row_share") if over_share else (self.max_rows, "max_bad_rows")
        )
        listed = "" if self.path is None else f" All are listed in {self.path}."
        raise ValueError(
            f"{count} of {self.total} rows cannot be used ({count / max(self.total, 1):.2%}). First: "
            f"{_first(self.reasons)}{listed} At most {limit} may be skipped: repair the data or raise {option}."
        )

    def _write(self) -> None:
        if self.path is None or not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row, reason in self.reasons.items():
                file.write(json.dumps({"row": row, "reason": reason}) + "\n")


def _first(reasons: dict[str, str]) -> str:
    shown = "; ".join(f"{row}: {reason}" for row, reason in list(reasons.items())[:5])
    shown += f"; and {len(reasons) - 5} more." if len(reasons) > 5 else "."
    # Broken JSON may hold half a character, which no terminal or log can print
    return shown.encode("utf-8", "backslashreplace").decode()
