"""What a run writes about itself: JSON lines, TensorBoard scalars, and the console.

    RUN/metrics.jsonl              one object a step
    RUN/evaluations.jsonl          one object an evaluation
    RUN/completions/step-N.jsonl   what the model said
    RUN/tensorboard/               the same scalars

A value that is missing or not finite is null. A log that cannot be written is said once and costs
no training. Completions are hostile text: nothing in them reaches the terminal as a control code.
"""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

from expo_fast.storage.files import replace_file

Row = Mapping[str, Any]
LIVE = {  # label of the panel: metrics shown there, as far as the row has them
    "reward": ("reward", "reward_std", "frac_reward_zero_std"),
    "explanations": ("exp/rate", "exp/nll", "exp/lift", "exp/leak_rate"),
    "policy": ("kl", "entropy", "logp_gap/max"),
    "completions": ("completions/mean_length", "completions/clipped_ratio"),
    "gradient": ("grad_norm", "grad_norm/policy", "grad_norm/exp_sft", "learning_rate"),
}
PLAIN = {  # label in a plain line: metric
    "reward": "reward",
    "zero_std": "frac_reward_zero_std",
    "exp": "exp/rate",
    "nll": "exp/nll",
    "kl": "kl",
    "length": "completions/mean_length",
    "grad": "grad_norm",
    "lr": "learning_rate",
}
SHOWN_COMPLETIONS = 3


class Phases:
    """Seconds of host time by phase, summed; a phase inside another counts in both.

    A GPU's work counts in the phase that waits for it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            key = f"time/{name}"
            self._seconds[key] = self._seconds.get(key, 0.0) + self._clock() - start

    def seconds(self) -> dict[str, float]:
        """So far, keyed `time/NAME` as in metrics.jsonl."""
        return dict(self._seconds)


class RunLog:
    """The log of one run directory. `console="auto"`: live on a terminal, else a line a step."""

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        console: Literal["auto", "live", "plain", "quiet"] = "auto",
        tensorboard: bool = True,
        stream: TextIO | None = None,  # None: stdout
    ):
        self._run_dir = run_dir
        self._failed: set[str] = set()  # kinds of output that were said to fail
        self._resumed_at: int | None = None
        self._display = _display(console, stream or sys.stdout, total_steps)
        self._tensorboard = tensorboard
        self._scalars: Any = None  # torch's SummaryWriter, from the first row on

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._survive("console"):
            self._display.close()
        with self._survive("tensorboard"):
            if self._scalars:
                self._scalars.close()

    def write_step(self, row: Row) -> None:
        """Append a step's metrics; `row` has `step`. Numbers may be tensors or numpy scalars."""
        row = _plain(row)
        with self._survive("metrics.jsonl"):
            _append(self._run_dir / "metrics.jsonl", row)
        self._write_scalars("", row)
        with self._survive("console"):
            self._display.show_step(row)

    def write_evaluation(self, row: Row) -> None:
        """Append an evaluation; `row` has `step`."""
        row = _plain(row)
        with self._survive("evaluations.jsonl"):
            _append(self._run_dir / "evaluations.jsonl", row)
        self._write_scalars("eval/", row)
        numbers = "  ".join(f"{k} {_number(v)}" for k, v in row.items() if _is_number(v))
        self.note(f"evaluation: {numbers}")

    def write_completions(self, step: int, rows: Iterable[Row]) -> None:
        """Write completions/step-N.jsonl and show the last of them: `prompt`, `completion`,
        `reward` and whatever else a row has.
        """
        plain = [_plain(row) for row in rows]
        with self._survive("completions"):
            path = self._run_dir / "completions" / f"step-{step}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join(_line(row) for row in plain))
        with self._survive("console"):
            self._display.show_completions(plain[-SHOWN_COMPLETIONS:])

    def note(self, text: str) -> None:
        """Say one line on the console, above the live panel."""
        with self._survive("console"):
            self._display.note(text)

    def cursor(self) -> dict[str, int | None]:
        """The last step in metrics.jsonl and in evaluations.jsonl, None where there is none."""
        return {
            name: max((s for s, _ in _rows(self._run_dir / name)), default=None)
            for name in ("metrics.jsonl", "evaluations.jsonl")
        }

    def truncate_to(self, step: int) -> None:
        """Forget what was logged after `step`, as a run resumed there writes it again.

        Also mends the line that a killed run left unfinished. Raises OSError where it cannot.
        """
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            path = self._run_dir / name
            kept = b"".join(line for row_step, line in _rows(path) if row_step <= step)
            if path.exists() and kept != path.read_bytes():
                replace_file(path, kept)
        for path in (self._run_dir / "completions").glob("step-*.jsonl"):
            number = path.stem.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                path.unlink()
        self._resumed_at = step

    def _write_scalars(self, prefix: str, row: Row) -> None:
        with self._survive("tensorboard"):
            if self._tensorboard and self._scalars is None:
                self._open_tensorboard()
            if self._scalars:
                for key, value in row.items():
                    if key != "step" and _is_number(value):
                        self._scalars.add_scalar(prefix + key, value, row["step"])
                self._scalars.flush()

    def _open_tensorboard(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            self._tensorboard = False
            self.note("tensorboard is not installed: metrics go to metrics.jsonl only")
            return
        first = None if self._resumed_at is None else self._resumed_at + 1  # hides older rows of it
        self._scalars = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=first)

    @contextmanager
    def _survive(self, kind: str) -> Iterator[None]:
        """A full disk or a closed terminal is worth a warning, not the run."""
        try:
            yield
        except OSError as error:
            if kind not in self._failed:
                self._failed.add(kind)
                warnings.warn(
                    f"{kind} of {self._run_dir} could not be written ({error}); training goes on",
                    stacklevel=4,
                )


