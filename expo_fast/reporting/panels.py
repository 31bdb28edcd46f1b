"""Panels of the report's figures, and their curves from the files of runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from expo_fast.reporting.jsonl import Row
from expo_fast.reporting.runs import Group, Spread, number, spread

MOST_CURVES = 6  # maximum number of readable curves on one pair of axes


@dataclass(frozen=True)
class Panel:
    """The title, metrics and scale of one pair of axes."""

    title: str
    unit: str
    metrics: dict[str, str]  # metric's name in the run's files -> label in the report
    held_out: bool = False  # whether metrics are of evaluations, and not of steps
    log_scale: bool = False  # only values above 0 are drawn
    zero_line: bool = False
    only: str = ""  # name of the only configuration that is shown; empty: all are shown


@dataclass(frozen=True)
class Curve:
    """One metric of one configuration. Each list has one value per point."""

    owner: int  # index of the configuration
    metric: str
    steps: list[int]
    middle: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class PlottedPanel:
    """A panel with its curves."""

    panel: Panel
    curves: list[Curve]


LEARNING = (
    Panel("Held-out pass@1", "fraction", {"pass@1": "pass@1"}, held_out=True, zero_line=True),
    Panel("Reward", "mean of the step", {"reward": "reward"}, zero_line=True),
    Panel(
        "Questions whose attempts all fail",
        "fraction",
        {"frac_all_fail": "all attempts fail"},
        zero_line=True,
    ),
)
PROPERTIES = (
    Panel(
        "(a) Negative log-likelihood",
        "nats per token",
        {"exp/nll": "explanation", "expert/nll": "expert", "own/nll": "own attempt"},
        zero_line=True,
    ),
    Panel(
        "(b) Lift of the right answer",
        "nats",
        {"exp/lift": "lift", "exp/lift_stated": "lift, answer stated"},
        zero_line=True,
    ),
)
GRADIENT_NORM = Panel(
    "Gradient norm of each term",
    "",
    {"grad_norm/policy": "policy", "grad_norm/exp_sft": "SFT"},
    log_scale=True,
)
ATTEMPTS = (
    Panel("Entropy of the attempts", "nats per token", {"entropy": "entropy"}, zero_line=True),
    Panel(
        "Length of the attempts",
        "tokens",
        {"completions/mean_length": "mean length"},
        zero_line=True,
    ),
    Panel(
        "Attempts cut at the length limit",
        "fraction",
        {"completions/clipped_ratio": "cut"},
        zero_line=True,
    ),
    Panel(
        "Verdicts on the attempts",
        "fraction",
        {
            "verdicts/exact": "right by rules",
            "verdicts/symbolic": "right by math-verify",
            "verdicts/no_answer": "no box",
            "verdicts/unparsable": "unreadable",
            "verdicts/undecided": "undecided",
        },
        zero_line=True,
    ),
    Panel("KL to the initial model", "nats per token", {"kl": "KL"}, zero_line=True),
)
UPDATES = (
    Panel("Loss", "nats", {"loss": "loss"}),
    Panel("Gradient norm of the update", "", {"grad_norm": "norm"}, log_scale=True),
    GRADIENT_NORM,
    Panel(
        "Texts that mention a given answer",
        "share",
        {"exp/leak_rate": "right explanations", "own/leak_rate": "own attempts"},
        zero_line=True,
    ),
    Panel("Right explanations rejected", "fraction", {"exp/unfit_rate": "unfit"}, zero_line=True),
    Panel(
        "Questions with an accepted explanation",
        "fraction",
        {"exp/rate": "accepted"},
        zero_line=True,
    ),
)
PREFERENCES = (
    Panel(
        "Rewards",
        "nats",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
        zero_line=True,
    ),
    Panel("Margin", "nats", {"rewards/margins": "chosen - rejected"}, zero_line=True),
    Panel("Pairs ranked correctly", "fraction", {"rewards/accuracies": "accuracy"}, zero_line=True),
    Panel("Log-probability", "nats", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
)


def plotted(panels: Sequence[Panel], groups: Sequence[Group]) -> list[PlottedPanel]:
    """Return the panels that the runs have data for, with their curves."""
    found = [PlottedPanel(panel, curves(groups, panel)) for panel in panels]
    return [each for each in found if each.curves]


def curves(groups: Sequence[Group], panel: Panel) -> list[Curve]:
    """Return a curve for each metric and configuration that has a number to draw."""
    found = []
    for owner, group in enumerate(groups):
        rows = group.evaluations if panel.held_out else group.steps
        for metric in panel.metrics:
            points = _points(rows, metric, positive=panel.log_scale)
            if points:
                found.append(_curve(owner, metric, points, len(group.runs)))
    return found


def _points(rows: Sequence[Row], metric: str, *, positive: bool) -> dict[int, Spread]:
    """Return the spread of the metric at each step that has it, in order."""
    rows_at: dict[int, list[Row]] = {}
    for row in rows:
        x = number(row, metric)
        if x is not None and (x > 0 or not positive):
            rows_at.setdefault(row["step"], []).append(row)
    points = {}
    for step in sorted(rows_at):
        point = spread(rows_at[step], metric)
        if point is not None:
            points[step] = point
    return points


def _curve(owner: int, metric: str, points: dict[int, Spread], n_runs: int) -> Curve:
    curve = Curve(owner, metric, steps=list(points), middle=[], low=[], high=[])
    for point in points.values():
        low = point.low
        high = point.high
        if point.n_runs == 1 and n_runs > 1:
            # The interval over questions of one run is not a range over runs.
            low = high = None
        curve.middle.append(point.mean)
        curve.low.append(point.mean if low is None else low)
        curve.high.append(point.mean if high is None else high)
    return curve


def split_crowded(panels: Sequence[PlottedPanel], names: Sequence[str]) -> list[PlottedPanel]:
    """Split panels of several metrics by configuration, if one of them has too many curves.

    names: names of the configurations. Panels of one metric are not split, because their curves
    differ in colour.
    """
    single = []
    several = []
    for each in panels:
        kind = single if len(each.panel.metrics) == 1 else several
        kind.append(each)
    if not any(len(each.curves) > MOST_CURVES for each in several):
        return list(panels)
    split = []
    for owner in owners(several):
        for each in several:
            panel = replace(each.panel, only=names[owner])
            own = [curve for curve in each.curves if curve.owner == owner]
            split.append(PlottedPanel(panel, own))
    return split + single


def owners(panels: Sequence[PlottedPanel]) -> list[int]:
    """Return the configurations that have a curve in any of the panels."""
    return sorted({curve.owner for each in panels for curve in each.curves})
