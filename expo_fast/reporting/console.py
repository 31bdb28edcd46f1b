"""Console output of a training run: none, one line per step, or a live panel.

Completions are untrusted text. Their control characters are escaped.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from expo_fast.reporting.jsonl import Row
from expo_fast.reporting.text import is_number, printable, short_number, short_numbers

ConsoleKind = Literal["auto", "live", "plain", "quiet"]

GRADIENT = ("grad_norm", "grad_norm/policy", "grad_norm/exp_sft", "learning_rate")
ATTEMPTS = ("reward", "reward_std", "frac_reward_zero_std")
EXPLANATIONS = ("exp/rate", "exp/nll", "exp/lift", "exp/leak_rate")
COMPLETIONS = ("completions/mean_length", "completions/clipped_ratio")


@dataclass(frozen=True)
class View:
    """The metrics that the console shows of a loop. A metric without a value is left out."""

    panel: dict[str, tuple[str, ...]]  # label of a row of the panel: metrics shown in it
    line: dict[str, str]  # label in a plain line: metric


VIEWS = {  # by the loop of the method, as in `methods.MethodSpec`
    "grpo": View(
        panel={
            "reward": ATTEMPTS,
            "explanations": EXPLANATIONS,
            "policy": ("kl", "entropy", "logp_gap/max"),
            "completions": COMPLETIONS,
            "gradient": GRADIENT,
        },
        line={
            "reward": "reward",
            "zero_std": "frac_reward_zero_std",
            "exp": "exp/rate",
            "nll": "exp/nll",
            "kl": "kl",
            "length": "completions/mean_length",
            "grad": "grad_norm",
            "lr": "learning_rate",
        },
    ),
    "dpo": View(
        panel={
            "loss": ("loss",),
            "pairs": ("pairs", "rewards/margins", "rewards/accuracies"),
            "log-probs": ("logps/chosen", "logps/rejected"),
            "attempts": ATTEMPTS,
            "explanations": EXPLANATIONS,
            "completions": COMPLETIONS,
            "gradient": GRADIENT,
        },
        line={
            "loss": "loss",
            "pairs": "pairs",
            "margin": "rewards/margins",
            "accuracy": "rewards/accuracies",
            "chosen": "logps/chosen",
            "rejected": "logps/rejected",
            "grad": "grad_norm",
            "lr": "learning_rate",
        },
    ),
    "sft": View(
        panel={
            "loss": ("loss", "expert/nll"),
            "data": ("num_tokens",),
            "gradient": GRADIENT,
        },
        line={
            "loss": "loss",
            "nll": "expert/nll",
            "tokens": "num_tokens",
            "grad": "grad_norm",
            "lr": "learning_rate",
        },
    ),
}
PROMPT_CHARACTERS = 160  # of a prompt or completion in the panel; a longer one shows its end


@dataclass(frozen=True)
class Speed:
    """The speed of a run after one of its steps."""

    tokens_per_s: float | None  # None after the first step
    time_left: str  # H:MM:SS


class Pace:
    """Measure the speed of a run.

    Tokens per second are of the last step. The time left assumes that the remaining steps take the
    mean time of this process's steps, without those before a resume.
    """

    def __init__(self, total_steps: int):
        self.total_steps = total_steps
        self._start = time.monotonic()
        self._last = self._start
        self._steps = 0
        self._tokens: float | None = None  # cumulative number at the last step

    def after(self, row: Row) -> Speed:
        """Return the speed after the step with these metrics."""
        now = time.monotonic()
        tokens = row.get("num_tokens")
        tokens_per_s = None
        if tokens is not None and self._tokens is not None and now > self._last:
            tokens_per_s = (tokens - self._tokens) / (now - self._last)
        self._last = now
        self._tokens = tokens
        self._steps += 1
        remaining = self.total_steps - row["step"]
        left = remaining * (now - self._start) / self._steps
        return Speed(tokens_per_s, _hours(left))


def _hours(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class QuietConsole:
    """A console that shows nothing, and the base class of the others."""

    def show_step(self, row: Row) -> None:
        """Show a step's metrics."""

    def show_evaluation(self, row: Row) -> None:
        """Show an evaluation's numbers as one line."""
        numbers = [f"{key} {short_number(x)}" for key, x in row.items() if is_number(x)]
        self.note(f"evaluation: {'  '.join(numbers)}")

    def show_completions(self, rows: Sequence[Row]) -> None:
        """Show `prompt`, `completion` and `reward` of a few samples."""

    def note(self, text: str) -> None:
        """Show one line."""

    def close(self) -> None:
        """Restore the terminal's usual state."""


