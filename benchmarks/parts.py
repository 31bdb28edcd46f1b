"""The parts of the Triton ops, timed one by one: what to tune, before tuning it."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.cases import SHAPES, make_case
from benchmarks.measure import Stopwatch, Wrong, brief, reason
from expo_fast.kernels import logprob as k
from expo_fast.kernels import rowwise
from expo_fast.kernels.head import NOTHING, Head, Needs, RowGrads
from expo_fast.kernels.products import matmul
from expo_fast.kernels.reference import PLAIN

TOLERANCE = 1e-4  # nats between two orders of summing a row
CONFIGS = [  # the first is what is shipped
    k.GEMM,
    k.Config(128, 256, 64, num_warps=8, num_stages=3, GROUP=32),
    k.Config(128, 256, 64, num_warps=8, num_stages=4, GROUP=32),  # too large beside E
    k.Config(128, 128, 64, num_warps=8, num_stages=4, GROUP=32),
    k.Config(256, 128, 64, num_warps=8, num_stages=3, GROUP=64),
    k.Config(256, 128, 64, num_warps=8, num_stages=3, GROUP=4),
]


class GivenLoss(NamedTuple):
    """A loss whose derivatives are known before its log-probs."""

    grads: RowGrads  # (N,) each

    def row_grads(self, rows: slice, logp: torch.Tensor) -> RowGrads:
        return self.grads.take(rows)


def works(head: Head) -> dict[str, Callable[[], Any]]:
    """What to time; `benchmarks.floors` says of each what it should take."""
    hidden, weight = head.hidden, head.weight
    e = k.empty_e(head, len(hidden))
    results, log_total = k.forward(head, e)
    d_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    row_grads = RowGrads(torch.ones_like(results.logp), torch.ones_like(results.logp))
    dz = torch.empty_like(e)
    into_hidden = partial(matmul, e, weight, d_hidden, narrow=True)
    into_weight = partial(matmul, e.T, hidden, d_weight, narrow=True)
    one_pass = partial(rowwise.ROWWISE.log_probs_and_gradients, head)

    def both_ways() -> None:
        k.forward(head, e)
        into_hidden()
        into_weight()

    return {
        "GEMM logits, bf16": partial(torch.mm, hidden, weight.T, out=dz),
        "GEMM E @ weight, fp32": into_hidden,
        "GEMM E.T @ hidden, fp32": into_weight,
        "... added to what is there": partial(into_weight, accumulate=True),
        "dz from E": partial(k.from_stored, head, e, log_total, results, row_grads, dz),
        "dz recomputed": partial(k.recomputed, head, results, row_grads, 0, dz),
        "row kernels, forward": partial(rowwise.ROWWISE.log_probs, head, NOTHING),
        "row kernels, one pass": partial(one_pass, GivenLoss(row_grads), Needs(True, True, False)),
        "fused forward": partial(k.forward, head),
        "fused forward with E": partial(k.forward, head, e),
        "forward and backward with E": both_ways,
    }


def parts(model: str, rows: int, device: str, repeats: int) -> dict[str, Any]:
    """Median seconds of each part, interleaved, and of the fused forward at each of CONFIGS.

    One whose log-probs are not plain PyTorch's is not timed.
    """
    case, stopwatch = make_case(model, rows, device), Stopwatch(device)
    head = Head(case.hidden.detach(), case.weight.detach(), None, case.targets, 1.0)
    todo, failed = {name: (work, k.GEMM) for name, work in works(head).items()}, {}
    for config in CONFIGS[1:]:
        for name in ("fused forward", "fused forward with E"):
            todo[f"{name}, {tuple(vars(config).values())}"] = todo[name][0], config
    expected = PLAIN.log_probs(head, NOTHING).results.logp
    seconds: dict[str, list[float]] = {}
    for lap in range(repeats + 1):  # the first compiles
        for name in [name for name in todo if name not in failed]:
            work, k.GEMM = todo[name]
            try:
                stopwatch.start()
                found = work()
                taken, _ = stopwatch.stop()
                if lap == 0 and name.startswith("fused"):
                    check(found[0].logp, expected)
            except Exception as e:  # a config that does not fit into shared memory
                failed[name] = reason(e)
                continue
            finally:
                k.GEMM = CONFIGS[0]
            if lap:
                seconds.setdefault(name, []).append(taken)
    found = {name: statistics.median(x) for name, x in seconds.items()}
    foreseen = floors.works(rows, *SHAPES[model])
    show(f"parts, {model}, {rows} rows", found, foreseen, failed)
    rest = {"foreseen": {name: vars(x) | {"floor": x.floor} for name, x in foreseen.items()}}
    return {"model": model, "rows": rows, "seconds": found, "failed": failed} | rest


def check(logp: Tensor, expected: Tensor) -> None:
    if not torch.allclose(logp, expected, rtol=0, atol=TOLERANCE):
        gap = float((logp - expected).abs().max())
        raise Wrong(f"log-probs are {gap:.1e} nats off plain PyTorch's")


def show(
    title: str, found: dict[str, float], foreseen: dict[str, floors.Work], failed: dict[str, str]
) -> None:
    print(f"\n{title}\n{'':64s}{'ms':>10s}{'TFLOP/s':>9s}{'floor':>9s}{'expected on an H200':>21s}")
    for name, s in found.items():
        work = foreseen[name.partition(", (")[0]]
        rate, floor = f"{work.flops / s / 1e12:.0f}", f"{work.floor * 1e3:.3f}"
        print(f"{name:64s}{s * 1e3:10.3f}{rate:>9s}{floor:>9s}{work.expected * 1e3:21.3f}")
    for name, why in failed.items():
        print(f"{name:64s} FAILED {brief(why)}")
