"""Training runs read from their log files, grouped by configuration.

The reader accepts files of other versions. Unknown fields and metrics are kept, and missing ones
are left out.
"""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from expo_fast.config import ADJUSTABLE
from expo_fast.reporting.jsonl import Row, has_step, read_rows
from expo_fast.reporting.text import is_number, shown_text

INEXACT = "# inexact: "  # begins a comment of config.toml that says why a run is inexact
# Fields in which runs of one configuration may differ. `steps` is not one of them, because the
# learning-rate schedule depends on it.
FREE_FIELDS = {"seed", *ADJUSTABLE} - {"steps"}


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: str  # as given by the user
    config: dict[str, Any]
    steps: list[Row]  # rows of metrics.jsonl, in the order of the steps
    evaluations: list[Row]  # rows of evaluations.jsonl, by step
    inexact: tuple[str, ...] = ()  # why it may not equal an uninterrupted run

    @property
    def before(self) -> Row:
        """The evaluation before the first step, empty if there is none."""
        for row in self.evaluations:
            if row["step"] == 0:
                return row
        return {}

    @property
    def after(self) -> Row:
        """The last evaluation after a step, empty if there is none."""
        if self.evaluations and self.evaluations[-1]["step"] > 0:
            return self.evaluations[-1]
        return {}

    @property
    def samples(self) -> int | None:
        """K of pass@K in the last evaluation."""
        if not self.evaluations:
            return None
        samples = number(self.evaluations[-1], "samples")
        return None if samples is None else int(samples)


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, which may have different seeds."""

    name: str
    runs: list[Run]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the first run. Others may differ only in `FREE_FIELDS`."""
        return self.runs[0].config

    @property
    def steps(self) -> list[Row]:
        """The steps of all runs."""
        return [row for run in self.runs for row in run.steps]

    @property
    def evaluations(self) -> list[Row]:
        """The evaluations of all runs."""
        return [row for run in self.runs for row in run.evaluations]

    @property
    def seconds_by_phase(self) -> dict[str, float]:
        """Host seconds of each phase, summed over all steps of all runs."""
        steps = self.steps
        keys = dict.fromkeys(key for row in steps for key in row if key.startswith("time/"))
        return {key.removeprefix("time/"): sum(numbers(steps, key)) for key in keys}


@dataclass(frozen=True)
class Spread:
    """The mean of a number over runs, and its range.

    For a single run, low and high are its interval over questions, if it has one.
    """

    mean: float
    low: float | None
    high: float | None
    n_runs: int


def load_run(name: str) -> Run:
    """Return the run in the folder `name`.

    Raise FileNotFoundError if it is not the folder of a run, and ValueError if its configuration is
    not TOML or no step was logged.
    """
    path = Path(name)
    for file in ("config.toml", "metrics.jsonl"):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{name!r} is not the folder of a run: it has no {file}")
    try:  # not cli.flags.from_toml, because other versions have other fields
        text = (path / "config.toml").read_bytes().decode()
        config = tomllib.loads(text)
    except ValueError as error:
        raise ValueError(f"{path / 'config.toml'} is not TOML: {error}") from None
    steps = _rows_by_step(path / "metrics.jsonl")
    if not steps:
        raise ValueError(f"{name!r} has no logged step: need at least one")
    evaluations = _rows_by_step(path / "evaluations.jsonl")
    reasons = []
    for line in text.splitlines():
        if line.startswith(INEXACT):
            reasons.append(line.removeprefix(INEXACT))
    return Run(name, config, steps, evaluations, tuple(reasons))


def _rows_by_step(path: Path) -> list[Row]:
    """Return the file's rows, sorted by step. Only the last row of each step is kept."""
    rows = {row["step"]: row for row in read_rows(path) if has_step(row)}
    return [rows[step] for step in sorted(rows)]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Return the runs grouped by configuration, in the order of their first runs."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        fields = {key: repr(x) for key, x in run.config.items() if key not in FREE_FIELDS}
        identity = repr(sorted(fields.items()))
        members.setdefault(identity, []).append(run)
    groups = []
    for position, same in enumerate(members.values(), start=1):
        method = shown_text(same[0].config.get("method", "run"), 40)
        name = f"{position}. {' '.join(method.split())}"
        groups.append(Group(name, same))
    return groups


def differing_fields(groups: Sequence[Group]) -> list[str]:
    """Return the fields, except the method, that differ between the configurations."""
    hidden = FREE_FIELDS | {"method"}
    differing = []
    for name in dict.fromkeys(name for group in groups for name in group.config):
        values = {repr(group.config.get(name)) for group in groups}
        if name not in hidden and len(values) > 1:
            differing.append(name)
    return differing


def number(row: Row, key: str) -> float | None:
    """Return the row's value if it is a finite number below 1e300, otherwise None."""
    return _finite(row.get(key))


def _finite(value: Any) -> float | None:
    if is_number(value) and abs(value) < 1e300:
        return float(value)
    return None


def numbers(rows: Iterable[Row], key: str) -> list[float]:
    """Return the row's numbers under the key, without missing ones."""
    found = (number(row, key) for row in rows)
    return [x for x in found if x is not None]


def spread(rows: Sequence[Row], key: str) -> Spread | None:
    """Return the spread of a number over rows, one row per run, or None if no row has it."""
    rows = [row for row in rows if number(row, key) is not None]
    values = numbers(rows, key)
    if not values:
        return None
    if len(values) > 1:
        return Spread(fmean(values), min(values), max(values), len(values))
    low, high = _interval(rows[0], key)
    return Spread(values[0], low, high, 1)


def _interval(row: Row, key: str) -> tuple[float | None, float | None]:
    ends = row.get(f"{key}/interval")
    if isinstance(ends, list) and len(ends) == 2:
        return _finite(ends[0]), _finite(ends[1])
    return None, None


def level_rows(evaluation: Mapping[str, Any]) -> list[Row]:
    """Return the rows of an evaluation for each level of problems."""
    rows = evaluation.get("levels")
    if not isinstance(rows, list):
        return []
    return [row for row in rows if isinstance(row, dict)]


def row_of_level(evaluation: Row, level: int) -> Row:
    """Return the row of an evaluation for one level, empty if it has none."""
    for row in level_rows(evaluation):
        if row.get("level") == level:
            return row
    return {}
