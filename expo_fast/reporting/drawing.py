"""Charts as specifications of Vega-Lite.

The report draws them in the browser with hover values. `draw` draws the same specifications as an
SVG file, without a browser. Lines and text have the colour of the text around the chart, and the
background is transparent, so that a chart is readable on light and dark pages and on paper.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expo_fast.reporting.panels import Curve, Panel, PlottedPanel, owners, split_crowded
from expo_fast.reporting.runs import Group

# Each colour has a contrast of at least 3 with the light and with the dark background of the
# report. The first three are of the palette of Okabe and Ito, which is safe for colour-blind
# readers. Dash patterns distinguish metrics too.
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#c2659a", "#a87900", "#7f7f7f"),
    *("#8a6bd1", "#9c5a3c"),
)
TEXT_COLOR = "currentColor"  # that of the page
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
PLOT_HEIGHT = 190  # pixels
STATIC_WIDTH = 290  # pixels of a chart of an SVG file
MOST_MARKED_POINTS = 40  # a curve with at most this number of points has markers
MOST_POINTS = 5000  # of the charts of a figure; longer curves have every k-th step

CHOSEN = "chosen"  # parameter: the entry of the legend that was clicked; none: all
NEAREST = "nearest"  # parameter: the point next to the pointer
COLUMNS = ("configuration", "metric", "step", "mean", "low", "high")
CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": TEXT_COLOR,
        "titleColor": TEXT_COLOR,
        "domainColor": TEXT_COLOR,
        "tickColor": TEXT_COLOR,
        "gridColor": TEXT_COLOR,
        "gridOpacity": 0.12,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": TEXT_COLOR,
        "labelFontSize": 11,
        "labelLimit": 300,
        "orient": "bottom",
        "title": None,
        "symbolType": "stroke",
        "symbolOpacity": 1,
        "symbolSize": 300,
        "symbolStrokeWidth": 2,
        "columns": 2,
        "layout": {"bottom": {"direction": "vertical", "anchor": "start"}},
    },
    "title": {"color": TEXT_COLOR, "fontSize": 13, "anchor": "start", "offset": 10},
}


@dataclass(frozen=True)
class Chart:
    """A specification without its data, and the data as one row per point."""

    title: str
    spec: dict[str, Any]
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def charts(panels: Sequence[PlottedPanel], names: Sequence[str]) -> list[Chart]:
    """Return a chart for each panel. A panel of too many curves becomes one per configuration.

    names: names of the configurations.
    """
    panels = [each for each in split_crowded(panels, names) if each.curves]
    titles = [each.panel.title for each in panels]
    n_curves = sum(len(each.curves) for each in panels)
    found = []
    for each in panels:
        domain = None
        if titles.count(each.panel.title) > 1:  # parts of one panel have the same scale
            domain = _domain([x for x in panels if x.panel.title == each.panel.title])
        found.append(_curves_chart(each, names, domain, most_points=MOST_POINTS // n_curves))
    return found


def phase_chart(groups: Sequence[Group]) -> list[Chart]:
    """Return a chart of the mean seconds of a step by phase, or nothing if no run has them."""
    rows = []
    phases: dict[str, None] = {}
    for group in groups:
        for name, seconds in group.seconds_by_phase.items():
            phase = name.replace("_", " ")
            if seconds > 0:
                phases[phase] = None
                rows.append((group.name, phase, seconds / len(group.steps)))
    if not rows:
        return []
    title = "Mean time of a step"
    spec = {
        "title": title,
        "height": {"step": 26},
        "mark": "bar",
        "encoding": {
            "y": {"field": "configuration", "type": "nominal", "title": None, "sort": None},
            "x": {
                "field": "seconds",
                "type": "quantitative",
                "title": "seconds",
                "axis": {"tickCount": 6},
            },
            "color": {
                "field": "phase",
                "type": "nominal",
                "sort": None,
                "scale": _scale(list(phases), COLORS),
                "legend": {"symbolType": "square", "symbolSize": 90, "columns": 3},
            },
            "tooltip": _TOOLTIP,
        },
    }
    return [Chart(title, spec, ("configuration", "phase", "seconds"), rows)]


def _curves_chart(
    plotted: PlottedPanel,
    names: Sequence[str],
    domain: tuple[float, float] | None,
    most_points: int,
) -> Chart:
    """Return a chart of curves.

    If it shows several configurations, each has a colour, and each metric a dash pattern.
    Otherwise each metric has a colour and a dash pattern.

    domain: the common range of y of several charts; None: that of the curves.
    most_points: maximum number of points of a curve.
    """
    panel = plotted.panel
    rows = []
    for curve in plotted.curves:
        rows += _rows(curve, panel, names, most_points)
    has_band = any(row[4] != row[5] for row in rows)
    marked = all(len(curve.steps) <= MOST_MARKED_POINTS for curve in plotted.curves)
    encoding = {
        "x": _steps_axis(min(row[2] for row in rows), max(row[2] for row in rows)),
        "y": _values_axis(panel, domain or _domain([plotted])),
        **_series(plotted, names),
    }
    layers = []
    if panel.zero_line:
        layers.append(_zero_line())
    if has_band:
        layers.append(_band())
    layers.append(_line(width=1.8 if marked else 1.3, chosen_by=encoding["color"]["field"]))
    layers.append(_points(marked=marked))
    title = [panel.only, panel.title] if panel.only else panel.title
    spec = {
        "title": title,
        "height": PLOT_HEIGHT,
        "encoding": encoding,
        "layer": layers,
    }
    name = f"{panel.only} {panel.title}".strip()
    return Chart(name, spec, COLUMNS, rows)


def _rows(
    curve: Curve, panel: Panel, names: Sequence[str], most_points: int
) -> list[tuple[Any, ...]]:
    """Return the points of a curve as rows of `COLUMNS`.

    A curve with more than `most_points` has every k-th point and its last one.
    """
    label = panel.metrics[curve.metric]
    every = -(-len(curve.steps) // max(1, most_points))
    last = len(curve.steps) - 1
    rows = []
    for i, step in enumerate(curve.steps):
        if i % every == 0 or i == last:
            values = (curve.middle[i], curve.low[i], curve.high[i])
            rounded = tuple(float(f"{value:.5g}") for value in values)
            rows.append((names[curve.owner], label, step, *rounded))
    return rows


def _steps_axis(first: int, last: int) -> dict[str, Any]:
    """Return the axis of steps. A single step is in the middle."""
    domain = [first - 1, last + 1] if first == last else [first, last]
    return {
        "field": "step",
        "type": "quantitative",
        "axis": {"format": "d", "values": step_ticks(first, last), "grid": False},
        "scale": {"domain": domain, "nice": False, "zero": False, "padding": 6},
    }


def step_ticks(first: int, last: int) -> list[int]:
    """Return integers from `first` to `last` for an axis, at most 7, at multiples of 1, 2 or 5."""
    magnitude = 1
    while True:
        for factor in (1, 2, 5):
            distance = factor * magnitude
            start = -(-first // distance) * distance
            if (last - start) // distance < 7:
                return list(range(start, last + 1, distance))
        magnitude *= 10


def _values_axis(panel: Panel, domain: tuple[float, float]) -> dict[str, Any]:
    axis: dict[str, Any] = {"tickCount": 5, "format": ".4~g"}
    scale: dict[str, Any] = {"domain": list(domain), "nice": True, "zero": False}
    if panel.log_scale:
        axis |= {"tickCount": 3, "grid": False}  # the grid would have nine lines per decade
        scale["type"] = "log"
    return {
        "field": "mean",
        "type": "quantitative",
        "title": panel.unit or None,
        "axis": axis,
        "scale": scale,
    }


def _domain(panels: Sequence[PlottedPanel]) -> tuple[float, float]:
    """Return the range of all values of the panels, with 0 if they have a zero line.

    It is never empty: of a single value x, it is from x - |x| / 10 to x + |x| / 10, or 0 to 1.
    """
    values = []
    for each in panels:
        for curve in each.curves:
            values += [*curve.low, *curve.high]
    if panels[0].panel.zero_line:
        values.append(0.0)
    low = min(values)
    high = max(values)
    if low < high:
        return low, high
    return (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)


def _series(plotted: PlottedPanel, names: Sequence[str]) -> dict[str, Any]:
    """Return the encodings of configuration and metric."""
    panel = plotted.panel
    drawn = {curve.metric for curve in plotted.curves}
    labels = [label for metric, label in panel.metrics.items() if metric in drawn]
    positions = [i for i, metric in enumerate(panel.metrics) if metric in drawn]
    by_owner = len(names) > 1 and not panel.only
    dash = {
        "field": "metric",
        "type": "nominal",
        "scale": _scale(labels, [DASHES[i % len(DASHES)] for i in positions]),
        "legend": {} if len(panel.metrics) > 1 else None,
    }
    color: dict[str, Any]
    if by_owner:
        shown = owners([plotted])
        scale = _scale([names[i] for i in shown], [COLORS[i % len(COLORS)] for i in shown])
        color = {"field": "configuration", "type": "nominal", "scale": scale, "legend": {}}
    else:
        scale = _scale(labels, [COLORS[i % len(COLORS)] for i in positions])
        color = {"field": "metric", "type": "nominal", "scale": scale, "legend": dash["legend"]}
    return {"color": color, "strokeDash": dash}


def _scale(domain: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    repeated = [values[i % len(values)] for i in range(len(domain))]
    return {"domain": list(domain), "range": repeated}


# Marks with this value show their row as report.js writes it. Vega-Lite's own texts lack nominal
# fields in the area around a point.
_TOOLTIP = {"value": "values"}


def _zero_line() -> dict[str, Any]:
    return {
        "data": {"values": [{"mean": 0}]},
        "mark": {"type": "rule", "color": TEXT_COLOR, "opacity": 0.5},
        "encoding": {"x": None, "color": None, "strokeDash": None},
    }


def _line(width: float, chosen_by: str) -> dict[str, Any]:
    """Return the lines. A click on the legend dims the others.

    width: of a line, in pixels.
    chosen_by: field of the legend.
    """
    chosen = {"type": "point", "fields": [chosen_by]}
    return {
        "params": [{"name": CHOSEN, "select": chosen, "bind": "legend"}],
        "mark": {"type": "line", "strokeWidth": width},
        "encoding": {"opacity": {"condition": {"param": CHOSEN, "value": 1}, "value": 0.12}},
    }


def _band() -> dict[str, Any]:
    return {
        "mark": {"type": "area", "opacity": 0.2},
        "encoding": {
            "y": {"field": "low", "type": "quantitative"},
            "y2": {"field": "high"},
            "strokeDash": None,
        },
    }


def _points(*, marked: bool) -> dict[str, Any]:
    """Return the markers, of which the nearest to the pointer shows its values.

    marked: whether all markers are visible.
    """
    return {
        "params": [
            {
                "name": NEAREST,
                "select": {"type": "point", "on": "pointerover", "nearest": True},
            }
        ],
        "mark": {"type": "point", "filled": True},
        "encoding": {
            "strokeDash": None,
            "size": {"condition": _at_pointer(80), "value": 22},
            "opacity": {"condition": _at_pointer(1), "value": 1 if marked else 0},
            "tooltip": _TOOLTIP,
        },
    }


def _at_pointer(value: float) -> dict[str, Any]:
    return {"param": NEAREST, "empty": False, "value": value}


def draw(panels: Sequence[PlottedPanel], names: Sequence[str]) -> str:
    """Return the charts of the panels, two per row, as the text of an SVG file.

    names: names of the configurations.
    """
    return draw_charts(charts(panels, names))


def draw_charts(drawn: Sequence[Chart]) -> str:
    """Return charts, two per row, as the text of an SVG file."""
    import vl_convert

    parts = []
    for chart in drawn:
        values = [dict(zip(chart.columns, row, strict=True)) for row in chart.rows]
        part = _without_interaction(chart.spec)
        parts.append(part | {"width": STATIC_WIDTH, "data": {"values": values}})
    independent = {"color": "independent", "strokeDash": "independent"}
    spec = {
        "concat": parts,
        "columns": 2,
        "config": CONFIG,
        "resolve": {"scale": independent, "legend": independent},
    }
    svg: Any = vl_convert.vegalite_to_svg(json.dumps(spec))
    return svg


def _without_interaction(value: Any) -> Any:
    """Return the specification without parameters, tooltips and conditions."""
    if isinstance(value, list):
        return [_without_interaction(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    if "condition" in value:
        condition = value["condition"]
        return {"value": condition["value"] if condition["param"] == CHOSEN else value["value"]}
    left_out = ("params", "tooltip")
    return {key: _without_interaction(x) for key, x in value.items() if key not in left_out}
