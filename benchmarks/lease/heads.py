"""The linear head's kernels against fp64."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.lease.report import Report
from expo_fast.kernels import logprob as k
from expo_fast.kernels import reference, rowwise
from expo_fast.kernels.head import Head, LogProb, Needs, RowGrads
from expo_fast.kernels.products import matmul

SHAPE = 1023, 72, 50257
DRY_ROWS, DRY_COLUMNS = 300, 1024
LOGP = 1e-4  # nats: the largest error of a row; tensor cores cut off what they sum
PRODUCT = 1e-4  # of a norm: summed in fp32; results rounded to bf16 would be 2e-3 off
GRADIENT = 8e-3  # of a norm: bf16 factors
ALL = Needs(True, True, True)


def make_head(report: Report, shape: Sequence[int], *, bias: bool = True) -> Head:
    """Random rows, with a temperature each; the first of them sure of its target."""
    n, d, v = shape
    if report.dry:
        n, v = min(n, DRY_ROWS), min(v, DRY_COLUMNS)
    g = torch.Generator(report.device).manual_seed(n + d + v)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=report.device)

    weight = (normal(v, d) * 2 / d**0.5).bfloat16()
    targets = torch.randint(v, (n,), generator=g, device=report.device)
    hidden = normal(n, d)
    hidden[0] += 8 * weight[targets[0]].float()
    temperature = torch.rand(n, generator=g, device=report.device) + 0.5
    return Head(hidden.bfloat16(), weight, normal(v) if bias else None, targets, temperature)


def truth_of(head: Head, upstream: Tensor | None = None) -> tuple[LogProb, list[Tensor]]:
    """Results in fp64, and with upstream slopes (3, N) the gradients."""
    assert head.bias is not None and isinstance(head.temperature, Tensor)
    inputs = [x.double() for x in (head.hidden, head.weight, head.bias)]
    if upstream is not None:
        inputs = [x.requires_grad_() for x in inputs]
    hidden, weight, bias = inputs
    results = LogProb(
        *reference.linear_logprob(hidden, weight, head.targets, bias, head.temperature.double())
    )
    if upstream is None:
        return results, []
    grads = torch.autograd.grad(tuple(results), inputs, tuple(upstream.double()))
    return LogProb(*(x.detach() for x in results)), list(grads)


def compare_results(report: Report, got: LogProb, truth: LogProb) -> None:
    for name in LogProb._fields:
        mine, theirs = getattr(got, name), getattr(truth, name)
        allowed = LOGP * max(1.0, float(theirs.abs().max()) / 10)
        report.compare(name, mine, theirs, allowed, worst=True)


def products(report: Report) -> None:
    """bf16 factors, fp32 results, in each layout that the gradients use."""
    n, d, v = (300, 64, 512) if report.dry else (1024, 896, 32768)
    g = torch.Generator(report.device).manual_seed(0)
    sizes = ((n, v), (v, d), (n, d))
    e, weight, hidden = (
        torch.randn(*size, generator=g, device=report.device).bfloat16() for size in sizes
    )
    for name, a, b in (("d_hidden", e, weight), ("d_weight", e.T, hidden)):
        expected = a.double() @ b.double()
        out = torch.full(expected.shape, math.nan, device=report.device)
        matmul(a, b, out, narrow=True)
        report.compare(name, out, expected, PRODUCT)
        matmul(a, b, out, narrow=True, accumulate=True)
        report.compare(f"{name}, added", out, 2 * expected, PRODUCT)


def row_kernels(report: Report) -> None:
    """Check the fallback, forward and backward."""
    head = make_head(report, SHAPE)
    upstream = torch.randn(3, len(head.hidden), device=report.device)
    truth, gradients = truth_of(head, upstream)
    forward = rowwise.ROWWISE.log_probs(head, ALL)
    compare_results(report, forward.results, truth)
    got = rowwise.ROWWISE.gradients(head, forward, RowGrads(*upstream), ALL)
    for name, mine, theirs in zip(("hidden", "weight", "bias"), got, gradients, strict=True):
        assert mine is not None
        report.compare(f"d_{name}", mine, theirs, GRADIENT)


def target_logits(report: Report) -> None:
    """Each row's logit of its target."""
    for bias in (True, False):
        head = make_head(report, SHAPE, bias=bias)
        rows = head.weight.double()[head.targets]
        expected = (head.hidden.double() * rows).sum(1)
        if head.bias is not None:
            expected += head.bias.double()[head.targets]
        call = k._Call.of(head)
        got, in_bits = call.target_logits()
        report.compare(f"bias {bias}", got, expected, 1e-4, worst=True)
        report.require_equal(f"bias {bias}, in bits", in_bits, got * call.scale)


