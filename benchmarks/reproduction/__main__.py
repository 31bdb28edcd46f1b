"""Run the paper's comparison on questions that the model always fails, with its controls.

    python -m benchmarks.reproduction                 # at the size that fits this machine
    python -m benchmarks.reproduction --only collect  # tables and figures of the runs done so far

Every arm samples the same number of completions for a question in a step, with three seeds. A run
that was stopped resumes from its last checkpoint. (The small size saves no checkpoint, so such a
run starts again.) A run that is done is not run again.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.reproduction.arms import (
    ABLATION,
    ARMS,
    SEEDS,
    SIZES,
    Arm,
    Size,
    target,
    train_flags,
)
from benchmarks.reproduction.choose import choose
from benchmarks.reproduction.collect import collect, commit, done


def main() -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default_size = "full" if torch.cuda.is_available() else "tiny"
    flags.add_argument("--size", choices=SIZES, default=default_size, help="default: %(default)s")
    flags.add_argument("--folder", type=Path, default=Path("runs/reproduction"))
    results = Path(__file__).parent / "results"
    flags.add_argument("--output", type=Path, default=results, help="folder of tables and figures")
    flags.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS)
    flags.add_argument("--arms", nargs="*", help="names or beginnings of names; default: all")
    flags.add_argument("--jobs", type=int, default=2, help="runs at a time; they share the cores")
    flags.add_argument("--only", choices=("plan", "run", "collect"), help="plan: print commands")
    flags.add_argument("--model", help="replaces the model of the size")
    flags.add_argument("--train-data", help="replaces the questions of the size")
    flags.add_argument("--eval-data", help="replaces the held-out questions of the size")
    given = flags.parse_args()
    size = given_size(given)
    folder = given.folder / given.size
    commands = {}
    for arm, seed in wanted_runs(given.seeds, tuple(given.arms or [""])):
        commands[target(folder, arm, seed)] = train_flags(arm, size, seed, folder)
    if given.only == "plan":
        print("".join(f"{shlex.join(command)}\n" for command in commands.values()), end="")
        return
    if given.only != "collect":
        choose(size, folder, "train")
        choose(size, folder, "eval")
        with ThreadPoolExecutor(given.jobs) as pool:
            jobs = {
                path: pool.submit(run, path, flags, given.jobs) for path, flags in commands.items()
            }
        failed = [path.name for path, job in jobs.items() if job.result()]
        if failed:
            raise SystemExit(
                f"these runs failed: {', '.join(failed)}. Run the same command again to resume them"
            )
    if given.only != "run":
        collect(size, folder, given.output / given.size)


def wanted_runs(seeds: Sequence[int], beginnings: tuple[str, ...]) -> Iterator[tuple[Arm, int]]:
    """Yield the arms with these seeds whose name starts with one of the beginnings."""
    for arms in (ARMS, ABLATION):
        for seed in seeds:
            for arm in arms:
                if seed not in arm.seeds or arm.mirrors is not None:
                    continue
                if arm.name.startswith(beginnings):
                    yield arm, seed


def given_size(given: argparse.Namespace) -> Size:
    """Return the size with the replacements that flags ask for."""
    size = SIZES[given.size]
    if given.model:
        size = replace(size, model=given.model)
    if given.train_data:
        tried = size.train_candidates[:1]
        size = replace(size, train_sources=(given.train_data,), train_candidates=tried)
        size = replace(size, shots_source=given.train_data)
    if given.eval_data:
        tried = size.eval_candidates[:1]
        size = replace(size, eval_sources=(given.eval_data,), eval_candidates=tried)
    return size


def run(output: Path, flags: list[str], jobs: int) -> int:
    """Train in a process of its own, and return its exit status.

    Its output goes to a log file next to the folder of the run.
    """
    if done(output, flags):
        print(f"{output.name}: already done", flush=True)
        return 0
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "expo_fast.train", *flags]
    print(f"{output.name}: starts or resumes", flush=True)
    with open(f"{output}.commit", "a") as commits:
        commits.write(commit() + "\n")
    with open(f"{output}.log", "a") as log:
        ended = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    outcome = "done" if ended.returncode == 0 else f"failed, see {log.name}"
    print(f"{output.name}: {outcome}", flush=True)
    return ended.returncode


if __name__ == "__main__":
    main()
