"""Tables of the report: configurations with their accuracy, accuracy by level, time by phase."""

from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from itertools import chain
from statistics import fmean

from expo_fast.reporting.jsonl import Row
from expo_fast.reporting.markup import escaped, remark, small, table
from expo_fast.reporting.runs import (
    Group,
    Spread,
    differing_fields,
    level_rows,
    number,
    numbers,
    row_of_level,
    spread,
)
from expo_fast.reporting.text import is_number

# Keys and fields that must be equal for accuracies to be comparable.
MEASURED_WITH = ("problems", "samples", "template", "grader")
EVALUATION_FIELDS = ("eval_data", "eval_temperature", "levels", "shots", "system_prompt")


def overview(groups: Sequence[Group]) -> str:
    """Return one row per configuration: its differing fields, accuracy, tokens and time."""
    formats = _accuracy_formats(groups)
    fields = differing_fields(groups)
    head = ["configuration", "seeds", "steps"]
    head += [key.replace("_", " ") for key in formats]
    head += ["tokens", "time of steps"]
    if fields:
        head.append("differs in")
    rows = [_overview_row(group, fields, formats) for group in groups]
    note = (
        "Held-out accuracy before &rarr; after training, as the mean over runs. The second line is "
        "the smallest and the largest of several runs (a&thinsp;&hellip;&thinsp;b), or the 95% "
        "bootstrap interval over questions of a single run ([a, b]). Tokens and time are per run, "
        "without evaluations. Tokens include prompts."
    )
    return table(head, rows) + remark(note)


def _accuracy_formats(groups: Sequence[Group]) -> dict[str, str]:
    """Return the format of each accuracy that an evaluation has, by key."""
    ks = {1}
    for group in groups:
        for run in group.runs:
            if run.samples:
                ks.add(run.samples)
    formats = {f"pass@{k}": ".3f" for k in sorted(ks)}
    formats |= {"majority": ".3f", "all_fail": ".0%"}
    known = {}
    for key, number_format in formats.items():
        if any(before_and_after(group, key, number_format) for group in groups):
            known[key] = number_format
    return known


def _overview_row(group: Group, fields: Sequence[str], formats: dict[str, str]) -> list[str]:
    row = [escaped(group.name)]
    seeds = [run.config.get("seed", "?") for run in group.runs]
    row.append(", ".join(escaped(seed, 20) for seed in seeds))
    row.append(_steps_done(group))
    row += [before_and_after(group, key, number_format) for key, number_format in formats.items()]
    row.append(_tokens(group))
    row.append(_duration(group))
    if fields:
        lines = []
        for name in fields:
            value = group.config.get(name, "unset")
            lines.append(f"{escaped(name, 80)}&nbsp;{escaped(value, 80)}")
        row.append("<br>".join(lines))
    return row


def _steps_done(group: Group) -> str:
    done = {run.steps[-1]["step"] for run in group.runs}
    wanted = group.config.get("steps")
    ends = sorted({min(done), max(done)})
    text = "&ndash;".join(map(str, ends))
    if wanted is not None and done != {wanted}:
        text += f" of {escaped(wanted, 20)}"
    evaluated = {run.after["step"] for run in group.runs if run.after}
    earlier = sorted(evaluated - done)
    if earlier:
        text += small(f"evaluated after {', '.join(map(str, earlier))}")
    return text


def _tokens(group: Group) -> str:
    totals = []
    for run in group.runs:
        counts = numbers(run.steps, "num_tokens")  # cumulative numbers
        if counts:
            totals.append(max(counts))
    return f"{fmean(totals):,.0f}" if totals else ""


def _duration(group: Group) -> str:
    seconds = sum(group.seconds_by_phase.values()) / len(group.runs)
    try:
        return str(timedelta(seconds=round(seconds))) if seconds else ""
    except OverflowError:  # a broken file: no run takes millions of years
        return f"{seconds:.3g} s"


