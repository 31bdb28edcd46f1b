"""Whole training steps, with a trace of the last."""

from benchmarks import gpu_train
from benchmarks.lease.machine import best
from benchmarks.lease.report import Report


def timed(report: Report, model: str) -> None:
    """A few steps of random weights: seconds by phase, MFU, memory."""
    if report.dry:  # without kernels there is nothing to learn
        gpu_train.require_learning = lambda step, row: None
    trace = report.folder / f"{report.name}.trace.json.gz"
    found = gpu_train.measure(model, report.device, best(report).flops, trace)
    report.add(result=found)
    steady = found["seconds"][1:]
    report.show(seconds=f"{sum(steady) / len(steady):.2f}", mfu=f"{found['mfu']:.0%}")
    if "peak_bytes" in found:
        report.show(peak_gb=round(found["peak_bytes"] / 1e9, 1))
