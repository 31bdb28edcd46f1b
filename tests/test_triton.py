"""Compare the Triton kernels with fp64 and plain PyTorch, on a GPU or in Triton's interpreter."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from expo_fast import ops
from expo_fast.kernels import (
    advantage,
    groups,
    logprob,
    objectives,
    policy_sums,
    reference,
    row_results,
    rowwise,
    selection,
)
from expo_fast.kernels.head import Head, Needs, RowGrads, from_sums
from expo_fast.kernels.integers import ceil_div
from expo_fast.kernels.objectives import Clipped, PolicyLossOfRows, PolicyRows, PolicyTerms
from expo_fast.kernels.triton_common import INTERPRETED
from expo_fast.op_backends import custom_ops, dispatch, row_selection, triton_fused
from judges import linear_results, max_error, relative_error, results_of_head, values_and_gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = Needs(True, True, True)
KERNELS = {"fused": triton_fused, "rowwise": rowwise.ROWWISE}


@pytest.fixture(params=KERNELS)
def kernels(request) -> dispatch.Kernels:
    return KERNELS[request.param]


def make_head(n, d, v, dtype=torch.bfloat16, spread=1.0) -> Head:
    g = torch.Generator().manual_seed(n + d + v)
    hidden = (torch.randn(n, d, generator=g) * spread).to(dtype)
    weight = torch.randn(v, d, generator=g).to(dtype)
    bias, temperature = torch.randn(v, generator=g), torch.rand(n, generator=g) + 0.5
    targets = torch.randint(v, (n,), generator=g)
    return Head(*(x.to(DEVICE) for x in (hidden, weight, bias, targets, temperature)))


def by_definition(head: Head, upstream: Tensor) -> list[Tensor]:
    """Return logp, entropy, lse, and the gradients of hidden, weight and bias, in fp64."""
    return results_of_head(linear_results, head, upstream, torch.float64)


def by_plain_pytorch(head: Head, upstream: Tensor) -> list[Tensor]:
    """Return the same as `by_definition`, by PyTorch in fp32."""
    return results_of_head(reference.linear_logprob, head, upstream, torch.float32)


def by_kernels(kernels, head: Head, upstream, needs=ALL) -> list:
    forward = kernels.log_probs(head, needs)
    grads = kernels.gradients(head, forward, RowGrads(*upstream), needs)
    return [*forward.results, *grads]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 8, 2), (5, 16, 3), (63, 40, 1000), (300, 64, 509)], ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(kernels, shape):
    head = make_head(*shape)
    upstream = torch.randn(3, shape[0], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    truth = by_definition(head, upstream)
    plain = by_plain_pytorch(head, upstream)
    ours = by_kernels(kernels, head, upstream)
    for t, p, o in zip(truth[:3], plain[:3], ours[:3], strict=True):
        assert max_error(o, t) <= 2 * max_error(p, t) + 5e-6  # plain bf16 logits: 1e-2
    for t, o in zip(truth[3:], ours[3:], strict=True):
        assert relative_error(o, t) <= 8e-3


def head_with(rest: float, v: int = 1000) -> Head:
    """Return a row whose target has probability 1 - rest / (1 + rest), in logits exact in bf16."""
    gap = torch.tensor(math.log(rest / (v - 1))).bfloat16()
    weight = torch.zeros(v, 8)
    weight[:, 0] = gap
    weight[3] = 0
    hidden = torch.zeros(1, 8)
    hidden[0, 0] = 1
    hidden, weight = (x.bfloat16().to(DEVICE) for x in (hidden, weight))
    return Head(hidden, weight, None, torch.tensor([3], device=DEVICE), 1.0)


@pytest.mark.parametrize("rest", [10.0**-k for k in range(2, 9)])
def test_relative_accuracy_as_the_probability_goes_to_one(kernels, rest):
    head = head_with(rest)
    others = head.weight.double()[0, 0].exp() * 999
    one = torch.ones(1, device=DEVICE)
    logp, *_, d_weight, _ = by_kernels(kernels, head, (one,), Needs(True, True, False))
    assert abs(logp.item() / -torch.log1p(others).item() - 1) < 1e-5
    truth = (others / (1 + others)).item()
    assert abs(d_weight[3, 0].item() / truth - 1) < 2**-8  # a bf16 rounding, not a cancellation


GAPS = torch.tensor([30.0, 50.0, 94.0, 1000.0])


def with_unlikely_targets(head: Head, rows: Tensor) -> Head:
    """Return the head with a gap of GAPS between a row's likely tokens and its target.

    Column 5 + i has logits of about GAPS[i], of either sign, in every row of number i modulo 4. In
    rows[i] it is the target, and has the logit -GAPS[i].
    """
    hidden = head.hidden.clone()
    kinds = torch.arange(len(hidden), device=DEVICE) % 4
    hidden[:, :4] *= torch.nn.functional.one_hot(kinds, 4)
    weight = head.weight.clone()
    weight[5:9] = 0
    targets = head.targets.clone()
    for i, row in enumerate(rows.tolist()):
        assert kinds[row] == i
        hidden[row, i] = 1
        weight[5 + i, i] = -GAPS[i]
        targets[row] = 5 + i
    return Head(hidden, weight, None, targets, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("needs", [ALL, Needs(True, False, False), Needs(False, False, False)])
def test_unlikely_targets_do_not_overflow(kernels, needs):
    unlikely = torch.tensor([64, 129, 298, 7])
    head = with_unlikely_targets(make_head(300, 16, 300), unlikely)
    upstream = torch.ones(3, 300, device=DEVICE)

    def definition(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return linear_results(hidden, weight, head.targets)

    inputs = (head.hidden, head.weight)
    truth = values_and_gradients(definition, inputs, tuple(upstream), torch.float64)
    assert (truth[0].cpu()[unlikely] < -GAPS).all()
    allowed = 1e-5 + 1e-6 * GAPS.repeat(75).to(DEVICE)
    needs = needs._replace(bias=False)
    *results, d_hidden, d_weight, _ = by_kernels(kernels, head, upstream, needs)
    for got, t in zip(results, truth[:3], strict=True):
        assert ((got.double() - t).abs() < allowed).all()
    for got, t in zip((d_hidden, d_weight), truth[3:], strict=True):
        if got is not None:
            assert relative_error(got, t) < 8e-3


@pytest.mark.slow
@pytest.mark.parametrize(("chunk", "kept"), [(64, 0), (64, 128), (64, 300), (300, 128)])
def test_kept_rows_and_chunk_sizes_change_no_gradient(monkeypatch, kept, chunk):
    """Rows beyond the budget are recomputed. Both kinds run in chunks and with inactive rows."""
    head = make_head(300, 16, 310)
    name = logprob.BY_CARD["default"]
    monkeypatch.setitem(logprob.VARIANTS, name, replace(logprob.VARIANTS[name], BN=64))
    fits = {triton_fused.KEPT_FRACTION: kept, triton_fused.CHUNK_FRACTION: chunk}
    monkeypatch.setattr(triton_fused, "_rows_within", lambda share, _: fits[share])
    monkeypatch.setattr(triton_fused, "GATHER_FROM", 0)
    upstream = torch.randn(3, 300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    upstream[:, ::3] = 0
    upstream[:, 100:200] = 0  # few enough that the kept E of the others is gathered
    for given in (upstream, upstream[:1]):
        padded = torch.cat([given, torch.zeros(3 - len(given), 300, device=DEVICE)])
        truth = by_definition(head, padded)
        for t, o in zip(truth[3:], by_kernels(triton_fused, head, given)[3:], strict=True):
            assert relative_error(o, t) < 8e-3
            assert (o[100:200] == 0).all() or len(o) != 300

    class Loss:
        def row_grads(self, rows, logp):
            return RowGrads(upstream[0, rows], upstream[1, rows])

    truth = by_definition(head, torch.cat([upstream[:2], upstream[:1] * 0]))
    results, grads = triton_fused.log_probs_and_gradients(head, Loss(), ALL)
    for t, o in zip(truth, (*results, *grads), strict=True):
        assert o is not None and relative_error(o, t) < 8e-3


def test_a_frozen_head_multiplies_only_in_the_forward(monkeypatch):
    head, needs = make_head(300, 16, 300), Needs(True, False, False)
    forward = triton_fused.log_probs(head, needs)
    upstream = torch.randn(2, 300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with_entropy = triton_fused.gradients(head, forward, RowGrads(*upstream), needs).hidden
    monkeypatch.delattr(triton_fused, "matmul")
    of_logp = triton_fused.gradients(head, forward, RowGrads(upstream[0]), needs).hidden
    zero = torch.zeros_like(upstream[:1])
    for got, g in ((of_logp, (upstream[:1], zero, zero)), (with_entropy, (upstream, zero))):
        truth = by_definition(head, torch.cat(g))[3]
        assert got is not None and relative_error(got, truth) < 8e-3


def test_a_row_of_nan_leaves_other_rows_finite(kernels):
    head = make_head(40, 16, 300)
    head.hidden[7] = math.nan
    clean = torch.arange(40) != 7
    for x in kernels.log_probs(head, Needs(False, False, False)).results:
        assert x[7].isnan() and x[clean].isfinite().all()


@pytest.mark.slow
def test_equal_calls_give_equal_bits(kernels):
    head, upstream = make_head(300, 16, 300), torch.ones(3, 300, device=DEVICE)
    for a, b in zip(*(by_kernels(kernels, head, upstream) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def by_default() -> tuple[Head, Any]:
    """Return a head and the results of the forward's default variant."""
    head = make_head(270, 16, 300)
    head.hidden[7] *= 20  # a row that is summed again from its largest logit
    shipped = logprob.VARIANTS[logprob.BY_CARD["default"]]
    return head, logprob.forward(head, config=shipped)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", logprob.VARIANTS)
