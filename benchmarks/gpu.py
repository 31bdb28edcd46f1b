"""Ceilings, parts, ops, decoding, training and tests on a CUDA machine, from a checkout, with
torch, triton, transformers and pytest alone.

    PYTHONPATH=. python benchmarks/gpu.py --output gpu

Each stage runs in a process of its own, with a share of the time, so that what one breaks or holds
the next does not see. The folder gets report.json, and of each stage its own report and what it
printed. Reports are written after each model and each group of contestants, so a kill loses little;
what fails is named there with its traceback. One stage, with all of the time, is --stages ops.
A smoke test without a GPU: --device cpu --models smollm2-135m --rows 64 --repeats 1
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_decode, gpu_train
from benchmarks.cases import OPS, OURS, SHAPES, Group, groups
from benchmarks.measure import brief, gemm_rate, measure, reason
from benchmarks.measure import ceilings as measured_ceilings
from benchmarks.parts import parts
from benchmarks.summary import machine, ms, show
from expo_fast.log import replace_file

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_device.py", "test_ops*.py", "test_triton*.py", "test_decode.py", "test_pitfalls.py")
# of the time that is left, at most; what others leave of theirs goes to the later ones
STAGES = {"ceilings": 0.1, "parts": 0.2, "ops": 0.4, "decode": 0.4, "train": 0.5, "tests": 1.0}
MARGIN = 15  # seconds that a stage has to import torch and, late, to end by itself
PARTS_OF = ("qwen2.5-3b", "qwen2.5-0.5b")
SECONDS = {"parts": 30, "decode": 30, "train": 40, "ops": 10}  # left, or no more is begun
DECODE_PEER_SECONDS = 60  # left, or it is not timed beside transformers'


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
        """What it returns; None where it fails. Why, and warnings, are kept in the report.

        SystemExit where the device is of no more use to this process.
        """
        gc.collect()  # what the one before left
        with warnings.catch_warnings(record=True) as said:
            try:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                return work()
            except Exception as e:  # the next may still tell something
                why = reason(e)
                self.note(failed={name: why})
                print(f"\n{name}: {why}", flush=True)
                require_device(name)
            finally:
                if said:
                    self.note(warned={name: [str(w.message) for w in said]})
                    print(*(f"{name}: {w.message}" for w in said), sep="\n", flush=True)

    def note(self, **more: dict[str, Any]) -> None:
        """Add to parts of the report that are dictionaries."""
        self.save(**{key: self.report.get(key, {}) | values for key, values in more.items()})

    def models(self, stage: str, names: Sequence[str], work: Callable[[str], Any]) -> None:
        """work(name) for each model, as far as the time allows."""
        for name in names:
            if self.left() < SECONDS[stage]:
                self.note(failed={f"{stage}, {name}": "no time"})
                continue
            found = self.attempt(f"{stage}, {name}", partial(work, name))
            if found is not None:
                self.save(**{stage: [*self.report.get(stage, []), found]})


def require_device(name: str) -> None:
    """SystemExit if a kernel has broken the context, which then fails at every call."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as e:
            sys.exit(f"{name} broke the device's context: {brief(reason(e))}")


def run_tests(run: Run) -> dict[str, Any]:
    """Their output goes to a file beside the report's; its end is printed."""
    files = [str(path) for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *files]
    command += ["-k", "not hopper and not oldest"]  # which need no GPU, and time
    log = run.folder / "pytest.txt"
    outcome = bounded(command, log, run.left() - MARGIN)
    lines = log.read_text().splitlines()
    ending = [line for line in lines if "FAILED" in line or "ERROR" in line][:20] + lines[-3:]
    print(*ending, f"tests: {outcome}", sep="\n", flush=True)
    return {"outcome": outcome, "ending": ending, "log": str(log)}


def bounded(command: Sequence[str], log: Path, seconds: float) -> str:
    """How the command, whose output goes to a file, ended in that time."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:  # late, or we are interrupted
                os.killpg(process.pid, signal.SIGKILL)  # with all that it started
                process.wait()  # until its memory is free


def ceilings(device: str) -> dict[str, float]:
    """The device's own best: a copy, and large products of random data."""
    best = measured_ceilings(device)
    found = {"copy GB/s": best.bytes / 1e9, "mm bf16 TFLOP/s": best.flops / 1e12}
    if device != "cpu":
        rate = gemm_rate(device, out_dtype=torch.float32)
        found["mm bf16, fp32 out TFLOP/s"] = rate / 1e12
    print(*(f"{name} {x:.1f}" for name, x in found.items()), sep="\n")
    return found


