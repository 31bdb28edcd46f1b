"""Profile the device and the host: of prompts up to the first tokens, and of a training step."""

import cProfile
import pstats
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_train
from benchmarks.gpu_decode import LOAD, MODELS, SMOKE, TINY, random_model
from benchmarks.gpu_train import KernelRun, kernel_runs
from benchmarks.lease.report import Report
from benchmarks.samplers import requests
from expo_fast.generate import Generator
from expo_fast.reporting.timing import Phases

REPEATS = 4  # the first one compiles
LONGEST = 20  # kernels and functions that are kept
MARKER = "spin"  # in the name of the kernel of torch.cuda._sleep
NAME = 80  # letters of a kernel's name that are kept
GAPS = 5  # longest gaps that are kept


@torch.no_grad()
def first_tokens(report: Report, model: str) -> None:
    """Time the first tokens of all sequences, and report kernels and functions of the host."""
    decoder = random_model(TINY if report.dry else MODELS[model], report.device)
    load = SMOKE if report.dry else LOAD
    generator = Generator(decoder)
    asked = requests(load.ids(decoder.shape.vocabulary), load.samples, 1)

    def sample() -> None:
        generator.sample(asked)
        if not report.dry:
            torch.cuda.synchronize()

    seconds = []
    for _ in range(2 if report.dry else REPEATS):
        began = time.perf_counter()
        sample()
        seconds.append(time.perf_counter() - began)
    report.add(seconds=seconds, host=host_functions(sample))
    if report.dry:
        return
    runs = kernel_runs(sample)
    busy = sum(run.seconds for run in runs)
    report.add(launches=len(runs), kernel_seconds=busy, kernels=longest_kernels(runs))
    report.show(first_tokens_ms=f"{min(seconds) * 1e3:.1f}", kernels_ms=f"{busy * 1e3:.1f}")


def train_phases(report: Report, model: str) -> None:
    """Report busy and idle seconds of the device by phase of a step, and the host's functions.

    The profiler slows down the host, so that the device is idle for longer than in other steps.
    """
    if report.dry:  # no kernel runs, so no step learns anything
        gpu_train.require_learning = lambda step, row: None
    trainer = gpu_train.build(model, report.device)
    count = gpu_train.Count(trainer.model)
    count.watch(trainer.generator)
    seconds = []
    for step in range(2):  # the first one compiles and captures
        began = time.perf_counter()
        gpu_train.run_step(trainer, step, count)
        seconds.append(time.perf_counter() - began)
    report.add(seconds=seconds)
    phases = MarkedPhases(spins=not report.dry)

    def marked_step() -> None:
        gpu_train.run_step(trainer, 2, count, phases)

    if report.dry:
        marked_step()
    else:
        runs = kernel_runs(marked_step)
        found = by_phase(runs, phases.marks)
        report.add(phases={name: asdict(span) for name, span in found.items()})
        for name, span in found.items():
            report.show(**{name: f"{span.seconds * 1e3:.0f} ms, {span.busy * 1e3:.0f} busy"})
    report.add(host=host_functions(lambda: gpu_train.run_step(trainer, 3, count)))


class MarkedPhases(Phases):
    """Launch a kernel at the beginning and at the end of each phase, which marks it in a profile.

    Phases must not be nested.

    spins: whether to launch. A CPU has no such kernel.
    """

    def __init__(self, *, spins: bool):
        super().__init__()
        self.spins = spins
        self.marks: list[str | None] = []  # the phase that begins at each mark; None: one ends

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.mark(name)
        with super().phase(name):
            yield
        self.mark(None)

    def mark(self, name: str | None) -> None:
        self.marks.append(name)
        if self.spins:
            torch.cuda._sleep(1)


@dataclass
class Span:
    """A phase on the device."""

    seconds: float = 0.0
    busy: float = 0.0  # seconds in which a kernel ran
    launches: int = 0
    gaps: list[float] = field(default_factory=list)  # seconds of the longest gaps
    kernels: dict[str, float] = field(default_factory=dict)  # seconds of the longest kernels


def by_phase(runs: Sequence[KernelRun], marks: Sequence[str | None]) -> dict[str, Span]:
    """Return the spans of the phases.

    runs: kernels in the order in which they began, of which those named MARKER are the marks.
    """
    borders = [i for i, run in enumerate(runs) if MARKER in run.name]
    if len(borders) != len(marks):
        raise ValueError(f"{len(borders)} kernels named {MARKER}: needs {len(marks)}, one a mark")
    found: dict[str, Span] = {}
    for j, name in enumerate(marks[:-1]):
        if name is not None:
            span = found.setdefault(name, Span())
            add_span(span, runs[borders[j] : borders[j + 1] + 1])
    return found


def add_span(span: Span, runs: Sequence[KernelRun]) -> None:
    """Add the kernels between two marks, which are the first and the last of the runs."""
    begin = runs[0].begin
    inner = runs[1:-1]
    last = begin
    gaps = []
    for run in inner:
        if run.begin > last:
            gaps.append(run.begin - last)
        end = run.begin + run.seconds
        if end > last:
            span.busy += end - max(run.begin, last)
            last = end
    gaps.append(max(0.0, runs[-1].begin - last))
    span.seconds += runs[-1].begin - begin
    span.launches += len(inner)
    span.gaps = sorted(gap for gap in span.gaps + gaps if gap > 0)[-GAPS:]
    for name, seconds in longest_kernels(inner).items():
        span.kernels[name] = span.kernels.get(name, 0.0) + seconds


def longest_kernels(runs: Sequence[KernelRun]) -> dict[str, float]:
    """Return the seconds of the kernels that take longest in total."""
    sums: dict[str, float] = {}
    for run in runs:
        name = run.name[:NAME]
        sums[name] = sums.get(name, 0.0) + run.seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1])[:LONGEST])


def host_functions(work: Callable[[], object]) -> dict[str, Any]:
    """Return calls and seconds of the Python functions that take longest themselves.

    The profiler slows down short functions most.
    """
    profiler = cProfile.Profile()
    profiler.runcall(work)
    stats: Any = pstats.Stats(profiler)
    rows = sorted(stats.stats.items(), key=lambda item: -item[1][2])
    found = {}
    for (file, line, name), (_, calls, own, cumulative, _) in rows[:LONGEST]:
        where = f"{Path(file).name}:{line} {name}"
        found[where] = {"calls": calls, "own": own, "cumulative": cumulative}
    return found