def test_each_variant_of_the_forward_equals_the_default(name, by_default, monkeypatch):
    monkeypatch.setenv(logprob.VARIANT, name)
    head, expected = by_default
    e = logprob.empty_e(head, 270)
    for got in (logprob.forward(head)[0], logprob.forward(head, e)[0]):
        # The masks and the loops change no bit; other tiles add in another order.
        allowed = 0.0 if name.startswith("256x128") else 1e-5
        compared = ["logp", "lse"]
        if logprob.VARIANTS[name].MOMENT:
            compared.append("entropy")
        else:
            assert got.entropy.isnan().all()
        for field in compared:
            mine, theirs = getattr(got, field), getattr(expected, field)
            torch.testing.assert_close(mine, theirs, rtol=allowed, atol=allowed)


class Sums:
    """Partial sums of V columns in tiles of 10, and the results of row_results."""

    def __init__(self, n: int, v: int, largest_exponent: float):
        g = torch.Generator().manual_seed(n + v)
        tiles = ceil_div(v, 10)
        # Exponents of e: from rows of almost certain targets to rows that are recomputed
        exponent = torch.linspace(-40, largest_exponent, n).expand(tiles, n)
        self.other = (2.0**exponent * torch.rand(tiles, n, generator=g)).to(DEVICE)
        self.moment = torch.randn(tiles, n, generator=g).to(DEVICE) * self.other
        self.scale = (torch.rand(n, generator=g) + 1).to(DEVICE)
        self.z = torch.randn(n, generator=g).to(DEVICE) * 10
        self.base = self.z * self.scale
        self.targets = torch.randint(v, (n,), generator=g).to(DEVICE)
        self.any_again = torch.zeros(1, dtype=torch.bool, device=DEVICE)
        self.tile_again = torch.zeros(ceil_div(n, 16), dtype=torch.bool, device=DEVICE)
        self.row_again = torch.zeros(n, dtype=torch.bool, device=DEVICE)
        self.e = torch.zeros(n, v + 3, device=DEVICE).bfloat16()[:, :v]
        self.out = torch.full((4, n), math.nan, dtype=torch.float64, device=DEVICE)
        self.size = {"N": n, "V": v, "BV": 10}
        self.size |= {"ROWS": row_results.ROWS, "AT_ONCE": row_results.AT_ONCE}

    def finish(self, redone: bool, moment: Tensor | None) -> None:
        n = len(self.z)
        kernel: Any = row_results.row_results
        kernel[(ceil_div(n, row_results.ROWS),)](
            self.other, moment, self.z, self.base, self.scale, self.targets,
            self.any_again, self.tile_again, self.row_again, *self.out, self.e, self.e.stride(0),
            SAFE_SUM=logprob.SAFE_SUM, LOG2_E=logprob.LOG2_E, REDONE=redone, BN=16, **self.size,
        )  # fmt: skip

    def truth(self) -> Tensor:
        other, moment = (x.double().sum(0) for x in (self.other, self.moment))
        base = self.base.double()
        shift = base - self.z.double() * self.scale.double()
        per_nat = logprob.LOG2_E
        nats = (base / per_nat, other, moment / per_nat, shift / per_nat)
        results, log_total = from_sums(*nats)
        return torch.stack([*results, log_total])


