"""The figures of training runs: numbers from their records, and curves over steps as inline SVG.

The same numbers give the same bytes. Ink is the page's text colour and the ground is the page's
own, so that a curve reads on light and dark pages and on paper. Labels are text, never parsed as
mathematics: a `$` is a `$`.
"""

import io
import json
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from expo_fast.config import ADJUSTABLE

Row = Mapping[str, Any]
INK = "#010203"  # stands for the page's text colour until the SVG is made
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
COLORS += ("#6b4226", "#7f7f7f")
DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 3.6, 2.7  # inches, of a panel
SPARSE = 40  # a curve of so few points has each of them marked
CROWDED = 6  # curves that can be told apart on one pair of axes
LONGEST = 1200  # characters shown of a text
# the number of steps makes another configuration: the schedule ends elsewhere
SAME = {"seed", *ADJUSTABLE} - {"steps"}


@dataclass(frozen=True)
class Run:
    path: str  # as given
    config: dict[str, Any]
    steps: list[Row]  # of metrics.jsonl, in order
    evaluations: list[Row]  # in order

    @property
    def before(self) -> Row:
        return next((row for row in self.evaluations if row["step"] == 0), {})

    @property
    def after(self) -> Row:
        return next((row for row in reversed(self.evaluations) if row["step"] > 0), {})

    @property
    def samples(self) -> int | None:
        """K of pass@K in the last evaluation."""
        k = number(self.evaluations[-1], "samples") if self.evaluations else None
        return None if k is None else int(k)


@dataclass(frozen=True)
class Group:
    """One configuration, run once or with several seeds."""

    name: str
    runs: list[Run]

    @property
    def steps(self) -> list[Row]:
        return [row for r in self.runs for row in r.steps]

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, summed over all steps of all runs."""
        keys = dict.fromkeys(key for row in self.steps for key in row if key.startswith("time/"))
        return {key.removeprefix("time/"): sum(numbers(self.steps, key)) for key in keys}


class Spread(NamedTuple):
    """The mean over runs and their range; of a single run, its interval over questions."""

    mean: float
    low: float | None
    high: float | None
    n: int  # runs


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows."""

    title: str
    unit: str
    metrics: dict[str, str]  # name in the record: label
    held_out: bool = False  # of the evaluations, not of the steps
    log: bool = False  # only what is more than 0 can be drawn
    zero: bool = False  # with a line there
    alone: str = ""  # the one configuration that is shown, of several


@dataclass(frozen=True)
class Curve:
    """One metric of one configuration; all lists are one value a point."""

    owner: int  # index of the configuration
    metric: str
    steps: list[int]
    middle: list[float]
    low: list[float]
    high: list[float]


