"""Collect the results of finished runs: results.json, TABLE.md and two figures."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.reproduction.arms import ABLATION, ARMS, SEEDS, Arm, Size, target, train_flags
from expo_fast.cli.flags import parse
from expo_fast.config import ADJUSTABLE, Train
from expo_fast.reporting.drawing import draw
from expo_fast.reporting.jsonl import Row
from expo_fast.reporting.panels import LEARNING, PROPERTIES, Panel, PlottedPanel, curves
from expo_fast.reporting.runs import Group, Run, load_run, numbers
from expo_fast.storage.files import replace_file

# The metrics of a step that results.json keeps.
KEPT = ("reward", "frac_all_fail", "exp/rate", "exp/nll", "expert/nll", "own/nll", "exp/lift")
KEPT += ("exp/nll_over_expert", "exp/accepted", "exp/lift_stated", "exp/leak_rate")
KEPT += ("exp/unfit_rate", "own/leak_rate", "grad_norm/policy")
KEPT += ("grad_norm/exp_sft", "pairs", "rewards/margins", "num_tokens")

ALL_ARMS = (*ARMS, *ABLATION)


def collect(size: Size, folder: Path, output: Path) -> None:
    """Write the tables and figures of the finished runs in a folder.

    Raise SystemExit if there is none.
    """
    groups: dict[str, list[Run]] = {}
    for arm in ALL_ARMS:
        runs = finished(arm, size, folder)
        if runs:
            groups[arm.name] = runs
    if not groups:
        raise SystemExit(f"{folder} contains no finished run: run the arms first")
    output.mkdir(parents=True, exist_ok=True)
    write_records(groups, folder, output)
    text = tables(size, groups)
    replace_file(output / "TABLE.md", text.encode())
    write_figures(groups, output)
    print(text)


def write_records(groups: dict[str, list[Run]], folder: Path, output: Path) -> None:
    """Write results.json, with one record for each run."""
    rows = []
    for arm in ALL_ARMS:
        if arm.mirrors is None:
            rows += [record(arm.name, run) for run in groups.get(arm.name, [])]
    chosen = json.loads((folder / "chosen.json").read_text())
    result = {"chosen": {k: without_folder(v) for k, v in chosen.items()}, "runs": rows}
    replace_file(output / "results.json", json.dumps(result, indent=1).encode() + b"\n")


def tables(size: Size, groups: dict[str, list[Run]]) -> str:
    """Return the tables of the arms and of the ablation, as far as there are runs for them."""
    parts = []
    for arms in (ARMS, ABLATION):
        if any(arm.name in groups for arm in arms if arm.mirrors is None):
            parts.append({arm.name: groups[arm.name] for arm in arms if arm.name in groups})
    # The first table may have arms with fewer seeds. The tables after it compare equal seeds.
    compared = parts[:1] + [same_seeds(part) for part in parts[1:]]
    grpo = groups.get("GRPO", [])
    return "\n".join("".join(table(size, part, grpo)) for part in compared)


def write_figures(groups: dict[str, list[Run]], output: Path) -> None:
    """Write learning.svg of all arms, and properties.svg of the arms that explain."""
    drawn = [Group(arm.name, groups[arm.name]) for arm in ARMS if arm.name in groups]
    everything = range(len(drawn))
    explaining = [i for i in everything if numbers(drawn[i].steps, "exp/nll")]
    write_figure(output / "learning.svg", LEARNING, drawn, everything)
    write_figure(output / "properties.svg", PROPERTIES, drawn, explaining or everything)


def write_figure(
    path: Path, panels: Sequence[Panel], drawn: Sequence[Group], owners: Sequence[int]
) -> None:
    """Write a figure with the curves of these owners, which are indices of `drawn`."""
    shown = []
    for panel in panels:
        some = [curve for curve in curves(drawn, panel) if curve.owner in owners]
        if some:
            shown.append(PlottedPanel(panel, some))
    svg = draw(shown, [group.name for group in drawn])
    replace_file(path, svg.replace("currentColor", "black").encode() + b"\n")


def finished(arm: Arm, size: Size, folder: Path) -> list[Run]:
    """Return the finished runs of an arm, in the order of seeds."""
    name = arm.mirrors or arm.name
    same = next(other for other in ALL_ARMS if other.name == name)
    runs = []
    for seed in SEEDS:
        run = done(target(folder, same, seed), train_flags(same, size, seed, folder))
        if run:
            runs.append(run)
    return runs


def done(path: Path, flags: Sequence[str]) -> Run | None:
    """Return the run if it has reached its last step, else None.

    Raise SystemExit if it was started with other flags.
    """
    if not (path / "evaluations.jsonl").exists() or not (path / "metrics.jsonl").exists():
        return None
    run = load_run(str(path))
    expected = asdict(parse(Train, flags))
    for name, value in expected.items():
        if name != "steps" and name in ADJUSTABLE:
            continue
        found = run.config.get(name)
        if found != (list(value) if isinstance(value, tuple) else value):
            raise SystemExit(
                f"{path} contains a run with {name}={found!r}, the arm has {value!r}: take another "
                "--folder, or remove the run"
            )
    last = run.evaluations[-1]["step"] if run.evaluations else 0
    return run if last == run.config["steps"] else None


def same_seeds(groups: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Return the runs whose seed occurs in every group."""
    by_group = [{run.config["seed"] for run in runs} for runs in groups.values()]
    common = set.intersection(*by_group)
    found = {}
    for name, runs in groups.items():
        found[name] = [run for run in runs if run.config["seed"] in common]
    return found


