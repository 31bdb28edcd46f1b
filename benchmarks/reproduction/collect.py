"""From runs to what is committed: results.json, TABLE.md and two figures."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.reproduction.arms import ABLATION, ARMS, Arm, Size
from expo_fast.figures import LEARNING, PROPERTIES, Group, Row, Run, curves, draw, load_run
from expo_fast.log import replace_file

KEPT = ("reward", "frac_all_fail", "exp/rate", "exp/nll", "expert/nll", "own/nll", "exp/lift")
KEPT += ("exp/lift_stated", "exp/leak_rate", "own/leak_rate", "grad_norm/policy")
KEPT += ("grad_norm/exp_sft", "pairs", "rewards/margins", "num_tokens")


DATA = ("train_data", "eval_data")  # files of the machine; chosen.json says what is in them


def collect(size: Size, folder: Path, output: Path) -> None:
    """Tables and figures of the runs in FOLDER that are done, into OUTPUT."""
    groups = {arm.name: runs for arm in (*ARMS, *ABLATION) if (runs := finished(arm, folder))}
    if not groups:
        raise SystemExit(f"no finished run in {folder}: run the arms first")
    output.mkdir(parents=True, exist_ok=True)
    rows = [record(name, run) for name, runs in groups.items() for run in runs]
    result = {"chosen": json.loads((folder / "chosen.json").read_text()), "runs": rows}
    halves = [
        {arm.name: groups[arm.name] for arm in arms if arm.name in groups}
        for arms in (ARMS, ABLATION)
        if any(arm.name in groups for arm in arms if arm.mirrors is None)
    ]
    text = "\n".join("".join(table(size, half, groups.get("GRPO", []))) for half in halves)
    replace_file(output / "results.json", json.dumps(result, indent=1).encode() + b"\n")
    replace_file(output / "TABLE.md", text.encode())
    drawn = [Group(name, groups[name]) for name in (a.name for a in ARMS) if name in groups]
    for name, panels in (("learning", LEARNING), ("properties", PROPERTIES)):
        shown = [(panel, found) for panel in panels if (found := curves(drawn, panel))]
        svg = draw(name, shown, [g.name for g in drawn]).replace("currentColor", "black")
        replace_file(output / f"{name}.svg", svg.encode() + b"\n")
    print(text)


def finished(arm: Arm, folder: Path) -> list[Run]:
    """The arm's runs, by seed."""
    slug = next(a.slug for a in (*ARMS, *ABLATION) if a.name == (arm.mirrors or arm.name))
    return [run for seed in arm.seeds if (run := done(folder / f"{slug}-{seed}"))]


def done(path: Path) -> Run | None:
    """A run that has reached its last step and evaluated it."""
    if not (path / "evaluations.jsonl").exists() or not (path / "metrics.jsonl").exists():
        return None
    run = load_run(str(path))
    last = run.evaluations[-1]["step"] if run.evaluations else 0
    return run if last == run.config["steps"] else None


def record(name: str, run: Run) -> dict[str, Any]:
    steps = [{key: row.get(key) for key in ("step", *KEPT) if key in row} for row in run.steps]
    seconds = sum(v for row in run.steps for k, v in row.items() if k.startswith("time/"))
    return {
        "arm": name,
        "seed": run.config["seed"],
        "commit": Path(f"{run.path}.commit").read_text(),
        "config": {k: v for k, v in run.config.items() if k not in ("output_dir", *DATA)},
        "seconds": round(seconds, 1),
        "evaluations": run.evaluations,
        "steps": steps,
    }


def table(size: Size, groups: dict[str, list[Run]], grpo: Sequence[Run]) -> Iterator[str]:
    """In the form of the paper's table for MATH: pass@K by level, a row a method."""
    K = size.flags["eval-samples"]
    first = next(iter(groups.values()))
    levels = [row["level"] for row in first[0].evaluations[0]["levels"]]
    n = {row["level"]: row["problems"] for row in first[0].evaluations[0]["levels"]}
    heads = [f"level {at} ({n[at]})" for at in levels] if len(levels) > 1 else []
    columns = [*heads, "all", "pass@1", "majority", "over GRPO", "seeds", "tokens"]
    yield f"| trained by | {' | '.join(columns)} |\n|---|{'--:|' * len(columns)}\n"
    bases = [run.before for run in first]
    yield row_of("none (before)", bases, levels if heads else [], f"pass@{K}", None, None)
    for name, runs in groups.items():
        after = [run.after for run in runs]
        tokens = fmean([run.steps[-1]["num_tokens"] for run in runs])
        over = against(runs, grpo)
        yield row_of(name, after, levels if heads else [], f"pass@{K}", over, tokens)
    yield f"\npass@{K} by level and over all; per cent, mean and range over seeds. over GRPO: "
    yield "difference in pass@1 at the same seed. tokens: prompts and completions, in thousands.\n"


def row_of(
    name: str,
    rows: Sequence[Row],
    levels: Sequence[int],
    key: str,
    over: str | None,
    tokens: float | None,
) -> str:
    by_level = [[at[key] for r in rows for at in r["levels"] if at["level"] == n] for n in levels]
    columns = [*by_level, *([r[k] for r in rows] for k in (key, "pass@1", "majority"))]
    cells = [spread(values) for values in columns]
    cells += [over or "", str(len(rows)), f"{tokens / 1000:.0f}" if tokens else ""]
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
