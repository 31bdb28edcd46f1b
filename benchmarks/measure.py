"""Time the contestants of a group against each other, in interleaved rounds of one process.

A round times every contestant once, and the GEMMs of the op alone. Before the first round, each
contestant runs once. This run compiles, touches memory, and is checked for accuracy. A contestant
that is not accurate is not timed.
"""

import ctypes
import math
import statistics
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import OPS, OURS, Case, Contestant, Group, head_shape
from benchmarks.judge import Baseline, Errors, answer, baseline, errors

# A contestant slower than this multiple of the GEMMs' time runs in every second round only.
SLOW = 8
GEMM_ROWS = 4096  # the most rows at which GEMMs are timed: more would not change their rate
JUDGE_GEMMS = 16  # time of the accuracy check on a CPU, in GEMMs of one forward
COLD_BYTES = 256 << 20  # written before each timing on a GPU, so that L2 is cold


def reason(error: Exception) -> str:
    """Return the full traceback: the cause of a compiler's error may be in any of its lines."""
    return "".join(traceback.format_exception(error)).strip()


def brief(why: str) -> str:
    """Return the line of a traceback that names the error.

    It is not always the last line: errors of CUDA go on with advice.
    """
    lines = why.splitlines()
    headers = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
    after_header = lines[headers[-1] + 1 :] if headers else lines
    for line in after_header:
        if line.strip() and not line[0].isspace():
            return line[:200]
    return lines[-1][:200]


class WrongResult(Exception):
    """Results differ from the truth by more than is allowed."""


class Stopwatch:
    """Measures the seconds and the peak extra memory of one call."""

    def __init__(self, device: str):
        self.cuda = device != "cpu"
        self.cold = None
        if self.cuda:
            self.cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=device)

    def start(self) -> None:
        """Start the measurement."""
        if self.cold is not None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            self.cold.zero_()  # empties L2; while it runs, the host can queue the work
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()
            return
        # Return freed memory to the system: reusing it would not raise the peak.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.before = _status("VmRSS")
        self.began = time.perf_counter()

    def stop(self) -> tuple[float, int]:
        """Return the seconds and the peak extra bytes since `start`."""
        if self.cuda:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            torch.cuda.synchronize()
            seconds = self.begin.elapsed_time(end) / 1e3
            return seconds, torch.cuda.max_memory_allocated() - self.before
        return time.perf_counter() - self.began, _status("VmHWM") - self.before


def peak_bytes() -> int:
    """Return the peak of this process's resident memory."""
    return _status("VmHWM")