def forward(report: Report, shape: Sequence[int], store: bool) -> None:
    """Check the fused forward, and E as its gradients want it."""
    head = make_head(report, shape)
    n = len(head.hidden)
    e = None
    if store:
        e = k.empty_e(head, n)
        e.fill_(math.nan)
    results, log_total = k.forward(head, e)
    truth, _ = truth_of(head)
    compare_results(report, results, truth)
    if e is not None:
        expected = exponentials(head, truth, log_total)
        report.compare("E", e, expected, GRADIENT)
    again, _ = k.forward(head, e)
    report.require_equal("again", torch.stack(tuple(results)), torch.stack(tuple(again)))


def exponentials(head: Head, truth: LogProb, log_total: Tensor) -> Tensor:
    """E in fp64: exp(z_j - z_y), and at the target what the gradients need there."""
    assert head.bias is not None and isinstance(head.temperature, Tensor)
    z = head.hidden.double() @ head.weight.double().T + head.bias.double()
    z /= head.temperature.double()[:, None]
    # what the kernel's anchor may differ from the target's logit by is part of log_total
    e = (z - (truth.lse - log_total.double())[:, None]).exp_()
    patch = truth.logp.expm1() * log_total.double().exp()
    return e.scatter_(1, head.targets[:, None], patch[:, None])


def logit_gradients(report: Report) -> None:
    """dz recomputed from a forward's results, whole and of some columns."""
    head = make_head(report, SHAPE)
    truth, _ = truth_of(head)
    slopes = random_slopes(report, len(head.hidden))
    expected = true_dz(head, truth, slopes)
    for first, last in ((0, len(head.weight)), (128, 512)):
        dz = k.padded_e(head, len(head.hidden))[:, : last - first]
        dz.fill_(math.nan)
        k.recomputed(head, truth, slopes, first, dz)
        report.compare(f"columns {first} to {last}", dz, expected[:, first:last], GRADIENT)


def scale_stored(report: Report) -> None:
    """dz from E, where the loss has an entropy term."""
    head = make_head(report, SHAPE)
    truth, _ = truth_of(head)
    slopes = random_slopes(report, len(head.hidden))
    log_total = -truth.logp
    e = k.empty_e(head, len(head.hidden))
    e.copy_(exponentials(head, truth, log_total))
    dz = torch.full_like(e, math.nan)
    k.from_stored(head, e, log_total, truth, slopes, dz)
    report.compare("dz", dz, true_dz(head, truth, slopes), 2 * GRADIENT)


def random_slopes(report: Report, n: int) -> RowGrads:
    g = torch.Generator(report.device).manual_seed(1)
    return RowGrads(*torch.randn(3, n, generator=g, device=report.device).double())


def true_dz(head: Head, truth: LogProb, slopes: RowGrads) -> Tensor:
    """Return the gradient in the logits before temperature, fp64, by autograd."""
    assert head.bias is not None and isinstance(head.temperature, Tensor)
    z = head.hidden.double() @ head.weight.double().T + head.bias.double()
    wide = replace(head, temperature=head.temperature.double())
    assert isinstance(wide.temperature, Tensor)
    z.requires_grad_()
    logs = (z / wide.temperature[:, None]).log_softmax(1)
    logp = logs.gather(1, head.targets[:, None])[:, 0]
    entropy = -(logs.exp() * logs).sum(1)
    lse = (z / wide.temperature[:, None]).logsumexp(1)
    upstream = tuple(x for x in slopes if x is not None)
    (dz,) = torch.autograd.grad((logp, entropy, lse), z, upstream)
    return dz
