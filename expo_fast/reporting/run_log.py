"""The log files and the console of a run.

    RUN/metrics.jsonl              one object per step
    RUN/evaluations.jsonl          one object per evaluation
    RUN/completions/step-N.jsonl   the completions of step N
    RUN/tensorboard/               the scalars of both, with the tracker `tensorboard`

Other trackers are in `trackers.py`. A value that is missing or not finite is null. If a file cannot
be written, the run warns once and continues. What could not be written waits in memory, and is
written with the next row that the disk takes.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from expo_fast.reporting.console import ConsoleKind, open_console
from expo_fast.reporting.jsonl import Row, encode_row, has_step, json_value, read_lines
from expo_fast.reporting.log_cursor import Cursor, RowCounter
from expo_fast.reporting.trackers import TRACKERS, TrackedRun, Tracker
from expo_fast.storage.files import AppendedFile, PatientFiles, is_full, replace_file, write_file

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SHOWN_COMPLETIONS = 3
CONSOLE = "console"  # a kind of output, as are the names of files and trackers
WAITING_COMPLETIONS_BYTES = 256 << 20  # of completions that a full disk does not take


class RunLog:
    """The log of one run directory.

    run_dir: an existing folder.
    total_steps: number of steps of the run, for the progress and the time left.
    loop: key of `console.VIEWS`, which selects the metrics on the console.
    config: options of the run, for trackers that show them.
    console: "auto" is "live" on a terminal, otherwise "plain", which is one line per step.
    report_to: names of trackers, as in `trackers.TRACKERS`. They open with the first row.
    stream: output of the console. None: stdout.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        loop: str = "grpo",
        config: Mapping[str, Any] | None = None,
        console: ConsoleKind = "auto",
        report_to: Sequence[str] = ("tensorboard",),
        stream: TextIO | None = None,
    ):
        self._run_dir = run_dir
        self._metrics = AppendedFile(run_dir / METRICS)
        self._evaluations = AppendedFile(run_dir / EVALUATIONS)
        self._counters = {METRICS: RowCounter(), EVALUATIONS: RowCounter()}
        self._completions = PatientFiles(write_file, WAITING_COMPLETIONS_BYTES)
        self._failed: set[str] = set()  # kinds of output whose last attempt failed
        self._is_full = False  # whether the last failure was that of a full disk
        self._resumed_at: int | None = None
        self._console = open_console(console, stream or sys.stdout, total_steps, loop)
        self._config = config or {}
        self._report_to = [name for name in report_to if name != "none"]
        self._trackers: dict[str, Tracker] | None = None  # None before the first row

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits, stop the live panel and close the trackers."""
        self.flush()
        with self._failures_reported(CONSOLE):
            self._console.close()
        for name, tracker in (self._trackers or {}).items():
            with self._failures_reported(name, Exception):
                tracker.close()
        lost = self.lost_in_words()
        if lost:
            warnings.warn(f"{self._run_dir} lacks {lost}: the disk did not take them", stacklevel=2)

    def flush(self) -> bool:
        """Try to write what waits. Return whether a full disk still keeps something from it."""
        self._is_full = False
        with self._failures_reported(METRICS):
            self._metrics.flush()
        with self._failures_reported(EVALUATIONS):
            self._evaluations.flush()
        with self._failures_reported("completions"):
            self._completions.flush()
        for name, tracker in (self._trackers or {}).items():
            with self._failures_reported(name, Exception):
                tracker.flush()
        return self._is_full

    def lost_in_words(self) -> str:
        """Return what is not on the disk, "" if nothing is missing."""
        missing = {
            f"rows of {METRICS}": self._metrics.waiting,
            f"rows of {EVALUATIONS}": self._evaluations.waiting,
            "files of completions": self._completions.waiting + self._completions.forgotten,
        }
        return ", ".join(f"{count} {what}" for what, count in missing.items() if count)

    def write_step(self, row: Row) -> None:
        """Append a step's metrics. `row` has `step`. Numbers may be tensors or numpy scalars."""
        row = json_value(row)
        assert has_step(row), row
        self._counters[METRICS].add(row)
        with self._failures_reported(METRICS):
            self._metrics.append(encode_row(row))
        self._track_scalars("", row)
        with self._failures_reported(CONSOLE):
            self._console.show_step(row)

    def write_evaluation(self, row: Row) -> None:
        """Append an evaluation. `row` has `step`."""
        row = json_value(row)
        assert has_step(row), row
        self._counters[EVALUATIONS].add(row)
        with self._failures_reported(EVALUATIONS):
            self._evaluations.append(encode_row(row))
        self._track_scalars("eval/", row)
        with self._failures_reported(CONSOLE):
            self._console.show_evaluation(row)

    def write_completions(self, step: int, rows: Iterable[Row]) -> None:
        """Write completions/step-N.jsonl and show its last rows on the console.

        A row has `prompt`, `completion`, `reward` and may have other keys.
        """
        plain = [json_value(row) for row in rows]
        with self._failures_reported("completions"):
            path = self._run_dir / "completions" / f"step-{step}.jsonl"
            self._completions.write(path, b"".join(map(encode_row, plain)))
        self._track_completions(step, plain)
        with self._failures_reported(CONSOLE):
            self._console.show_completions(plain[-SHOWN_COMPLETIONS:])

    def note(self, text: str) -> None:
        """Show one line on the console, above the live panel."""
        with self._failures_reported(CONSOLE):
            self._console.note(text)

    def cursors(self, step: int) -> dict[str, Cursor]:
        """Return how far each log has come at a step, with the rows that wait for the disk.

        The evaluation after the step does not count: a signal may save the step before it.
        """
        return {
            METRICS: self._counters[METRICS].cursor(),
            EVALUATIONS: self._counters[EVALUATIONS].cursor_before(step),
        }

    def truncate_to(self, step: int, cursors: Mapping[str, Cursor] | None = None) -> None:
        """Remove log entries after `step`, because a run resumed there writes them again.

        Also remove a partial last line of a killed run. Raise OSError if that fails.

        cursors: how far each log had come at `step`. Rows behind it are removed, except that of an
        evaluation after `step`.
        """
        for name in (METRICS, EVALUATIONS):
            path = self._run_dir / name
            kept = b""
            counter = RowCounter()
            cursor = (cursors or {}).get(name)
            for line, row in _lines_up_to(step, path):
                is_evaluation = name == EVALUATIONS and row["step"] == step
                if cursor is None or counter.cursor().rows < cursor.rows or is_evaluation:
                    kept += line
                    counter.add(row)
            self._counters[name] = counter
            if path.exists() and kept != path.read_bytes():
                replace_file(path, kept)
        for path in (self._run_dir / "completions").glob("step-*.jsonl"):
            number = path.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                path.unlink()
        self._resumed_at = step

    def open_trackers(self) -> None:
        """Open the trackers, if they are not open.

        Raise ValueError if one of them refuses, such as wandb without a key.
        """
        if self._trackers is not None:
            return
        self._trackers = {}
        run = TrackedRun(self._run_dir, self._config, self._resumed_at)
        for name in self._report_to:
            try:
                with self._failures_reported(name):
                    self._trackers[name] = TRACKERS[name](run)
            except ModuleNotFoundError:
                self.note(f"{name} is not installed: metrics go to metrics.jsonl only")

    def _track_scalars(self, prefix: str, row: Row) -> None:
        self.open_trackers()
        for name, tracker in (self._trackers or {}).items():
            with self._failures_reported(name, Exception):
                tracker.scalars(prefix, row)

    def _track_completions(self, step: int, rows: Sequence[Row]) -> None:
        self.open_trackers()
        for name, tracker in (self._trackers or {}).items():
            with self._failures_reported(f"{name} completions", Exception):
                tracker.completions(step, rows)

    @contextmanager
    def _failures_reported(self, kind: str, errors: type[Exception] = OSError) -> Iterator[None]:
        """Convert an error to one warning, so that a full disk does not stop the training.

        The next warning of a kind comes after an attempt that succeeded.

        errors: classes to convert. Trackers raise classes of their own, for a lost connection.
        """
        try:
            yield
        except errors as error:
            self._is_full |= is_full(error)
            if kind not in self._failed:
                self._failed.add(kind)
                waits = "" if kind == CONSOLE else ", and writes them later if it can"
                warnings.warn(
                    f"{kind} of {self._run_dir} could not be written ({error}); training "
                    f"continues{waits}",
                    stacklevel=4,
                )
        else:
            if kind != CONSOLE:  # some consoles do nothing for some calls
                self._failed.discard(kind)


def _lines_up_to(step: int, path: Path) -> Iterator[tuple[bytes, Row]]:
    for line, row in read_lines(path):
        if has_step(row) and row["step"] <= step:
            yield line, row