def _status(name: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    return _kilobytes(Path("/proc/self/status"), name) << 10


def _kilobytes(file: Path, name: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise ValueError(f"{file} has no line {name}")


def free_bytes(device: str) -> int:
    """Return the bytes that can be allocated on the device."""
    if device != "cpu":
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") << 10


@dataclass
class Comparison:
    """The contestants of a group, and their times."""

    group: Group
    device: str
    case: Case
    works: dict[str, Callable[[], object]] = field(default_factory=dict)
    errors: dict[str, Errors] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # contestants not in `works`, and why
    seconds: dict[str, list[float]] = field(default_factory=dict)
    extra_bytes: dict[str, list[int]] = field(default_factory=dict)  # without the gradients
    rounds: int = 0

    def __post_init__(self):
        self.gemms = gemms(self.case, OPS[self.group.op].backward)
        self.stopwatch = Stopwatch(self.device)

    def run_round(self, without: str = "") -> None:
        """Time the GEMMs and every contestant once, except the one to leave out."""
        everything = self.gemms | self.works
        names = [name for name in everything if name != without and self._takes_part(name)]
        for name in names:
            self.start()
            everything[name]()
            self.stop(name)
        self.rounds += 1

    def start(self) -> None:
        """Start the measurement of one contestant."""
        self.clear()
        self.stopwatch.start()

    def clear(self) -> None:
        """Drop the gradients of the last contestant."""
        self.case.hidden.grad = self.case.weight.grad = None

    def stop(self, name: str) -> None:
        """Keep the time and the memory of what ran since `start`."""
        seconds, extra = self.stopwatch.stop()
        self.seconds.setdefault(name, []).append(seconds)
        for tensor in (self.case.hidden, self.case.weight):
            if tensor.grad is not None:
                extra -= tensor.grad.nbytes
        self.extra_bytes.setdefault(name, []).append(max(0, extra))

    def finished(self, name: str) -> Callable[[], None]:
        """Return the contestant's work up to its end on the device, for a clock of the host."""

        def work() -> None:
            self.works[name]()
            if self.stopwatch.cuda:
                torch.cuda.synchronize()

        return work

    def _takes_part(self, name: str) -> bool:
        if self.rounds % 2 == 0 or name not in self.seconds:
            return True
        return self.seconds[name][0] <= SLOW * self.limit()

    def limit(self) -> float:
        """Return the seconds that the GEMMs of the active rows take alone."""
        op = OPS[self.group.op]
        times = {"logits": 2 if op.reference else 1, "d_hidden": 1, "d_weight": 1}
        total = sum(times[name] * statistics.median(self.seconds[name]) for name in self.gemms)
        timed_rows = min(self.group.rows, GEMM_ROWS)
        return self.case.active.sum().item() / timed_rows * total

    def result(self) -> dict[str, Any]:
        """Return the results as plain data, for JSON."""
        limit = self.limit()
        ours = statistics.median(self.seconds[OURS])
        contestants = {}
        for name in self.works:
            median = statistics.median(self.seconds[name])
            contestants[name] = {
                "median_s": median,
                "seconds": self.seconds[name],
                "times_ours": median / ours,
                "of_limit": limit / median,
                "extra_bytes": statistics.median(self.extra_bytes[name]),
                "error": self.errors[name]._asdict(),
            }
        return {
            **vars(self.group),
            "device": self.device,
            "threads": torch.get_num_threads(),
            "gemm_seconds": {name: statistics.median(self.seconds[name]) for name in self.gemms},
            "gemm_rows": min(self.group.rows, GEMM_ROWS),
            "limit_seconds": limit,
            "contestants": contestants,
            "left_out": self.left_out,
        }


def gemms(case: Case, backward: bool) -> dict[str, Callable[[], object]]:
    """Return the products that every implementation needs, with their outputs allocated."""
    hidden = case.hidden.detach()[:GEMM_ROWS]
    weight = case.weight.detach()
    logits = hidden @ weight.T
    products = {"logits": (hidden, weight.T, logits)}
    if backward:
        products["d_hidden"] = (logits, weight, torch.empty_like(hidden))
        products["d_weight"] = (logits.T, hidden, torch.empty_like(weight))
    return {name: partial(torch.mm, a, b, out=out) for name, (a, b, out) in products.items()}


def warm_up(group: Group, device: str, without: Collection[str] = ()) -> Comparison:
    """Run and check every contestant once, except those to leave out.

    A peer that fails is left out of the comparison. Raise what ours raises, such as WrongResult.
    """
    # After the default of 8 recompilations, a peer would fall back to slower code without an error.
    torch._dynamo.config.recompile_limit = 1000
    case = group.case(device)
    op = OPS[group.op]
    expected = baseline(case, op)
    comparison = Comparison(group, device, case)
    for name, contestant in op.contestants(device):
        if name in without:
            continue
        try:
            comparison.errors[name] = attempt(comparison, contestant, expected)
            comparison.works[name] = partial(op.run, contestant, case)
        except Exception as e:  # a peer may not run on this device
            if name == OURS:
                raise
            comparison.left_out[name] = reason(e)
    return comparison


def attempt(comparison: Comparison, contestant: Contestant, expected: Baseline) -> Errors:
    """Run a contestant and return its errors.

    Raise MemoryError if its logits do not fit, and WrongResult if an error is more than twice that
    of plain PyTorch.
    """
    case = comparison.case
    op = OPS[comparison.group.op]
    needed = contestant.logit_bytes * len(case.hidden) * len(case.weight)
    free = free_bytes(comparison.device)
    if needed > free:
        raise MemoryError(f"needs some {needed / 1e9:.0f} GB, but {free / 1e9:.0f} GB are free")
    comparison.clear()
    value = op.run(contestant, case)
    found = errors(answer(case, value), expected.truth)
    comparison.clear()
    if not found.within_twice(expected.plain, is_loss=not op.head):
        raise WrongResult(f"errors are {found}; those of plain PyTorch are {expected.plain}")
    return found


def measure(
    group: Group,
    device: str,
    repeats: int,
    without: Collection[str] = (),
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Time a group in `repeats` rounds. Return plain data.

    without: names of contestants to leave out.
    seconds: see `run_rounds`.
    """
    comparison = warm_up(group, device, without)
    run_rounds(comparison.run_round, repeats, seconds)
    return comparison.result()


def run_rounds(run_round: Callable[[], None], repeats: int, seconds: float = math.inf) -> None:
    """Run a round `repeats` times.

    seconds: no round but the first begins later than this.
    """
    began = time.perf_counter()
    for _ in range(repeats):
        run_round()
        if time.perf_counter() - began > seconds:
            return


def gemm_rate(device: str, **how: Any) -> float:
    """Return the FLOP/s of a bf16 product.

    On a CPU it has the shape of a forward. On a GPU it is large enough to reach the highest rate.
    """
    m, k, n = (1024, 1024, 16384) if device == "cpu" else (8192, 8192, 8192)
    a, b = (torch.randn(rows, k, device=device).bfloat16() for rows in (m, n))
    stopwatch = Stopwatch(device)
    seconds = []
    for _ in range(8):
        stopwatch.start()
        torch.mm(a, b.T, **how)
        seconds.append(stopwatch.stop()[0])
    return 2 * m * k * n / min(seconds)


@dataclass(frozen=True)
class Ceilings:
    """The highest measured rates of a device."""

    flops: float  # per second, in torch.mm of bf16 matrices
    bytes: float  # per second, read and written in a copy


def ceilings(device: str) -> Ceilings:
    """Measure the rates of a device."""
    size = (4 << 30) if device != "cpu" else (256 << 20)
    source = torch.empty(size, dtype=torch.int8, device=device)
    destination = source.clone()
    stopwatch = Stopwatch(device)
    seconds = []
    for _ in range(5):
        stopwatch.start()
        destination.copy_(source)
        seconds.append(stopwatch.stop()[0])
    return Ceilings(gemm_rate(device), 2 * source.nbytes / min(seconds))


def estimated_seconds(group: Group, device: str, repeats: int, rate: float) -> float:
    """Return roughly how long `measure` would take, at a rate in FLOP/s."""
    v, d = head_shape(group.model)
    op = OPS[group.op]
    forward = 2 * group.rows * v * d / rate
    gemms = 1 + 2 * op.backward + op.reference
    cost = 1 + sum(contestant.cost for _, contestant in op.contestants(device))
    judged = JUDGE_GEMMS * (1 + op.reference)
    return forward * (judged + gemms * cost * (repeats + 1))
