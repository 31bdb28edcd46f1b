"""From runs to what is committed: results.json, TABLE.md and two figures."""

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
from expo_fast.reporting.panels import LEARNING, PROPERTIES, PlottedPanel, curves
from expo_fast.reporting.runs import Group, Run, load_run, numbers
from expo_fast.storage.files import replace_file

KEPT = ("reward", "frac_all_fail", "exp/rate", "exp/nll", "expert/nll", "own/nll", "exp/lift")
KEPT += ("exp/nll_over_expert", "exp/accepted", "exp/lift_stated", "exp/leak_rate")
KEPT += ("exp/unfit_rate", "own/leak_rate", "grad_norm/policy")
KEPT += ("grad_norm/exp_sft", "pairs", "rewards/margins", "num_tokens")


def collect(size: Size, folder: Path, output: Path) -> None:
    """Tables and figures of the runs in FOLDER that are done, into OUTPUT."""
    groups = {arm.name: runs for arm in (*ARMS, *ABLATION) if (runs := finished(arm, size, folder))}
    if not groups:
        raise SystemExit(f"no finished run in {folder}: run the arms first")
    output.mkdir(parents=True, exist_ok=True)
    own = [arm.name for arm in (*ARMS, *ABLATION) if arm.mirrors is None]
    rows = [record(name, run) for name in own for run in groups.get(name, [])]
    chosen = json.loads((folder / "chosen.json").read_text())
    result = {"chosen": {k: anywhere(v) for k, v in chosen.items()}, "runs": rows}
    halves = [
        {arm.name: groups[arm.name] for arm in arms if arm.name in groups}
        for arms in (ARMS, ABLATION)
        if any(arm.name in groups for arm in arms if arm.mirrors is None)
    ]
    halves[1:] = map(same_seeds, halves[1:])
    text = "\n".join("".join(table(size, half, groups.get("GRPO", []))) for half in halves)
    replace_file(output / "results.json", json.dumps(result, indent=1).encode() + b"\n")
    replace_file(output / "TABLE.md", text.encode())
    drawn = [Group(name, groups[name]) for name in (a.name for a in ARMS) if name in groups]
    every = range(len(drawn))
    explained = [i for i in every if numbers(drawn[i].steps, "exp/nll")] or every
    for name, panels, of in (("learning", LEARNING, every), ("properties", PROPERTIES, explained)):
        found = [(panel, [c for c in curves(drawn, panel) if c.owner in of]) for panel in panels]
        shown = [PlottedPanel(panel, some) for panel, some in found if some]
        svg = draw(name, shown, [g.name for g in drawn]).replace("currentColor", "black")
        replace_file(output / f"{name}.svg", svg.encode() + b"\n")
    print(text)


def finished(arm: Arm, size: Size, folder: Path) -> list[Run]:
    """Return the arm's runs, by seed."""
    same = next(a for a in (*ARMS, *ABLATION) if a.name == (arm.mirrors or arm.name))
    made = [(target(folder, same, seed), train_flags(same, size, seed, folder)) for seed in SEEDS]
    return [run for path, flags in made if (run := done(path, flags))]


def done(path: Path, flags: Sequence[str]) -> Run | None:
    """Return a run that has reached its last step. Raise SystemExit if it had other flags."""
    if not (path / "evaluations.jsonl").exists() or not (path / "metrics.jsonl").exists():
        return None
    run, wanted = load_run(str(path)), asdict(parse(Train, flags))
    for name in [name for name in wanted if name == "steps" or name not in ADJUSTABLE]:
        have, want = run.config.get(name), wanted[name]
        if have != (list(want) if isinstance(want, tuple) else want):
            raise SystemExit(
                f"{path} holds a run with {name}={have!r}, the arm has {want!r}: take another "
                "--folder, or remove it"
            )
    last = run.evaluations[-1]["step"] if run.evaluations else 0
    return run if last == run.config["steps"] else None


def same_seeds(groups: dict[str, list[Run]]) -> dict[str, list[Run]]:
    """Without the runs whose seed another arm lacks."""
    seeds = set.intersection(*({run.config["seed"] for run in runs} for runs in groups.values()))
    return {
        name: [run for run in runs if run.config["seed"] in seeds] for name, runs in groups.items()
    }


