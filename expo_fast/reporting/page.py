"""The report on training runs as one HTML page.

Values that a run has not measured are left out. Completions are untrusted, so all text is escaped.
"""

from collections.abc import Sequence
from pathlib import Path

from expo_fast.reporting.drawing import draw
from expo_fast.reporting.jsonl import Row, read_rows
from expo_fast.reporting.markup import escaped, page, remark, section
from expo_fast.reporting.panels import (
    GRADIENT_NORM,
    LEARNING,
    PREFERENCES,
    PROPERTIES,
    UPDATES,
    Panel,
    plotted,
)
from expo_fast.reporting.runs import FREE_FIELDS, Group, number, numbers
from expo_fast.reporting.tables import levels, measured_differently, overview, phases
from expo_fast.reporting.text import shown_text
from expo_fast.reporting.verdicts import in_distribution, learning_signal

SHOWN_QUESTIONS = 2  # questions shown per step
KIND_LABELS = {
    "own": "own attempt",
    "explanation": "accepted explanation",
    "expert": "expert's solution",
}
ABOUT = (
    "ExPO (arXiv:2507.02834) trains a language model on its own explanations of known answers. "
    "A curve over several runs is the mean. Its band is from the smallest to the largest run. The "
    "band of a single run's held-out accuracy is its 95% bootstrap interval over questions."
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


def render(groups: Sequence[Group]) -> str:
    """Return the page on these configurations."""
    n_runs = sum(len(group.runs) for group in groups)
    parts = (
        remark(f"Runs: {n_runs}, configurations: {len(groups)}. {ABOUT}"),
        section("Configurations", overview(groups), measured_differently(groups)),
        section("Accuracy by level", levels(groups)),
        section("Learning curves", figure("learning", LEARNING, groups)),
        section("The two properties of a good positive sample", *properties(groups)),
        section(
            "Parts of the update",
            figure("updates", UPDATES, groups),
            zero_norms(groups),
        ),
        section("Preference pairs", figure("preferences", PREFERENCES, groups)),
        section("Seconds by phase", phases(groups)),
        section("Completions", *map(completions, groups)),
        section("Runs and their configurations", *map(record, groups)),
    )
    return page("".join(parts))


def figure(name: str, panels: Sequence[Panel], groups: Sequence[Group]) -> str:
    """Return the panels that have data as SVG, or "" if no panel has data."""
    shown = plotted(panels, groups)
    if not shown:
        return ""
    svg = draw(name, shown, [group.name for group in groups])
    return f"<figure>{svg}</figure>"


def properties(groups: Sequence[Group]) -> list[str]:
    """Return the verdicts on both properties and their curves, or nothing if there are no data."""
    curves = figure("properties", PROPERTIES, groups)
    if not curves:
        return []
    items = []
    for group in groups:
        verdicts = f"<li>(a) {in_distribution(group)}</li><li>(b) {learning_signal(group)}</li>"
        items.append(f"<li>{escaped(group.name)}<ul>{verdicts}</ul></li>")
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


def completions(group: Group) -> str:
    """Return completions of the first and the last step of the configuration's first run."""
    run = group.runs[0]
    files: dict[int, Path] = {}
    for file in Path(run.path, "completions").glob("step-*.jsonl"):
        step = file.stem.removeprefix("step-")
        if step.isdecimal():
            files[int(step)] = file
    if not files:
        return ""
    parts = []
    for step in sorted({min(files), max(files)}):
        texts = [question(rows) for rows in first_questions(files[step])]
        if texts:
            title = f"{escaped(group.name)}, step {step} of {escaped(run.path, 200)}"
            parts.append(f"<h3>{title}</h3>\n{''.join(texts)}")
    return "".join(parts)


def first_questions(file: Path) -> list[list[Row]]:
    """Return the rows of a few questions. Questions with several kinds of samples come first."""
    rows_of: dict[str, list[Row]] = {}
    for row in read_rows(file):
        identity = repr(row.get("id"))
        rows_of.setdefault(identity, []).append(row)
    questions = sorted(rows_of.values(), key=_has_one_kind)
    return questions[:SHOWN_QUESTIONS]


def _has_one_kind(rows: Sequence[Row]) -> bool:
    kinds = {repr(row.get("kind")) for row in rows}
    return len(kinds) < 2


def question(rows: Sequence[Row]) -> str:
    """Return a question, its answer and the first completion of each kind."""
    prompt = rows[0].get("prompt")
    answer = rows[0].get("answer")
    terms = [("question", prompt), ("answer", answer)]
    first_of_kind: dict[str, Row] = {}
    for row in rows:
        first_of_kind.setdefault(shown_text(row.get("kind"), 40), row)
    for kind, row in first_of_kind.items():
        label = KIND_LABELS.get(kind, kind)
        reward = number(row, "reward")
        if reward is not None:
            label += f", reward {reward:.3g}"
        terms.append((label, row.get("completion")))
    shown = [f"<dt>{escaped(a)}</dt><dd><pre>{escaped(b)}</pre></dd>" for a, b in terms]
    return f"<dl>{''.join(shown)}</dl>\n"


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
