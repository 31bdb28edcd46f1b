"""The parts of the Triton ops, timed one by one: what to tune, before tuning it."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.cases import SHAPES, make_case
from benchmarks.measure import Stopwatch
from expo_fast.kernels import logprob as k
from expo_fast.kernels import rowwise
from expo_fast.kernels.head import NOTHING, Head, Needs, Slopes
from expo_fast.kernels.products import matmul

CONFIGS = [  # the first is what is shipped
    k.GEMM,
    k.Config(128, 256, 64, num_warps=8, num_stages=3, GROUP=32),
    k.Config(128, 256, 64, num_warps=8, num_stages=4, GROUP=32),  # too large beside E
    k.Config(128, 128, 64, num_warps=8, num_stages=4, GROUP=32),
    k.Config(256, 128, 64, num_warps=8, num_stages=3, GROUP=64),
    k.Config(256, 128, 64, num_warps=8, num_stages=3, GROUP=4),
]


def works(head: Head) -> dict[str, tuple[Callable[[], Any], int]]:
    """What to time, and of how many GEMMs it is made."""
    hidden, weight = head.hidden, head.weight
    e = k.room_for_e(head, len(hidden))[:, : len(weight)]
    results, log_total = k.forward(head, e)
    d_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    slopes = Slopes(torch.ones_like(results.logp), torch.ones_like(results.logp))
    dz = torch.empty_like(e)
    one_pass = partial(rowwise.ROWWISE.log_probs_and_gradients, head)
    return {
        "GEMM logits, bf16": (partial(torch.mm, hidden, weight.T, out=dz), 1),
        "GEMM E @ weight, fp32": (partial(matmul, e, weight, d_hidden, narrow=True), 1),
        "GEMM E.T @ hidden, fp32": (partial(matmul, e.T, hidden, d_weight, narrow=True), 1),
        "... added to what is there": (
            partial(matmul, e.T, hidden, d_weight, narrow=True, accumulate=True),
            1,
        ),
        "dz from E": (partial(k.from_stored, head, e, log_total, results, slopes, dz), 0),
        "dz recomputed": (partial(k.recomputed, head, results, slopes, 0, dz), 1),
        "row kernels, forward": (partial(rowwise.ROWWISE.log_probs, head, NOTHING), 1),
        "row kernels, one pass": (
            partial(one_pass, lambda span, _: slopes.take(span), Needs(True, True, False)),
            3,
        ),
        "fused forward": (partial(k.forward, head), 1),
        "fused forward with E": (partial(k.forward, head, e), 1),
    }


def parts(model: str, rows: int, device: str, repeats: int) -> dict[str, Any]:
    """Median seconds of each part, interleaved, and of the fused forward at each of CONFIGS."""
    case, stopwatch = make_case(model, rows, device), Stopwatch(device)
    head = Head(case.hidden.detach(), case.weight.detach(), None, case.targets, 1.0)
    todo, failed = {name: (work, n, k.GEMM) for name, (work, n) in works(head).items()}, {}
    for config in CONFIGS[1:]:
        for name in ("fused forward", "fused forward with E"):
            todo[f"{name}, {tuple(vars(config).values())}"] = (*todo[name][:2], config)
    seconds: dict[str, list[float]] = {}
    for lap in range(repeats + 1):  # the first compiles
        for name in [name for name in todo if name not in failed]:
            work, _, k.GEMM = todo[name]
            try:
                stopwatch.start()
                work()
                taken, _ = stopwatch.stop()
            except Exception as e:  # a config that does not fit into shared memory
                failed[name] = f"{type(e).__name__}: {e}".splitlines()[0]
                continue
            finally:
                k.GEMM = CONFIGS[0]
            if lap:
                seconds.setdefault(name, []).append(taken)
    gemm = 2 * rows * SHAPES[model][0] * SHAPES[model][1]
    found = {name: statistics.median(x) for name, x in seconds.items()}
    print(f"\nparts, {model}, {rows} rows")
    for name, s in found.items():
        print(f"{name:64s}{s * 1e3:10.3f} ms{todo[name][1] * gemm / s / 1e12:8.0f} TFLOP/s")
    for name, why in failed.items():
        print(f"{name:64s} FAILED {why}")
    return {"model": model, "rows": rows, "seconds": found, "failed": failed}
