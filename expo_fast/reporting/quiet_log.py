"""The log of a rank that writes no files: rank 0 writes those of all ranks."""

from collections.abc import Iterable, Mapping
from typing import Any

from expo_fast.reporting.jsonl import Row
from expo_fast.reporting.log_cursor import Cursor
from expo_fast.reporting.run_log import RunLog


class QuietLog(RunLog):
    """A log that writes and prints nothing. It opens no console, which would draw a live panel."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def close(self) -> None:
        pass

    def write_step(self, row: Row) -> None:
        pass

    def write_evaluation(self, row: Row) -> None:
        pass

    def write_completions(self, step: int, rows: Iterable[Row]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def truncate_to(self, step: int, cursors: Mapping[str, Cursor] | None = None) -> None:
        pass

    def open_trackers(self) -> None:
        pass

    def flush(self) -> bool:
        return False
