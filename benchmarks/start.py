"""Time the start of commands beside the imports that every run needs.

    python -m benchmarks.start

Each round starts one process of each, so that a change of the machine's load reaches all. `user`
time is steadier than wall time on a machine with other work. The baseline is the import of torch
and of transformers' AutoTokenizer. The last line is one JSON object with the ratios of the medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

BASELINE = "imports"
COMMANDS = {
    BASELINE: ["-c", "import torch; from transformers import AutoTokenizer"],
    "train --help": ["-m", "expo_fast.train", "--help"],
    "train --dry-run": ["-m", "expo_fast.train", "--dry-run"],
    "check": ["-m", "expo_fast", "check"],
}


@dataclass
class Start:
    """The seconds of one process."""

    wall: float
    user: float


def timed(words: list[str]) -> Start:
    """Run a Python process to its end. Raise CalledProcessError if it fails."""
    began = time.perf_counter()
    before = os.times().children_user
    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)
    user = os.times().children_user - before
    return Start(wall=time.perf_counter() - began, user=user)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    starts: dict[str, list[Start]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            starts[name].append(timed(words))
    medians: dict[str, Start] = {}
    for name, each in starts.items():
        wall = statistics.median(start.wall for start in each)
        user = statistics.median(start.user for start in each)
        medians[name] = Start(wall=wall, user=user)
    base = medians[BASELINE]
    ratios: dict[str, float] = {}
    for name, start in medians.items():
        ratios[name] = round(start.user / base.user, 2)
        print(f"{name:<16} {start.wall:6.2f} s wall  {start.user:6.2f} s user  {ratios[name]:.2f}")
    print(json.dumps({"ratios": ratios}))


if __name__ == "__main__":
    main()
