"""Curves over steps as inline SVG.

The output is deterministic. Lines and text have the page's text colour, and the background is the
page's, so that a figure is readable on light and dark pages and on paper. Labels are plain text: a
`$` does not start mathematics.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

from expo_fast.reporting.panels import Curve, Panel, PlottedPanel, owners, split_crowded

TEXT_COLOR = "#010203"  # placeholder, replaced by the page's text colour in the SVG
# The palette of Okabe and Ito, which is safe for colour-blind readers, and two more colours.
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#6b4226", "#7f7f7f"),
)
DASHES = ("-", "--", ":", "-.")
PANEL_WIDTH = 3.6  # inches
PANEL_HEIGHT = 2.7  # inches
MOST_MARKED_POINTS = 40  # a curve with at most this number of points has markers


def draw(name: str, panels: Sequence[PlottedPanel], names: Sequence[str]) -> str:
    """Return the panels, two per row, as an <svg> element.

    name: name of the figure, which makes its ids unique on a page.
    names: names of the configurations.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    label = "; ".join(each.panel.title for each in panels)
    panels = split_crowded(panels, names)
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with style.context(["default", _style(name)]):  # ignores the user's matplotlibrc
        size = (PANEL_WIDTH * columns, PANEL_HEIGHT * rows)
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        _fill_grid(grid, panels, several=len(names) > 1)
        if len(names) > 1:
            _add_legend(figure, panels, names)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    return _inline(file.getvalue(), label)


def _style(name: str) -> dict[str, Any]:
    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(colored, TEXT_COLOR) | {
        "svg.fonttype": "none",  # keeps text as text, for search and screen readers
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


def _fill_grid(grid: Any, panels: Sequence[PlottedPanel], *, several: bool) -> None:
    """Draw each panel on its axes, and remove empty axes."""
    first_of_title: dict[str, Any] = {}  # panels with the same title have the same scale
    for axes, each in zip(grid, panels, strict=False):
        if not each.curves:
            axes.remove()
            continue
        first = first_of_title.setdefault(each.panel.title, axes)
        if first is not axes:
            axes.sharey(first)
        by_owner = several and not each.panel.only
        _fill(axes, each.panel, each.curves, by_owner=by_owner)
    for axes in grid[len(panels) :]:
        axes.remove()


def _add_legend(figure: Any, panels: Sequence[PlottedPanel], names: Sequence[str]) -> None:
    """Add a legend of the configurations if a panel shows several."""
    shared = [each for each in panels if not each.panel.only]
    handles = []
    for owner in owners(shared):
        color = COLORS[owner % len(COLORS)]
        handles.append(_legend_line(names[owner], color))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _fill(axes: Any, panel: Panel, curves: Sequence[Curve], *, by_owner: bool) -> None:
    """Draw one panel.

    by_owner: each configuration has a colour, and each metric a dash pattern. Otherwise there is
    one configuration, and each metric has a colour and a dash pattern.
    """
    _set_up_axes(axes, panel)
    names = list(panel.metrics)
    handles = {}
    for curve in curves:
        position = names.index(curve.metric)
        dash = DASHES[position % len(DASHES)]
        color_index = curve.owner if by_owner else position
        color = COLORS[color_index % len(COLORS)]
        marker = "o" if len(curve.steps) <= MOST_MARKED_POINTS else None
        axes.plot(curve.steps, curve.middle, dash, color=color, marker=marker)
        if curve.low != curve.high:
            axes.fill_between(
                curve.steps, curve.low, curve.high, color=color, alpha=0.2, linewidth=0
            )
        label = panel.metrics[curve.metric]
        legend_color = TEXT_COLOR if by_owner else color
        handles[curve.metric] = _legend_line(label, legend_color, dash)
    if len(names) > 1:
        axes.legend(
            handles=[handles[metric] for metric in names if metric in handles],
            ncols=3,
            columnspacing=1,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            borderaxespad=3.8,
        )


def _set_up_axes(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set_title(f"{panel.only}\n{panel.title}".strip())
    axes.set_ylabel(panel.unit)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if panel.log_scale:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        # The default formatter writes numbers as mathematics.
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if panel.zero_line:
        axes.axhline(0, color=TEXT_COLOR, linewidth=0.6)


def _legend_line(label: str, color: str, dash: Any = "-") -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=dash, label=label)


def _inline(svg: str, label: str) -> str:
    """Return only the <svg> element, without styles, ids of groups and namespaces.

    The page has the styles once, and the others are not needed.
    """
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = svg.replace(TEXT_COLOR, "currentColor")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
