"""Compare policy losses with the methods' formulas, in fp64, without code of the ops."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from expo_fast.kernels import objectives, reference
from expo_fast.ops import (
    Cispo,
    Clipped,
    SequenceClipped,
    SoftAdaptive,
    linear_logprob,
    linear_policy_loss,
)
from judges import (
    cispo_loss,
    clipped_loss,
    dual_clipped_loss,
    kl_estimate,
    linear_results,
    max_error,
    relative_error,
    sapo_loss,
    values_and_gradients,
)

LENGTHS = [1, 9, 4, 13, 2, 7]  # targets of each sequence; two more rows of each are its prompt
L_MAX = 16


@pytest.fixture(autouse=True)
def several_chunks(each_backend, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1 << 13)


@dataclass(frozen=True)
class Batch:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    ids: Tensor
    advantage: Tensor
    old_logp: Tensor
    ref_logp: Tensor
    temperature: Tensor

    def rows(self, keep) -> "Batch":
        return replace(self, **{k: v[keep] for k, v in vars(self).items() if k != "weight"})

    def logp_and_entropy(self, hidden, weight):
        """Return both, (N,) each; 0 for rows without target."""
        results = linear_results(hidden, weight, self.targets, temperature=self.temperature)
        return results[:2]

    def ratio(self, logp):
        return torch.exp(logp - self.old_logp)


def make_batch(d=6, v=53, seed=1) -> Batch:
    g = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.full((t + 2,), i) for i, t in enumerate(LENGTHS)])
    n = len(ids)
    normal = partial(torch.randn, generator=g, dtype=torch.float64)
    targets = torch.randint(v, (n,), generator=g)
    starts = torch.cat([torch.tensor([True]), ids[1:] != ids[:-1]])
    targets[starts | starts.roll(1)] = -100
    per_sequence = normal(len(LENGTHS))
    batch = Batch(
        normal(n, d), normal(v, d), targets, ids, per_sequence[ids],
        torch.empty(0), torch.empty(0), 0.7 + torch.rand(n, generator=g, dtype=torch.float64),
    )  # fmt: skip
    logp = batch.logp_and_entropy(batch.hidden, batch.weight)[0]
    # ratios from 0.3 to 3: every branch of every objective is taken
    return replace(batch, old_logp=logp + 0.4 * normal(n), ref_logp=logp + 0.3 * normal(n))


def ppo(b, logp, low=0.2, high=0.2):
    return clipped_loss(b.ratio(logp), b.advantage, low, high)


def dual_clip(b, logp):
    return dual_clipped_loss(b.ratio(logp), b.advantage, 0.2, 0.2, cap=1.5)


def cispo(b, logp):
    return cispo_loss(b.ratio(logp), b.advantage, logp, cap=1.3)


def sapo(b, logp):
    return sapo_loss(b.ratio(logp), b.advantage)


def gspo(b, logp, low=0.05, high=0.08):
    out = torch.zeros_like(logp)
    for i in range(len(LENGTHS)):
        mine = (b.ids == i) & (b.targets != -100)
        ratio = torch.exp((logp - b.old_logp)[mine].mean())
        out = torch.where(mine, clipped_loss(ratio, b.advantage, low, high), out)
    return out


def grpo_weight(b):
    return 1 / (len(LENGTHS) * torch.tensor(LENGTHS, dtype=torch.float64)[b.ids])


def dapo_weight(b):
    return torch.full_like(b.advantage, 1 / sum(LENGTHS))


def dr_grpo_weight(b):
    return torch.full_like(b.advantage, 1 / (len(LENGTHS) * L_MAX))


def uneven_weight(b):
    return grpo_weight(b) * (1 + b.targets.clamp(min=0) / 50)


@dataclass(frozen=True)
class Method:
    """An objective of the ops, and the formulas that it has to agree with."""

    objective: Any
    row_loss: Callable[[Batch, Tensor], Tensor]  # (N,) of a batch and its log-probs
    row_weight: Callable[[Batch], Tensor]  # (N,)


METHODS = {
    "grpo": Method(Clipped(0.2, 0.2), ppo, grpo_weight),
    "dr_grpo": Method(Clipped(0.2, 0.2), ppo, dr_grpo_weight),
    "dapo": Method(Clipped(0.2, 0.28), partial(ppo, high=0.28), dapo_weight),
    "dual_clip": Method(Clipped(0.2, 0.2, cap=1.5), dual_clip, grpo_weight),
    "cispo": Method(Cispo(cap=1.3), cispo, dapo_weight),
    "sapo": Method(SoftAdaptive(), sapo, grpo_weight),
    "gspo": Method(SequenceClipped(0.05, 0.08), gspo, grpo_weight),
    "uneven_gspo": Method(SequenceClipped(0.05, 0.08), gspo, uneven_weight),
}


def formula_loss(b, method, on_policy, kl_coef, entropy_coef, hidden, weight):
    formula = METHODS[method]
    logp, entropy = b.logp_and_entropy(hidden, weight)
    policy = (
        formula.row_loss(b, logp) + kl_coef * kl_estimate(logp, b.ref_logp) - entropy_coef * entropy
    )
    row = torch.where(on_policy, -b.advantage * logp, policy)
    return (formula.row_weight(b) * torch.where(b.targets != -100, row, 0)).sum()


def our_loss(b, method, on_policy, kl_coef, entropy_coef, hidden, weight):
    ours = METHODS[method]
    ids = torch.where(on_policy, 5, b.ids)  # on-policy rows must not count as the sequence's own
    return linear_policy_loss(
        hidden, weight, b.targets, b.advantage, ours.row_weight(b), objective=ours.objective,
        old_logp=b.old_logp, ref_logp=b.ref_logp, on_policy=on_policy, kl_coef=kl_coef,
        entropy_coef=entropy_coef, temperature=b.temperature, sequence_ids=ids,
    )  # fmt: skip


def gradients(f, b):
    """Return the loss and the gradients of hidden and weight, for an upstream gradient of 1.7."""
    return values_and_gradients(f, (b.hidden, b.weight), [torch.tensor(1.7)])


@pytest.mark.parametrize(("kl_coef", "entropy_coef"), [(0.0, 0.0), (0.3, 0.0), (0.2, 0.05)])
@pytest.mark.parametrize("with_sft_rows", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_policy_loss_and_gradients_equal_the_formula(method, with_sft_rows, kl_coef, entropy_coef):
    b = make_batch()
    on_policy = (b.ids == 3) if with_sft_rows else torch.zeros_like(b.ids, dtype=torch.bool)
    b = replace(b, advantage=torch.where(on_policy, 1.0, b.advantage))
    terms = (b, method, on_policy, kl_coef, entropy_coef)
    truth = gradients(partial(formula_loss, *terms), b)
    ours = gradients(lambda *inputs: our_loss(*terms, *inputs).loss, b)
    for a, t in zip(ours, truth, strict=True):
        assert max_error(a, t) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_a_split_into_micro_batches_changes_neither_loss_nor_gradients(method, dtype):
    b = make_batch()
    b = replace(b, **{k: v.to(dtype) for k, v in vars(b).items() if v.is_floating_point()})
    off = torch.zeros_like(b.ids, dtype=torch.bool)

    def loss_of(part, on_policy):
        return lambda *inputs: our_loss(part, method, on_policy, 0.1, 0.01, *inputs).loss

    undivided = gradients(loss_of(b, off), b)
    loss, d_weight, d_hidden = 0.0, torch.zeros_like(b.weight), torch.zeros_like(b.hidden)
    for group in ([0, 1], [2], [3, 4, 5]):
        keep = torch.isin(b.ids, torch.tensor(group))
        part, off_part = b.rows(keep), off[keep]
        part_loss, d_hidden[keep], d_part = gradients(loss_of(part, off_part), part)
        loss, d_weight = loss + part_loss, d_weight + d_part
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for a, t in zip((loss, d_hidden, d_weight), undivided, strict=True):
        assert max_error(a, t) < tolerance


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"uneven_gspo"}))
def test_without_old_logp_the_gradient_is_the_policy_gradient(method):
    b = make_batch()
    objective = METHODS[method].objective
    row_weight = METHODS[method].row_weight(b)

    def ours(hidden, weight):
        return linear_policy_loss(
            hidden, weight, b.targets, b.advantage, row_weight, objective=objective,
            temperature=b.temperature, sequence_ids=b.ids,
        ).loss  # fmt: skip

    def reinforce(hidden, weight):
        logp = b.logp_and_entropy(hidden, weight)[0]
        return (row_weight * torch.where(b.targets != -100, -b.advantage * logp, 0)).sum()

    for a, t in zip(gradients(ours, b)[1:], gradients(reinforce, b)[1:], strict=True):
        # GSPO averages the gradient over the sequence; with one advantage and weight that is equal
        assert max_error(a, t) < 1e-12


def test_statistics_are_those_of_the_policy_rows():
    b = make_batch()
    on_policy = b.ids == 3
    b = replace(b, hidden=b.hidden.clone())
    dropped = b.ids == 1
    b.hidden[dropped] = float("nan")
    row_weight = torch.where(dropped, 0, grpo_weight(b))
    got = linear_policy_loss(
        b.hidden, b.weight, b.targets, b.advantage, row_weight, old_logp=b.old_logp,
        ref_logp=b.ref_logp, on_policy=on_policy, kl_coef=0.5, temperature=b.temperature,
    )  # fmt: skip
    logp, entropy = b.logp_and_entropy(b.hidden, b.weight)
    scored = (b.targets != -100) & ~dropped
    policy = scored & ~on_policy
    w, a, r = row_weight[policy], b.advantage[policy], b.ratio(logp)[policy]
    value, k3 = ppo(b, logp)[policy], kl_estimate(logp, b.ref_logp)[policy]
    sft = -(row_weight * b.advantage * logp)[scored & on_policy].sum()
    assert max_error(got.logp, torch.where(scored, logp, 0)) < 1e-12
    assert max_error(got.entropy, torch.where(scored, entropy, 0)) < 1e-12
    assert not (got.logp.requires_grad or got.policy_loss.requires_grad)
    expected = {
        "policy_loss": (w * value).sum(),
        "on_policy_loss": sft,
        "kl": (w * k3).sum() / w.sum(),
        "mean_entropy": (w * entropy[policy]).sum() / w.sum(),
        "clip_low": ((a < 0) & (r < 0.8)).double().mean(),
        "clip_high": ((a > 0) & (r > 1.2)).double().mean(),
        "ratio_mean": r.mean(),
        "ratio_max": r.max(),
        "loss": (w * (value + 0.5 * k3)).sum() + sft,
    }
    assert expected["clip_low"] > 0 and expected["clip_high"] > 0
    for name, truth in expected.items():
        assert getattr(got, name).item() == pytest.approx(truth.item(), abs=1e-12), name


def test_grads_are_the_derivatives_and_0_where_a_row_is_clipped():
    g = torch.Generator().manual_seed(3)
    logp, old, a = (torch.randn(500, generator=g, dtype=torch.float64) for _ in range(3))
    for objective in (Clipped(), Clipped(0.1, 0.3, cap=2.0), SoftAdaptive()):
        x = logp.clone().requires_grad_()
        value, grad, side = objective(x, x - old, a)
        assert max_error(grad, torch.autograd.grad(value.sum(), x)[0]) < 1e-12
        if isinstance(objective, Clipped):
            assert ((grad == 0) == (side != 0)).all() and side.unique().tolist() == [-1, 0, 1]


def test_losses_of_extreme_ratios_are_finite():
    b = make_batch()
    b = replace(b, old_logp=b.old_logp - 500, ref_logp=b.ref_logp + 500)
    off = torch.zeros_like(b.ids, dtype=torch.bool)
    for method in METHODS:
        f = partial(our_loss, b, method, off, 0.1, 0.0)
        loss, *grads = gradients(lambda *x, f=f: f(*x).loss.float(), b)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert objectives.MAX_LOG_RATIO == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl_coef": 0.1}, "kl_coef=0.1 needs ref_logp"),
        ({"objective": SequenceClipped()}, "SequenceClipped needs sequence_ids"),
        ({"old_logp": torch.zeros(3)}, r"old_logp has shape \(3,\), needs \(2,\)"),
        ({"on_policy": torch.zeros(1)}, r"on_policy has shape \(1,\)"),
        (
            {
                "objective": SequenceClipped(),
                "sequence_ids": torch.tensor([7, 7]),
                "row_weight": torch.tensor([1.0, 0.0]),
            },
            "sequence 7 has targets with and without row_weight",
        ),
    ],
)
def test_invalid_policy_arguments_are_named(change, message):
    given = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(9, 4)}
    given |= {"targets": torch.tensor([0, 1]), "advantage": torch.ones(2)}
    given |= {"row_weight": torch.ones(2)} | change
    with pytest.raises(ValueError, match=message):
        linear_policy_loss(**given)


def test_constants_may_be_from_inference_mode():
    """Samplers compute old log-probs in it. Autograd refuses to save such tensors."""
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(16, 8, requires_grad=True)

    def loss_of() -> Tensor:
        old = torch.tensor([-1.0, -2.0, -3.0, -4.0])
        targets = torch.tensor([1, 2, 3, 4])
        ones = torch.ones(4)
        given = (targets, old, ones)
        more = {"old_logp": old, "ref_logp": old, "kl_coef": 0.1, "temperature": ones}
        with torch.inference_mode(False):
            return linear_policy_loss(hidden, weight, *given, **more).loss

    expected = torch.autograd.grad(loss_of(), (hidden, weight))
    with torch.inference_mode():
        loss = loss_of()
    found = torch.autograd.grad(loss, (hidden, weight))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clipped(-0.1, 0.2), "low=-0.1"),
        (lambda: Clipped(0.2, 0.2, cap=1.1), "cap=1.1"),
        (lambda: Cispo(0.28), "cap=0.28"),
        (lambda: SoftAdaptive(0.0), "tau_positive=0.0"),
        (lambda: SequenceClipped(2.0), "SequenceClipped"),
    ],
)
def test_objectives_with_invalid_coefficients_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_bf16_policy_gradient_error_is_at_most_twice_that_of_plain_pytorch():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 32, generator=g), torch.randn(500, 32, generator=g)
    y, a = torch.randint(500, (300,), generator=g), torch.randn(300, generator=g)
    narrow = hidden.bfloat16(), weight.bfloat16()
    old = linear_logprob(*narrow, y).logp

    def surrogate(logp):
        return (clipped_loss((logp - old).exp(), a, 0.2, 0.2) / 300).sum()

    def run(f, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in narrow]
        return torch.autograd.grad(f(*inputs), inputs)

    def plain(h, w):
        return surrogate(reference.linear_logprob(h, w, y).logp)

    truth, theirs = run(plain, torch.float64), run(plain, torch.bfloat16)
    w = torch.full((300,), 1 / 300)
    ours = run(lambda h, wt: linear_policy_loss(h, wt, y, a, w, old_logp=old).loss, torch.bfloat16)
    for t, p, o in zip(truth, theirs, ours, strict=True):
        assert max_error(o, t) <= 2 * max_error(p, t)


def test_a_loss_scale_keeps_gradients_that_underflow_fp16():
    """1e-9 is 0 in fp16, and 1e-9 * 2^24 is not."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 16, generator=g).half().requires_grad_() for n in (40, 100)]
    targets, one = torch.randint(100, (40,), generator=g), torch.ones(40)
    loss = linear_policy_loss(inputs[0], inputs[1], targets, one, one * 1e-9).loss
    got = torch.autograd.grad(loss * 2**24, inputs)
    hidden, weight = (x.detach().double().requires_grad_() for x in inputs)
    logp = linear_results(hidden, weight, targets)[0]
    truth = torch.autograd.grad(-1e-9 * 2**24 * logp.sum(), (hidden, weight))
    for a, b in zip(got, truth, strict=True):
        assert a.dtype == torch.float16
        assert relative_error(a, b) < 1e-3
