"""The completions that the report's reader can filter and search.

A report has at most `MOST_BYTES` of them: of each run the first and the last step, then steps
between them, evenly spread.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expo_fast.reporting.jsonl import Row, read_rows
from expo_fast.reporting.runs import Group, Run, number
from expo_fast.reporting.text import shown_text

MOST_BYTES = 2_000_000
KIND_LABELS = {
    "own": "own attempt",
    "explanation": "accepted explanation",
    "expert": "expert's solution",
}


@dataclass
class Samples:
    """Completions as JSON values, in which a question that several of them share occurs once."""

    runs: list[dict[str, str]] = field(default_factory=list)
    """`name`, `method` and `seed` of each run."""
    questions: list[list[Any]] = field(default_factory=list)
    """Prompt, answer and level."""
    completions: list[list[Any]] = field(default_factory=list)
    """Index of the run, step, kind, reward, reason of the end, index of the question, text."""
    left_out: int = 0
    """Number of steps whose completions did not fit."""
    _places: dict[str, int] = field(default_factory=dict)

    def add(self, run: int, step: int, row: Row) -> int:
        """Add a completion and return its size in bytes."""
        size = 0
        level = number(row, "level")
        question = [shown_text(row.get("prompt")), shown_text(row.get("answer"), 200), level]
        key = json.dumps(question)
        if key not in self._places:
            self._places[key] = len(self.questions)
            self.questions.append(question)
            size += len(key)
        finish = row.get("finish_reason")
        completion = [
            run,
            step,
            shown_text(row.get("kind"), 40),
            number(row, "reward"),
            finish if finish == "length" else None,
            self._places[key],
            shown_text(row.get("completion")),
        ]
        self.completions.append(completion)
        return size + len(json.dumps(completion))


def collect(groups: Sequence[Group]) -> Samples:
    """Return completions of all runs, within `MOST_BYTES`."""
    found = Samples()
    n_runs = sum(len(group.runs) for group in groups)
    for group in groups:
        for run in group.runs:
            seed = shown_text(run.config.get("seed", "?"), 20)
            method = shown_text(run.config.get("method", "run"), 40)
            name = f"{group.name}, seed {seed}"
            found.runs.append({"name": name, "method": method, "seed": seed})
            _add_run(found, run, most_bytes=MOST_BYTES // n_runs)
    found.completions.sort(key=lambda row: (row[0], row[1]))  # stable: in the order of the files
    return found


def _add_run(found: Samples, run: Run, most_bytes: int) -> None:
    index = len(found.runs) - 1
    files = _files_by_step(run)
    size = 0
    for step in _spread_order(sorted(files)):
        if size >= most_bytes:
            found.left_out += 1
            continue
        for row in read_rows(files[step]):
            if size < most_bytes:
                size += found.add(index, step, row)


def _files_by_step(run: Run) -> dict[int, Path]:
    files: dict[int, Path] = {}
    for file in Path(run.path, "completions").glob("step-*.jsonl"):
        step = file.stem.removeprefix("step-")
        if step.isdecimal():
            files[int(step)] = file
    return files


def _spread_order(steps: Sequence[int]) -> Iterator[int]:
    """Yield each step once: the first, the last, and then the middles of the gaps."""
    if not steps:
        return
    yield steps[0]
    if len(steps) > 1:
        yield steps[-1]
    gaps = [(0, len(steps) - 1)]
    while gaps:
        next_gaps = []
        for low, high in gaps:
            middle = (low + high) // 2
            if middle > low:
                yield steps[middle]
                next_gaps += [(low, middle), (middle, high)]
        gaps = next_gaps
