"""Prints tables of the fused ops against their peers, and one JSON object last.

    python -m benchmarks.summary --models smollm2-135m --rows 1024
    python -m benchmarks.summary FILE    of pytest benchmarks --benchmark-json FILE

Of limit: what the GEMMs of the live rows take alone, in the same run, over what the op took. There
is one forward, two more with gradients, and one for a reference model. Errors are against fp64: the
largest of the log-probs or the loss's, and of the gradients relative to their norm.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import OPS, ROWS, SHAPES, Group, groups
from benchmarks.measure import brief, measure

PACKAGES = ("torch", "triton", "cut-cross-entropy", "liger-kernel", "trl")


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "threads": torch.get_num_threads()}
    found["device"] = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["device"] = next(x for x in lines if x.startswith("model name")).split(": ")[1]
    if torch.cuda.is_available():
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
        found["commit"] = done.stdout.decode().strip()
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def show(result: dict[str, Any]) -> None:
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
    return f"{seconds * 1e3:.{0 if seconds >= 1 else 1 if seconds >= 0.01 else 3}f}"


def load(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text())
    results = [benchmark["extra_info"] for benchmark in data["benchmarks"]]
    results = [result for result in results if "op" in result]  # test_decode's are no ops
    return {"machine": data["machine_info"]["expo_fast"], "results": results}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["smollm2-135m"])
    parser.add_argument("--rows", nargs="+", type=int, default=[ROWS[0]])
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args(argv)
    if a.file:
        summary = load(a.file)
        for result in summary["results"]:
            show(result)
    else:
        summary = {"machine": machine(), "results": []}
        for group in groups(a.models, a.rows, a.ops):
            summary["results"].append(measure(group, default_device(), a.repeats))
            show(summary["results"][-1])
    print(f"\n{' '.join(f'{k} {v}' for k, v in summary['machine'].items())}")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
