"""Times a group's contestants against each other: interleaved laps, in one process.

A lap times every contestant once, and the op's GEMMs alone. Before the first lap each has run once:
that compiles, touches memory, and is what the judge sees. One that is wrong is not timed.
"""

import ctypes
import statistics
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import OPS, OURS, SHAPES, Case, Contestant, Group
from benchmarks.judge import Errors, Yardstick, answer, errors, yardstick

SLOW = 8  # times the GEMMs' time: a contestant beyond takes part in every second lap
GEMM_ROWS = 4096  # the GEMMs of more rows are timed at so many, which does not slow them
JUDGE_GEMMS = 16  # what the judge takes on a CPU, in GEMMs of one forward
COLD_BYTES = 256 << 20  # written before each timing on a GPU, whose L2 is then cold


def reason(error: Exception) -> str:
    """Return the full traceback: of a compiler's error, each line may be the one that tells."""
    return "".join(traceback.format_exception(error)).strip()


def brief(why: str) -> str:
    """Return the line of a traceback that names the error; CUDA's go on with advice."""
    lines = why.splitlines()
    headers = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
    said = lines[headers[-1] + 1 :] if headers else lines
    return next((line for line in said if line.strip() and not line[0].isspace()), lines[-1])[:200]


class Wrong(Exception):
    """The results are off, by more than twice what plain PyTorch's are."""


class Stopwatch:
    """Seconds and peak extra memory of one call."""

    def __init__(self, device: str):
        self.cuda = device != "cpu"
        self.cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=device) if self.cuda else None

    def start(self) -> None:
        if self.cold is not None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            self.cold.zero_()  # and gives the host a head start
            self.begin = torch.cuda.Event(enable_timing=True)
            self.begin.record()
            return
        ctypes.CDLL(None).malloc_trim(0)  # memory that others have freed would hide what is used
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        self.before = _status("VmRSS")
        self.began = time.perf_counter()

    def stop(self) -> tuple[float, int]:
        if self.cuda:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            torch.cuda.synchronize()
            seconds = self.begin.elapsed_time(end) / 1e3
            return seconds, torch.cuda.max_memory_allocated() - self.before
        return time.perf_counter() - self.began, _status("VmHWM") - self.before


def _status(name: str) -> int:  # bytes
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10


def free_bytes(device: str) -> int:
    if device != "cpu":
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10


