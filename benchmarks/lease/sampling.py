"""The generator: end to end, a step's graph alone, truncated draws, and a trace."""

import math
import os
import statistics
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import decode as racing
from benchmarks import gpu_decode
from benchmarks.gpu_decode import LOAD, MODELS, SMOKE, TINY, random_model, shared_tables
from benchmarks.lease import switches
from benchmarks.lease.machine import best
from benchmarks.lease.profiles import truncated_draw
from benchmarks.lease.report import Report
from benchmarks.measure import Stopwatch, Wrong
from benchmarks.samplers import OURS, Subject
from expo_fast.inference.cuda_engine import CudaEngine
from expo_fast.inference.engine import Rows, Sampling
from expo_fast.inference.sampling import Truncation
from expo_fast.modeling.decoder import Decoder

STEPS = 64  # replayed one after the other
BURSTS = 4  # in a trace
REPEATS = 5
LONGEST = 15  # kernels named in a trace's summary
DRAWS = {"peaked": 8.0, "flat": 0.01}  # standard deviation of the logits
RULES: dict[str, dict[str, Any]] = {"top-p": {"top_p": 0.9}, "top-k": {"top_k": 50}}


def timed(report: Report, model: str, truncated: bool) -> None:
    """All of it for one model; a part that fails costs no other its figures.

    truncated: whether to time truncated draws too, which are the same for every model.
    """
    device, ceilings = report.device, best(report)
    if report.dry:
        accept_anything()
    load = SMOKE if report.dry else LOAD
    decoder = random_model(TINY if report.dry else MODELS[model], device)
    if switches.TORCH_ENGINE in switches.wanted(os.environ):
        report.add(note=f"{switches.TORCH_ENGINE}: nothing of Triton's engine is timed")
    else:
        report.attempt("step", partial(step_alone, report, decoder))
        if truncated:
            report.attempt("draws", partial(draws, report))
        attention = partial(gpu_decode.attention, decoder, load, ceilings)
        report.add(attention=report.attempt("attention", attention))
        del attention
    del decoder  # `measure` makes its own
    whole = partial(gpu_decode.measure, model, device, ceilings, peer=False)
    found = report.attempt("end to end", whole)
    if found:
        report.add(result=found)
        ours = found["contestants"][OURS]
        rate = round(ours["tokens_per_second"])
        report.show(tokens_s=rate, of_limit=f"{ours['of_limit']:.0%}")
    report.require_all()


def beside_peer(report: Report, model: str) -> None:
    """Time the generator beside transformers' continuous batching."""
    if report.dry:
        accept_anything()
    found = gpu_decode.measure(model, report.device, best(report), peer=True)
    report.add(result=found)
    for name, contestant in found["contestants"].items():
        report.show(**{name: f"{contestant['tokens_per_second']:.0f} tokens/s"})


def accept_anything() -> None:
    """Let a race go on although no kernel has run, so that no sampler can be right."""
    truth = racing.truth

    def any_truth(subject: Subject) -> racing.Truth:
        try:
            return truth(subject)
        except Wrong:
            return racing.Truth(mean=0.0, stdev=1.0, n=1)

    racing.truth = any_truth
    racing.SIGMAS = math.inf


@torch.no_grad()
def step_alone(report: Report, model: Decoder) -> None:
    """Seconds of a decode step without the host: replays of its graph, one behind the other."""
    load = SMOKE if report.dry else LOAD
    engine = CudaEngine(model)
    tables = shared_tables(load)
    n = len(tables)
    engine.open(1 + int(tables.max()), load.prompt_tokens + load.new_tokens)
    engine.slab.normal_()
    none = Truncation(torch.zeros(n).long(), torch.ones(n), torch.zeros(n))
    middle = load.prompt_tokens + load.new_tokens // 2 - STEPS // 2
    first = min(load.prompt_tokens, max(0, middle))
    where = torch.full((n,), 5), torch.full((n,), first)
    engine.load(Rows(*where, tables, Sampling(torch.arange(n), torch.ones(n), none)))
    stopwatch, seconds = Stopwatch(report.device), []
    steps = 1 if report.dry else STEPS
    for _ in range(REPEATS):
        engine.step.inputs.positions.fill_(first)
        stopwatch.start()
        for _ in range(steps):
            engine.step.run()
        seconds.append(stopwatch.stop()[0] / steps)
    engine.step.inputs.positions.fill_(first)
    engine.step.progress.index.zero_()
    middle_one = statistics.median(seconds)
    captured = engine.step.graph is not None
    report.add(step={"seconds": middle_one, "all": seconds, "graph": captured})
    report.show(step_ms=f"{middle_one * 1e3:.3f}")
    report.add(trace=traced(report, engine))
    engine.close()


def traced(report: Report, engine: CudaEngine) -> dict[str, Any]:
    """Trace some bursts, host and device, and return the kernels that take longest."""
    kinds = [ProfilerActivity.CPU]
    kinds += [] if report.dry else [ProfilerActivity.CUDA]
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
    """Seconds of a truncated draw at batch 256, where few tokens stand out and where none does."""
    n, v = (4, 4096) if report.dry else (256, 151936)
    found = {}
    for shape, spread in DRAWS.items():
        logits = spread * torch.randn(n, v, device=report.device)
        for rule, given in RULES.items():
            run = partial(truncated_draw, logits, **given)
            found[f"{shape}, {rule}"] = median(report, run)
        found[f"{shape}, topk(512)"] = median(report, partial(torch.topk, logits, 512))
        report.add(draws=found)


def median(report: Report, run: Any) -> float:
    """Seconds of a call, after one that compiles."""
    run()
    stopwatch, seconds = Stopwatch(report.device), []
    for _ in range(1 if report.dry else REPEATS):
        stopwatch.start()
        run()
        seconds.append(stopwatch.stop()[0])
    return statistics.median(seconds)
