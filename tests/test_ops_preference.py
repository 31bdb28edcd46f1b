"""Preference losses against their formulas, in fp64 code that shares nothing with the ops."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expo_fast.kernels import reference
from expo_fast.kernels.preferences import Pairs
from expo_fast.ops import (
    Cpo,
    Dpo,
    DpoPositive,
    Hinge,
    Ipo,
    Orpo,
    RDpo,
    SimPo,
    linear_preference_loss,
)

LENGTHS = torch.tensor([1, 9, 13, 4, 2, 7])  # targets of each sequence, three pairs
N, D, V = int(LENGTHS.sum()) + 12, 6, 53  # 12 rows without target
# what make_rows' sequences have, but for log-ratios h of about 3, -6 and 9
REF = torch.tensor([-9.6, -88.7, -94.3, -35.9, -25.3, -68.7]).double()


@pytest.fixture(autouse=True)
def several_chunks(each_backend, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", 1 << 13)


class Rows(NamedTuple):
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    ids: Tensor  # (N,), -1 without target


def make_rows(seed=0) -> Rows:
    g = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.arange(6).repeat_interleave(LENGTHS), torch.full((12,), -1)])
    ids = ids[torch.randperm(N, generator=g)]
    hidden, weight = (torch.randn(n, D, generator=g).double() for n in (N, V))
    targets = torch.where(ids < 0, -100, torch.randint(V, (N,), generator=g))
    return Rows(hidden, weight, targets, ids)


def summed_logp(rows, hidden, weight) -> Tensor:  # (P, 2)
    logp = (hidden @ weight.T / 0.8).log_softmax(-1)
    own = logp.gather(1, rows.targets.clamp(min=0)[:, None])[:, 0]
    own = torch.where(rows.targets < 0, 0, own)
    return torch.stack([own[rows.ids == i].sum() for i in range(6)]).view(3, 2)


def gradients(f, rows):
    inputs = [x.clone().requires_grad_() for x in rows[:2]]
    loss = f(*inputs)
    return loss, *torch.autograd.grad(loss, inputs, torch.full_like(loss, 1.7))


def worst(got, truth) -> float:
    return (got.double() - truth.double()).abs().max().item()


def gap(x) -> Tensor:  # (P, 2) -> (P,)
    return x[:, 0] - x[:, 1]


def average(x, length) -> Tensor:
    return x / length.clamp(min=1)


def dpo_formula(policy, ref, length, beta=0.2, flipped=0.0):
    s = beta * gap(policy - ref)
    return -(1 - flipped) * F.logsigmoid(s) - flipped * F.logsigmoid(-s)


def ipo_formula(policy, ref, length, beta=0.2):
    return (gap(policy - ref) - 1 / (2 * beta)) ** 2


def averaged_ipo_formula(policy, ref, length):
    return ipo_formula(average(policy, length), average(ref, length), length)


def hinge_formula(policy, ref, length):
    return F.relu(1 - 0.2 * gap(policy - ref))


def rdpo_formula(policy, ref, length):
    return -F.logsigmoid(0.2 * gap(policy - ref) + 0.3 * gap(length.double()))


def dpop_formula(policy, ref, length):
    worse = F.relu(ref[:, 0] - policy[:, 0])
    return -F.logsigmoid(0.2 * (gap(policy - ref) - 0.7 * worse))


def simpo_formula(policy, ref, length):
    return -F.logsigmoid(1.5 * gap(average(policy, length)) - 0.4)


def cpo_formula(policy, ref, length):
    return -F.logsigmoid(0.2 * gap(policy)) - 0.3 * average(policy, length)[:, 0]


def orpo_formula(policy, ref, length):
    x = average(policy, length)
    odds = 1 / torch.expm1(-x.clamp(max=-1e-20))  # p / (1 - p)
    return -x[:, 0] - 0.2 * F.logsigmoid(gap(odds.log()))


PREFERENCES = {
    "dpo": (Dpo(beta=0.2), dpo_formula),
    "smoothed": (Dpo(beta=0.2, label_smoothing=0.1), partial(dpo_formula, flipped=0.1)),
    "ipo": (Ipo(beta=0.2), ipo_formula),
    "averaged_ipo": (Ipo(beta=0.2, average=True), averaged_ipo_formula),
    "hinge": (Hinge(beta=0.2), hinge_formula),
    "rdpo": (RDpo(alpha=0.3, beta=0.2), rdpo_formula),
    "dpop": (DpoPositive(beta=0.2, penalty=0.7), dpop_formula),
    "simpo": (SimPo(beta=1.5, gamma=0.4), simpo_formula),
    "cpo": (Cpo(beta=0.2, nll_coef=0.3), cpo_formula),
    "orpo": (Orpo(beta=0.2), orpo_formula),
}


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("pair_weight", [None, torch.tensor([0.5, 0.0, 2.0])])
@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_loss_and_gradients_equal_the_formula(name, pair_weight, with_reference):
    objective, formula = PREFERENCES[name]
    rows = make_rows()
    ref = REF if with_reference else torch.zeros(6)

    def truth(hidden, weight):
        pairs = formula(summed_logp(rows, hidden, weight), ref.view(3, 2), LENGTHS.view(3, 2))
        return pairs.mean() if pair_weight is None else (pair_weight * pairs).sum()

    def ours(hidden, weight):
        return linear_preference_loss(
            hidden, weight, rows.targets, rows.ids, objective=objective, pair_weight=pair_weight,
            ref_logp=ref if with_reference else None, temperature=0.8,
        )  # fmt: skip

    got = gradients(lambda *x: ours(*x).loss, rows)
    for a, t in zip(got, gradients(truth, rows), strict=True):
        assert worst(a, t) < 1e-11
    got, policy = ours(*rows[:2]), summed_logp(rows, *rows[:2])
    ratio = policy - ref.view(3, 2)
    h = ratio[:, 0] - ratio[:, 1]
    assert worst(torch.stack([got.chosen_logp, got.rejected_logp], 1), policy) < 1e-11
    assert got.margin.item() == pytest.approx(h.mean().item())
    assert got.accuracy.item() == pytest.approx((h > 0).double().mean().item())


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_numerical_gradient_agrees(name):
    rows, objective = make_rows(), PREFERENCES[name][0]

    def loss(hidden, weight):
        return linear_preference_loss(
            hidden, weight, *rows[2:], objective=objective, ref_logp=REF, temperature=0.8
        ).loss

    inputs = [x.clone().requires_grad_() for x in rows[:2]]
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("name", PREFERENCES)
def test_sequences_without_targets_have_log_prob_0(name):
    objective, formula = PREFERENCES[name]
    rows = make_rows()
    empty = torch.tensor([False, True, True, False, True, True])
    targets = torch.where(empty[rows.ids.clamp(min=0)], -100, rows.targets)
    rows, length = rows._replace(targets=targets), LENGTHS.masked_fill(empty, 0)

    def truth(hidden, weight):
        policy = summed_logp(rows, hidden, weight)
        return formula(policy, torch.zeros(3, 2), length.view(3, 2)).sum()

    def ours(hidden, weight):
        return linear_preference_loss(
            hidden, weight, targets, rows.ids, objective=objective, pair_weight=torch.ones(3),
            temperature=0.8,
        ).loss  # fmt: skip

    for a, t in zip(gradients(ours, rows), gradients(truth, rows), strict=True):
        assert a.isfinite().all() and worst(a, t) < 1e-11


@pytest.mark.parametrize("name", PREFERENCES)
def test_extreme_sums_cost_fp32_nothing(name):
    """Log-ratios of up to 2e4 nats, averages of 0, about -1e-9 and -400."""
    objective, formula = PREFERENCES[name]
    grid = torch.cartesian_prod(*[torch.tensor([-1e4, -30.0, -4e-8, 0.0])] * 4)
    length = torch.tensor([40.0, 25.0]).expand(len(grid), 2)
    got = objective(Pairs(*torch.cat([grid, length], 1).T))
    policy, ref = grid.double().view(-1, 2, 2).unbind(1)
    value = formula(policy.requires_grad_(), ref, length.double())
    (pair_grads,) = torch.autograd.grad(value.sum(), policy)
    for a, t in zip(got, (value, *pair_grads.T), strict=True):
        assert a.dtype == torch.float32 and a.isfinite().all()
        assert ((a - t).abs() <= 1e-5 * (1 + t.abs())).all()


@pytest.mark.parametrize("gap_in_logits", [20.0, 60.0, 300.0])  # 1 - p is 1e-7, 5e-25 and 0
def test_orpo_with_certain_sequences_in_fp32(gap_in_logits):
    targets, ids = torch.arange(8), torch.arange(8) // 2
    certain = torch.where((ids == 0) | (ids == 3), 1.0, 0.01)  # of two pairs
    hidden, weight = gap_in_logits * certain[:, None] * torch.eye(8), torch.eye(V, 8)
    rows = Rows(hidden, weight, targets, ids)

    def ours(hidden, weight):
        return linear_preference_loss(hidden, weight, targets, ids, objective=Orpo()).loss

    def truth(hidden, weight):
        x = (hidden @ weight.T).log_softmax(-1).diagonal().view(2, 2, 2).mean(2)
        log_odds = -torch.expm1(-x).log()
        return (-x[:, 0] - 0.1 * F.logsigmoid(gap(log_odds))).mean()

    got = gradients(ours, rows)
    assert all(x.isfinite().all() for x in got)
    if gap_in_logits == 20:
        exact = gradients(truth, Rows(hidden.double(), weight.double(), targets, ids))
        for a, t in zip(got, exact, strict=True):
            assert worst(a, t) < 1e-5 * t.abs().max()


def test_rdpo_pushes_less_where_the_chosen_sequence_is_the_longer_one():
    chosen, rejected = torch.tensor([[10.0, 5.0], [5.0, 5.0], [5.0, 10.0]]).T
    logp = torch.full((3,), -10.0)
    pairs = Pairs(logp, logp, logp, logp, chosen, rejected)
    push = -RDpo(alpha=0.2)(pairs).grad_chosen
    assert 0 < push[0] < push[1] < push[2]
    assert push[1] == -Dpo()(pairs).grad_chosen[1]


@pytest.mark.parametrize("name", PREFERENCES)
def test_pairs_split_into_micro_batches_add_up(name):
    rows = make_rows()
    loss = partial(linear_preference_loss, objective=PREFERENCES[name][0], temperature=0.8)
    share = torch.full((3,), 1 / 3, dtype=torch.float64)

    def loss_of(pairs, h, w):
        ids = rows.ids - 2 * pairs.start
        mine = (ids >= 0) & (rows.ids < 2 * pairs.stop)
        targets = torch.where(mine, rows.targets, -100)
        part = REF[2 * pairs.start : 2 * pairs.stop]
        return loss(h, w, targets, ids, ref_logp=part, pair_weight=share[pairs]).loss

    def undivided(h, w):
        return loss(h, w, rows.targets, rows.ids, ref_logp=REF).loss

    parts = [gradients(partial(loss_of, pairs), rows) for pairs in (slice(0, 1), slice(1, 3))]
    for truth, *split in zip(gradients(undivided, rows), *parts, strict=True):
        assert worst(sum(split), truth) < 1e-12


def test_pairs_that_do_not_fit_are_named():
    rows = make_rows()
    loss = partial(linear_preference_loss, *rows)
    with pytest.raises(ValueError, match=r"sequence_ids has [45]: ids of 2 pairs are 0 to 3"):
        loss(ref_logp=torch.zeros(4))
    with pytest.raises(ValueError, match=r"ref_logp has shape \(5,\), 2 pairs need \(4,\)"):
        loss(ref_logp=torch.zeros(5))
    with pytest.raises(ValueError, match=r"pair_weight has shape \(2,\), 3 pairs need \(3,\)"):
        loss(ref_logp=torch.zeros(6), pair_weight=torch.zeros(2))
    with pytest.raises(ValueError, match="sequence_ids has shape"):
        linear_preference_loss(*rows[:3], rows.ids[1:])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dpo(beta=0.0), "beta=0.0"),
        (lambda: Dpo(label_smoothing=0.5), "label_smoothing=0.5"),
        (lambda: Ipo(beta=-1.0), "beta=-1.0"),
        (lambda: Hinge(beta=math.inf), r"Hinge\(beta=inf\): must be finite and positive"),
        (lambda: RDpo(alpha=-0.1), r"RDpo\(alpha=-0.1\): must be finite and at least 0"),
        (lambda: RDpo(alpha=0.1, beta=0.0), "beta=0.0"),
        (lambda: DpoPositive(penalty=-1.0), "penalty=-1.0"),
        (lambda: SimPo(gamma=math.nan), "gamma=nan"),
        (lambda: Cpo(nll_coef=-1.0), "nll_coef=-1.0"),
        (lambda: Orpo(beta=-0.1), r"Orpo\(beta=-0.1\)"),
    ],
)
def test_impossible_objectives_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
