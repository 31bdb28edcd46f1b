"""The paper's comparison on questions that the model always fails, with its controls.

    python -m benchmarks.reproduction                 # minutes a run on two CPU cores
    python -m benchmarks.reproduction --size full     # on a GPU
    python -m benchmarks.reproduction --only collect  # tables and figures of what has run so far

Every arm samples the same number of completions a question and step, with three seeds. A run that
was stopped goes on where it was; one that is done is not run again.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.reproduction.arms import ABLATION, ARMS, SEEDS, SIZES, Arm, Size, flags_of
from benchmarks.reproduction.choose import choose
from benchmarks.reproduction.collect import collect


def main() -> None:
    flags = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    flags.add_argument("--size", choices=SIZES, default="tiny")
    flags.add_argument("--folder", type=Path, default=Path("runs/reproduction"))
    results = Path(__file__).parent / "results"
    flags.add_argument("--output", type=Path, default=results, help="of what is collected")
    flags.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    flags.add_argument("--ablation-seeds", type=int, nargs="*", default=SEEDS[:1])
    flags.add_argument("--arms", nargs="*", help="names, or beginnings of names; default: all")
    flags.add_argument("--jobs", type=int, default=2, help="runs at once, sharing the cores")
    flags.add_argument("--only", choices=("run", "collect"))
    given = flags.parse_args()
    size, folder = SIZES[given.size], given.folder / given.size
    wanted = [(arm, seed) for seed in given.seeds for arm in ARMS]
    wanted += [(arm, seed) for seed in given.ablation_seeds for arm in ABLATION]
    wanted = [
        (arm, seed)
        for arm, seed in wanted
        if arm.mirrors is None and (not given.arms or arm.name.startswith(tuple(given.arms)))
    ]
    if given.only != "collect":
        data = choose(size, folder, "train"), choose(size, folder, "eval")
        with ThreadPoolExecutor(given.jobs) as pool:
            jobs = [pool.submit(run, *job, size, folder, data, given.jobs) for job in wanted]
        for job in jobs:
            job.result()
    if given.only != "run":
        collect(size, folder, given.output / given.size)


def run(arm: Arm, seed: int, size: Size, folder: Path, data: tuple[Path, Path], jobs: int) -> None:
    """One training run, in a process of its own; its output goes to FOLDER/ARM-SEED.log."""
    target = folder / f"{arm.slug}-{seed}"
    command = [sys.executable, "-m", "expo_fast.train", *flags_of(arm, size, seed)]
    command += ["--train-data", str(data[0]), "--eval-data", str(data[1]), "--eval-limit", "10000"]
    command += ["--shots-data", size.shots_source, "--model", size.model]
    command += ["--output-dir", str(target), "--keep-checkpoints", "1"]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    print(f"{target.name}: begins or goes on", flush=True)
    with open(f"{target}.log", "a") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    print(f"{target.name}: {'done' if done.returncode == 0 else f'failed, see {log.name}'}")


if __name__ == "__main__":
    main()