def run_ops(run: Run, wanted: list[Group], device: str, repeats: int) -> None:
    for i, group in enumerate(wanted):
        if run.left() < SECONDS["ops"]:
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
                print(f"    {other}: {brief(why)}")
    for result in report.get("decode", []):
        for name, c in result["contestants"].items():
            speed = f"{c['tokens_per_second']:.0f} tokens/s, {c['of_limit']:.0%} of the limit"
            print(f"decode, {result['model']}, {name}: {speed}")
    for found in report.get("train", []):
        phases = ", ".join(f"{name} {s:.2f}" for name, s in found["phases"].items())
        rates = f"{found['tokens/s']:.0f} tokens/s, MFU {found['mfu']:.0%}"
        print(f"train, {found['model']}: {rates}; seconds: {phases}")
    for name, why in report.get("failed", {}).items():
        print(f"{name:58s} FAILED {brief(why)}")
    print("tests:", (report.get("tests") or {}).get("outcome", "not run"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="a folder")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--models", nargs="+", choices=SHAPES)
    # what matters most first: the time may run out
    parser.add_argument("--rows", nargs="+", type=int, default=[16384, 4096, 1024])
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--repeats", type=int, default=11)
    a = parser.parse_args()
    if not a.device and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu makes a smoke test")
    run = Run(a.output.resolve(), time.monotonic() + a.seconds)
    run.folder.mkdir(parents=True, exist_ok=True)
    if len(a.stages) > 1:
        apart(run, a)
    else:
        run.save(machine=machine())
        print(*(f"{name}: {x}" for name, x in run.report["machine"].items()), sep="\n", flush=True)
        here(run, a, a.stages[0])
    print(json.dumps(run.report))  # before the table, as an end is what a log shows
    digest(run.report)


def apart(run: Run, a: argparse.Namespace) -> None:
    """Each stage in a process of its own; the reports become one."""
    stages = among(STAGES, a.stages)
    for stage in stages:
        if stage == "tests":  # which are such a process
            here(run, a, stage)
            continue
        limit = run.left() * (1.0 if stage == stages[-1] else STAGES[stage])
        folder, began = run.folder / stage, time.monotonic()
        command = [sys.executable, "-u", "-m", "benchmarks.gpu"]
        flags = vars(a) | {"stages": [stage], "output": folder, "seconds": limit - MARGIN}
        for name, value in flags.items():
            if value is not None:
                command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        (folder / "report.json").unlink(missing_ok=True)  # of an earlier run
        outcome = bounded(command, run.folder / f"{stage}.txt", limit)
        print(f"{stage}: {outcome}, {time.monotonic() - began:.0f} s", flush=True)
        if (folder / "report.json").exists():
            found = json.loads((folder / "report.json").read_text())
            run.note(**{key: found.pop(key) for key in ("failed", "warned") if key in found})
            run.save(**found)
        if outcome != "exit code 0":
            run.note(failed={stage: f"{outcome}, see {stage}.txt"})


def here(run: Run, a: argparse.Namespace, stage: str) -> None:
    device, cpu = a.device or "cuda", a.device == "cpu"
    best = None
    if stage in ("parts", "decode", "train"):
        best = run.attempt("ceilings of decoding", partial(measured_ceilings, device))
    if stage == "tests":
        run.save(tests=run.attempt("tests", partial(run_tests, run)))
    elif stage == "ceilings":
        run.save(ceilings=run.attempt("ceilings", partial(ceilings, device)))
    elif stage == "parts" and best:
        rows, names = 64 if cpu else 16384, a.models or PARTS_OF
        run.models("parts", names, lambda name: parts(name, rows, device, a.repeats, best))
    elif stage == "decode" and best:
        names, peer = among(gpu_decode.MODELS, a.models), DECODE_PEER_SECONDS
        run.models(
            "decode", names, lambda n: gpu_decode.measure(n, device, best, run.left() > peer)
        )
    elif stage == "train" and best:
        names = among(gpu_train.SHOWN, a.models)
        run.models("train", names, lambda name: gpu_train.measure(name, device, best.flops))
    elif stage == "ops":
        run_ops(run, groups(a.models, a.rows, a.ops), device, a.repeats)


def among(names: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    return [name for name in names if not wanted or name in wanted]


if __name__ == "__main__":
    main()
