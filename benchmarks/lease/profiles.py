"""Read the hardware counters of one kernel launch with Nsight Compute.

python -m benchmarks.lease.profiles KERNEL    launch the kernel that the profiler measures
"""

import csv
import subprocess
import sys
from collections.abc import Callable
from shutil import which

import torch

from benchmarks.cases import SHAPES
from benchmarks.gpu_decode import LOAD, SMOKE, AttentionCase
from benchmarks.lease.report import Mismatch, Report
from expo_fast.inference import sampling
from expo_fast.kernels import blocks, decode, draw, truncate
from expo_fast.kernels import logprob as k
from expo_fast.kernels.head import Head

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "LaunchStats")
SECTIONS += ("Occupancy", "SchedulerStats", "WarpStateStats", "InstructionStats")
SHOWN = ("Duration", "Compute (SM) Throughput", "Memory Throughput", "Registers Per Thread")
MARGIN = 3  # seconds to read the counters


def counters(report: Report, kernel: str) -> None:
    """Profile the first launch of a kernel. In a dry run, launch it without the profiler."""
    target = [sys.executable, "-m", "benchmarks.lease.profiles", kernel]
    if report.dry:
        launch(kernel, "cpu")
        return
    if not which("ncu"):
        raise Mismatch("ncu is not installed", {})
    command = ["ncu", "--clock-control", "none", "--launch-count", "1", "--csv"]
    command += ["--kernel-name", kernel, "--page", "details"]
    for section in SECTIONS:
        command += ["--section", section]
    done = subprocess.run(
        [*command, *target], capture_output=True, text=True, timeout=report.left() - MARGIN
    )
    (report.folder / f"{report.name}.csv").write_text(done.stdout)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    metrics = {
        row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in rows
        if row.get("Metric Name")
    }
    if not metrics:
        output = (done.stdout + done.stderr)[-2000:]
        raise Mismatch(f"ncu printed no metrics. Its output ends with {output}", {})
    report.add(metrics=metrics)
    report.show(**{name: metrics[name] for name in SHOWN if name in metrics})


def launch(kernel: str, device: str) -> None:
    """Launch one kernel at the sizes that are timed, or at small sizes on a CPU."""
    LAUNCHES[kernel](device)
    if device != "cpu":
        torch.cuda.synchronize()


def softmax_sums(device: str) -> None:
    n = 16384
    v, d = SHAPES["qwen2.5-0.5b"]
    if device == "cpu":
        n, v, d = 300, 1024, 64
    hidden = torch.randn(n, d, device=device).bfloat16()
    weight = (torch.randn(v, d, device=device) * 2 / d**0.5).bfloat16()
    head = Head(hidden, weight, None, torch.randint(v, (n,), device=device), 1.0)
    k.forward(head, k.empty_e(head, n))


def attend_items(device: str) -> None:
    case = AttentionCase(14, 2, 64, LOAD if device != "cpu" else SMOKE, device)
    case.plan(decode.rows_together(14, 2))
    case.run(0)


def draw_allowed(device: str) -> None:
    n, v = (256, 151936) if device != "cpu" else (4, 4096)
    logits = 3 * torch.randn(n, v, device=device)
    truncated_draw(logits, top_p=0.9)


def truncated_draw(logits: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0) -> None:
    """Draw a token for each row, as a decode step does."""
    n = len(logits)
    device = logits.device
    temperature = torch.ones(n, device=device)
    zeros = torch.zeros(2, n, dtype=torch.int64, device=device)
    seeds = torch.arange(n, device=device)
    found = blocks.blocks_of(logits, temperature, sampling.BLOCK)
    progress = draw.Progress.start(*zeros, burst=1)
    sampled = draw.sample_rows(
        logits, *found, sampling.BLOCK, temperature, seeds, progress, record=False
    )
    truncate.redraw(
        logits,
        *found,
        sampling.BLOCK,
        temperature,
        sampled.u,
        top_k=torch.full((n,), top_k, device=device),
        top_p=torch.full((n,), top_p, device=device),
        min_p=torch.zeros(n, device=device),
        tokens=sampled.tokens,
        logps=sampled.logps,
    )
    draw.record(sampled, progress)


LAUNCHES: dict[str, Callable[[str], None]] = {
    "softmax_sums": softmax_sums,
    "attend_items": attend_items,
    "draw_allowed": draw_allowed,
}

if __name__ == "__main__":
    launch(sys.argv[1], "cuda")