class LineConsole(QuietConsole):
    """A console that shows one line per step."""

    def __init__(self, stream: TextIO, total_steps: int, view: View):
        self._stream = stream
        self._pace = Pace(total_steps)
        self._view = view

    def show_step(self, row: Row) -> None:
        speed = self._pace.after(row)
        parts = [f"step {row['step']}/{self._pace.total_steps}"]
        for label, key in self._view.line.items():
            if row.get(key) is not None:
                parts.append(f"{label} {short_number(row[key])}")
        times = _times(row)
        if speed.tokens_per_s is not None:
            parts.append(f"tok/s {short_number(speed.tokens_per_s)}")
        parts.append(f"{sum(times.values()):.1f} s")
        parts.append(f"left {speed.time_left}")
        self.note("  ".join(parts))

    def note(self, text: str) -> None:
        line = _encodable(printable(text), self._stream)
        print(line, file=self._stream, flush=True)


class LiveConsole(QuietConsole):
    """A console with a panel at the bottom of a terminal, which is drawn again after each step.

    Raise ModuleNotFoundError if rich is not installed.
    """

    def __init__(self, stream: TextIO, total_steps: int, view: View):
        from rich.console import Console
        from rich.live import Live

        self._stream = stream
        self._pace = Pace(total_steps)
        self._view = view
        self._row: Row = {}
        self._speed = Speed(None, "-")
        self._completions: Sequence[Row] = []
        self._live = Live(console=Console(file=stream), auto_refresh=False)
        self._live.start()

    def show_step(self, row: Row) -> None:
        self._row = row
        self._speed = self._pace.after(row)
        self._live.update(self._panel(), refresh=True)

    def show_completions(self, rows: Sequence[Row]) -> None:
        self._completions = rows
        if self._row:
            self._live.update(self._panel(), refresh=True)

    def note(self, text: str) -> None:
        line = _encodable(printable(text), self._stream)
        self._live.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _panel(self) -> Any:
        from rich.console import Group
        from rich.panel import Panel

        step = f"step {self._row['step']}/{self._pace.total_steps}"
        title = f"{step}, {self._speed.time_left} left"
        content = Group(self._metrics(), self._samples())
        return Panel(content, title=title, title_align="left")

    def _metrics(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        row = self._row
        bar = ProgressBar(total=self._pace.total_steps, completed=row["step"], width=40)
        table = Table.grid(padding=(0, 2))
        table.add_row("progress", bar)
        for label, keys in self._view.panel.items():
            known = {key: row[key] for key in keys if row.get(key) is not None}
            if known:
                table.add_row(label, Text(short_numbers(known)))
        if self._speed.tokens_per_s is not None:
            table.add_row("tokens/s", Text(short_number(self._speed.tokens_per_s)))
        times = _times(row)
        if times:
            table.add_row("seconds", Text(short_numbers(times)))
        return table

    def _samples(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for sample in self._completions:
            prompt = self._end_of(sample.get("prompt", ""))
            completion = self._end_of(sample.get("completion", ""))
            label = sample.get("reward")
            if label is None:  # texts of the data and explanations have no reward
                label = sample.get("kind", "")
            table.add_row(Text(short_number(label)), Text(f"{prompt}\n> {completion}"))
        return table

    def _end_of(self, value: Any) -> str:
        text = " ".join(str(value).split())
        if len(text) > PROMPT_CHARACTERS:
            text = "..." + text[-PROMPT_CHARACTERS:]
        return _encodable(printable(text), self._stream)


def open_console(
    kind: ConsoleKind, stream: TextIO, total_steps: int, loop: str = "grpo"
) -> QuietConsole:
    """Return a console. "auto" is a panel on a terminal, otherwise one line per step.

    loop: key of `VIEWS`, which selects the metrics.

    Without rich, show one line per step and say so once.
    """
    if kind == "quiet":
        return QuietConsole()
    if kind == "live" or (kind == "auto" and stream.isatty()):
        try:
            return LiveConsole(stream, total_steps, VIEWS[loop])
        except ModuleNotFoundError:
            print("rich is not installed: one line per step instead of a panel", file=stream)
    return LineConsole(stream, total_steps, VIEWS[loop])


def _times(row: Row) -> dict[str, Any]:
    return {key: x for key, x in row.items() if key.startswith("time/") and is_number(x)}


def _encodable(text: str, stream: TextIO) -> str:
    """Return the text. Characters that the stream's encoding lacks are escaped."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
