"""The points that `benchmarks.curves` measures, and their charts as one SVG file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS
from benchmarks.measure import brief
from expo_fast.reporting.drawing import (
    COLORS,
    DASHES,
    PLOT_HEIGHT,
    TEXT_COLOR,
    Chart,
    draw_charts,
)
from expo_fast.storage.files import replace_file

# Colours of the page and of its text. A page that shows an SVG file as an image does not pass the
# colour of its text on.
STYLE = """<style>
svg { color: #1f2328; }
.page { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg { color: #e6edf3; }
  .page { fill: #161b22; }
}
</style><rect class="page" width="100%" height="100%" rx="8"/>"""
LABELS = {"... static cache": "transformers, static cache"}  # names that need their context
SECONDS = "seconds"
TOKENS_PER_S = "tokens/s"
MOST_TICKS = 7  # of an axis of values


@dataclass(frozen=True)
class Panel:
    """A pair of axes."""

    curve: str
    quantity: str  # SECONDS or TOKENS_PER_S
    title: str
    fixed: str  # the sizes that are the same at all points
    axis: str  # the size that varies


@dataclass(frozen=True)
class Point:
    """What was measured of one contestant at one size."""

    curve: str
    size: int
    quantity: str
    contestant: str
    value: float
    seconds: list[float]  # of all rounds; the value is of their median


@dataclass
class Measured:
    """The points of a run of `benchmarks.curves`."""

    machine: dict[str, Any]
    model: str
    panels: list[Panel]
    points: list[Point] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)

    def add(self, curve: str, size: int, quantity: str, contestants: Mapping[str, Any]) -> None:
        """Add the points of the contestants of benchmarks.summary, decode or body."""
        for name, row in contestants.items():
            value = row["tokens_per_second"] if quantity == TOKENS_PER_S else row["median_s"]
            self.points.append(Point(curve, size, quantity, name, value, row["seconds"]))

    def leave_out(self, curve: str, size: int, reasons: Mapping[str, str]) -> None:
        """Add why contestants have no point at a size."""
        for name, why in reasons.items():
            what = {"curve": curve, "size": size, "contestant": name, "reason": brief(why)}
            self.left_out.append(what)

    def write(self, file: Path) -> None:
        """Write a file for `read`."""
        replace_file(file, json.dumps(asdict(self)).encode() + b"\n")


def read(file: Path) -> Measured:
    """Return what `Measured.write` has written.

    Raise ValueError if the file has other content, and OSError if it cannot be read.
    """
    try:
        plain = json.loads(file.read_text())
        plain["panels"] = [Panel(**each) for each in plain["panels"]]
        plain["points"] = [Point(**each) for each in plain["points"]]
        return Measured(**plain)
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: need a file that --output has written ({e})") from None


def draw(measured: Measured) -> str:
    """Return the panels that have points, two per row, as the text of an SVG file.

    It follows the reader's preference for light or dark pages.
    """
    names = {point.contestant: None for point in measured.points}
    contestants = sorted(names, key=lambda name: name != OURS)
    charts = []
    for panel in measured.panels:
        of_panel = (panel.curve, panel.quantity)
        points = [p for p in measured.points if (p.curve, p.quantity) == of_panel]
        if points:
            charts.append(chart(panel, points, contestants))
    svg = draw_charts(charts)
    end_of_tag = svg.index(">", svg.index("<svg")) + 1
    return svg[:end_of_tag] + STYLE + svg[end_of_tag:] + "\n"


def chart(panel: Panel, points: Sequence[Point], contestants: Sequence[str]) -> Chart:
    """Return a chart with a line for each contestant.

    contestants: those of all charts, so that each has one colour.
    """
    names = {point.contestant for point in points}
    places = [i for i, name in enumerate(contestants) if name in names]
    labels = [shown(contestants[i]) for i in places]
    colors = [COLORS[i % len(COLORS)] for i in places]
    dashes = [DASHES[i % len(DASHES)] for i in range(len(places))]
    spec = {
        "title": {"text": panel.title, "subtitle": panel.fixed, "subtitleColor": TEXT_COLOR},
        "height": PLOT_HEIGHT,
        "encoding": {
            "x": size_axis(panel.axis, [point.size for point in points]),
            "y": value_axis(panel.quantity, [point.value for point in points]),
            "color": by_contestant(labels, colors),
        },
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.8},
                "encoding": {"strokeDash": by_contestant(labels, dashes)},
            },
            {"mark": {"type": "point", "filled": True, "size": 22, "opacity": 1}},
        ],
    }
    rows = [(shown(point.contestant), point.size, point.value) for point in points]
    return Chart(panel.title, spec, ("contestant", "size", "value"), rows)


def shown(contestant: str) -> str:
    """Return the name of a contestant in the legend."""
    return LABELS.get(contestant, contestant)


def size_axis(title: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Return the axis of sizes, with a label at each of them: 4096 is 4k."""
    label = "datum.value >= 1024 ? datum.value / 1024 + 'k' : datum.value"
    low = min(sizes)
    high = max(sizes)
    domain = [low, high] if low < high else [low / 2, high * 2]
    return {
        "field": "size",
        "type": "quantitative",
        "title": title,
        "axis": {"values": sorted(set(sizes)), "labelExpr": label, "grid": False},
        "scale": log_scale(domain, base=2),
    }


def value_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the axis of values, on which equal ratios are equal distances."""
    label = "format(datum.value, datum.value >= 10000 ? ',.0f' : '.4~g')"
    low = min(values) / 1.2
    high = max(values) * 1.2
    return {
        "field": "value",
        "type": "quantitative",
        "title": title,
        "axis": {"values": value_ticks(low, high), "labelExpr": label},
        "scale": log_scale([low, high], base=10),
    }


def value_ticks(low: float, high: float) -> list[float]:
    """Return the values in a range that are 1, 2 or 5 times a power of 10.

    If these are more than `MOST_TICKS`, return the powers of 10; if there is none, both ends.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    inside = [value for value in found if low <= value <= high]
    if len(inside) > MOST_TICKS:
        inside = [value for value in inside if math.log10(value).is_integer()]
    return inside or [low, high]


def log_scale(domain: Sequence[float], base: int) -> dict[str, Any]:
    """Return a logarithmic scale."""
    return {"type": "log", "base": base, "domain": list(domain), "nice": False, "padding": 6}


def by_contestant(labels: list[str], values: list[Any]) -> dict[str, Any]:
    """Return the encoding of the contestants by these values, such as colours."""
    return {
        "field": "contestant",
        "type": "nominal",
        "scale": {"domain": labels, "range": values},
        "legend": {"columns": 1},
    }