LEARNING = (
    Panel("Held-out pass@1", "share", {"pass@1": "pass@1"}, held_out=True, zero=True),
    Panel("Reward", "mean of the step", {"reward": "reward"}, zero=True),
    Panel("Questions that all fail", "share", {"frac_all_fail": "all samples fail"}, zero=True),
)
PROPERTIES = (
    Panel(
        "(a) Negative log-likelihood",
        "nats a token",
        {"exp/nll": "explanation", "expert/nll": "expert", "own/nll": "own attempt"},
        zero=True,
    ),
    Panel(
        "(b) Lift of the right answer",
        "nats",
        {"exp/lift": "lift", "exp/lift_stated": "lift, answer stated"},
        zero=True,
    ),
)
UPDATES = (
    Panel(
        "Gradient norm",
        "",
        {"grad_norm/policy": "policy", "grad_norm/exp_sft": "SFT"},
        log=True,
    ),
    Panel(
        "Texts that lean on a given answer",
        "share",
        {"exp/leak_rate": "right explanations", "own/leak_rate": "own attempts"},
        zero=True,
    ),
    Panel("Right explanations rejected", "share", {"exp/unfit_rate": "unfit"}, zero=True),
    Panel("Questions with an accepted explanation", "share", {"exp/rate": "accepted"}, zero=True),
)
PREFERENCES = (
    Panel(
        "Rewards", "nats", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, zero=True
    ),
    Panel("Margin", "nats", {"rewards/margins": "chosen - rejected"}, zero=True),
    Panel("Pairs ordered right", "share", {"rewards/accuracies": "accuracy"}, zero=True),
    Panel("Log-probability", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
)


def load_run(name: str) -> Run:
    path = Path(name)
    for file in ("config.toml", "metrics.jsonl"):
        if not (path / file).is_file():
            raise FileNotFoundError(f"{name!r} is no folder of a run: it has no {file}")
    try:  # no from_toml: other versions have other fields
        config = tomllib.loads((path / "config.toml").read_bytes().decode())
    except ValueError as error:
        raise ValueError(f"{path / 'config.toml'} is not TOML: {error}") from None
    steps = by_step(path / "metrics.jsonl")
    if not steps:
        raise ValueError(f"{name!r} has no step logged")
    return Run(name, config, steps, by_step(path / "evaluations.jsonl"))


def by_step(path: Path) -> list[Row]:
    rows = {row["step"]: row for row in read_rows(path) if type(row.get("step")) is int}
    return [rows[step] for step in sorted(rows)]


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, if it is there; lines that a kill has torn are left out."""
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Configurations in the order in which they first appear."""
    found: dict[str, list[Run]] = {}
    for r in runs:
        identity = sorted((k, repr(v)) for k, v in r.config.items() if k not in SAME)
        found.setdefault(repr(identity), []).append(r)
    methods = [spelt(r[0].config.get("method", "run"), 40) for r in found.values()]
    names = [f"{i}. {' '.join(method.split())}" for i, method in enumerate(methods, 1)]
    return [Group(name, members) for name, members in zip(names, found.values(), strict=True)]


def differing(groups: Sequence[Group]) -> list[str]:
    """Fields, other than the method, that are not the same in all configurations."""
    configs = [g.runs[0].config for g in groups]
    names = dict.fromkeys(k for c in configs for k in c if k not in SAME and k != "method")
    return [k for k in names if len({repr(c.get(k)) for c in configs}) > 1]


def spelt(value: Any, longest: int = LONGEST) -> str:
    """Text without control, escape and bidirectional characters, which are spelt out."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    more = f" ... and {len(text) - longest} characters more" if len(text) > longest else ""
    return "".join(map(_spelt_character, text[:longest])) + more


def _spelt_character(c: str) -> str:
    if c.isprintable() or c == "\n":
        return c
    space = c == "\t" or unicodedata.category(c).startswith("Z")
    return " " if space else c.encode("unicode_escape").decode()


def number(row: Row, key: str) -> float | None:
    return _finite(row.get(key))


def _finite(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and abs(value) < 1e300 else None


def numbers(rows: Iterable[Row], key: str) -> list[float]:
    return [x for row in rows if (x := number(row, key)) is not None]


def spread(rows: Sequence[Row], key: str) -> Spread | None:
    """Of one row a run; None where no row has the number."""
    rows = [row for row in rows if number(row, key) is not None]
    values = numbers(rows, key)
    if len(values) != 1:
        return Spread(fmean(values), min(values), max(values), len(values)) if values else None
    ends = rows[0].get(f"{key}/interval")
    low, high = map(_finite, ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return Spread(values[0], low, high, 1)


def curves(groups: Sequence[Group], panel: Panel) -> list[Curve]:
    """Of each metric and configuration that has a number to draw."""
    found = []
    for owner, g in enumerate(groups):
        rows = [row for r in g.runs for row in (r.evaluations if panel.held_out else r.steps)]
        for metric in panel.metrics:
            at: dict[int, list[Row]] = {}
            for row in rows:
                x = number(row, metric)
                if x is not None and (x > 0 or not panel.log):
                    at.setdefault(row["step"], []).append(row)
            points = {step: x for step in sorted(at) if (x := spread(at[step], metric))}
            if points:
                found.append(_curve(owner, metric, points, len(g.runs)))
    return found


def _curve(owner: int, metric: str, points: Mapping[int, Spread], n_runs: int) -> Curve:
    middle, low, high = [], [], []
    for x in points.values():
        odd = x.n < n_runs and x.n == 1  # its interval over questions is no range over runs
        middle.append(x.mean)
        low.append(x.mean if odd or x.low is None else x.low)
        high.append(x.mean if odd or x.high is None else x.high)
    return Curve(owner, metric, list(points), middle, low, high)


def apart(
    panels: Sequence[tuple[Panel, Sequence[Curve]]], owners: Sequence[str]
) -> list[tuple[Panel, Sequence[Curve]]]:
    """Panels of several metrics, where one has too many curves: one for each configuration."""
    several = [pair for pair in panels if len(pair[0].metrics) > 1]
    if not any(len(found) > CROWDED for _, found in several):
        return list(panels)
    alone = [
        (replace(panel, alone=owners[i]), [c for c in found if c.owner == i])
        for i in sorted({c.owner for _, found in several for c in found})
        for panel, found in several
    ]
    return alone + [pair for pair in panels if len(pair[0].metrics) == 1]


def draw(name: str, panels: Sequence[tuple[Panel, Sequence[Curve]]], owners: Sequence[str]) -> str:
    """The panels, two beside each other, as an <svg>. `name` keeps ids apart on one page."""
    from matplotlib import style
    from matplotlib.figure import Figure

    label = "; ".join(panel.title for panel, _ in panels)
    panels = apart(panels, owners)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with style.context(["default", _looks(name)]):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        first: dict[str, Any] = {}  # axes of each title, whose scale the others of it share
        for axes, (panel, curves) in zip(grid, panels, strict=False):
            if not curves:
                axes.remove()
                continue
            if (other := first.setdefault(panel.title, axes)) is not axes:
                axes.sharey(other)
            _fill(axes, panel, curves, by_owner=len(owners) > 1 and not panel.alone)
        for axes in grid[len(panels) :]:
            axes.remove()
        shown = sorted({c.owner for p, curves in panels for c in curves if not p.alone})
        if len(owners) > 1 and shown:
            handles = [_handle(owners[i], COLORS[i % len(COLORS)]) for i in shown]
            figure.legend(handles=handles, loc="outside lower center", ncols=2)
        text = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue(), label)


def _looks(name: str) -> dict[str, Any]:
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(inked, INK) | {
        "svg.fonttype": "none",  # text that can be searched and read out
        "svg.hashsalt": name,
        "text.parse_math": False,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "font.size": 8.5,
        "lines.linewidth": 1.4,
        "lines.markersize": 3,
        "legend.frameon": False,
    }


def _fill(axes: Any, panel: Panel, curves: Sequence[Curve], *, by_owner: bool) -> None:
    """Colour tells configurations apart and dashes metrics; of one configuration, colour both."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set_title(f"{panel.alone}\n{panel.title}".strip())
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")  # the usual one writes mathematics
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.zero:
        axes.axhline(0, color=INK, linewidth=0.6)
    names, handles = list(panel.metrics), {}
    for c in curves:
        i = names.index(c.metric)
        color, dash = COLORS[(c.owner if by_owner else i) % len(COLORS)], DASHES[i % len(DASHES)]
        marker = "o" if len(c.steps) <= SPARSE else None
        axes.plot(c.steps, c.middle, dash, color=color, marker=marker)
        if c.low != c.high:
            axes.fill_between(c.steps, c.low, c.high, color=color, alpha=0.2, linewidth=0)
        label = panel.metrics[c.metric]
        handles[c.metric] = _handle(label, INK if by_owner else color, dash)
    if len(names) > 1:
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 3.8}
        shown = [handles[m] for m in names if m in handles]
        axes.legend(handles=shown, ncols=3, columnspacing=1, **below)


def _handle(label: str, color: str, dash: Any = "-") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=dash, label=label)


def _inline(svg: str, label: str) -> str:
    """Only the element, without what a page needs once (styles) or not at all (ids, namespaces)."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = svg.replace(INK, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
