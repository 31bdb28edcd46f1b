"""Tests, ceilings, parts, decoding, training and ops on a CUDA machine, from a checkout, with
torch, triton, transformers and pytest alone.

    PYTHONPATH=. python benchmarks/gpu.py --output gpu

The folder gets report.json and tests.txt. What is done is in it after each stage and each group of
contestants, so a kill loses little; a stage that fails is named there, and the next begins.
A smoke test without a GPU: --device cpu --models smollm2-135m --rows 64 --repeats 1
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_decode, gpu_train
from benchmarks.cases import OPS, OURS, SHAPES, Group, groups
from benchmarks.decode import ceilings as decode_ceilings
from benchmarks.measure import Stopwatch, measure
from benchmarks.parts import parts
from benchmarks.summary import machine, ms, show
from expo_fast.log import replace_file

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_device.py", "test_ops*.py", "test_triton*.py", "test_decode.py", "test_pitfalls.py")
STAGES = ("tests", "ceilings", "parts", "decode", "train", "ops")
TESTS_SHARE = 0.4  # of the time, at most
PARTS_OF = ("qwen2.5-3b", "qwen2.5-0.5b")
SECONDS = {"parts": 60, "decode": 45, "train": 60}  # left, or a model is not begun
DECODE_PEER_SECONDS = 240  # left, or it is not timed beside transformers'


@dataclass
class Run:
    folder: Path
    deadline: float  # of time.monotonic()
    report: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:  # seconds
        return self.deadline - time.monotonic()

    def save(self, **stage: Any) -> None:
        self.report |= stage
        replace_file(self.folder / "report.json", json.dumps(self.report).encode())

    def attempt(self, name: str, work: Callable[[], Any]) -> Any:
        """What it returns; None where it fails, which is kept under `failed`."""
        try:
            return work()
        except Exception as e:  # the next may still tell something
            why = f"{type(e).__name__}: {e}"
            print(f"\n{name}: {why}", flush=True)
            self.save(failed=self.report.get("failed", {}) | {name: why})

    def models(self, stage: str, names: Sequence[str], work: Callable[[str], Any]) -> None:
        """work(name) for each model, as far as the time allows."""
        for name in names:
            if self.left() < SECONDS[stage]:
                self.save(failed=self.report.get("failed", {}) | {f"{stage}, {name}": "no time"})
                continue
            found = self.attempt(f"{stage}, {name}", partial(work, name))
            if found is not None:
                self.save(**{stage: [*self.report.get(stage, []), found]})


def run_tests(run: Run) -> dict[str, Any]:
    """Their output goes to a file beside the report's; its end is printed."""
    files = [str(path) for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *files]
    command += ["-k", "not hopper and not oldest"]  # which need no GPU, and time
    log, limit = run.folder / "tests.txt", TESTS_SHARE * run.left()
    with log.open("w") as out:
        tests = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            outcome = f"exit code {tests.wait(limit)}"
        except subprocess.TimeoutExpired:
            os.killpg(tests.pid, signal.SIGKILL)  # with all that it started, or it would be timed
            outcome = f"stopped after {limit:.0f} s"
    lines = log.read_text().splitlines()
    ending = [line for line in lines if "FAILED" in line or "ERROR" in line][:20] + lines[-3:]
    print(*ending, f"tests: {outcome}", sep="\n", flush=True)
    return {"outcome": outcome, "ending": ending, "log": str(log)}


def ceilings(device: str) -> dict[str, float]:
    """The device's own best: a copy and square products, of random data."""
    gpu = device != "cpu"
    side = 8192 if gpu else 1024
    bits = torch.empty((4 << 30) if gpu else (64 << 20), dtype=torch.int8, device=device)
    twin = torch.empty_like(bits)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    works = {"copy": partial(twin.copy_, bits), "mm bf16": partial(torch.mm, a, b)}
    if gpu:
        works["mm bf16, fp32 out"] = partial(torch.mm, a, b, out_dtype=torch.float32)
    stopwatch = Stopwatch(device)
    best = dict.fromkeys(works, float("inf"))
    for _ in range(11):
        for name, work in works.items():
            stopwatch.start()
            work()
            best[name] = min(best[name], stopwatch.stop()[0])
    found = {"copy GB/s": 2 * bits.nbytes / best.pop("copy") / 1e9}
    found |= {f"{name} TFLOP/s": 2 * side**3 / s / 1e12 for name, s in best.items()}
    print(*(f"{name} {x:.1f}" for name, x in found.items()), sep="\n")
    return found


