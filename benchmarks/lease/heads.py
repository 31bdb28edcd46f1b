"""Check the kernels of the LM head against fp64."""

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
# The largest error of a row in nats: tensor cores truncate the terms of their sums.
LOGP = 1e-4
# Errors relative to a norm. Products are summed in fp32; rounded to bf16, they would be 2e-3 off.
PRODUCT = 1e-4
GRADIENT = 8e-3  # its factors are bf16
ALL = Needs(True, True, True)


def make_head(report: Report, shape: Sequence[int], *, bias: bool = True) -> Head:
    """Return random rows with a temperature each. The first row is almost sure of its target."""
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
    """Return the results in fp64, and the inputs' gradients for upstream gradients (3, N)."""
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
    """Compare log-probs, entropies and log-sum-exps."""
    for name in LogProb._fields:
        expected = getattr(truth, name)
        allowed = LOGP * max(1.0, float(expected.abs().max()) / 10)
        report.compare(name, getattr(got, name), expected, allowed, worst=True)


def products(report: Report) -> None:
    """Check products of bf16 factors with fp32 results, in each layout that gradients use."""
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
    """Check the row kernels, which are the fallback, forward and backward."""
    head = make_head(report, SHAPE)
    upstream = torch.randn(3, len(head.hidden), device=report.device)
    truth, gradients = truth_of(head, upstream)
    forward = rowwise.ROWWISE.log_probs(head, ALL)
    compare_results(report, forward.results, truth)
    got = rowwise.ROWWISE.gradients(head, forward, RowGrads(*upstream), ALL)
    for name, grad, expected in zip(("hidden", "weight", "bias"), got, gradients, strict=True):
        assert grad is not None
        report.compare(f"d_{name}", grad, expected, GRADIENT)


def target_logits(report: Report) -> None:
    """Check the logits of the targets."""
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
    """Check the fused forward and, if `store`, E, which the gradients read."""
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
    """Return E in fp64: exp(z_j - z_y), and at the target the value that gradients need there."""
    assert head.bias is not None and isinstance(head.temperature, Tensor)
    z = head.hidden.double() @ head.weight.double().T + head.bias.double()
    z /= head.temperature.double()[:, None]
    # log_total contains the difference between the kernel's anchor and the logit of the target.
    e = (z - (truth.lse - log_total.double())[:, None]).exp_()
    at_target = truth.logp.expm1() * log_total.double().exp()
    return e.scatter_(1, head.targets[:, None], at_target[:, None])


def logit_gradients(report: Report) -> None:
    """Check dz recomputed from the results of a forward, for all columns and for some of them."""
    head = make_head(report, SHAPE)
    truth, _ = truth_of(head)
    row_grads = random_row_grads(report, len(head.hidden))
    expected = true_dz(head, truth, row_grads)
    for first, last in ((0, len(head.weight)), (128, 512)):
        dz = k.padded_e(head, len(head.hidden))[:, : last - first]
        dz.fill_(math.nan)
        k.recomputed(head, truth, row_grads, first, dz)
        report.compare(f"columns {first} to {last}", dz, expected[:, first:last], GRADIENT)


def scale_stored(report: Report) -> None:
    """Check dz computed from E, for a loss with an entropy term."""
    head = make_head(report, SHAPE)
    truth, _ = truth_of(head)
    row_grads = random_row_grads(report, len(head.hidden))
    log_total = -truth.logp
    e = k.empty_e(head, len(head.hidden))
    e.copy_(exponentials(head, truth, log_total))
    dz = torch.full_like(e, math.nan)
    k.from_stored(head, e, log_total, truth, row_grads, dz)
    report.compare("dz", dz, true_dz(head, truth, row_grads), 2 * GRADIENT)


def random_row_grads(report: Report, n: int) -> RowGrads:
    """Return random gradients of a loss in the results of each row."""
    g = torch.Generator(report.device).manual_seed(1)
    return RowGrads(*torch.randn(3, n, generator=g, device=report.device).double())


def true_dz(head: Head, truth: LogProb, row_grads: RowGrads) -> Tensor:
    """Return the gradient of the logits before temperature, computed by autograd in fp64."""
    assert head.bias is not None and isinstance(head.temperature, Tensor)
    z = head.hidden.double() @ head.weight.double().T + head.bias.double()
    wide = replace(head, temperature=head.temperature.double())
    assert isinstance(wide.temperature, Tensor)
    z.requires_grad_()
    logs = (z / wide.temperature[:, None]).log_softmax(1)
    logp = logs.gather(1, head.targets[:, None])[:, 0]
    entropy = -(logs.exp() * logs).sum(1)
    lse = (z / wide.temperature[:, None]).logsumexp(1)
    upstream = tuple(grad for grad in row_grads if grad is not None)
    (dz,) = torch.autograd.grad((logp, entropy, lse), z, upstream)
    return dz
