"""Time the parts of the ops of the LM head, and the variants of its fused forward."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks import parts
from benchmarks.cases import SHAPES
from benchmarks.lease.machine import best
from benchmarks.lease.report import Mismatch, Report
from benchmarks.measure import brief, reason
from expo_fast.kernels import logprob as k
from expo_fast.kernels.head import Head

ROWS = (16384, 4096, 1024)
REPEATS = 7
SMALL = "small"  # the shape of a dry run


def compiled(report: Report) -> None:
    """Compile every variant into Triton's cache, several at a time, before they are timed."""
    todo = [(name, store, report.dry) for name in k.VARIANTS for store in (False, True)]
    jobs = min(len(todo), max(1, len(os.sched_getaffinity(0)) - 1))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        outcomes = list(pool.map(compile_one, *zip(*todo, strict=True)))
    labels = [f"{name}, E" if store else name for name, store, _ in todo]
    found = dict(zip(labels, outcomes, strict=True))
    report.add(compiled=found)
    report.show(variants=outcomes.count("ok"), of=len(outcomes))
    for name in set(k.BY_CARD.values()):
        if found[name] != "ok":
            raise Mismatch(f"the variant {name} does not compile: {brief(found[name])}", {})


def compile_one(variant: str, store: bool, dry: bool) -> str:
    """Launch a variant on a few rows, which Triton specialises in the same way as real shapes.

    Return "ok" or the reason of a failure.
    """
    if dry:
        from benchmarks.lease import fake_driver

        fake_driver.install()
    device = "cpu" if dry else "cuda"
    hidden = torch.randn(256, 64, device=device).bfloat16()
    weight = torch.randn(1024, 64, device=device).bfloat16()
    head = Head(hidden, weight, None, torch.zeros(256, dtype=torch.int64, device=device), 1.0)
    try:
        e = k.padded_e(head, 256)[:, :1024] if store else None
        k.forward(head, e, k.VARIANTS[variant])
        if not dry:
            torch.cuda.synchronize()
    except Exception as error:  # such as a variant that does not fit into shared memory
        return reason(error)
    return "ok"


def timed(report: Report, model: str) -> None:
    """Time every part and every variant for some numbers of rows."""
    if report.dry:
        SHAPES[SMALL] = (264, 64)
        parts.check = lambda logp, expected: None
    ceilings = best(report)
    for rows in (64,) if report.dry else ROWS:
        if report.left() < 8:
            report.extend("not_reached", rows)
            continue
        repeats = 1 if report.dry else REPEATS
        named = SMALL if report.dry else model
        found = parts.parts(named, rows, report.device, repeats, ceilings)
        report.extend("parts", found)
        # A variant may need too much memory with E, and be meant for the forward without E only.
        broken = {name: why for name, why in found["failed"].items() if "OutOfResources" not in why}
        if report.dry and broken:
            reasons = [f"{name}: {brief(why)}" for name, why in broken.items()]
            raise Mismatch("; ".join(reasons), {})
        ms = {
            name.removeprefix("fused forward with E, "): seconds * 1e3
            for name, seconds in found["seconds"].items()
            if name.startswith("fused forward with E, ")
        }
        if ms:
            fastest = min(ms, key=lambda name: ms[name])
            report.show(**{f"{rows}_rows": f"{fastest} {ms[fastest]:.3f} ms"})
    if not report.found.get("parts"):
        raise Mismatch("nothing was timed", {})
