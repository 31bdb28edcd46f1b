"""Trackers: tools that record a run's metrics beside metrics.jsonl, chosen by `report_to`.

    tensorboard   scalars in RUN/tensorboard
    wandb         scalars and a table of completions; WANDB_MODE, WANDB_PROJECT and others apply
    trackio       the same as for wandb; TRACKIO_DIR and TRACKIO_SPACE_ID apply

Scalars have the names of metrics.jsonl, and those of evaluations begin with `eval/`. To wandb and
trackio, a metric that TRL logs with the same meaning also goes under the name that TRL's runs have
there, such as `train/reward`, so that panels made for TRL show these runs.
"""

import io
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from expo_fast.reporting.jsonl import Row
from expo_fast.reporting.metric_table import trl_names
from expo_fast.reporting.text import is_number
from expo_fast.storage.files import AppendedFile

PROJECT = "expo_fast"  # default of WANDB_PROJECT and TRACKIO_PROJECT
REQUIRED_PACKAGES = {"wandb": "wandb", "trackio": "trackio"}


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker needs to know of the run."""

    run_dir: Path
    config: Mapping[str, Any]
    resumed_at: int | None = None
    """Step that the run was resumed from; None: it was not resumed."""


class Tracker:
    """Base class of trackers, which records nothing."""

    def scalars(self, prefix: str, row: Row) -> None:
        """Record the numbers of a row, with the prefix before their names."""

    def completions(self, step: int, rows: Sequence[Row]) -> None:
        """Record the completions of a step as a table, if the tracker has tables."""

    def flush(self) -> None:
        """Try again to write what a full disk did not take."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard(Tracker):
    """Scalars for TensorBoard.

    The file of events is written here, and not by TensorBoard's writer. Its thread ends with a
    traceback when the disk is full, and loses all later events.

    Raise ModuleNotFoundError if it is not installed.
    """

    def __init__(self, run: TrackedRun):
        from tensorboard.compat.proto import event_pb2, summary_pb2

        events: Any = event_pb2  # a type checker does not see the classes of protobuf
        summaries: Any = summary_pb2
        self._event = events.Event
        self._summary = summaries.Summary
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = AppendedFile(run.run_dir / "tensorboard" / name)
        self._file.queue(self._record(file_version="brain.Event:2"))
        if run.resumed_at is not None:
            # TensorBoard then hides later rows in the files of earlier processes.
            started = events.SessionLog(status=events.SessionLog.START)
            self._file.queue(self._record(step=run.resumed_at + 1, session_log=started))

    def _record(self, **values: Any) -> bytes:
        """Return an event as a file of events holds it."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        event = self._event(wall_time=time.time(), **values)
        RecordWriter(record).write(event.SerializeToString())
        return record.getvalue()

    def scalars(self, prefix: str, row: Row) -> None:
        values = []
        for key, value in row.items():
            if key != "step" and is_number(value):
                values.append(self._summary.Value(tag=prefix + key, simple_value=value))
        self._file.queue(self._record(step=row["step"], summary=self._summary(value=values)))
        self.flush()

    def flush(self) -> None:
        self._file.path.parent.mkdir(exist_ok=True)
        self._file.flush()

    def close(self) -> None:
        self.flush()


class Wandb(Tracker):
    """Scalars and tables of completions for Weights & Biases."""

    def __init__(self, run: TrackedRun):
        import wandb  # pyright: ignore[reportMissingImports]

        self._wandb = wandb
        id_file = run.run_dir / "wandb.id"
        known = id_file.read_text().strip() if id_file.exists() else None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.run_dir.name,
                dir=str(run.run_dir),
                config=dict(run.config),
                id=known,
                resume="allow",
            )
        except Exception as error:  # wandb's own classes: no key, no network, no such project
            raise ValueError(
                f"report_to='wandb': {error}: log in with `wandb login`, set WANDB_MODE=offline, "
                "or leave wandb out"
            ) from error
        id_file.write_text(self._run.id)
        # A resumed run logs steps again. wandb refuses a lower number of its own step, so the
        # step is a metric, and the other metrics are plotted against it.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, prefix: str, row: Row) -> None:
        self._run.log({"step": row["step"], **_named(prefix, row)})

    def completions(self, step: int, rows: Sequence[Row]) -> None:
        columns, data = _table(step, rows)
        if data:
            table = self._wandb.Table(columns=columns, data=data)
            self._run.log({"step": step, "completions": table})

    def close(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    """Scalars and tables of completions for Trackio."""

    def __init__(self, run: TrackedRun):
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=run.run_dir.name,
            config=dict(run.config),
            resume="allow",
        )

    def scalars(self, prefix: str, row: Row) -> None:
        self._trackio.log(_named(prefix, row), step=row["step"])

    def completions(self, step: int, rows: Sequence[Row]) -> None:
        import pandas

        columns, data = _table(step, rows)
        if data:
            frame = pandas.DataFrame(data, columns=columns)
            self._trackio.log({"completions": self._trackio.Table(dataframe=frame)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise ValueError if a tracker is chosen whose package is not installed."""
    for name in report_to:
        package = REQUIRED_PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise ValueError(
                f"report_to={name!r}: {package} is not installed: `pip install {package}`, or "
                "choose another tracker"
            )


def _named(prefix: str, row: Row) -> dict[str, Any]:
    """Return the numbers of a row under our names and, for steps, under those of TRL's runs."""
    named = {}
    for key, value in row.items():
        if key == "step" or not is_number(value):
            continue
        named[prefix + key] = value
        if not prefix:
            for alias in trl_names(key):
                named[f"train/{alias}"] = value
    return named


def _table(step: int, rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and the data of a table of completions.

    A column that differs in type between rows, such as the answers, is converted to text. Columns
    of reward functions follow, as in TRL's table.
    """
    functions: dict[str, None] = {}
    for row in rows:
        functions |= dict.fromkeys(row.get("rewards") or ())
    texts = ["kind", "prompt", "answer", "completion"]
    numbers = ["reward", "advantage"]
    data = []
    for row in rows:
        by_function = row.get("rewards") or {}
        line: list[Any] = [step]
        line += [str(row.get(name, "")) for name in texts]
        line += [row.get(name) for name in numbers]
        line += [by_function.get(name) for name in functions]
        data.append(line)
    return ["step", *texts, *numbers, *functions], data