@pytest.mark.parametrize("n", [1, 31, 100])
@pytest.mark.parametrize("v", [7, 320, 1003])
def test_row_results_equal_those_of_their_sums_in_fp64(n, v):
    sums = Sums(n, v, largest_exponent=45.0)
    truth = sums.truth()
    sums.finish(redone=False, moment=sums.moment)
    torch.testing.assert_close(sums.out, truth, rtol=1e-11, atol=1e-13)
    # near probability 1, a relative tolerance alone
    torch.testing.assert_close(sums.out[0], truth[0], rtol=1e-9, atol=0)
    patch = truth[0].expm1() * truth[3].exp()
    expected = torch.zeros_like(sums.e)
    expected.scatter_(1, sums.targets[:, None], patch[:, None].bfloat16())
    assert torch.equal(sums.e, expected)
    assert not sums.any_again and not sums.tile_again.any() and not sums.row_again.any()
    sums.finish(redone=False, moment=None)
    assert sums.out[1].isnan().all()
    assert torch.equal(sums.out[[0, 2, 3]].isnan(), truth[[0, 2, 3]].isnan())


def test_rows_beyond_the_safe_sum_are_marked_and_recomputed():
    sums = Sums(100, 320, largest_exponent=30.0)
    sums.other[3, 50] = math.nan
    sums.other[2, 97] = logprob.SAFE_SUM
    sums.finish(redone=False, moment=sums.moment)
    assert sums.any_again
    assert sums.tile_again.nonzero()[:, 0].tolist() == [3, 6]
    assert sums.row_again.nonzero()[:, 0].tolist() == [50, 97]

    before = sums.base.clone()
    kernel: Any = row_results.largest_logits
    kernel[(4,)](sums.other, sums.any_again, sums.row_again, sums.base, **sums.size)
    assert sums.base[97] == logprob.SAFE_SUM
    changed = (sums.base != before).nonzero()[:, 0].tolist()
    assert changed in ([97], [50, 97])  # a maximum with NaN in it may be anything
    sums.base[50] = 0
    sums.other[3, 50] = 1
    first = sums.out.clone()
    sums.out.fill_(math.nan)
    sums.e.fill_(math.nan)
    sums.finish(redone=True, moment=sums.moment)
    done = torch.zeros(100, dtype=torch.bool, device=DEVICE)
    done[48:64] = done[96:] = True  # all rows of their tiles, of which E is written again
    truth = sums.truth()
    torch.testing.assert_close(sums.out[:, done], truth[:, done], rtol=1e-11, atol=1e-13)
    assert sums.out[:, ~done].isnan().all()
    assert sums.e.isfinite().sum(1).tolist() == done.int().tolist()
    done[50] = done[97] = False
    torch.testing.assert_close(sums.out[:, done], first[:, done], rtol=1e-13, atol=1e-15)


