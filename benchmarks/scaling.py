"""The same job on 1, 2, ... ranks: python -m benchmarks.scaling --ranks 1 2 [-- flags of training]

    python -m benchmarks.scaling --simulate RUN [--measured RUN_OF_SEVERAL_RANKS]

simulates the steps of a run of one process on up to 1024 ranks (`simulated_ranks`).

Each rank has a GPU, or on a CPU an equal part of the cores, which is the same for all K. The
efficiency is the time of the smallest run divided by that of K ranks, and by how many times more
ranks these are. It is at most 50% if a core has two ranks. The first of several steps is left out.
The last line is a JSON object.

Bytes are those that a rank sends in a step, counted from the sizes: each pass sums the fp32
gradients (reduce-scatter), each update gathers the weights, and with `--shard model` each pass
gathers them twice more.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import simulated_ranks
from expo_fast.cli.flags import parse
from expo_fast.config import Train
from expo_fast.inspection.ranks_memory import sent_bytes
from expo_fast.weights import load_structure

JOB = (
    "--method grpo --reward {folder}/rewards.py:parity --steps 3 --prompts-per-step 8 "
    "--num-generations 4 --max-completion-length 48 --eval-every 0 --checkpoint-every 0 "
    "--diagnose 0 --report-to none --pack-tokens 2048"
)
# With this reward nearly all attempts have a gradient, for all numbers of ranks.
REWARD = "def parity(completion_ids, **columns): return [sum(ids) % 2 for ids in completion_ids]\n"
PHASES = ("generate", "reward", "forward_backward", "optimizer")


@dataclass(frozen=True)
class Measured:
    """The medians of a run's steps after the first one."""

    ranks: int
    seconds: float
    phases: dict[str, float]
    idle: float
    memory: float
    """Of the largest rank, in GB."""
    reward: float
    """Of the first step, which is the same for all numbers of ranks up to rounding."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("flags", nargs="*", help="flags of expo_fast.train, after --")
    parser.add_argument("--keep", type=Path, help="keep the folders of the runs here, by K")
    parser.add_argument("--simulate", type=Path, help="folder of a run of one process")
    parser.add_argument("--measured", type=Path, help="folder of a run on several ranks to compare")
    parser.add_argument("--questions-per-rank", type=int, default=0, help="in larger steps")
    options = parser.parse_args()
    if options.simulate is not None:
        print_simulated(options.simulate, options.measured, options.questions_per_rank)
        return
    flags = [*JOB.split(), *options.flags]
    threads = max(1, len(os.sched_getaffinity(0)) // max(options.ranks))
    runs = [measured(n, flags, threads, options.keep) for n in options.ranks]
    for line in table(runs, flags):
        print(line)
    print(json.dumps({"runs": [vars(run) for run in runs], "flags": flags}))


def print_simulated(folder: Path, measured: Path | None, per_rank: int) -> None:
    """Simulate the steps of a run. See `simulated_ranks`."""
    run = simulated_ranks.read(folder)
    other = None if measured is None else simulated_ranks.read(measured)
    rate = simulated_ranks.rate_of_one_sequence(run.config, run.steps[0][0].prompt_ids)
    print(f"one sequence: {rate:.1f} tokens/s")
    costs = simulated_ranks.costs_of(run, rate)
    for line in simulated_ranks.lines(run, costs, per_rank=per_rank, measured=other):
        print(line)


def measured(n_ranks: int, flags: Sequence[str], threads: int, keep: Path | None) -> Measured:
    """Run the job on some ranks, each with some threads. keep: move its folder to keep/K."""
    with tempfile.TemporaryDirectory() as folder:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
        command = [sys.executable, *(launch if n_ranks > 1 else [])]
        Path(folder, "rewards.py").write_text(REWARD)
        given = [flag.format(folder=folder) for flag in flags]
        command += ["-m", "expo_fast.train", *given, "--output-dir", f"{folder}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        log = Path(folder, "log")
        with open(log, "wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(log.read_text()[-3000:])
        rows = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(folder, "run"), keep / str(n_ranks))
    return summary(n_ranks, [json.loads(row) for row in rows], usage.ru_maxrss * 1024)


def summary(n_ranks: int, rows: list[dict[str, Any]], peak: int) -> Measured:
    """Return the medians of the rows of metrics.jsonl after the first one.

    peak: memory of the only process, if there is one rank, in bytes.
    """
    later = rows[1:] or rows

    def median(values: Sequence[float]) -> float:
        return statistics.median(values) if values else 0.0

    phases = {}
    for phase in PHASES:
        phases[phase] = median([row[f"time/{phase}"] for row in later if f"time/{phase}" in row])
    idle = median([row.get("idle") or 0.0 for row in later])
    seconds = [row["rank/0/busy"] / (1 - row["rank/0/idle"]) for row in later if "idle" in row]
    last = rows[-1]
    memories = [last[f"rank/{rank}/memory"] for rank in range(n_ranks) if n_ranks > 1]
    return Measured(
        ranks=n_ranks,
        seconds=median(seconds) or sum(phases.values()),
        phases=phases,
        idle=idle,
        memory=max(memories, default=peak / 1e9),
        reward=rows[0].get("reward") or 0.0,
    )


def table(runs: Sequence[Measured], flags: Sequence[str]) -> list[str]:
    """Return the lines of a table of the runs."""
    config = parse(Train, [flag for flag in flags if flag])
    model, _ = load_structure(config.model)
    base = runs[0].seconds * runs[0].ranks
    lines = [
        "| ranks | s/step | " + " | ".join(PHASES) + " | idle | GB/rank | sent, GB/pass | eff. |",
        "|--:|--:|" + "--:|" * len(PHASES) + "--:|--:|--:|--:|",
    ]
    for run in runs:
        phases = " | ".join(f"{run.phases[phase]:.2f}" for phase in PHASES)
        sent = sent_bytes(config, model, run.ranks) / 1e9
        efficiency = base / (run.seconds * run.ranks)
        lines.append(
            f"| {run.ranks} | {run.seconds:.2f} | {phases} | {run.idle:.0%} | {run.memory:.2f} | "
            f"{sent:.2f} | {efficiency:.0%} |"
        )
    return lines


if __name__ == "__main__":
    main()