def run_ops(run: Run, wanted: list[Group], device: str, repeats: int) -> None:
    for i, group in enumerate(wanted):
        if run.left() < 0:
            run.save(not_reached=[str(group) for group in wanted[i:]])
            print(f"\nout of time: {len(wanted) - i} of {len(wanted)} groups not reached")
            return
        if found := run.attempt(str(group), partial(measure, group, device, repeats)):
            show(found)
            run.save(results=[*run.report.get("results", []), found])


def digest(report: dict[str, Any]) -> None:
    """A line a group."""
    print(f"\n{'':58s}{'ms':>9s}{'of limit':>10s}{'extra MB':>10s}  x ours, fastest peer")
    for result in report.get("results", []):
        name = str(Group(*(result[field] for field in Group.__dataclass_fields__)))
        ours, line = result["contestants"][OURS], ""
        peers = {n: c for n, c in result["contestants"].items() if not n.startswith(OURS)}
        if peers:
            best = min(peers, key=lambda n: peers[n]["median_s"])
            line = f"{peers[best]['times_ours']:8.2f} {best}"
        print(
            f"{name:58s}{ms(ours['median_s']):>9s}{ours['of_limit']:10.0%}"
            f"{ours['extra_bytes'] / 1e6:10.0f}{line}"
        )
        for other, why in result["left_out"].items():
            if other.startswith(OURS):
                print(f"    {other}: {why}")
    for result in report.get("decode", []):
        for name, c in result["contestants"].items():
            speed = f"{c['tokens_per_second']:.0f} tokens/s, {c['of_limit']:.0%} of the limit"
            print(f"decode, {result['model']}, {name}: {speed}")
    for found in report.get("train", []):
        phases = ", ".join(f"{name} {s:.2f}" for name, s in found["phases"].items())
        rates = f"{found['tokens/s']:.0f} tokens/s, MFU {found['mfu']:.0%}"
        print(f"train, {found['model']}: {rates}; seconds: {phases}")
    for name, why in report.get("failed", {}).items():
        print(f"{name:58s} FAILED {why}")
    print("tests:", (report.get("tests") or {}).get("outcome", "not run"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="a folder")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    # the middle first: the time may run out
    parser.add_argument("--rows", nargs="+", type=int, default=[4096, 16384, 1024])
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--repeats", type=int, default=11)
    a = parser.parse_args()
    if not a.device and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu makes a smoke test")
    device = a.device or "cuda"
    run = Run(a.output.resolve(), time.monotonic() + a.seconds)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.save(machine=machine())
    print(*(f"{name}: {x}" for name, x in run.report["machine"].items()), sep="\n", flush=True)
    if "tests" in a.stages:
        run.save(tests=run.attempt("tests", partial(run_tests, run)))
    if "ceilings" in a.stages:
        run.save(ceilings=run.attempt("ceilings", partial(ceilings, device)))
    if "parts" in a.stages:
        rows = 64 if device == "cpu" else 16384
        names = a.models or PARTS_OF
        run.models("parts", names, lambda name: parts(name, rows, device, a.repeats))
    best = None
    if {"decode", "train"} & {*a.stages}:
        best = run.attempt("ceilings of decoding", partial(decode_ceilings, device))
    if best and "decode" in a.stages:
        names = [name for name in gpu_decode.MODELS if not a.models or name in a.models]
        peer = DECODE_PEER_SECONDS
        run.models(
            "decode", names, lambda n: gpu_decode.measure(n, device, best, run.left() > peer)
        )
    if best and "train" in a.stages:
        names = [name for name in gpu_train.SHOWN if not a.models or name in a.models]
        run.models("train", names, lambda name: gpu_train.measure(name, device, best.flops))
    if "ops" in a.stages:
        run_ops(run, groups(a.models, a.rows, a.ops), device, a.repeats)
    print(json.dumps(run.report))  # before the table, as an end is what a log shows
    digest(run.report)


if __name__ == "__main__":
    main()
