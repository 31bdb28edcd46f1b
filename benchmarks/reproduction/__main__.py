"""The paper's comparison on questions that the model always fails, with its controls.

    python -m benchmarks.reproduction                 # sized for this machine's CPU or GPU
    python -m benchmarks.reproduction --only collect  # tables and figures of what has run so far

Every arm samples the same number of completions a question and step, with three seeds. A run that
was stopped goes on from its last checkpoint (the small size keeps none, and begins again); one that
is done is not run again.
"""

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.reproduction.arms import ABLATION, ARMS, SEEDS, SIZES, Size, target, train_flags
from benchmarks.reproduction.choose import choose
from benchmarks.reproduction.collect import collect, commit, done


def main() -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    here = "full" if torch.cuda.is_available() else "tiny"
    flags.add_argument("--size", choices=SIZES, default=here, help="default: what this machine can")
    flags.add_argument("--folder", type=Path, default=Path("runs/reproduction"))
    results = Path(__file__).parent / "results"
    flags.add_argument("--output", type=Path, default=results, help="of what is collected")
    flags.add_argument("--seeds", type=int, nargs="+", choices=SEEDS, default=SEEDS)
    flags.add_argument("--arms", nargs="*", help="names, or beginnings of names; default: all")
    flags.add_argument("--jobs", type=int, default=2, help="runs at once, sharing the cores")
    flags.add_argument("--only", choices=("plan", "run", "collect"), help="plan: print commands")
    flags.add_argument("--model", help="in place of the size's")
    flags.add_argument("--train-data", help="in place of the size's, of which as many are tried")
    flags.add_argument("--eval-data", help="the same for held-out questions")
    given = flags.parse_args()
    size, folder = given_size(given), given.folder / given.size
    begins = tuple(given.arms or [""])
    wanted = [
        (arm, seed)
        for arms in (ARMS, ABLATION)
        for seed in given.seeds
        for arm in arms
        if seed in arm.seeds and arm.mirrors is None and arm.name.startswith(begins)
    ]
    commands = {
        target(folder, arm, seed): train_flags(arm, size, seed, folder) for arm, seed in wanted
    }
    if given.only == "plan":
        print("".join(f"{shlex.join(command)}\n" for command in commands.values()), end="")
        return
    if given.only != "collect":
        choose(size, folder, "train")
        choose(size, folder, "eval")
        with ThreadPoolExecutor(given.jobs) as pool:
            jobs = [pool.submit(run, *job, given.jobs) for job in commands.items()]
        if failed := [path.name for path, job in zip(commands, jobs, strict=True) if job.result()]:
            raise SystemExit(
                f"failed: {', '.join(failed)}; the same command goes on where they are"
            )
    if given.only != "run":
        collect(size, folder, given.output / given.size)


def given_size(given: argparse.Namespace) -> Size:
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
    """One training run, in a process of its own; what it prints goes beside its folder."""
    if done(output, flags):
        print(f"{output.name}: is done", flush=True)
        return 0
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "expo_fast.train", *flags]
    print(f"{output.name}: begins or goes on", flush=True)
    with open(f"{output}.commit", "a") as commits:
        commits.write(commit() + "\n")
    with open(f"{output}.log", "a") as log:
        ended = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    said = "done" if ended.returncode == 0 else f"failed, see {log.name}"
    print(f"{output.name}: {said}", flush=True)
    return ended.returncode


if __name__ == "__main__":
    main()
