"""The report on training runs as one HTML page.

Values that a run has not measured are left out. Completions are untrusted, so all text is escaped.
report.js draws the charts with Vega-Lite and lets the reader filter the completions. Both are part
of the page, which loads no other files.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from expo_fast.reporting.drawing import CONFIG, Chart, charts, phase_chart
from expo_fast.reporting.markup import escaped, page, remark, resource, section, warning
from expo_fast.reporting.panels import (
    ATTEMPTS,
    GRADIENT_NORM,
    LEARNING,
    PREFERENCES,
    PROPERTIES,
    UPDATES,
    Panel,
    plotted,
)
from expo_fast.reporting.runs import FREE_FIELDS, Group, numbers
from expo_fast.reporting.samples import KIND_LABELS, Samples, collect
from expo_fast.reporting.tables import (
    levels,
    measured_differently,
    overview,
    phases,
    verdicts,
)
from expo_fast.reporting.text import shown_text
from expo_fast.reporting.verdicts import in_distribution, learning_signal

ABOUT = (
    "ExPO (arXiv:2507.02834) trains a language model on its own explanations of known answers. "
    "A curve over several runs is the mean. Its band is from the smallest to the largest run. The "
    "band of a single run's held-out accuracy is its 95% bootstrap interval over questions. "
    "Point at a curve for its values, and click an entry of a legend to dim the others."
)
ABOUT_PROPERTIES = (
    "(a) In-distribution: under the plain question, the explanation is likelier than the "
    "expert's solution. (b) Learning signal: the right answer is likelier after the explanation "
    "than after the model's own attempts (lift above 0). An explanation that states the answer "
    "has a lift by copying, so the verdict is on the lift with the answer masked. Both verdicts "
    "are on the same few questions of a step that have an accepted explanation. The explanation "
    "is the likeliest one of the question, unless choose_explanations selects another. The curve "
    "of the explanations' NLL is over all explanations that are trained on."
)


class Charts:
    """The charts of a page, in the order in which they were added."""

    def __init__(self, groups: Sequence[Group]):
        self._groups = groups
        self._names = [group.name for group in groups]
        self.data: list[dict[str, Any]] = []

    def figure(self, panels: Sequence[Panel]) -> str:
        """Add charts of the panels that have data, and return their places on the page."""
        return self.add(charts(plotted(panels, self._groups), self._names))

    def add(self, added: Sequence[Chart]) -> str:
        """Add charts, and return their places on the page, or "" if there is none."""
        places = []
        for chart in added:
            title = escaped(chart.title)
            label = f'role="group" aria-label="{title}"'
            place = (
                f'<figure data-chart="{len(self.data)}" {label}><div class="plot"></div></figure>'
            )
            places.append(place)
            self.data.append(vars(chart))
        return f'<div class="charts">{"".join(places)}</div>' if places else ""


def render(groups: Sequence[Group], skipped: Sequence[str] = ()) -> str:
    """Return the page on these configurations.

    skipped: a sentence on each run that could not be read.
    """
    n_runs = sum(len(group.runs) for group in groups)
    drawn = Charts(groups)
    samples = collect(groups)
    parts = (
        remark(f"Runs: {n_runs}, configurations: {len(groups)}. {ABOUT}"),
        *[warning(f"Left out: {escaped(text)}") for text in skipped],
        *inexact_runs(groups),
        section("Configurations", overview(groups), verdicts(groups), measured_differently(groups)),
        section("Accuracy by level", levels(groups)),
        section("Learning curves", drawn.figure(LEARNING)),
        section("The two properties of a good positive sample", *properties(groups, drawn)),
        section("Attempts", drawn.figure(ATTEMPTS)),
        section("Updates", drawn.figure(UPDATES), zero_norms(groups)),
        section("Preference pairs", drawn.figure(PREFERENCES)),
        section("Time by phase", drawn.add(phase_chart(groups)), phases(groups)),
        section("Completions", completions(samples)),
        section("Runs and their configurations", *map(record, groups)),
    )
    data = {
        "config": CONFIG,
        "charts": drawn.data,
        "kinds": KIND_LABELS,
        "runs": samples.runs,
        "questions": samples.questions,
        "completions": samples.completions,
    }
    return page("".join(parts), data, scripts=[library(), resource("report.js")])


def inexact_runs(groups: Sequence[Group]) -> Iterator[str]:
    """Yield a warning for each run that was resumed with something changed."""
    for group in groups:
        for run in group.runs:
            if run.inexact:
                yield warning(escaped(f"{run.path} is inexact: {'; '.join(run.inexact)}"))


@cache
def library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, with their licences."""
    import vl_convert

    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return f"/*\n{resource('vega_licenses.txt')}*/\n{script}"


def completions(samples: Samples) -> str:
    """Return the place of the completions, or "" if there is none."""
    if not samples.completions:
        return ""
    left_out = ""
    if samples.left_out:
        text = (
            f"The completions of {samples.left_out} steps are left out, to bound the file's size."
        )
        left_out = remark(text)
    return f'{left_out}<div id="completions"></div>'


def properties(groups: Sequence[Group], drawn: Charts) -> list[str]:
    """Return the verdicts on both properties and their curves, or nothing if there are no data."""
    curves = drawn.figure(PROPERTIES)
    if not curves:
        return []
    items = []
    for group in groups:
        both = f"<li>(a) {in_distribution(group)}</li><li>(b) {learning_signal(group)}</li>"
        items.append(f"<li>{escaped(group.name)}<ul>{both}</ul></li>")
    return [remark(ABOUT_PROPERTIES), f"<ul>{''.join(items)}</ul>", curves]


def zero_norms(groups: Sequence[Group]) -> str:
    """Return the number of steps with a gradient norm of 0, which a log axis cannot show."""
    counts = []
    for group in groups:
        for key, label in GRADIENT_NORM.metrics.items():
            norms = numbers(group.steps, key)
            if 0 in norms:
                count = f"{label} {norms.count(0)} of {len(norms)}"
                counts.append(f"{escaped(group.name)}: {count}")
    if not counts:
        return ""
    return remark(f"Steps with a norm of 0, not drawn: {'; '.join(counts)}.")


def record(group: Group) -> str:
    """Return the folders of a configuration's runs, and the configuration's fields."""
    folders = []
    for run in group.runs:
        seed = escaped(run.config.get("seed", "?"), 20)
        folders.append(f"<li>{escaped(run.path)} (seed {seed})</li>")
    fields = []
    for name, value in group.config.items():
        if name not in FREE_FIELDS:
            fields.append(escaped(f"{name} = {shown_text(value)}"))
    listed = "\n".join(fields)
    return f"<h3>{escaped(group.name)}</h3>\n<ul>{''.join(folders)}</ul>\n<pre>{listed}</pre>"
