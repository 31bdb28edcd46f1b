"""Compare the ops with their definitions in fp64, differentiated by autograd."""

import gc
import math
import weakref
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from expo_fast.kernels import reference
from expo_fast.op_backends import custom_ops
from expo_fast.ops import (
    Clipped,
    Dpo,
    SequenceClipped,
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
)
from judges import linear_results, max_error, max_relative_error, values_and_gradients


@pytest.fixture(autouse=True)
def several_chunks(each_backend, monkeypatch):
    """Make chunks small, so that every test crosses their borders."""
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1 << 14)
    monkeypatch.setattr(reference, "CUDA_CHUNK_BYTES", 1 << 14)


class Head(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    targets: Tensor  # (N,)

    def to(self, dtype, grad=True):
        hidden, weight, bias = (x.to(dtype).requires_grad_(grad) for x in self[:3])
        return Head(hidden, weight, bias, self.targets)


def make_head(n=61, d=8, v=127, seed=0, spread=1.0) -> Head:
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=g).double() for s in ((n, d), (v, d), (v,)))
    return Head(hidden * spread, weight, bias, torch.randint(v, (n,), generator=g))


# linear_logprob


@pytest.mark.parametrize("v", [1, 2, 127, 1000, 50257])
@pytest.mark.parametrize("n", [1, 17])
def test_logprob_and_gradients_equal_the_definition(n, v):
    case = make_head(n, 5, v, seed=v)
    if n > 1:
        case.targets[::4] = -100
    temperature = torch.linspace(0.6, 1.7, n, dtype=torch.float64)
    upstream = torch.randn(3, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def ours(hidden, weight, bias):
        return linear_logprob(hidden, weight, case.targets, bias=bias, temperature=temperature)

    def definition(hidden, weight, bias):
        return linear_results(hidden, weight, case.targets, bias, temperature)

    got = values_and_gradients(ours, case[:3], tuple(upstream))
    truth = values_and_gradients(definition, case[:3], tuple(upstream))
    for a, t in zip(got, truth, strict=True):
        assert max_error(a, t) < 1e-11


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradcheck_passes_for_each_result(which):
    case = make_head(7, 3, 11).to(torch.float64)
    case.targets[2] = -100

    def f(hidden, weight, bias):
        results = linear_logprob(hidden, weight, case.targets, bias=bias, temperature=0.7)
        return tuple(results[i] for i in which)

    assert torch.autograd.gradcheck(f, case[:3])


@pytest.mark.parametrize("gap", [50.0, 94.0, 1000.0])
def test_unlikely_targets_do_not_overflow(gap):
    """exp(z_j - z_y) overflows fp32 beyond 88 nats."""
    hidden = torch.tensor([[1.0, 0.0]])
    weight = torch.tensor([[-gap, 0.0], [0.0, 1.0], [-1.0, 2.0]])
    targets = torch.tensor([0])
    for a, t in zip(*ours_and_truth(hidden, weight, targets), strict=True):
        assert max_error(a, t) < 1e-6 * gap


def ours_and_truth(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Return results and gradients of the op, and those of the definition in fp64."""

    def ours(hidden, weight):
        return linear_logprob(hidden, weight, targets, temperature=temperature)

    def definition(hidden, weight):
        return linear_results(hidden, weight, targets, temperature=temperature)

    ones = [torch.ones(len(targets), dtype=torch.float64)] * 3
    got = values_and_gradients(ours, (hidden, weight), ones)
    return got, values_and_gradients(definition, (hidden, weight), ones, torch.float64)


@pytest.mark.parametrize("rest", [10.0**-k for k in range(2, 9)])
def test_relative_accuracy_as_the_probability_goes_to_one(rest):
    v = 1000
    weight = torch.full((v, 1), math.log(rest / (v - 1)))
    weight[3] = 0
    weight.requires_grad_()
    logp = linear_logprob(torch.ones(1, 1), weight, torch.tensor([3])).logp
    (d_weight,) = torch.autograd.grad(logp.sum(), weight)
    others = weight.detach().double()[0, 0].exp() * (v - 1)
    assert abs(logp.item() / -torch.log1p(others).item() - 1) < 1e-5
    assert abs(d_weight[3].item() / (others / (1 + others)).item() - 1) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, spread):
    narrow = make_head(200, 64, 1000, spread=spread).to(dtype, grad=False)
    upstream = torch.randn(200, generator=torch.Generator().manual_seed(2))

    def run(f, dtype):
        hidden, weight = (x.detach().to(dtype).requires_grad_() for x in narrow[:2])
        got = f(hidden, weight, narrow.targets)
        return *got, *torch.autograd.grad(
            (got[0] * upstream + 0.1 * got[1]).sum(), (hidden, weight)
        )

    truth = run(linear_results, torch.float64)
    plain = run(reference.linear_logprob, dtype)
    ours = run(linear_logprob, dtype)
    for t, p, o in zip(truth, plain, ours, strict=True):
        assert max_error(o, t) <= 2 * max_error(p, t) + 1e-7
    if dtype == torch.bfloat16:  # logits are not rounded to bf16
        assert max_error(ours[0], truth[0]) < 0.01 * max_error(plain[0], truth[0])


def test_bf16_sums_are_fp32_and_the_precision_setting_is_restored():
    case = make_head(300, 16, 50).to(torch.bfloat16)
    matmul = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = matmul.fp32_precision
    got = linear_logprob(*case[:2], case.targets)
    d_hidden, d_weight = torch.autograd.grad(got.logp.sum(), case[:2])
    assert [x.dtype for x in got] == [torch.float32] * 3
    assert d_weight.dtype == d_hidden.dtype == torch.bfloat16
    assert matmul.fp32_precision == before
    hidden, weight = (x.detach().double().requires_grad_() for x in case[:2])
    (truth,) = torch.autograd.grad(linear_results(hidden, weight, case.targets)[0].sum(), weight)
    # many chunks: sums rounded to bf16 after each would be off by more than the final rounding
    assert max_relative_error(d_weight, truth) <= 2.0**-8


def test_batched_strided_inputs_and_int32_targets_are_accepted():
    case = make_head(24, 6, 31)
    hidden = case.hidden.view(2, 12, 6).transpose(0, 1)
    targets = case.targets.view(2, 12).T.to(torch.int32)
    weight = case.weight.T.contiguous().T
    got = linear_logprob(hidden, weight, targets)
    truth = linear_results(case.hidden, case.weight, case.targets)
    for a, t in zip(got, truth, strict=True):
        assert a.shape == (12, 2)
        assert max_error(a.T.reshape(-1), t) < 1e-12


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16,) * 2])
def test_mixed_and_half_inputs_keep_their_dtype(dtypes):
    case = make_head(40, 6, 31)
    hidden, weight = (x.to(t) for x, t in zip(case[:2], dtypes, strict=True))
    temperature = torch.linspace(0.5, 2, 40, dtype=torch.float64)
    got, truth = ours_and_truth(hidden, weight, case.targets, temperature)
    for a, t in zip(got[:3], truth[:3], strict=True):
        assert a.dtype == torch.float32
        assert max_error(a, t) < 1e-5
    for a, t, x in zip(got[3:], truth[3:], (hidden, weight), strict=True):
        assert a.dtype == x.dtype
        assert max_relative_error(a, t) <= 8 * torch.finfo(x.dtype).eps


def test_forbidden_tokens_have_no_probability():
    case = make_head(9, 4, 12)
    case.bias[5:] = -math.inf
    case.targets.clamp_(max=4)
    got = linear_logprob(*case[:2], case.targets, bias=case.bias)
    truth = linear_results(case.hidden, case.weight[:5], case.targets, case.bias[:5])
    for a, t in zip(got, truth, strict=True):
        assert max_error(a, t) < 1e-12


def test_masked_rows_may_hold_nan():
    case = make_head().to(torch.float64, grad=False)
    case.targets[::3] = -100
    case.hidden[::3] = math.nan
    hidden, weight = (x.clone().requires_grad_() for x in case[:2])
    got = linear_logprob(hidden, weight, case.targets)
    d_hidden, d_weight = torch.autograd.grad(torch.cat(got).sum(), (hidden, weight))
    assert all((x[::3] == 0).all() and x.isfinite().all() for x in got)
    assert (d_hidden[::3] == 0).all() and d_hidden.isfinite().all()
    assert d_weight.isfinite().all() and d_weight.abs().max() > 0


@pytest.mark.parametrize("n", [0, 5])
def test_rows_without_targets_give_zeros_and_a_connected_graph(n):
    case = make_head(n, 4, 9).to(torch.float32)
    targets = torch.full((n,), -100)
    zeros = torch.zeros(n)
    ids = torch.zeros(n, dtype=torch.int64)
    for loss in (
        linear_logprob(*case[:2], targets).logp.sum(),
        linear_policy_loss(*case[:2], targets, zeros, zeros + 1).loss,
        linear_policy_loss(*case[:2], targets.clamp(min=0), zeros, zeros).loss,
        linear_preference_loss(*case[:2], targets, ids).loss,
    ):
        for grad in torch.autograd.grad(loss, case[:2]):
            assert not grad.count_nonzero()


def test_backward_twice_scales_with_the_upstream_gradient():
    case = make_head().to(torch.float64)
    w = torch.ones(61)
    for loss in (
        linear_logprob(*case[:2], case.targets).logp.sum(),
        linear_policy_loss(*case[:2], case.targets, w, w).loss,
    ):
        once = torch.autograd.grad(loss, case[:2], retain_graph=True)
        again = torch.autograd.grad(-3 * loss, case[:2])
        for a, b in zip(once, again, strict=True):
            assert max_error(-3 * a, b) < 1e-12


def test_gradients_accumulate_over_repeated_backward_calls():
    case, w = make_head().to(torch.float32), torch.ones(61)
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    loss = linear_policy_loss(hidden, weight, case.targets, w, w).loss
    once = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    for x, g in zip((hidden, weight), once, strict=True):
        assert x.grad is not None and max_error(x.grad, 3 * g) < 1e-5


def test_a_temperature_changed_before_backward_is_noticed():
    case, t = make_head().to(torch.float64), torch.full((61,), 0.7, dtype=torch.float64)
    logp = linear_logprob(*case[:2], case.targets, temperature=t).logp
    t.fill_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logp.sum(), case.hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 9])}, r"targets\[1\] is 9"),
        ({"targets": torch.tensor([-1, 0])}, r"targets\[0\] is -1"),
        ({"targets": torch.tensor([0])}, r"targets is torch.int64 of shape \(1,\)"),
        ({"targets": torch.tensor([0.0, 1.0])}, r"targets is torch.float32"),
        ({"weight": torch.zeros(9, 3)}, r"weight \(9, 3\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\)"),
        ({"temperature": 0.0}, r"temperature=0.0"),
        ({"temperature": torch.tensor([1.0, 0.0])}, r"temperature has 0.0"),
        ({"temperature": torch.ones(3)}, r"temperature has shape \(3,\)"),
        ({"backend": "triton", "weight": torch.zeros(9, 4).double()}, "'triton' runs fp32, bf16"),
        ({"backend": "native", "weight": torch.zeros(9, 4).double()}, "'native' runs fp32, bf16"),
        ({"backend": "cuda"}, r"backend='cuda'"),
    ],
)
def test_invalid_arguments_are_named(change, message):
    given = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(9, 4)}
    given |= {"targets": torch.tensor([0, 1])} | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**given)


# Custom objectives


def test_a_custom_objective_is_freed_with_its_graph():
    case, ones = make_head(), torch.ones(61)
    held = weakref.WeakSet()

    def fresh():
        def objective(logp, log_ratio, advantage):
            return Clipped()(logp, log_ratio, advantage)

        held.add(objective)
        return objective

    hidden = case.hidden.clone().requires_grad_()
    gc.freeze()  # a collection of all objects of the tests takes 0.4 s
    try:
        for _ in range(20):
            given = (hidden, case.weight, case.targets, ones, ones)
            loss = linear_policy_loss(*given, objective=fresh()).loss
            gc.collect()
            assert len(held) == 1
            loss.backward()
            del loss
        gc.collect()
        assert len(held) == 0
    finally:
        gc.unfreeze()


def test_a_custom_objective_is_kept_for_repeated_backward_calls():
    case, ones, ids = make_head(60).to(torch.float64), torch.ones(60), torch.arange(60) // 15
    for built_in, call in (
        (Clipped(0.1, 0.1), partial(linear_policy_loss, *case[:2], case.targets, ones, ones)),
        (Dpo(0.3), partial(linear_preference_loss, *case[:2], case.targets, ids)),
    ):
        custom = call(objective=lambda *given, f=built_in: f(*given)).loss
        other = call(objective=lambda *given, f=built_in: f(*given)).loss
        truth = torch.autograd.grad(call(objective=built_in).loss, case[:2])
        gc.collect()
        for loss in (custom, other, custom, custom):
            grads = torch.autograd.grad(loss, case[:2], retain_graph=True)
            assert all(map(torch.equal, grads, truth))


# Work that is avoided


class Meter(TorchDispatchMode):
    """Measures the bytes of the largest tensor, and the rows multiplied by the (V, D) weight."""

    def __init__(self, weight):
        super().__init__()
        self.largest = 0
        self.multiplied = 0
        self.size = weight.numel()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "expo_fast":
            op = next(x for x in vars(custom_ops).values() if getattr(x, "_opoverload", 0) is func)
            with self:
                return op._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.nbytes)
        if func is torch.ops.aten.addmm.out:
            (m, k), (_, n) = args[1].shape, args[2].shape
            self.multiplied += m * k * n / self.size
        return out


def measure(f, weight) -> Meter:
    with Meter(weight) as meter:
        f()
    return meter


@pytest.mark.slow
def test_no_tensor_of_rows_times_vocabulary_is_made():
    case = make_head(120, 4, 500).to(torch.float32)
    w, ids = torch.ones(120), torch.arange(120) // 6

    def everything():
        linear_logprob(*case[:2], case.targets).logp.sum().backward()
        linear_policy_loss(*case[:2], case.targets, w, w, entropy_coef=0.1).loss.backward()
        linear_preference_loss(*case[:2], case.targets, ids).loss.backward()

    assert measure(everything, case.weight).largest <= 120 * 500 * 4 / 6
    plain = measure(lambda: reference.linear_logprob(*case[:2], case.targets), case.weight)
    assert plain.largest == 120 * 500 * 4  # the meter sees it


def test_frozen_inputs_and_dropped_rows_cost_no_product():
    case = make_head(60, 8, 100)
    advantage, row_weight = torch.ones(60), torch.ones(60)

    def rows(grad="hw", objective=None, old_logp=None, row_weight=row_weight):
        hidden = case.hidden.clone().requires_grad_("h" in grad)
        weight = case.weight.clone().requires_grad_("w" in grad)

        def f():
            loss = linear_policy_loss(
                hidden,
                weight,
                case.targets,
                advantage,
                row_weight,
                objective=objective or Clipped(0.2, 0.2),
                old_logp=old_logp,
                sequence_ids=torch.arange(60) // 10,
            ).loss
            if grad:
                loss.backward()

        return measure(f, weight).multiplied

    assert rows("") == pytest.approx(60)
    assert rows("h") == rows("w") == pytest.approx(120)
    assert rows() == pytest.approx(180)
    assert rows(objective=SequenceClipped(0.2, 0.2)) == pytest.approx(240)
    assert rows(row_weight=(torch.arange(60) < 20).float()) == pytest.approx(60)
    frozen = partial(linear_preference_loss, *case[:2], case.targets, torch.arange(60) // 10)
    assert measure(frozen, case.weight).multiplied == pytest.approx(60)
    logp = linear_logprob(*case[:2], case.targets).logp
    clipped = logp - (torch.arange(60) < 45).float()  # ratio e, advantage 1: no gradient
    assert rows(old_logp=clipped) == pytest.approx(60 + 2 * 15)


# group_advantage


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_ragged_shuffled_groups_equal_the_formula(scale):
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([5, -2, 5, 900, -2, 5, 900, 5, -2, 17])
    rewards = torch.rand(10, generator=g)
    rewards[3] = float("nan")
    got = group_advantage(rewards, ids, scale=scale, eps=1e-4)
    assert got.dtype == torch.float32
    valid = rewards[~rewards.isnan()].double()
    for i in range(10):
        mates = rewards[(ids == ids[i]) & ~rewards.isnan()].double()
        expected = 0.0
        if not rewards[i].isnan() and len(mates) > 1:
            deviation = {"group": mates.std(), "batch": valid.std(), "none": torch.tensor(1 - 1e-4)}
            expected = ((rewards[i] - mates.mean()) / (deviation[scale] + 1e-4)).item()
        assert got[i].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_that_differ_by_rounding_have_no_advantage(scale):
    noise = 1e-7 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    rewards = torch.cat([0.3 * (1 + noise), 3e3 * (1 + noise), torch.tensor([0.0, 1.0])])
    ids = torch.tensor([0] * 8 + [1] * 8 + [2] * 2)
    got = group_advantage(rewards, ids, scale=scale, eps=0.0)
    assert rewards[:8].unique().numel() > 1
    assert (got[:16] == 0).all() and got[16] < 0 < got[17]


def exact_advantages(rewards: Tensor, scale: str, eps: float) -> list[float]:
    """Return the advantages of one group by the formula, in fractions of integers."""
    values = [Fraction(x) for x in rewards.tolist()]
    mean = sum(values) / len(values)
    deviations = [x - mean for x in values]
    if scale == "none":
        return [float(x) for x in deviations]
    variance = sum(x * x for x in deviations) / (len(values) - 1)
    # a root with 60 more bits than fp64's: isqrt takes integers
    bits = 2**400
    std = Fraction(math.isqrt(int(variance * bits * bits)), bits)
    return [float(x / (std + Fraction(eps))) for x in deviations]


FAR_FROM_0 = {
    "a million and halves": torch.tensor([1e6, 1e6 + 0.5, 1e6, 1e6 + 1]),
    "below -1e6": torch.tensor([-1e6, -1e6 - 0.5, -1e6, -1e6 + 1]),
    "a thousand and a two-thousandth": torch.tensor([1000.0, 1000.0005, 1000.0]),
    "1e30": torch.tensor([1e30, 2e30, -1e30, 1e30]),
    "1e30, close": torch.tensor([1e30, 1.000001e30, 1e30, 1.000003e30]),
    "1e-30": torch.tensor([1e-30, 2e-30, 1e-30, 0.0]),
    "two steps of fp32 above 0": torch.tensor([0.0, 2.8e-45]),
    "fp64, a million and billionths": torch.tensor(
        [1e6, 1e6 + 1e-9, 1e6 + 4e-9], dtype=torch.float64
    ),
    "integers": torch.tensor([10_000_000, 10_000_001, 10_000_003]),
    "bf16, neighbours": torch.tensor([8.0, 8.0625], dtype=torch.bfloat16),
    "zeros of both signs": torch.tensor([0.0, -0.0, 1.0]),
}


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("scale", ["group", "none"])
@pytest.mark.parametrize("name", FAR_FROM_0)
def test_rewards_of_any_size_get_the_formulas_advantages(name, scale, eps):
    rewards = FAR_FROM_0[name]
    ids = torch.zeros(len(rewards), dtype=torch.int64)
    got = group_advantage(rewards, ids, scale=scale, eps=eps)
    assert got.tolist() == pytest.approx(exact_advantages(rewards, scale, eps), rel=1e-6, abs=0)
    assert got.any()


def test_a_group_far_from_0_beside_one_near_0():
    """Each group has its own bound, and unknown rewards and groups of one change none."""
    far = torch.tensor([1e6, 1e6 + 0.5, 1e6, 1e6 + 1])
    near = torch.tensor([1.0, 1.00001, 1.0])
    rest = torch.tensor([math.nan, 3e20, 1e6])
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 2, 3])
    got = group_advantage(torch.cat([far, near, rest]), ids, eps=0.0)
    expected = exact_advantages(far, "group", 0.0) + exact_advantages(near, "group", 0.0)
    assert got.tolist() == pytest.approx([*expected, 0.0, 0.0, 0.0], rel=1e-6, abs=0)


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_computed_in_another_order_are_equal(size, dtype):
    g = torch.Generator().manual_seed(0)
    a, b, share = (torch.rand(1000, generator=g, dtype=dtype) for _ in range(3))
    one = share * (size * a + size * b)
    other = share * (size * a) + share * (size * b)
    assert (one != other).any()
    rewards = torch.stack([one, other], 1).flatten()
    got = group_advantage(rewards, torch.arange(1000).repeat_interleave(2), eps=0.0)
    assert (got == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decimal_sums_are_equal(dtype):
    tenths = torch.arange(11, dtype=dtype) / 10
    sums = (tenths[:, None] + tenths).flatten()
    ids = (torch.arange(11)[:, None] + torch.arange(11)).flatten()
    assert sums.unique().numel() > 21  # 0.1 + 0.7 is not 0.8, nor 0.1 + 0.2 0.3 in fp64
    assert (group_advantage(sums, ids, eps=0.0) == 0).all()


def test_advantages_of_no_rewards_and_of_invalid_rewards():
    nan = torch.full((3,), float("nan"))
    assert group_advantage(torch.empty(0), torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert (group_advantage(nan, torch.zeros(3, dtype=torch.int64)) == 0).all()
    with pytest.raises(ValueError, match=r"rewards\[1\] is infinite"):
        group_advantage(torch.tensor([0.0, float("inf")]), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="scale='std'"):
        group_advantage(torch.zeros(2), torch.zeros(2), scale="std")


def test_a_bias_of_fp16_may_forbid_a_token():
    """The bound of such a bias must be a number of its dtype."""
    hidden = torch.randn(4, 8).half()
    weight = torch.randn(16, 8).half()
    bias = torch.zeros(16).half()
    bias[7] = -torch.inf
    targets = torch.arange(4)
    found = linear_logprob(hidden, weight, targets, bias=bias)
    logits = hidden.double() @ weight.double().T + bias.double()
    expected = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert torch.allclose(found.logp.double(), expected, atol=1e-5)
    assert bool(found.entropy.isfinite().all())


def test_log_probs_have_a_shape_without_values():
    """Tools that estimate memory run a model on fake tensors."""
    with FakeTensorMode():
        found = linear_logprob(torch.empty(8, 4), torch.empty(16, 4), torch.empty(8).long())
    assert found.logp.shape == found.entropy.shape == (8,)