def record(name: str, run: Run) -> dict[str, Any]:
    steps = [{key: row.get(key) for key in ("step", *KEPT) if key in row} for row in run.steps]
    seconds = sum(v for row in run.steps for k, v in row.items() if k.startswith("time/"))
    return {
        "arm": name,
        "seed": run.config["seed"],
        "commit": ", ".join(dict.fromkeys(Path(f"{run.path}.commit").read_text().split())),
        "config": {k: anywhere(v) for k, v in run.config.items() if k != "output_dir"},
        "seconds": round(seconds, 1),
        "evaluations": run.evaluations,
        "steps": steps,
    }


def anywhere(value: Any) -> Any:
    """Of a file, or of each in a list, its name: its folder says nothing on another machine."""
    if isinstance(value, list):
        return [anywhere(x) for x in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def table(size: Size, groups: dict[str, list[Run]], grpo: Sequence[Run]) -> Iterator[str]:
    """In the form of the paper's table for MATH: pass@K by level, a row a method."""
    K = size.flags["eval-samples"]
    first = next(iter(groups.values()))
    levels = [row["level"] for row in first[0].evaluations[0]["levels"]]
    n = {row["level"]: row["problems"] for row in first[0].evaluations[0]["levels"]}
    heads = [f"level {at} ({n[at]})" for at in levels] if len(levels) > 1 else []
    columns = [*heads, "all", "pass@1", "over GRPO", "majority", "boxed", "explained", "seeds"]
    columns += ["tokens"]
    yield f"| trained by | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}\n"
    bases = [run.before for run in first]
    yield row_of("none (before)", bases, levels if heads else [], f"pass@{K}", "", "", "")
    for name, runs in groups.items():
        after = [run.after for run in runs]
        tokens = fmean([run.steps[-1]["num_tokens"] for run in runs])
        shown = [n for run in runs for row in run.steps if (n := row.get("exp/accepted"))]
        explained = f"{sum(shown) / len(runs):.0f}" if shown else ""
        over = against(runs, grpo) or ""
        rest = over, explained, f"{tokens / 1000:.0f}"
        yield row_of(name, after, levels if heads else [], f"pass@{K}", *rest)
    yield f"\npass@{K} by level and over all; per cent, mean and range over seeds. over GRPO: "
    yield "difference in pass@1 at the same seed. boxed: samples with any answer in a box. "
    yield "explained: explanations trained on in a run. tokens: prompts and completions, in "
    yield "thousands.\n"


def row_of(
    name: str,
    rows: Sequence[Row],
    levels: Sequence[int],
    key: str,
    over: str,
    explained: str,
    tokens: str,
) -> str:
    by_level = [[at[key] for r in rows for at in r["levels"] if at["level"] == n] for n in levels]
    cells = [spread(values) for values in by_level]
    cells += [spread([r[k] for r in rows]) for k in (key, "pass@1")] + [over]
    cells += [spread([r[k] for r in rows]) for k in ("majority", "boxed_ratio")]
    cells += [explained, str(len(rows)), tokens]
    return f"| {name} | {' | '.join(cells)} |\n"


def spread(values: Sequence[float]) -> str:
    low, high = (f"{100 * x:.1f}" for x in (min(values), max(values)))
    return f"{100 * fmean(values):.1f}" + (f" [{low}, {high}]" if len(values) > 1 else "")


def against(runs: Sequence[Run], others: Sequence[Run]) -> str | None:
    """Gain in pass@1 over the runs of the same seeds; None against itself, or without any."""
    by_seed = {run.config["seed"]: run for run in others}
    both = [(run, by_seed[run.config["seed"]]) for run in runs if run.config["seed"] in by_seed]
    gains = [run.after["pass@1"] - other.after["pass@1"] for run, other in both]
    if not gains or all(run.path == other.path for run, other in both):
        return None
    return f"{100 * fmean(gains):+.1f} [{100 * min(gains):+.1f}, {100 * max(gains):+.1f}]"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
