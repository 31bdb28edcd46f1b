"""Compare gradients from kept exponentials with fp64 and with recomputed logits."""

import pytest
import torch
from torch import Tensor

from expo_fast.kernels.head import NOTHING, Gradients, Head, LogProb, Needs, RowGrads
from expo_fast.op_backends import cpu, native_head
from judges import relative_error
from test_native import BOTH, by_definition, by_plain_pytorch, isa, make_head, threads

__all__ = ["isa", "threads"]  # fixtures

ALL = Needs(True, True, True)
BF16 = BOTH[1]
SHAPES = [(1, 2, 40), (5, 7, 3), (63, 33, 1001), (130, 64, 509), (1100, 30, 77), (17, 130, 1531)]


def as_list(grads: Gradients) -> list[Tensor]:
    assert grads.hidden is not None and grads.weight is not None and grads.bias is not None
    return [grads.hidden, grads.weight, grads.bias]


def some_rows(n: int, fraction: float) -> Tensor:
    """Return (N,) derivatives, of which about `fraction` are not 0."""
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=g) * (torch.rand(n, generator=g) < fraction)


@pytest.mark.parametrize("fraction", [1.0, 0.4, 0.05, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_from_kept_exponentials(isa, shape, fraction):
    n, d, v = shape
    head = make_head(n, d, v, BF16)
    d_logp = some_rows(n, fraction)
    upstream = torch.stack([d_logp, torch.zeros(n), 0.3 * d_logp])
    truth = by_definition(head, upstream)[3:]
    plain = by_plain_pytorch(head, upstream)[3:]
    forward = cpu.log_probs(head, ALL)
    assert forward.kept is not None
    found = as_list(cpu.gradients(head, forward, RowGrads(d_logp, lse=0.3 * d_logp), ALL))
    if not d_logp.any():
        assert all(not x.any() for x in found)
        return
    for t, p, o in zip(truth, plain, found, strict=True):
        assert relative_error(o, t) <= 2 * relative_error(p, t) + 4e-3


@pytest.mark.parametrize("kept_rows", [16, 48, 1040])
def test_rows_beyond_the_budget_are_recomputed(isa, monkeypatch, kept_rows):
    head = make_head(1100, 24, 301, BF16)
    d_logp = some_rows(1100, 0.5)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 2 * 301 * kept_rows + 2)
    forward = cpu.log_probs(head, ALL)
    assert forward.kept is not None
    assert len(forward.kept) == len(native_head.KeptExponentials.empty(head, kept_rows).memory)
    found = as_list(cpu.gradients(head, forward, RowGrads(d_logp), ALL))
    upstream = torch.stack([d_logp, torch.zeros(1100), torch.zeros(1100)])
    for t, o in zip(by_definition(head, upstream)[3:], found, strict=True):
        assert relative_error(o, t) < 4e-3


def test_a_weight_gradient_of_two_sums_is_in_fp32(monkeypatch):
    head = make_head(40, 8, 50, BF16)
    monkeypatch.setattr(cpu, "KEPT_BYTES", 2 * 50 * 16)
    grads = cpu.gradients(head, cpu.log_probs(head, ALL), RowGrads(torch.ones(40)), ALL)
    assert grads.weight is not None and grads.weight.dtype == torch.float32


class Scaled:
    """A rowwise loss: the sum of weight * logp."""

    def __init__(self, weight: Tensor, entropy: Tensor | None = None):
        self.weight = weight
        self.entropy = entropy
        self.seen: list[slice] = []

    def row_grads(self, rows: slice, logp: Tensor) -> RowGrads:
        assert len(logp) == rows.stop - rows.start
        self.seen.append(rows)
        entropy = None if self.entropy is None else self.entropy[rows]
        return RowGrads(self.weight[rows], entropy)


@pytest.mark.parametrize("has_entropy", [False, True])
@pytest.mark.parametrize("n", [0, 1, 700, 2 * cpu.SPAN + 37])
def test_one_pass_equals_two(isa, n, has_entropy):
    head = make_head(n, 24, 130, BF16)
    weight = some_rows(n, 0.6)
    if n > cpu.SPAN:
        weight[: cpu.SPAN] = 0  # a span without an active row, which has no sums
    loss = Scaled(weight, 0.1 * weight if has_entropy else None)
    results, grads = cpu.log_probs_and_gradients(head, loss, ALL)
    forward = cpu.log_probs(head, NOTHING)
    for one, two in zip(results, forward.results, strict=True):
        assert torch.equal(one, two)
    expected = cpu.gradients(head, forward, loss.row_grads(slice(0, n), results.logp), ALL)
    for one, two in zip(as_list(grads), as_list(expected), strict=True):
        assert one.dtype == two.dtype
        assert one.shape == two.shape
        if n:
            assert relative_error(one, two) < 6e-3


@pytest.mark.parametrize("count", [1, 3, 7])
def test_threads_may_share_tiles_in_any_way(isa, threads, count):
    """Forward and backward divide the vocabulary into tiles of different sizes."""
    head = make_head(90, 24, 700, BF16)
    d_logp = some_rows(90, 0.7)
    upstream = torch.stack([d_logp, torch.zeros(90), torch.zeros(90)])
    threads(count)

    def compute() -> list[Tensor]:
        return as_list(cpu.gradients(head, cpu.log_probs(head, ALL), RowGrads(d_logp), ALL))

    for t, a, b in zip(by_definition(head, upstream)[3:], compute(), compute(), strict=True):
        assert torch.equal(a, b)  # same threads, same bits
        assert relative_error(a, t) < 4e-3


@pytest.mark.parametrize("gap", [3.0, 20.0, 60.0, 300.0])
def test_a_base_that_moves_between_tiles(isa, gap):
    """The exponentials of early tiles are relative to a lower logit than those of later ones."""
    v = 2000
    logits = torch.cat([torch.zeros(v // 2), torch.linspace(0, gap, v // 2)])
    weight = logits[:, None].bfloat16()
    hidden = torch.ones(33, 1, dtype=torch.bfloat16)
    targets = torch.arange(33) % 7  # their logit is the lowest
    head = Head(hidden, weight, torch.zeros(v), targets, torch.ones(33))
    d_logp = torch.ones(33)
    forward = cpu.log_probs(head, ALL)
    found = as_list(cpu.gradients(head, forward, RowGrads(d_logp), ALL))
    upstream = torch.stack([d_logp, torch.zeros(33), torch.zeros(33)])
    for t, o in zip(by_definition(head, upstream)[3:], found, strict=True):
        assert relative_error(o, t) < 6e-3


def test_a_sum_that_grows_slowly_and_far(isa, threads):
    """No tile is much larger than the sum so far, but the last base is far above the first."""
    v = 126 * 90
    logits = torch.minimum(torch.arange(v) // 126 * 3.5, torch.tensor(83.0))  # 126 rows a tile
    weight = logits[:, None].bfloat16()
    hidden = torch.ones(5, 1, dtype=torch.bfloat16)
    head = Head(hidden, weight, torch.zeros(v), torch.zeros(5, dtype=torch.int64), torch.ones(5))
    d_logp = torch.ones(5)
    threads(1)
    forward = cpu.log_probs(head, ALL)
    found = as_list(cpu.gradients(head, forward, RowGrads(d_logp), ALL))
    upstream = torch.stack([d_logp, torch.zeros(5), torch.zeros(5)])
    for t, o in zip(by_definition(head, upstream)[3:], found, strict=True):
        assert relative_error(o, t) < 6e-3


@pytest.mark.parametrize("rest", [1e-2, 1e-4, 1e-6])
def test_a_probability_near_one_keeps_its_digits(isa, rest):
    """Gradients are proportional to 1 - p. They are not differences of rounded numbers."""
    v = 1000
    weight = torch.full((v, 1), torch.tensor(rest / (v - 1)).log().item()).bfloat16()
    weight[777] = 0
    hidden = torch.ones(16, 1, dtype=torch.bfloat16)
    targets = torch.full((16,), 777)
    head = Head(hidden, weight, torch.zeros(v), targets, torch.ones(16))
    forward = cpu.log_probs(head, ALL)
    found = as_list(cpu.gradients(head, forward, RowGrads(torch.ones(16)), ALL))
    upstream = torch.stack([torch.ones(16), torch.zeros(16), torch.zeros(16)])
    for t, o in zip(by_definition(head, upstream)[3:], found, strict=True):
        assert relative_error(o, t) < 6e-3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_inactive_row_without_finite_logits_changes_nothing(isa, value):
    head = make_head(70, 16, 200, BF16)
    d_logp = some_rows(70, 0.5)
    inactive = (d_logp == 0).nonzero()[0, 0]
    expected = cpu.gradients(head, cpu.log_probs(head, ALL), RowGrads(d_logp), ALL)
    head.hidden[inactive] = value
    found = cpu.gradients(head, cpu.log_probs(head, ALL), RowGrads(d_logp), ALL)
    for a, b in zip(as_list(found), as_list(expected), strict=True):
        assert torch.equal(a, b)


def test_a_sum_of_several_weight_gradients_in_bf16_is_refused():
    head = make_head(40, 8, 50, BF16)
    sums = cpu._GradientSums(native_head.as_kernels_read(head), ALL, n_sums=1)
    results: LogProb = cpu.log_probs(head).results
    sums.add(slice(0, 20), results.take(slice(0, 20)), RowGrads(torch.ones(20)))
    with pytest.raises(RuntimeError, match="the sum of several weight gradients must be fp32"):
        sums.add(slice(20, 40), results.take(slice(20, 40)), RowGrads(torch.ones(20)))
