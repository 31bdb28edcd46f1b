"""JSON Lines files that survive a killed process: readers skip partial lines."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def json_value(value: Any) -> Any:
    """Convert a value to JSON values.

    Tensor and numpy scalars become numbers. NaN and infinities become None. Keys become strings.
    """
    if isinstance(value, Mapping):
        return {str(key): json_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def encode_row(row: Row) -> bytes:
    """Return the row as one line. Raise ValueError for a number that is not finite."""
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of the file; see `read_lines`."""
    for _, row in read_lines(path):
        yield row


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each complete line that holds a JSON object, with its line feed, and the object.

    Other lines, left by a killed process, are skipped. A file that does not exist has no lines.
    """
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # the latter for thousands of nested lists
            continue
        if isinstance(row, dict):
            yield line + b"\n", row


def has_step(row: Row) -> bool:
    """Return whether the row has an integer `step`, as all rows of a run's files have."""
    return type(row.get("step")) is int
