"""Time the generator: end to end, the graph of a step alone, truncated draws, and a trace."""

import math
import os
import statistics
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import decode as decode_benchmark
from benchmarks import gpu_decode
from benchmarks.gpu_decode import LOAD, MODELS, SMOKE, TINY, random_model, shared_tables
from benchmarks.lease import switches
from benchmarks.lease.machine import best
from benchmarks.lease.profiles import truncated_draw
from benchmarks.lease.report import Report
from benchmarks.measure import Stopwatch, WrongResult
from benchmarks.samplers import OURS, Subject
from expo_fast.inference.cuda_engine import CudaEngine
from expo_fast.inference.engine import Rows, Sampling
from expo_fast.inference.sampling import Truncation
from expo_fast.modeling.decoder import Decoder

STEPS = 64  # steps that are replayed without a host sync
BURSTS = 4  # bursts in a trace
FIRST_TOKEN = 5  # the token of each row that the first step continues
REPEATS = 5
LONGEST = 15  # kernels in the summary of a trace
DRAWS = {"peaked": 8.0, "flat": 0.01}  # standard deviations of the logits
RULES: dict[str, dict[str, Any]] = {"top-p": {"top_p": 0.9}, "top-k": {"top_k": 50}}


def timed(report: Report, model: str, truncated: bool) -> None:
    """Time the generator of one model. A part that fails does not stop the other parts.

    truncated: whether to time truncated draws too, which do not depend on the model.
    """
    device = report.device
    ceilings = best(report)
    if report.dry:
        accept_anything()
    load = SMOKE if report.dry else LOAD
    decoder = random_model(TINY if report.dry else MODELS[model], device)
    if switches.TORCH_ENGINE in switches.wanted(os.environ):
        report.add(note=f"{switches.TORCH_ENGINE} is set: Triton's engine is not timed")
    else:
        report.attempt("step", partial(step_alone, report, decoder))
        if truncated:
            report.attempt("draws", partial(draws, report))
        attention = partial(gpu_decode.attention, decoder, load, ceilings)
        report.add(attention=report.attempt("attention", attention))
        del attention
    del decoder  # frees memory: `measure` builds a model of its own
    end_to_end = partial(gpu_decode.measure, model, device, ceilings, peer=False)
    found = report.attempt("end to end", end_to_end)
    if found:
        report.add(result=found)
        ours = found["contestants"][OURS]
        rate = round(ours["tokens_per_second"])
        report.show(tokens_s=rate, of_limit=f"{ours['of_limit']:.0%}")
    report.require_all()


def beside_peer(report: Report, model: str) -> None:
    """Time the generator and the continuous batching of transformers."""
    if report.dry:
        accept_anything()
    found = gpu_decode.measure(model, report.device, best(report), peer=True)
    report.add(result=found)
    for name, contestant in found["contestants"].items():
        report.show(**{name: f"{contestant['tokens_per_second']:.0f} tokens/s"})


def accept_anything() -> None:
    """Make the checks of samplers pass in a dry run, in which no kernel runs."""
    truth = decode_benchmark.truth

    def any_truth(subject: Subject) -> decode_benchmark.Truth:
        try:
            return truth(subject)
        except WrongResult:
            return decode_benchmark.Truth(mean=0.0, stdev=1.0, n=1)

    decode_benchmark.truth = any_truth
    decode_benchmark.SIGMAS = math.inf


@torch.no_grad()
def step_alone(report: Report, model: Decoder) -> None:
    """Time a decode step without the host: replay its graph many times without a host sync."""
    engine = loaded_engine(report, model)
    stopwatch = Stopwatch(report.device)
    seconds = [seconds_of_a_step(report, engine, stopwatch) for _ in range(REPEATS)]
    rewind(report, engine)
    median_seconds = statistics.median(seconds)
    captured = engine.step.graph is not None
    report.add(step={"seconds": median_seconds, "all": seconds, "graph": captured})
    report.show(step_ms=f"{median_seconds * 1e3:.3f}")
    report.add(trace=traced(report, engine))
    engine.close()


def loaded_engine(report: Report, model: Decoder) -> CudaEngine:
    """Return an engine with the rows of the load, and with a cache of random numbers."""
    load = SMOKE if report.dry else LOAD
    engine = CudaEngine(model)
    tables = shared_tables(load)
    n = len(tables)
    engine.open(1 + int(tables.max()), load.prompt_tokens + load.new_tokens)
    engine.slab.normal_()
    no_truncation = Truncation(torch.zeros(n).long(), torch.ones(n), torch.zeros(n))
    last_tokens = torch.full((n,), FIRST_TOKEN)
    positions = torch.full((n,), first_position(report))
    keys = Sampling(torch.arange(n), torch.ones(n), no_truncation)
    engine.load(Rows(last_tokens, positions, tables, keys))
    return engine


def first_position(report: Report) -> int:
    """Return the position from which STEPS steps have their middle in that of the new tokens."""
    load = SMOKE if report.dry else LOAD
    middle = load.prompt_tokens + load.new_tokens // 2 - STEPS // 2
    return min(load.prompt_tokens, max(0, middle))


def rewind(report: Report, engine: CudaEngine) -> None:
    """Set the rows back to their first position, at the start of a burst."""
    engine.step.inputs.positions.fill_(first_position(report))
    engine.step.progress.index.zero_()


def seconds_of_a_step(report: Report, engine: CudaEngine, stopwatch: Stopwatch) -> float:
    """Return the mean seconds of STEPS steps without a host sync."""
    steps = 1 if report.dry else STEPS
    engine.step.inputs.positions.fill_(first_position(report))
    stopwatch.start()
    for _ in range(steps):
        engine.step.run()
    return stopwatch.stop()[0] / steps


def traced(report: Report, engine: CudaEngine) -> dict[str, Any]:
    """Trace some bursts on host and device. Return the kernels that take longest."""
    kinds = [ProfilerActivity.CPU]
    if not report.dry:
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler:
        for _ in range(1 if report.dry else BURSTS):
            engine.decode(ahead=False)
    profiler.export_chrome_trace(str(report.folder / f"{report.name}.trace.json.gz"))
    sums: dict[str, float] = {}
    events: Any = profiler.events()
    for event in events:
        if report.dry or str(event.device_type).endswith("CUDA"):
            name = event.name[:80]
            sums[name] = sums.get(name, 0.0) + event.time_range.elapsed_us() / 1e6
    longest = sorted(sums.items(), key=lambda item: -item[1])[:LONGEST]
    return {"bursts": BURSTS, "seconds": dict(longest)}


def draws(report: Report) -> None:
    """Time truncated draws at batch 256, for peaked and for flat distributions."""
    n, v = (4, 4096) if report.dry else (256, 151936)
    found = {}
    for shape, spread in DRAWS.items():
        logits = spread * torch.randn(n, v, device=report.device)
        for rule, given in RULES.items():
            run = partial(truncated_draw, logits, **given)
            found[f"{shape}, {rule}"] = median_time(report, run)
        topk = partial(torch.topk, logits, 512)
        found[f"{shape}, topk(512)"] = median_time(report, topk)
        report.add(draws=found)


def median_time(report: Report, run: Any) -> float:
    """Return the median seconds of a call, after a first call that compiles."""
    run()
    stopwatch = Stopwatch(report.device)
    seconds = []
    for _ in range(1 if report.dry else REPEATS):
        stopwatch.start()
        run()
        seconds.append(stopwatch.stop()[0])
    return statistics.median(seconds)
