"""How far a log had come when a checkpoint was saved.

A resume compares the log with the cursor in its checkpoint, and so notices rows that are missing or
have changed.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expo_fast.reporting.jsonl import Row, has_step, read_rows

# What differs between two runs that are equal otherwise. The cursors of such runs are equal.
OF_THE_MACHINE = ("seconds", "idle")
OF_THE_MACHINE_PREFIXES = ("time/", "rank/")


@dataclass(frozen=True)
class Cursor:
    """The number of rows of a log, and a checksum of them."""

    rows: int
    sha256: str


class RowCounter:
    """Counts the rows of a log."""

    def __init__(self, rows: Iterable[Row] = ()):
        self._n_rows = 0
        self._digest = hashlib.sha256()
        self._last_step: int | None = None
        self._before_last = self.cursor()
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Add a row. Its times do not count."""
        if row["step"] != self._last_step:
            self._last_step = row["step"]
            self._before_last = self.cursor()
        kept = {}
        for name, value in row.items():
            if name not in OF_THE_MACHINE and not name.startswith(OF_THE_MACHINE_PREFIXES):
                kept[name] = value
        self._n_rows += 1
        self._digest.update(json.dumps(kept).encode() + b"\n")

    def cursor(self) -> Cursor:
        """Return the cursor behind the last row."""
        return Cursor(self._n_rows, self._digest.hexdigest())

    def cursor_before(self, step: int) -> Cursor:
        """Return the cursor behind the last row of an earlier step. No row is of a later one."""
        return self._before_last if step == self._last_step else self.cursor()


def damage_of(path: Path, cursor: Cursor, step: int) -> str | None:
    """Return how a log differs from its cursor at a step, as a predicate, None if it does not.

    Rows behind the cursor are no difference. They are of steps that a resume takes again.
    """
    rows: list[dict[str, Any]] = [row for row in read_rows(path) if has_step(row)]
    if RowCounter(rows[: cursor.rows]).cursor() == cursor:
        return None
    earlier = sum(row["step"] <= step for row in rows)
    if earlier < cursor.rows:
        return f"has {earlier} of its {cursor.rows} rows up to step {step}"
    return f"has other rows up to step {step} than when that step was saved"