@dataclass
class Race:
    group: Group
    device: str
    case: Case
    works: dict[str, Callable[[], object]] = field(default_factory=dict)
    errors: dict[str, Errors] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)  # who is not in `works`, and why
    seconds: dict[str, list[float]] = field(default_factory=dict)
    extra_bytes: dict[str, list[int]] = field(default_factory=dict)  # beside the gradients
    laps: int = 0

    def __post_init__(self):
        self.gemms = gemms(self.case, OPS[self.group.op].backward)
        self.stopwatch = Stopwatch(self.device)

    def lap(self, besides: str = "") -> None:
        everyone = self.gemms | self.works
        for name in [name for name in everyone if name != besides and self._takes_part(name)]:
            self.start()
            everyone[name]()
            self.stop(name)
        self.laps += 1

    def start(self) -> None:
        self.clear()
        self.stopwatch.start()

    def clear(self) -> None:
        self.case.hidden.grad = self.case.weight.grad = None

    def stop(self, name: str) -> None:
        seconds, extra = self.stopwatch.stop()
        self.seconds.setdefault(name, []).append(seconds)
        kept = sum(
            x.grad.nbytes for x in (self.case.hidden, self.case.weight) if x.grad is not None
        )
        self.extra_bytes.setdefault(name, []).append(max(0, extra - kept))

    def finished(self, name: str) -> Callable[[], None]:
        """Return the contestant's work, for a clock of the host's."""

        def work() -> None:
            self.works[name]()
            if self.stopwatch.cuda:
                torch.cuda.synchronize()

        return work

    def _takes_part(self, name: str) -> bool:
        slow = self.laps and self.seconds.get(name, [0])[0] > SLOW * self.limit()
        return not (slow and self.laps % 2)

    def limit(self) -> float:
        """Seconds that the GEMMs of the live rows take alone."""
        timed = min(self.group.rows, GEMM_ROWS)
        share = self.case.live.sum().item() / timed
        op = OPS[self.group.op]
        times = {"logits": 2 if op.reference else 1, "d_hidden": 1, "d_weight": 1}
        return share * sum(times[n] * statistics.median(self.seconds[n]) for n in self.gemms)

    def result(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        limit, ours = self.limit(), statistics.median(self.seconds[OURS])
        return {
            **vars(self.group),
            "device": self.device,
            "threads": torch.get_num_threads(),
            "gemm_seconds": {name: statistics.median(self.seconds[name]) for name in self.gemms},
            "gemm_rows": min(self.group.rows, GEMM_ROWS),
            "limit_seconds": limit,
            "contestants": {
                name: {
                    "median_s": (median := statistics.median(self.seconds[name])),
                    "seconds": self.seconds[name],
                    "times_ours": median / ours,
                    "of_limit": limit / median,
                    "extra_bytes": statistics.median(self.extra_bytes[name]),
                    "error": self.errors[name]._asdict(),
                }
                for name in self.works
            },
            "left_out": self.left_out,
        }


def gemms(case: Case, backward: bool) -> dict[str, Callable[[], object]]:
    """Return the products that any way to the op needs, into memory that is there."""
    hidden, weight = case.hidden.detach()[:GEMM_ROWS], case.weight.detach()
    logits = hidden @ weight.T
    products = {"logits": (hidden, weight.T, logits)}
    if backward:
        products["d_hidden"] = (logits, weight, torch.empty_like(hidden))
        products["d_weight"] = (logits.T, hidden, torch.empty_like(weight))
    return {name: partial(torch.mm, a, b, out=out) for name, (a, b, out) in products.items()}


def warm_up(group: Group, device: str, without: Collection[str] = ()) -> Race:
    """Run and judge each contestant once, but for those that are to be left out.

    Raises Wrong if ours is off, and whatever it raises.
    """
    # with the default of 8 recompilations a peer would quietly fall back to slower code
    torch._dynamo.config.recompile_limit = 1000
    case, op = group.case(device), OPS[group.op]
    measure, race = yardstick(case, op), Race(group, device, case)
    for name, contestant in op.contestants(device):
        if name in without:
            continue
        try:
            race.errors[name] = attempt(race, contestant, measure)
            race.works[name] = partial(op.run, contestant, case)
        except Exception as e:  # of a peer, which may not even run on this device
            if name == OURS:
                raise
            race.left_out[name] = reason(e)
    return race


def attempt(race: Race, contestant: Contestant, measure: Yardstick) -> Errors:
    """Run and judge a contestant. Raise MemoryError or Wrong."""
    case, op = race.case, OPS[race.group.op]
    needed = contestant.logit_bytes * len(case.hidden) * len(case.weight)
    if needed > (free := free_bytes(race.device)):
        raise MemoryError(f"needs some {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
    race.clear()
    found = errors(answer(case, op.run(contestant, case)), measure.truth)
    race.clear()
    if not found.within_twice(measure.plain, is_loss=not op.head):
        raise Wrong(f"errors are {found}; plain PyTorch's {measure.plain}")
    return found


def measure(
    group: Group, device: str, repeats: int, without: Collection[str] = ()
) -> dict[str, Any]:
    """Plain data; without: contestants that are left out."""
    race = warm_up(group, device, without)
    for _ in range(repeats):
        race.lap()
    return race.result()


def gemm_rate(device: str, **how: Any) -> float:
    """FLOP/s of a bf16 product: a forward's on a CPU, on a GPU one large enough for its best."""
    m, k, n = (1024, 1024, 16384) if device == "cpu" else (8192, 8192, 8192)
    a, b = (torch.randn(rows, k, device=device).bfloat16() for rows in (m, n))
    stopwatch, seconds = Stopwatch(device), []
    for _ in range(8):
        stopwatch.start()
        torch.mm(a, b.T, **how)
        seconds.append(stopwatch.stop()[0])
    return 2 * m * k * n / min(seconds)


@dataclass(frozen=True)
class Ceilings:
    """What a device does at its best."""

    flops: float  # a second, of torch.mm in bf16
    bytes: float  # a second, read and written by a copy


def ceilings(device: str) -> Ceilings:
    """Measure them."""
    room = torch.empty(
        (4 << 30) if device != "cpu" else (256 << 20), dtype=torch.int8, device=device
    )
    twin, stopwatch, seconds = room.clone(), Stopwatch(device), []
    for _ in range(5):
        stopwatch.start()
        twin.copy_(room)
        seconds.append(stopwatch.stop()[0])
    return Ceilings(gemm_rate(device), 2 * room.nbytes / min(seconds))


def foreseen_seconds(group: Group, device: str, repeats: int, rate: float) -> float:
    (v, d), op = SHAPES[group.model], OPS[group.op]
    forward = 2 * group.rows * v * d / rate
    gemms = 1 + 2 * op.backward + op.reference
    cost = 1 + sum(contestant.cost for _, contestant in op.contestants(device))
    return forward * (JUDGE_GEMMS * (1 + op.reference) + gemms * cost * (repeats + 1))
