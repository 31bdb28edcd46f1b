"""One HTML file about training runs: python -m expo_fast.report RUN_DIR... --output report.html.

Runs that differ in nothing but their seed are one configuration. What a run has not measured is
left out, and nothing is claimed beyond the numbers. Completions are hostile text: all text is
escaped, and the page holds no script and loads nothing.
"""

import html
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any

from expo_fast.cli.exit_status import run
from expo_fast.cli.flags import from_flags
from expo_fast.reporting import drawing
from expo_fast.reporting.drawing import Group, Panel, Row, Spread, number, numbers, spelt, spread
from expo_fast.storage.files import output_file, replace_file

QUESTIONS = 2  # shown of a step
KINDS = {"own": "own attempt", "explanation": "accepted explanation", "expert": "expert's solution"}
ABOUT = (
    "ExPO (arXiv:2507.02834) trains a language model on its own explanations of known answers. "
    "Curves over several runs are means, their bands the smallest and the largest; the band of a "
    "single run's held-out accuracy is its 95% bootstrap interval over questions."
)
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>expo_fast: training runs</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .remark { font-size: .87rem; max-width: 48rem; opacity: .85; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
td { white-space: nowrap; } thead th { vertical-align: bottom; }
tr { border-bottom: 1px solid #8886; } small { display: block; font-size: .8rem; opacity: .75; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
svg * { font-family: system-ui, sans-serif; stroke-linejoin: round; stroke-linecap: butt; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; margin: .1rem 0 .6rem; }
dl { border-left: 2px solid #8886; padding-left: .8rem; } dd { margin: 0; }
dt { font-size: .8rem; opacity: .75; }
@media print {
  :root { color-scheme: light; font-size: 11px; } body { max-width: none; margin: 0; }
  h2, h3 { break-after: avoid; } figure, tr, dl, li { break-inside: avoid; }
}
</style></head><body>
<h1>Training runs</h1>
BODY</body></html>
"""


@dataclass(frozen=True)
class Report:
    """Write one HTML file about training runs, which needs no network to be read."""

    run_dirs: tuple[str, ...]
    """Folders that expo_fast.train wrote."""
    output: str = "report.html"
    """Replaced if it is there."""


def main(argv: Sequence[str]) -> None:
    config = from_flags(Report, argv, str(Report.__doc__), {})
    if not config.run_dirs:
        raise ValueError("need the folder of a run, or of several; see --help")
    output = output_file(config.output)
    if len({Path(name).resolve() for name in config.run_dirs}) < len(config.run_dirs):
        raise ValueError(f"one run is given twice: {' '.join(config.run_dirs)}")
    runs = [drawing.load_run(name) for name in config.run_dirs]
    page = render(drawing.grouped(runs)).encode()
    try:
        replace_file(output, page)
    except OSError as error:
        raise ValueError(f"--output {config.output!r}: {error.strerror}") from None
    print(f"report: {output}", flush=True)


def escaped(value: Any, longest: int = drawing.LONGEST) -> str:
    """Text as HTML that shows it."""
    return html.escape(spelt(value, longest))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """All cells are HTML; the first of a row names it."""
    lines = [f"<tr><th>{first}</th>{_cells(rest)}</tr>" for first, *rest in rows]
    columns = "".join(f"<th>{cell}</th>" for cell in head)
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead>\n{body}</table></div>'


def _cells(cells: Iterable[str]) -> str:
    return "".join(f"<td>{cell or '&ndash;'}</td>" for cell in cells)


def section(title: str, *parts: str) -> str:
    """Empty where there is nothing to show under the title."""
    body = "\n".join(filter(None, parts))
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n" if body else ""


def remark(text: str) -> str:
    return f'<p class="remark">{text}</p>'


def render(groups: Sequence[Group]) -> str:
    """The page."""
    n_runs = sum(len(g.runs) for g in groups)
    parts = (
        remark(f"Runs: {n_runs}, configurations: {len(groups)}. {ABOUT}"),
        section("Configurations", overview(groups), unlike(groups)),
        section("Accuracy by level", levels(groups)),
        section("Learning curves", figure("learning", drawing.LEARNING, groups)),
        section("The two properties of a good positive sample", *properties(groups)),
        section(
            "What updates the weights",
            figure("updates", drawing.UPDATES, groups),
            still(groups),
        ),
        section("Preference pairs", figure("preferences", drawing.PREFERENCES, groups)),
        section("Seconds by phase", phases(groups)),
        section("Completions", *map(completions, groups)),
        section("Runs and their configurations", *map(record, groups)),
    )
    return PAGE.replace("BODY", "".join(parts), 1)


def overview(groups: Sequence[Group]) -> str:
    ks = sorted({1, *(k for g in groups for r in g.runs if (k := r.samples))})
    accuracy = {f"pass@{k}": ".3f" for k in ks} | {"majority": ".3f", "all_fail": ".0%"}
    accuracy = {k: f for k, f in accuracy.items() if any(change(g, k, f) for g in groups)}
    fields = drawing.differing(groups)
    head = ["configuration", *(["differs in"] if fields else []), "seeds", "steps"]
    head += [key.replace("_", " ") for key in accuracy]
    rows = []
    for g in groups:
        own = g.runs[0].config
        said = (f"{escaped(k, 80)}&nbsp;{escaped(own.get(k, 'unset'), 80)}" for k in fields)
        seeds = ", ".join(escaped(r.config.get("seed", "?"), 20) for r in g.runs)
        row = [escaped(g.name), *(["<br>".join(said)] if fields else []), seeds, steps_done(g)]
        row += [change(g, key, form) for key, form in accuracy.items()]
        rows.append([*row, sampled(g), duration(g)])
    note = (
        "Held-out accuracy before &rarr; after, the mean over runs. Under it, of several runs the "
        "smallest and the largest (a&thinsp;&hellip;&thinsp;b), of one run its 95% bootstrap "
        "interval over questions ([a, b]). Tokens and time are a run's, without its evaluations; "
        "tokens count prompts too."
    )
    return table([*head, "tokens", "time of steps"], rows) + remark(note)


def steps_done(g: Group) -> str:
    done, wanted = {r.steps[-1]["step"] for r in g.runs}, g.runs[0].config.get("steps")
    text = "&ndash;".join(map(str, sorted({min(done), max(done)})))
    text += "" if done == {wanted} or wanted is None else f" of {escaped(wanted, 20)}"
    last = sorted({r.after["step"] for r in g.runs if r.after} - done)
    return text + (f"<small>evaluated after {', '.join(map(str, last))}</small>" if last else "")


def change(g: Group, key: str, form: str, level: int | None = None) -> str:
    """A number of the evaluations before and after, as HTML; empty where there is neither."""
    sides = [(at(r.before, level), at(r.after, level)) for r in g.runs]
    whole = [pair for pair in sides if all(number(row, key) is not None for row in pair)]
    before, after = (spread(side, key) for side in zip(*(whole or sides), strict=True))
    if before is None and after is None:
        return ""
    cell = " &rarr; ".join(format(x.mean, form) if x else "&ndash;" for x in (before, after))
    ranges = [between(x, form) for x in (before, after)]
    cell += f"<small>{' &rarr; '.join(ranges)}</small>" if any(ranges) else ""
    few = 0 < len(whole) < len(sides)
    return cell + (f"<small>{len(whole)} of {len(sides)} runs</small>" if few else "")


def at(evaluation: Row, level: int | None) -> Row:
    """The evaluation, or what it says of one level."""
    if level is None:
        return evaluation
    return next((row for row in level_rows(evaluation) if row.get("level") == level), {})


def level_rows(evaluation: Row) -> list[Row]:
    rows = evaluation.get("levels")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def between(x: Spread | None, form: str) -> str:
    if x is None or x.low is None or x.high is None:
        return ""
    low, high = format(x.low, form), format(x.high, form)
    return f"{low}&thinsp;&hellip;&thinsp;{high}" if x.n > 1 else f"[{low}, {high}]"


def sampled(g: Group) -> str:
    totals = [max(found) for r in g.runs if (found := numbers(r.steps, "num_tokens"))]
    return f"{fmean(totals):,.0f}" if totals else ""


def duration(g: Group) -> str:
    seconds = sum(g.seconds.values()) / len(g.runs)
    return str(timedelta(seconds=round(seconds))) if seconds else ""


def unlike(groups: Sequence[Group]) -> str:
    """A warning where accuracies were not measured alike."""
    rows = [row for g in groups for r in g.runs for row in r.evaluations]
    names = ("problems", "samples", "template", "grader")
    found = [n for n in names if len({repr(row[n]) for row in rows if n in row}) > 1]
    asked = ("eval_data", "eval_temperature", "levels", "shots", "system_prompt")
    found += [n for n in drawing.differing(groups) if n in asked]
    if not found:
        return ""
    return remark(f"<b>Not measured alike:</b> evaluations differ in {', '.join(found)}.")


def levels(groups: Sequence[Group]) -> str:
    """One column a level; left out where there is but one, which the overview shows."""
    rows = [row for g in groups for r in g.runs for e in r.evaluations for row in level_rows(e)]
    found = {int(x): row for row in rows if (x := number(row, "level")) is not None}
    if len(found) < 2:
        return ""
    columns = sorted(found)
    keys = sorted({key for row in rows for key in row if key.startswith("pass@")})
    keys = [key for key in keys if "/" not in key]
    lines = []
    for g in groups:
        for key in keys:
            cells = [change(g, key, ".3f", level) for level in columns]
            if any(cells):
                lines.append([f"{escaped(g.name)}, {escaped(key)}", *cells])
    head = [
        f"level {x}<small>{escaped(found[x].get('problems'), 20)} questions</small>"
        for x in columns
    ]
    return table(["configuration", *head], lines)


def figure(name: str, panels: Sequence[Panel], groups: Sequence[Group]) -> str:
    """Those of the panels that have data, as SVG; empty where none has."""
    drawn = [(p, found) for p in panels if (found := drawing.curves(groups, p))]
    names = [g.name for g in groups]
    return f"<figure>{drawing.draw(name, drawn, names)}</figure>" if drawn else ""


def properties(groups: Sequence[Group]) -> list[str]:
    picture = figure("properties", drawing.PROPERTIES, groups)
    if not picture:
        return []
    about = (
        "(a) In-distribution: under the plain question, the model finds the explanation likelier "
        "than the expert's solution. (b) Learning signal: behind the explanation, the right answer "
        "is likelier than behind the model's own attempts (lift above 0). An explanation that "
        "states the answer has its lift by copying, so the verdict is on the lift with the answer "
        "masked. Both verdicts are on the same few questions of a step, with an accepted "
        "explanation: the likeliest of the question's, unless choose_explanations says otherwise. "
        "The curve of the explanations' NLL is over all that are trained on."
    )
    verdicts = (
        f"<li>{escaped(g.name)}<ul><li>(a) {in_distribution(g)}</li>"
        f"<li>(b) {learning_signal(g)}</li></ul></li>"
        for g in groups
    )
    return [remark(about), f"<ul>{''.join(verdicts)}</ul>", picture]


def in_distribution(g: Group) -> str:
    over = numbers(g.steps, "exp/nll_over_expert")
    if not over:
        return "In-distribution: not measured."
    reason = "the explanation's NLL is {} the expert's"
    said = verdict("In-distribution", [x < 0 for x in over], reason, "below")
    return said + f". Mean difference {fmean(over):+.3g} nats a token."


def learning_signal(g: Group) -> str:
    lift, stated = numbers(g.steps, "exp/lift"), numbers(g.steps, "exp/lift_stated")
    if not lift:
        return "Learning signal: not measured."
    unsure = "" if stated else ", if the answer was masked, which the record does not say"
    said = verdict(f"Learning signal{unsure}", [x > 0 for x in lift], "the lift is {} 0", "above")
    said += f". Mean {fmean(lift):.3g} nats, lowest {min(lift):.3g}, highest {max(lift):.3g}"
    return said + (f"; with the answer stated, mean {fmean(stated):.3g}." if stated else ".")


def verdict(what: str, holds: Sequence[bool], reason: str, side: str) -> str:
    """In words and counts, over the steps that measured it in all runs together."""
    n, of = sum(holds), len(holds)
    if 2 * n > of:
        return f"{what}: <b>holds</b> in {n} of {of} measured steps: {reason.format(side)}"
    side = f"not {side}"
    return f"{what}: <b>fails</b> in {of - n} of {of} measured steps: {reason.format(side)}"


def still(groups: Sequence[Group]) -> str:
    """What the logarithmic axis cannot show: steps in which a part gave no gradient."""
    said = []
    for g in groups:
        for key, label in drawing.UPDATES[0].metrics.items():
            norms = numbers(g.steps, key)
            if 0 in norms:
                n = norms.count(0)
                said.append(f"{escaped(g.name)}: {label} {n} of {len(norms)}")
    return remark(f"Steps with a norm of 0, not drawn: {'; '.join(said)}.") if said else ""


def phases(groups: Sequence[Group]) -> str:
    spent = {g.name: g.seconds for g in groups}
    columns = list(dict.fromkeys(name for seconds in spent.values() for name in seconds))
    rows = []
    for g in groups:
        seconds, total = spent[g.name], sum(spent[g.name].values())
        if total:
            cells = [
                f"{seconds[c] / len(g.steps):.3g}<small>{seconds[c] / total:.0%}</small>"
                if c in seconds
                else ""
                for c in columns
            ]
            rows.append([escaped(g.name), *cells, f"{total / len(g.steps):.3g}"])
    if not rows:
        return ""
    head = ["configuration", *(escaped(c, 40).replace("_", " ") for c in columns), "sum"]
    return table(head, rows) + remark("Mean seconds of a step, and the phase's share of their sum.")


def completions(g: Group) -> str:
    """Some of what was said in the first and the last step of the configuration's first run."""
    first = g.runs[0]
    files = Path(first.path, "completions").glob("step-*.jsonl")
    found = {int(n): f for f in files if (n := f.stem.removeprefix("step-")).isdecimal()}
    parts = []
    for step in sorted({min(found), max(found)}) if found else ():
        said = [question(rows) for rows in first_questions(found[step])]
        if said:
            title = f"{escaped(g.name)}, step {step} of {escaped(first.path, 200)}"
            parts.append(f"<h3>{title}</h3>\n{''.join(said)}")
    return "".join(parts)


def first_questions(file: Path) -> list[list[Row]]:
    """Their rows; questions with an explanation or another such sample come first."""
    found: dict[str, list[Row]] = {}
    for row in drawing.read_rows(file):
        found.setdefault(repr(row.get("id")), []).append(row)
    mixed = sorted(found.values(), key=lambda rows: len({repr(r.get("kind")) for r in rows}) < 2)
    return mixed[:QUESTIONS]


def question(rows: Sequence[Row]) -> str:
    """The first text of each kind."""
    head = rows[0]
    parts = [("question", head.get("prompt")), ("answer", head.get("answer"))]
    kinds: dict[str, Row] = {}
    for row in rows:
        kinds.setdefault(spelt(row.get("kind"), 40), row)
    for kind, row in kinds.items():
        label, reward = KINDS.get(kind, kind), number(row, "reward")
        label += "" if reward is None else f", reward {reward:.3g}"
        parts.append((label, row.get("completion")))
    shown = (f"<dt>{escaped(a)}</dt><dd><pre>{escaped(b)}</pre></dd>" for a, b in parts)
    return f"<dl>{''.join(shown)}</dl>\n"


def record(g: Group) -> str:
    seeds = [escaped(r.config.get("seed", "?"), 20) for r in g.runs]
    pairs = zip(g.runs, seeds, strict=True)
    folders = "".join(f"<li>{escaped(r.path)} (seed {seed})</li>" for r, seed in pairs)
    lines = (f"{k} = {spelt(v)}" for k, v in g.runs[0].config.items() if k not in drawing.SAME)
    fields = "\n".join(escaped(line) for line in lines)
    return f"<h3>{escaped(g.name)}</h3>\n<ul>{folders}</ul>\n<pre>{fields}</pre>"


if __name__ == "__main__":
    sys.exit(run(main))