def test_an_unknown_variant_is_refused(monkeypatch):
    monkeypatch.setenv(logprob.VARIANT, "512x512")
    with pytest.raises(ValueError, match="EXPO_FAST_VARIANT=512x512: must be one of 256x128, "):
        logprob.forward(make_head(3, 16, 9))


def test_unaligned_widths_and_strides_take_the_row_kernels():
    kinds = {16: triton_fused, 12: rowwise.ROWWISE}
    for d, expected in kinds.items():
        assert dispatch.choose("triton", make_head(3, d, 9)) is expected
    assert dispatch.choose("triton", make_head(3, 16, 9, torch.float32)) is rowwise.ROWWISE
    head = make_head(3, 32, 9)
    columns = Head(head.hidden[:, :16], head.weight[:, 4:20], None, head.targets, 1.0)
    assert dispatch.choose("triton", columns) is rowwise.ROWWISE
    assert dispatch.choose("triton", Head(*vars(columns).values())) is rowwise.ROWWISE


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("m", [0, 1, 7, 300])
def test_advantages_are_those_of_the_definition(scale, m):
    g = torch.Generator().manual_seed(m)
    rewards, ids = torch.rand(m, generator=g), torch.randint(-3, 40, (m,), generator=g)
    rewards[::7] = math.nan
    rewards[ids == 5] = 0.3 * (1 + 1e-7 * torch.randn(int((ids == 5).sum()), generator=g))
    got = groups.group_advantage(rewards.to(DEVICE), ids.to(DEVICE), scale, 1e-4)
    truth = advantage.group_advantage(rewards, ids, scale, 1e-4)
    assert torch.allclose(got.cpu(), truth, rtol=1e-6, atol=0)
    assert torch.equal(got.cpu() == 0, truth == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_far_from_0_are_those_of_the_definition(scale, dtype):
    sizes = torch.tensor([1e6, 1e6, 1e6, 1e6, 1, 1, 1, 7, 3e9, 3e9], dtype=torch.float64)
    steps = torch.tensor([0, 0.5, 0, 1, 0, 0, 2e-4, 0, 0, 256], dtype=torch.float64)
    rewards = (sizes + steps).to(dtype)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 3, 3])
    got = groups.group_advantage(rewards.to(DEVICE), ids.to(DEVICE), scale, 1e-4)
    truth = advantage.group_advantage(rewards, ids, scale, 1e-4)
    assert torch.allclose(got.cpu(), truth, rtol=1e-6, atol=0)
    assert truth.any() or dtype == torch.bfloat16


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
def test_an_infinite_reward_makes_advantages_nan_and_not_zero(scale, infinite):
    """On a CPU it raises ValueError. On a GPU it must not look like a group of equal rewards."""
    rewards = torch.tensor([infinite, 0.0, 1.0, math.nan, 0.0, 1.0, 5.0, 5.0], device=DEVICE)
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2], device=DEVICE)
    got = groups.group_advantage(rewards, ids, scale, 1e-4)
    assert got[:3].isnan().all() and got[3] == 0  # the last is unknown
    assert (got[6:] == 0).all()
    assert got[4:6].isnan().all() if scale == "batch" else got[4] == -got[5] < 0
    with pytest.raises(ValueError, match=r"rewards\[0\] is infinite"):
        advantage.group_advantage(rewards, ids, scale, 1e-4)


