"""Time the fused ops against their peers, and print tables and then one JSON object.

    python -m benchmarks.summary --models smollm2-135m --rows 1024
    python -m benchmarks.summary FILE    print what `pytest benchmarks --benchmark-json FILE` saved

"of limit" is the time of the op's GEMMs alone, in the same run and for the active rows, divided by
the time of the op. The GEMMs are one for a forward, two more for gradients, and one for a reference
model. Errors are differences from fp64: the largest error of a log-prob, or the error of the loss,
and the errors of gradients relative to their norm.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import OPS, OURS, ROWS, SHAPES, ZEROS, Group, groups
from benchmarks.measure import brief, measure

PACKAGES = ("torch", "triton", "cut-cross-entropy", "liger-kernel", "trl", "transformers")


def default_device() -> str:
    """Return "cuda" where torch sees a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    """Return the date, the device, the commit and the versions of packages."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "device": platform.processor() or platform.machine(),
    }
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        found["device"] = name.split(": ")[1]
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
        found["commit"] = done.stdout.decode().strip()
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def show(result: dict[str, Any]) -> None:
    """Print a table of the results of a group."""
    group = Group(*(result[name] for name in Group.__dataclass_fields__))
    gemms = ", ".join(f"{name} {ms(s)}" for name, s in result["gemm_seconds"].items())
    print(f"\n{group}, bf16, {result['device']}, {result['threads']} threads")
    print(f"limit {ms(result['limit_seconds'])} ms; GEMMs of {result['gemm_rows']} rows: {gemms}")
    print(
        f"{'':31s}{'median ms':>10s}{'spread':>18s}{'x ours':>8s}{'of limit':>9s}{'extra MB':>9s}"
        f"{'error':>9s}{'d_hidden':>9s}{'d_weight':>9s}"
    )
    for name, c in result["contestants"].items():
        spread = f"{ms(min(c['seconds']))}-{ms(max(c['seconds']))}"
        errors = "".join(f"{x:9.1e}" for x in c["error"].values() if x is not None)
        print(
            f"{name:31s}{ms(c['median_s']):>10s}{spread:>18s}{c['times_ours']:8.2f}"
            f"{c['of_limit']:9.0%}{c['extra_bytes'] / 1e6:9.0f}{errors}"
        )
    for name, why in result["left_out"].items():
        print(f"{name:31s} left out: {brief(why)}")


def ms(seconds: float) -> str:
    """Return a time in milliseconds, with 0, 1 or 3 decimals."""
    if seconds >= 1:
        decimals = 0
    elif seconds >= 0.01:
        decimals = 1
    else:
        decimals = 3
    return f"{seconds * 1e3:.{decimals}f}"


def load(path: Path) -> dict[str, Any]:
    """Return the results of ops that pytest-benchmark saved."""
    data = json.loads(path.read_text())
    results = [benchmark["extra_info"] for benchmark in data["benchmarks"]]
    results = [result for result in results if "op" in result]  # not those of test_decode
    return {"machine": data["machine_info"]["expo_fast"], "results": results}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["smollm2-135m"])
    parser.add_argument("--rows", nargs="+", type=int, default=[ROWS[0]])
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--zeros", nargs="+", type=int, default=ZEROS, help="percent of zero rows")
    parser.add_argument("--without", nargs="+", default=[], help="names of peers to leave out")
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args(argv)
    peers = {name for op in OPS.values() for name, _ in op.contestants(default_device())} - {OURS}
    for name in a.without:
        if name not in peers:
            parser.error(f"--without {name!r}: need one of {', '.join(sorted(peers))}")
    if a.file:
        summary = load(a.file)
        for result in summary["results"]:
            show(result)
    else:
        summary = {"machine": machine(), "results": []}
        for group in groups(a.models, a.rows, a.ops, a.zeros):
            result = measure(group, default_device(), a.repeats, without=a.without)
            summary["results"].append(result)
            show(result)
            sys.stdout.flush()
    print(f"\n{' '.join(f'{k} {v}' for k, v in summary['machine'].items())}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