def record(name: str, run: Run) -> dict[str, Any]:
    """Return a run of an arm as plain data, for JSON."""
    steps = []
    seconds = []
    for row in run.steps:
        steps.append({key: row[key] for key in ("step", *KEPT) if key in row})
        seconds += [value for key, value in row.items() if key.startswith("time/")]
    commits = Path(f"{run.path}.commit").read_text().split()
    config = {k: without_folder(v) for k, v in run.config.items() if k != "output_dir"}
    return {
        "arm": name,
        "seed": run.config["seed"],
        "commit": ", ".join(dict.fromkeys(commits)),  # each commit once
        "config": config,
        "seconds": round(sum(seconds), 1),
        "evaluations": run.evaluations,
        "steps": steps,
    }


def without_folder(value: Any) -> Any:
    """Return an absolute path, or each one in a list, as its file name. Return other values as is.

    A folder of this machine means nothing on another one.
    """
    if isinstance(value, list):
        return [without_folder(each) for each in value]
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name
    return value


def table(size: Size, groups: dict[str, list[Run]], grpo: Sequence[Run]) -> Iterator[str]:
    """Yield a table like the paper's table for MATH: pass@K by level, with a row per method."""
    key = f"pass@{size.flags['eval-samples']}"
    first = next(iter(groups.values()))
    level_rows = first[0].evaluations[0]["levels"]
    if len(level_rows) == 1:
        level_rows = []
    levels = [row["level"] for row in level_rows]
    columns = [f"level {row['level']} ({row['problems']})" for row in level_rows]
    columns += ["all", "pass@1", "over GRPO", "majority", "boxed", "explained", "seeds", "tokens"]
    yield f"| trained by | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}\n"
    before = [run.before for run in first]
    yield row_of("none (before)", before, levels, key)
    for name, runs in groups.items():
        tokens = fmean([run.steps[-1]["num_tokens"] for run in runs])
        yield row_of(
            name,
            [run.after for run in runs],
            levels,
            key,
            over=gain_over(runs, grpo) or "",
            explained=explanations_of(runs),
            tokens=f"{tokens / 1000:.0f}",
        )
    yield f"\n{key} by level and over all; per cent, mean and range over seeds. over GRPO: "
    yield "difference in pass@1 at the same seed. boxed: samples with any answer in a box. "
    yield "explained: explanations trained on in a run. tokens: prompts and completions, in "
    yield "thousands.\n"


def explanations_of(runs: Sequence[Run]) -> str:
    """Return the mean number of explanations that a run trains on, or "" if there are none."""
    total = sum(row.get("exp/accepted") or 0 for run in runs for row in run.steps)
    return f"{total / len(runs):.0f}" if total else ""


def row_of(
    name: str,
    rows: Sequence[Row],
    levels: Sequence[int],
    key: str,
    over: str = "",
    explained: str = "",
    tokens: str = "",
) -> str:
    """Return a row of the table from evaluations of several seeds."""
    cells = []
    for level in levels:
        of_level = [each for row in rows for each in row["levels"] if each["level"] == level]
        cells.append(spread(of_level, key))
    cells += [spread(rows, key), spread(rows, "pass@1"), over]
    cells += [spread(rows, "majority"), spread(rows, "boxed_ratio")]
    cells += [explained, str(len(rows)), tokens]
    return f"| {name} | {' | '.join(cells)} |\n"


def spread(rows: Sequence[Row], key: str) -> str:
    """Return the mean of a column in per cent, with its range if there are several rows."""
    values = [row[key] for row in rows]
    mean = f"{100 * fmean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} [{100 * min(values):.1f}, {100 * max(values):.1f}]"


def gain_over(runs: Sequence[Run], others: Sequence[Run]) -> str | None:
    """Return the gain in pass@1 over the runs of the same seeds.

    Return None if no seed is the same, or if both are the same runs.
    """
    by_seed = {run.config["seed"]: run for run in others}
    pairs = [(run, by_seed[run.config["seed"]]) for run in runs if run.config["seed"] in by_seed]
    if all(run.path == other.path for run, other in pairs):
        return None
    gains = [run.after["pass@1"] - other.after["pass@1"] for run, other in pairs]
    return f"{100 * fmean(gains):+.1f} [{100 * min(gains):+.1f}, {100 * max(gains):+.1f}]"


def commit() -> str:
    """Return the commit of the checkout, marked if there are changes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()