class Operators(TorchDispatchMode):
    """Counts the ATen operators, and those that bring a value from the device to Python.

    Views, casts to the same dtype and allocations launch nothing and are not counted.
    """

    FREE = ("alias", "detach", "empty", "empty_like", "expand", "lift_fresh", "new_empty")
    FREE += ("numpy_T", "permute", "promote_types", "select", "slice", "t", "transpose", "unbind")
    FREE += ("unsqueeze", "view", "set_", "resolve_conj", "resolve_neg")
    READS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "tolist")

    def __init__(self):
        super().__init__()
        self.count = 0
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "expo_fast":
            op = getattr(custom_ops, name.removeprefix("linear_"))
            with self:
                return op._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        unchanged = name == "to" and out is args[0]
        self.count += name not in self.FREE and not unchanged
        self.reads += name in self.READS
        return out


def test_advantages_of_a_gpu_are_computed_without_a_host_sync(monkeypatch):
    monkeypatch.setattr(custom_ops, "advantage_kernel", lambda _: groups.group_advantage)
    rewards, ids = torch.rand(40, device=DEVICE), torch.arange(40, device=DEVICE) // 5
    with Operators() as operators:
        custom_ops.group_advantage(rewards, ids, "group", 1e-4)
        assert operators.reads == 0
        assert not rewards.isinf().any()
        assert operators.reads == 1  # the counter works