def before_and_after(group: Group, key: str, number_format: str, level: int | None = None) -> str:
    """Return a number of the evaluations before and after training as HTML, or "" if none has it.

    It is the mean over the runs that have both evaluations, or over all runs if no run has both.

    number_format: format specification, such as `.3f`.
    level: level of problems; None: all problems.
    """
    pairs = []
    complete = []
    for run in group.runs:
        pair = (run.before, run.after)
        if level is not None:
            pair = (row_of_level(run.before, level), row_of_level(run.after, level))
        pairs.append(pair)
        if len(numbers(pair, key)) == 2:
            complete.append(pair)
    shown = complete or pairs
    before = spread([row for row, _ in shown], key)
    after = spread([row for _, row in shown], key)
    if before is None and after is None:
        return ""
    cell = f"{_mean(before, number_format)} &rarr; {_mean(after, number_format)}"
    ranges = [_range(before, number_format), _range(after, number_format)]
    if any(ranges):
        cell += small(" &rarr; ".join(ranges))
    if 0 < len(complete) < len(pairs):
        cell += small(f"{len(complete)} of {len(pairs)} runs")
    return cell


def verdicts(groups: Sequence[Group]) -> str:
    """Return the reasons of the verdicts of each configuration's last evaluations, as a table.

    Return "" if no evaluation has them.
    """
    rows = []
    for group in groups:
        counts: Counter[str] = Counter()
        for run in group.runs:
            found = run.after.get("verdicts")
            if isinstance(found, dict):
                counts.update({name: n for name, n in found.items() if is_number(n)})
        total = sum(counts.values())
        if total > 0:
            shares = [f"{escaped(name, 20)} {n / total:.1%}" for name, n in counts.most_common()]
            rows.append([escaped(group.name), ", ".join(shares)])
    return table(["configuration", "verdicts on the samples after training"], rows) if rows else ""


def _mean(x: Spread | None, number_format: str) -> str:
    return format(x.mean, number_format) if x else "&ndash;"


def _range(x: Spread | None, number_format: str) -> str:
    if x is None or x.low is None or x.high is None:
        return ""
    low = format(x.low, number_format)
    high = format(x.high, number_format)
    if x.n_runs > 1:
        return f"{low}&thinsp;&hellip;&thinsp;{high}"
    return f"[{low}, {high}]"


def measured_differently(groups: Sequence[Group]) -> str:
    """Return a warning if accuracies cannot be compared, or "" if they can."""
    evaluations = [row for group in groups for row in group.evaluations]
    differing = []
    for name in MEASURED_WITH:
        values = {repr(row[name]) for row in evaluations if name in row}
        if len(values) > 1:
            differing.append(name)
    differing += [name for name in differing_fields(groups) if name in EVALUATION_FIELDS]
    if not differing:
        return ""
    return remark(f"<b>Measured differently:</b> evaluations differ in {', '.join(differing)}.")


def levels(groups: Sequence[Group]) -> str:
    """Return accuracy with one column per level, or "" for a single level."""
    evaluations = [row for group in groups for row in group.evaluations]
    rows = [row for evaluation in evaluations for row in level_rows(evaluation)]
    row_of: dict[int, Row] = {}
    for row in rows:
        level = number(row, "level")
        if level is not None:
            row_of[int(level)] = row
    if len(row_of) < 2:
        return ""
    columns = sorted(row_of)
    keys = sorted({key for row in rows for key in row if _is_pass_at_k(key)})
    head = ["configuration"]
    for level in columns:
        count = escaped(row_of[level].get("problems"), 20)
        head.append(f"level {level}" + small(f"{count} questions"))
    lines = []
    for group in groups:
        for key in keys:
            cells = [before_and_after(group, key, ".3f", level) for level in columns]
            if any(cells):
                lines.append([f"{escaped(group.name)}, {escaped(key)}", *cells])
    return table(head, lines)


def _is_pass_at_k(key: str) -> bool:
    return key.startswith("pass@") and "/" not in key  # pass@1/interval is not an accuracy


def phases(groups: Sequence[Group]) -> str:
    """Return the mean seconds of a step by phase, or "" if no run has them."""
    spent = {group.name: group.seconds_by_phase for group in groups}
    columns = list(dict.fromkeys(chain(*spent.values())))
    rows = []
    for group in groups:
        seconds = spent[group.name]
        total = sum(seconds.values())
        if not total:
            continue
        n_steps = len(group.steps)
        row = [escaped(group.name)]
        for phase in columns:
            cell = ""
            if phase in seconds:
                cell = f"{seconds[phase] / n_steps:.3g}" + small(f"{seconds[phase] / total:.0%}")
            row.append(cell)
        row.append(f"{total / n_steps:.3g}")
        rows.append(row)
    if not rows:
        return ""
    names = [escaped(phase, 40).replace("_", " ") for phase in columns]
    head = ["configuration", *names, "sum"]
    return table(head, rows) + remark("Mean seconds per step, and the percentage of their sum.")
