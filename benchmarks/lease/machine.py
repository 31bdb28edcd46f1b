"""Describe the machine, and measure its highest rates."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from shutil import which
from typing import Any

import torch

from benchmarks import floors, measure
from benchmarks.cases import SHAPES
from benchmarks.lease.report import Report
from benchmarks.summary import machine
from expo_fast.kernels.products import matmul

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "pytest", "pytest-xdist")
PACKAGES += ("liger-kernel", "cut-cross-entropy", "flash-attn")
TOOLS = ("compute-sanitizer", "ncu", "nvidia-smi")


def versions(report: Report) -> None:
    """Report versions of packages, and properties of the card."""
    found: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    report.add(versions=found, tools={name: which(name) for name in TOOLS}, machine=machine())
    report.show(torch=torch.__version__, triton=found["triton"])
    if report.dry:
        return
    card = torch.cuda.get_device_properties(0)
    report.add(
        card={
            "name": card.name,
            "capability": (card.major, card.minor),
            "multiprocessors": card.multi_processor_count,
            "bytes": card.total_memory,
            "l2_bytes": card.L2_cache_size,
        }
    )
    report.show(card=card.name)
    if which("nvidia-smi"):
        query = "--query-gpu=driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, timeout=20
        )
        report.add(nvidia_smi=done.stdout)


def card_name(device: str) -> str:
    """Return the name under which the ceilings are saved."""
    return torch.cuda.get_device_name() if device != "cpu" else "cpu"


def best(report: Report) -> measure.Ceilings:
    """Return the ceilings of the card, from an earlier check if there was one."""
    card = card_name(report.device)
    file = report.folder.parent / "ceilings.json"
    if file.exists():
        known = floors.read(file)
        if card in known:
            return known[card]
    return measure.ceilings(report.device)


def ceilings(report: Report) -> None:
    """Time a copy, a large product, and the products of the LM head with fp32 results."""
    device = report.device
    found = measure.ceilings(device)
    floors.write(report.folder / "ceilings-by-card.json", {card_name(device): found})
    report.show(tflops=round(found.flops / 1e12), copy_gb_s=round(found.bytes / 1e9))
    for model in ("qwen2.5-0.5b", "qwen2.5-3b"):
        v, d = (512, 64) if report.dry else SHAPES[model]
        n = 64 if report.dry else 16384
        e = torch.randn(n, v, device=device).bfloat16()
        hidden = torch.randn(n, d, device=device).bfloat16()
        weight = torch.randn(v, d, device=device).bfloat16()
        products = {
            "d_hidden": (e, weight, torch.empty(n, d, device=device)),
            "d_weight": (e.T, hidden, torch.empty(v, d, device=device)),
        }
        for name, (a, b, out) in products.items():
            stopwatch = measure.Stopwatch(device)
            seconds = []
            for _ in range(6):
                stopwatch.start()
                matmul(a, b, out, narrow=True)
                seconds.append(stopwatch.stop()[0])
            rate = 2 * n * v * d / min(seconds) / 1e12
            report.extend("fp32-out", {"model": model, "gemm": name, "rows": n, "tflops": rate})