@pytest.fixture
def on_gpu_paths(monkeypatch):
    """Take the code paths of a GPU. Return the names of launched kernels of the interpreter."""
    monkeypatch.setattr(row_selection, "_selection_kernel", lambda _: selection.selected)
    monkeypatch.setattr(custom_ops, "policy_sums_kernel", lambda _: policy_sums.policy_sums)
    launches = []
    if INTERPRETED:
        launch = GridExecutor.__call__

        def quietly(self, *args, **kwargs):
            launches.append(self.fn.__name__)
            with _disable_current_modes():
                launch(self, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", quietly)
    return launches


def test_operators_and_launches_around_the_matrix_products_are_few(on_gpu_paths):
    """On an H100, each costs 25 us of host time, and 1024 rows are multiplied in 360 us."""
    launches = on_gpu_paths
    head = make_head(40, 16, 300)
    hidden, weight = (x.clone().requires_grad_() for x in (head.hidden, head.weight))

    def run(what) -> tuple:
        launches.clear()
        with Operators() as operators:
            out = what()
        return out, operators

    def log_probs() -> Tensor:
        return ops.linear_logprob(hidden, weight, head.targets, backend="triton").logp

    logp, operators = run(log_probs)
    assert operators.count <= 14
    assert operators.reads == 0
    assert len(launches) in (0, 8)
    _, operators = run(logp.sum().backward)
    assert operators.count <= 14
    assert operators.reads == 0
    assert not launches  # rows are selected once, in the forward pass
    rows = torch.ones(40, device=DEVICE)

    def policy_loss() -> Tensor:
        return ops.linear_policy_loss(
            hidden, weight, head.targets, rows, rows, old_logp=-5 * rows, backend="triton"
        ).loss

    _, operators = run(policy_loss)
    assert operators.count <= 70
    assert operators.reads == 0
    assert len(launches) <= 9


def test_complete_rows_are_neither_selected_nor_checked(on_gpu_paths):
    launches = on_gpu_paths
    head = make_head(40, 16, 300)
    rows = torch.linspace(-1, 1, 40, device=DEVICE)
    outcomes = []
    for complete in (False, True):
        hidden, weight = (x.clone().requires_grad_() for x in (head.hidden, head.weight))
        launches.clear()
        named = {"backend": "triton", "complete": complete}
        with Operators() as operators:
            logp = ops.linear_logprob(hidden, weight, head.targets, **named).logp
            loss = ops.linear_policy_loss(hidden, weight, head.targets, rows, rows + 2, **named)
        assert operators.reads == 0
        (logp.sum() + loss.loss).backward()
        if complete:
            assert "select_rows" not in launches
        outcomes.append((logp, *loss, hidden.grad, weight.grad))
    for a, b in zip(*outcomes, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [0, 1, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_are_selected_as_pytorch_selects_them(n, dtype):
    g = torch.Generator().manual_seed(n)
    targets = torch.randint(100, (n,), generator=g).to(DEVICE, dtype)
    targets[torch.rand(n, generator=g).to(DEVICE) < 0.3] = -100
    flags = torch.rand(2 * n, generator=g).to(DEVICE) < 0.5
    for wanted in (None, flags[:n], flags[::2]):
        mask = targets != -100
        mask = mask if wanted is None else mask & wanted
        rows, valid = selection.selected(targets, wanted, 100)
        assert valid
        assert rows.dtype == torch.int64
        assert torch.equal(rows, mask.nonzero()[:, 0])
        if n > 1:
            for wrong in (-1, 100, -101, 2**31 - 1):
                spoiled = targets.clone()
                spoiled[n // 2] = wrong
                assert not selection.selected(spoiled, wanted, 100)[1]


def test_a_wrong_target_is_named_after_one_host_sync(on_gpu_paths):
    head = make_head(40, 16, 300)
    targets = head.targets.clone()
    targets[7] = 300
    with pytest.raises(ValueError, match=r"targets\[7\] is 300: must lie in \[0, 300\)"):
        ops.linear_logprob(head.hidden, head.weight, targets, backend="triton")
    targets[7] = -100
    logp = ops.linear_logprob(head.hidden, head.weight, targets, backend="triton").logp
    assert logp[7] == 0 and (logp != 0).sum() == 39


@pytest.mark.parametrize("n", [0, 1, 1500])
@pytest.mark.parametrize("special", ["none", "all on-policy", "nan", "weights cancel"])
def test_sums_of_policy_terms_are_those_of_the_definition(n, special):
    g = torch.Generator().manual_seed(n)

    def normal() -> Tensor:
        return torch.randn(n, generator=g).to(DEVICE)

    on_policy = torch.rand(n, generator=g).to(DEVICE) < (2 if special == "all on-policy" else 0.3)
    weight = normal()
    if special == "weights cancel":
        weight = torch.zeros_like(weight)
    rows = PolicyRows(normal(), weight, None, None, on_policy, None)
    side = torch.randint(-1, 2, (n,), generator=g).to(DEVICE, torch.int8)
    ratio = normal().exp()
    if special == "nan" and n:
        ratio[n // 2] = math.nan
    terms = PolicyTerms(normal(), ratio, side, normal(), RowGrads(None))
    entropy = normal()
    loss = PolicyLossOfRows(Clipped(0.2, 0.2), rows, kl_coef=0.3, entropy_coef=0.7)
    got = policy_sums.policy_sums(loss, terms, entropy)
    wide = PolicyRows(rows.advantage, weight.double(), None, None, on_policy, None)
    floats = {name: getattr(terms, name).double() for name in ("value", "ratio", "k3")}
    expected = objectives.policy_sums(
        replace(loss, rows=wide), terms._replace(**floats), entropy.double()
    )
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-5, equal_nan=True)


# Without a GPU: what is compiled for Hopper, and the oldest supported version of Triton

ROOT = Path(__file__).resolve().parents[1]
OLDEST = Path(sys.prefix) / "triton-3.6"  # the Makefile puts it there


@pytest.fixture
def environment(request) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if request.param == "installed":
        return environment
    if not OLDEST.exists():
        pytest.skip(f"no triton 3.6 in {OLDEST}")
    return environment | {"PYTHONPATH": str(OLDEST)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "forms"),
    [
        ("installed", "last"),
        ("oldest", "last"),
        pytest.param("installed", "all", marks=pytest.mark.long),
        pytest.param("oldest", "all", marks=pytest.mark.long),
    ],
    indirect=["environment"],
)
def test_kernels_compile_for_hopper_without_spilling(environment, forms):
    command = [sys.executable, "-m", "benchmarks.aot"]
    if forms == "last":
        command.append("--last")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["triton"].startswith("3.6.") == (environment.get("PYTHONPATH") == str(OLDEST))
    multiply = {"softmax_sums", "logit_gradients"}
    decode = {"attend_items", "add_slots", "append_tokens"}
    decode |= {"add_norm_rows", "place_heads", "swiglu_elements", "rotation_rows"}
    decode |= {"block_sums", "draw_tokens", "draw_allowed", "record_tokens"}
    training = {"swiglu_gradient_elements", "rotate_heads", "copy_key_rows", "sum_key_copies"}
    rest = (decode | training) | {
        "target_logits",
        "row_results",
        "largest_logits",
        "select_rows",
        "sum_policy_terms",
        "scale_stored",
        "row_sums",
        "row_gradients",
        "centre_and_scale",
    }
    assert {row["kernel"] for row in made["kernels"]} == multiply | rest
    for row in made["kernels"]:
        assert row["stack"] == row["LDL"] == row["STL"] == 0, row
        assert row["shared"] <= logprob.SHARED_BYTES, row  # on cards with less, `supports` is false
        attends = row["kernel"] == "attend_items"
        multiplies = attends and row["dtype"] != "fp32"  # no tensor core multiplies fp32 exactly
        # Pages are gathered by pointers. Items of one row are products of 16; HGMMA needs 64.
        assert (row["UTMALDG"] > 0) == (row["kernel"] in multiply), row
        assert (row["HGMMA"] > 0) == (row["kernel"] in multiply or multiplies), row
        assert (row["HMMA"] > 0) == multiplies, row
        assert (row["LDGSTS"] > 0) == attends or row.get("dtype") == "fp32", row
    dtypes = {row["dtype"] for row in made["kernels"] if row["kernel"] == "attend_items"}
    assert dtypes == {"bf16", "fp16", "fp32"}  # all that are accepted


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["oldest"], indirect=True)
def test_the_oldest_triton_computes_the_same(environment):
    environment |= {"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}
    chosen = "plain or (kept and 64-128)"
    command = [sys.executable, "-m", "pytest", "-q", "-k", chosen, "tests/test_triton.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
