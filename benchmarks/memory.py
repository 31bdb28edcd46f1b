"""The estimate of `expo_fast.check` beside the measured peak: python -m benchmarks.memory

The measured peak is the peak of a process's resident memory, less its resident memory after the
imports: the median of `--repeats` processes of two steps. The configurations fill their packs, so
that the estimate, which assumes texts of the maximum length, applies.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile

from expo_fast.algorithms.resume import with_recorded_options
from expo_fast.cli.flags import parse
from expo_fast.config import Train
from expo_fast.inspection.memory import estimate_run

CONFIGURATIONS = {
    "sft": "--method sft --pack-tokens 1024",
    "sft, long packs": "--method sft --pack-tokens 4096 --prompts-per-step 48",
    "sft, checkpointing": (
        "--method sft --pack-tokens 4096 --prompts-per-step 48 --gradient-checkpointing"
    ),
    "sft, fp32": "--method sft --pack-tokens 1024 --dtype float32",
    "sft, LoRA": "--method sft --pack-tokens 2048 --prompts-per-step 32 --lora-rank 16",
    "expo-grpo with KL": "--pack-tokens 1024 --prompts-per-step 6 --kl-coef 0.01",
}
PROGRAM = """
import json, resource, sys
import peft, safetensors.torch, tokenizers, transformers
from pathlib import Path
from expo_fast import train
pages = int(Path("/proc/self/statm").read_text().split()[1])
train.main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"peak": peak - pages * resource.getpagesize()}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    options = parser.parse_args()
    print("| configuration | flags | estimate, GB | measured, GB | estimate / measured |")
    print("|---|---|--:|--:|--:|")
    for name in options.only:
        flags = CONFIGURATIONS[name].split()
        estimate = estimate_run(with_recorded_options(parse(Train, flags))).peak
        measured = statistics.median(measured_peak(flags) for _ in range(options.repeats))
        ratio = estimate / measured
        cells = f"{estimate / 1e9:.2f} | {measured / 1e9:.2f} | {ratio:.2f}"
        print(f"| {name} | `{' '.join(flags)}` | {cells} |", flush=True)


def measured_peak(flags: list[str]) -> int:
    """Return the peak of two steps in a process of its own, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROGRAM, *flags, "--output-dir", f"{folder}/run"]
        command += ["--steps", "2", "--eval-every", "0", "--checkpoint-every", "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["peak"]


if __name__ == "__main__":
    main()