class _Quiet:
    """No console; what the two others start from."""

    def show_step(self, row: Row) -> None: ...
    def show_completions(self, rows: list[dict[str, Any]]) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


class _Lines(_Quiet):
    def __init__(self, stream: TextIO, total_steps: int):
        self._stream, self._pace = stream, _Pace(total_steps)

    def show_step(self, row: Row) -> None:
        tokens_per_s, left = self._pace.after(row)
        values = [f"{label} {_number(row[key])}" for label, key in PLAIN.items() if key in row]
        seconds = sum(v for k, v in row.items() if k.startswith("time/") and _is_number(v))
        tail = f"tok/s {_number(tokens_per_s)}  {seconds:.1f} s  left {left}"
        self.note("  ".join([f"step {row['step']}/{self._pace.total_steps}", *values, tail]))

    def note(self, text: str) -> None:
        print(_printable(text, self._stream), file=self._stream, flush=True)


class _Live(_Quiet):
    """One panel that stays at the bottom of a terminal, drawn again after each step."""

    def __init__(self, stream: TextIO, total_steps: int):
        from rich.console import Console
        from rich.live import Live

        self._stream, self._pace = stream, _Pace(total_steps)
        self._row: Row = {}
        self._speed: tuple[float | None, str] = (None, "-")
        self._completions: list[dict[str, Any]] = []
        self._live = Live(console=Console(file=stream), auto_refresh=False)
        self._live.start()

    def show_step(self, row: Row) -> None:
        self._row, self._speed = row, self._pace.after(row)
        self._live.update(self._panel(), refresh=True)

    def show_completions(self, rows: list[dict[str, Any]]) -> None:
        self._completions = rows
        if self._row:
            self._live.update(self._panel(), refresh=True)

    def note(self, text: str) -> None:
        self._live.console.print(_printable(text, self._stream), markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row, (tokens_per_s, left), total = self._row, self._speed, self._pace.total_steps
        table = Table.grid(padding=(0, 2))
        table.add_row("progress", ProgressBar(total=total, completed=row["step"], width=40))
        for label, keys in LIVE.items():
            table.add_row(label, Text(_shown({key: row[key] for key in keys if key in row})))
        table.add_row("tokens/s", Text(_number(tokens_per_s)))
        times = {k.removeprefix("time/"): v for k, v in row.items() if k.startswith("time/")}
        table.add_row("seconds", Text(_shown(times)))
        said = Table.grid(padding=(0, 2))
        for c in self._completions:
            prompt, text = (
                self._tail(str(c.get(key, "")), 160) for key in ("prompt", "completion")
            )
            said.add_row(Text(_number(c.get("reward"))), Text(f"{prompt}\n> {text}"))
        title = f"step {row['step']}/{total}, {left} left"
        return Panel(Group(table, said), title=title, title_align="left")

    def _tail(self, text: str, length: int) -> str:
        text = " ".join(text.split())
        text = text if len(text) <= length else "..." + text[-length:]
        return _printable(text, self._stream)


def _display(console: str, stream: TextIO, total_steps: int) -> _Quiet:
    if console == "quiet":
        return _Quiet()
    if console == "live" or (console == "auto" and stream.isatty()):
        try:
            return _Live(stream, total_steps)
        except ModuleNotFoundError:
            print("rich is not installed: one line a step instead of the panel", file=stream)
    return _Lines(stream, total_steps)


class _Pace:
    """Tokens per second of a step, and the time that the remaining steps need at the mean pace."""

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self._began = self._last = time.monotonic()
        self._steps = 0  # of this process: a resumed run starts at its own pace
        self._tokens: float | None = None  # cumulative, at the last row

    def after(self, row: Row) -> tuple[float | None, str]:
        now, tokens, per_s = time.monotonic(), row.get("num_tokens"), None
        if tokens is not None and self._tokens is not None and now > self._last:
            per_s = (tokens - self._tokens) / (now - self._last)
        self._last, self._tokens = now, tokens
        self._steps += 1
        left = (self.total_steps - row["step"]) * (now - self._began) / self._steps
        minutes, seconds = divmod(round(max(0.0, left)), 60)
        return per_s, f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _plain(value: Any) -> Any:
    """`value` as JSON has it: tensor and numpy scalars as numbers, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _append(path: Path, row: Row) -> None:
    """One row, durable. A write that fails half-way takes its half back."""
    assert isinstance(row["step"], int), row
    line = _line(row)
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes fit on the disk")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def _rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """(step, line) of each whole row; torn ones are left out."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)["step"], line + b"\n"
        except (ValueError, LookupError, TypeError):
            continue  # torn by a kill: truncate_to drops it


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    if not _is_number(value):
        return "-" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _shown(metrics: Row) -> str:
    return "  ".join(
        f"{key.removesuffix('/max').rpartition('/')[2]} {_number(v)}" for key, v in metrics.items()
    )


def _printable(text: str, stream: TextIO) -> str:
    """`text` on one line, with control, escape and bidirectional characters spelt out."""
    spelt = "".join(
        c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode()
        for c in text
    )
    encoding = stream.encoding or "utf-8"
    return spelt.encode(encoding, "backslashreplace").decode(encoding)
