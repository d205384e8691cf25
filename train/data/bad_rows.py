"""The rows that a run cannot use: counted over all processes, listed in a file, and too many of them stop it."""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object


logger = logging.getLogger(__name__)

BAD_ROWS_NAME = "bad_rows.jsonl"


class BadRows:
    """Every row that could not be used, with the reason, and the limits on their number.

    Rows are found when a data set is read (malformed ones) and when a batch is made (images that cannot be decoded).
    Each counts once, however often it comes up, except that a stream may know a row by no more than its place in a
    shard (see `train.data.conversations.convert_row`).

    Args:
        folder: where `bad_rows.jsonl` is written, one `{"row", "reason"}` per line; nowhere if `None`.
        max_share: largest share of `total` that may be bad, between 0 and 1.
        max_rows: largest number that may be bad, besides the share.
        writes: whether this process writes the file; one of a run should.
        resume: begin with the rows that the file of an earlier part of the run lists; otherwise that file is removed.

    Attributes:
        total: rows that the share is of; whoever reads a data set adds to it.
        reasons: by row, why it cannot be used.

    Raises:
        ValueError: for limits that are none.
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
            raise ValueError(f"max_bad_row_share is a share between 0 and 1, got {max_share}.")
        if max_rows is not None and max_rows < 0:
            raise ValueError(f"max_bad_rows is a number of rows, got {max_rows}.")
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
        """Note rows and reasons, warn of the new ones, list them, and stop if they are too many.

        Raises:
            ValueError: over a limit; the message names the numbers, the first rows and the file.
        """
        self._note(rows)
        self._check()

    def add_from_all(self, rows: list[tuple[str, str]]) -> None:
        """As `add`, with the rows that each process of a run has found. A collective: every process calls it."""
        self._note(gather_object(rows))
        # A process that stops ends the others, and the list must be there by then
        PartialState().wait_for_everyone()
        self._check()

    def _note(self, rows: Iterable[tuple[str, str]]) -> None:
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
        limit, knob = (f"{self.max_share:.2%}", "max_bad_row_share") if over_share else (self.max_rows, "max_bad_rows")
        listed = "" if self.path is None else f" All are listed in {self.path}."
        raise ValueError(
            f"{count} of {self.total} rows cannot be used ({count / max(self.total, 1):.2%}). First: "
            f"{_first(self.reasons)}{listed} At most {limit} may be skipped: repair the data or raise {knob}."
        )

    def _write(self) -> None:
        if self.path is None or not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for row, reason in self.reasons.items():
                file.write(json.dumps({"row": row, "reason": reason}) + "\n")
        temporary.replace(self.path)


def _first(reasons: dict[str, str]) -> str:
    shown = "; ".join(f"{row}: {reason}" for row, reason in list(reasons.items())[:5])
    shown += f"; and {len(reasons) - 5} more." if len(reasons) > 5 else "."
    # Half a character, as broken JSON may hold, cannot be written to a terminal or a log
    return shown.encode("utf-8", "backslashreplace").decode()
