"""Time training steps of random weights, and profile the last step."""

from benchmarks import gpu_train
from benchmarks.lease.machine import best
from benchmarks.lease.report import Report


def timed(report: Report, model: str) -> None:
    """Time a few steps: seconds by phase, MFU, memory, and seconds by kind of kernel."""
    if report.dry:  # no kernel runs, so no step learns anything
        gpu_train.require_learning = lambda step, row: None
    for found in gpu_train.measure(model, report.device, best(report).flops):
        report.add(result=found)
        steady = found["seconds"][1:]
        report.show(seconds=f"{sum(steady) / len(steady):.2f}", mfu=f"{found['mfu']:.0%}")
        if "peak_bytes" in found:
            report.show(peak_gb=round(found["peak_bytes"] / 1e9, 1))
        if "outside" in found:
            report.show(outside=f"{found['outside']:.0%}")
