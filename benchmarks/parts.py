"""Time each part of the Triton ops separately, to find out which part to tune."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.cases import SHAPES, make_case
from benchmarks.measure import Ceilings, Stopwatch, WrongResult, brief, reason
from expo_fast.kernels import logprob as k
from expo_fast.kernels import rowwise
from expo_fast.kernels.head import NOTHING, Head, LogProb, Needs, RowGrads
from expo_fast.kernels.products import matmul
from expo_fast.kernels.reference import PLAIN

TOLERANCE = 1e-4  # nats by which two orders of summing a row may differ


class GivenLoss(NamedTuple):
    """A loss whose gradients do not depend on the log-probs."""

    grads: RowGrads  # (N,) each

    def row_grads(self, rows: slice, logp: torch.Tensor) -> RowGrads:
        return self.grads.take(rows)


@dataclass(frozen=True)
class Part:
    """A part to time."""

    forecast: str  # its name in `benchmarks.floors`
    run: Callable[[], Any]
    returns_logp: bool = False  # whether `run` returns results whose log-probs can be checked


def stored(head: Head, expected: LogProb) -> tuple[Tensor, str | None]:
    """Return E (N, V) from the fused forward, and None.

    Where the forward fails, return random numbers and the reason.
    """
    e = k.empty_e(head, len(head.hidden))
    try:
        k.forward(head, e)
        return e, None
    except Exception as error:  # the other parts can still be timed
        e.uniform_()
        return e, reason(error)


def works(head: Head, e: Tensor, known: LogProb) -> dict[str, Part]:
    """Return the parts to time, by name.

    known: the results of a forward.
    """
    hidden, weight = head.hidden, head.weight
    log_total = -known.logp
    d_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    d_weight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    row_grads = RowGrads(torch.ones_like(known.logp), torch.ones_like(known.logp))
    dz = torch.empty_like(e)
    into_hidden = partial(matmul, e, weight, d_hidden, narrow=True)
    into_weight = partial(matmul, e.T, hidden, d_weight, narrow=True)
    one_pass = partial(rowwise.ROWWISE.log_probs_and_gradients, head)
    narrow = {
        "GEMM E @ weight, bf16": partial(torch.mm, e, weight, out=torch.empty_like(hidden)),
        "GEMM E.T @ hidden, bf16": partial(torch.mm, e.T, hidden, out=torch.empty_like(weight)),
    }

    def logits() -> None:
        chunk = min(4096, len(hidden))  # to save memory
        z = torch.empty(chunk, len(weight), dtype=torch.float32, device=hidden.device)
        for first in range(0, len(hidden), chunk):
            part = hidden[first : first + chunk]
            matmul(part, weight.T, z[: len(part)], narrow=True)

    def forward_and_backward() -> None:
        k.forward(head, e)
        into_hidden()
        into_weight()

    plain = {
        "GEMM logits, bf16": partial(torch.mm, hidden, weight.T, out=dz),
        "GEMM logits, fp32": logits,
        **narrow,
        "GEMM E @ weight, fp32": into_hidden,
        "GEMM E.T @ hidden, fp32": into_weight,
        "... added to what is there": partial(into_weight, accumulate=True),
        "dz from E": partial(k.from_stored, head, e, log_total, known, row_grads, dz),
        "dz recomputed": partial(k.recomputed, head, known, row_grads, 0, dz),
        "row kernels, forward": partial(rowwise.ROWWISE.log_probs, head, NOTHING),
        "row kernels, one pass": partial(one_pass, GivenLoss(row_grads), Needs(True, True, False)),
        "forward and backward with E": forward_and_backward,
    }
    todo = {name: Part(name, run) for name, run in plain.items()}
    for variant, config in k.VARIANTS.items():
        for name, given in (("fused forward", None), ("fused forward with E", e)):
            run = partial(k.forward, head, given, config)
            todo[f"{name}, {variant}"] = Part(name, run, returns_logp=True)
    return todo


def parts(model: str, rows: int, device: str, repeats: int, best: Ceilings) -> dict[str, Any]:
    """Return the median seconds of each part, and of the fused forward in each variant.

    Rounds of all parts are interleaved. A part that raises an error, or whose log-probs differ from
    those of plain PyTorch, is not timed.
    """
    case = make_case(model, rows, device)
    stopwatch = Stopwatch(device)
    head = Head(case.hidden.detach(), case.weight.detach(), None, case.targets, 1.0)
    expected = PLAIN.log_probs(head, NOTHING).results
    expected = LogProb(*(x.double() for x in expected))
    e, why = stored(head, expected)
    failed = {"E": why} if why else {}
    todo = works(head, e, expected)
    seconds: dict[str, list[float]] = {}
    for round_number in range(repeats + 1):  # the first round compiles
        for name in [name for name in todo if name not in failed]:
            try:
                stopwatch.start()
                found = todo[name].run()
                taken, _ = stopwatch.stop()
                if round_number == 0 and todo[name].returns_logp:
                    check(found[0].logp, expected.logp)
            except Exception as error:  # such as a variant that does not fit into shared memory
                failed[name] = reason(error)
                continue
            if round_number > 0:
                seconds.setdefault(name, []).append(taken)
    found = {name: statistics.median(x) for name, x in seconds.items()}
    foreseen = floors.works(rows, *SHAPES[model], best)
    forecasts = {name: foreseen[todo[name].forecast] for name in found}
    show(f"parts, {model}, {rows} rows", found, forecasts, failed)
    return {
        "model": model,
        "rows": rows,
        "seconds": found,
        "failed": failed,
        "floors": {name: work.floor for name, work in forecasts.items()},
        "expected": {name: work.expected for name, work in forecasts.items()},
    }


def check(logp: Tensor, expected: Tensor) -> None:
    """Raise WrongResult if the log-probs differ from those of plain PyTorch."""
    if not torch.allclose(logp, expected, rtol=0, atol=TOLERANCE):
        gap = float((logp - expected).abs().max())
        raise WrongResult(
            f"log-probs are {gap:.1e} nats off plain PyTorch: at most {TOLERANCE:.0e} is allowed"
        )


def show(
    title: str,
    found: Mapping[str, float],
    forecasts: Mapping[str, floors.Work],
    failed: Mapping[str, str],
) -> None:
    """Print measured times next to the forecasts."""
    print(f"\n{title}\n{'':52s}{'ms':>10s}{'TFLOP/s':>9s}{'floor':>9s}{'expected':>10s}")
    for name, s in found.items():
        work = forecasts[name]
        rate, floor = f"{work.flops / s / 1e12:.0f}", f"{work.floor * 1e3:.3f}"
        print(f"{name:52s}{s * 1e3:10.3f}{rate:>9s}{floor:>9s}{work.expected * 1e3:10.3f}")
    for name, why in failed.items():
        print(f"{name:52s} FAILED {brief(why)}")
