"""Compare preference losses with their formulas, in fp64, without code of the ops."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expo_fast.kernels import reference
from expo_fast.kernels.preferences import Pairs
from expo_fast.ops import (
    Clipped,
    Cpo,
    Dpo,
    DpoPositive,
    Hinge,
    Ipo,
    Orpo,
    RDpo,
    SimPo,
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
)
from judges import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    linear_results,
    logps_of,
    max_error,
    max_relative_error,
    rdpo_loss,
    simpo_loss,
    values_and_gradients,
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
    own = linear_results(hidden, weight, rows.targets, temperature=0.8)[0]
    return torch.stack([own[rows.ids == i].sum() for i in range(6)]).view(3, 2)


def gradients(f, rows):
    """Return the loss and the gradients of hidden and weight, for an upstream gradient of 1.7."""
    return values_and_gradients(f, rows[:2], [torch.tensor(1.7)])


def gap(x) -> Tensor:  # (P, 2) -> (P,)
    return x[:, 0] - x[:, 1]


def average(x, length) -> Tensor:
    return x / length.clamp(min=1)


def dpo_formula(policy, ref, length, label_smoothing=0.0):
    return dpo_loss(gap(policy - ref), 0.2, label_smoothing)


def ipo_formula(policy, ref, length):
    return ipo_loss(gap(policy - ref), 0.2)


def averaged_ipo_formula(policy, ref, length):
    return ipo_loss(gap(average(policy - ref, length)), 0.2)


def hinge_formula(policy, ref, length):
    return hinge_loss(gap(policy - ref), 0.2)


def rdpo_formula(policy, ref, length):
    return rdpo_loss(gap(policy - ref), gap(length.double()), 0.2, 0.3)


def dpop_formula(policy, ref, length):
    worse = F.relu(ref[:, 0] - policy[:, 0])
    return -F.logsigmoid(0.2 * (gap(policy - ref) - 0.7 * worse))


def simpo_formula(policy, ref, length):
    return simpo_loss(gap(average(policy, length)), 1.5, 0.4)


def cpo_formula(policy, ref, length):
    return dpo_loss(gap(policy), 0.2) - 0.3 * average(policy, length)[:, 0]


def orpo_formula(policy, ref, length):
    x = average(policy, length)
    odds = 1 / torch.expm1(-x.clamp(max=-1e-20))  # p / (1 - p)
    return -x[:, 0] - 0.2 * F.logsigmoid(gap(odds.log()))


PREFERENCES = {
    "dpo": (Dpo(beta=0.2), dpo_formula),
    "smoothed": (Dpo(beta=0.2, label_smoothing=0.1), partial(dpo_formula, label_smoothing=0.1)),
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
        assert max_error(a, t) < 1e-11
    got, policy = ours(*rows[:2]), summed_logp(rows, *rows[:2])
    ratio = policy - ref.view(3, 2)
    h = ratio[:, 0] - ratio[:, 1]
    assert max_error(torch.stack([got.chosen_logp, got.rejected_logp], 1), policy) < 1e-11
    assert got.margin.item() == pytest.approx(h.mean().item())
    assert got.accuracy.item() == pytest.approx((h > 0).double().mean().item())


@pytest.mark.parametrize("name", PREFERENCES)
def test_gradcheck_passes_for_each_loss(name):
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
        assert a.isfinite().all() and max_error(a, t) < 1e-11


@pytest.mark.parametrize("name", PREFERENCES)
def test_extreme_sums_keep_fp32_accuracy(name):
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
def test_orpo_of_sequences_of_probability_one_is_finite_in_fp32(gap_in_logits):
    targets, ids = torch.arange(8), torch.arange(8) // 2
    certain = torch.where((ids == 0) | (ids == 3), 1.0, 0.01)  # of two pairs
    hidden, weight = gap_in_logits * certain[:, None] * torch.eye(8), torch.eye(V, 8)
    rows = Rows(hidden, weight, targets, ids)

    def ours(hidden, weight):
        return linear_preference_loss(hidden, weight, targets, ids, objective=Orpo()).loss

    def truth(hidden, weight):
        x = logps_of(hidden @ weight.T, targets).view(2, 2, 2).mean(2)
        log_odds = -torch.expm1(-x).log()
        return (-x[:, 0] - 0.1 * F.logsigmoid(gap(log_odds))).mean()

    got = gradients(ours, rows)
    assert all(x.isfinite().all() for x in got)
    if gap_in_logits == 20:
        exact = gradients(truth, Rows(hidden.double(), weight.double(), targets, ids))
        for a, t in zip(got, exact, strict=True):
            assert max_relative_error(a, t) < 1e-5


def test_rdpo_has_a_smaller_gradient_where_the_chosen_sequence_is_longer():
    chosen, rejected = torch.tensor([[10.0, 5.0], [5.0, 5.0], [5.0, 10.0]]).T
    logp = torch.full((3,), -10.0)
    pairs = Pairs(logp, logp, logp, logp, chosen, rejected)
    push = -RDpo(alpha=0.2)(pairs).grad_chosen
    assert 0 < push[0] < push[1] < push[2]
    assert push[1] == -Dpo()(pairs).grad_chosen[1]


@pytest.mark.parametrize("name", PREFERENCES)
def test_losses_and_gradients_of_micro_batches_add_up(name):
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
        assert max_error(sum(split, torch.zeros(())), truth) < 1e-12


def test_inconsistent_pair_arguments_are_named():
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
def test_objectives_with_invalid_coefficients_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_reference_log_prob_for_each_row_is_refused():
    """Otherwise it would add pairs without rows."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 16, generator=random)
    weight = torch.randn(50, 16, generator=random)
    targets = torch.arange(8)
    ids = torch.arange(4).repeat_interleave(2)
    with pytest.raises(ValueError, match="for each of 8 rows, whose ids are of 2 pairs: sum it"):
        linear_preference_loss(hidden, weight, targets, ids, ref_logp=torch.zeros(8))


def test_what_is_no_objective_is_refused():
    hidden = torch.zeros(2, 4)
    weight = torch.zeros(5, 4)
    targets = torch.zeros(2, dtype=torch.int64)
    ones = torch.ones(2)
    wrong: list[tuple[Any, str]] = [
        ("grpo", "must be an object such as Clipped"),
        (Clipped, "must be an object such as Clipped"),
        (Dpo(), "is no policy objective such as Clipped"),
    ]
    for objective, says in wrong:
        with pytest.raises(ValueError, match=says):
            linear_policy_loss(hidden, weight, targets, ones, ones, objective=objective)
    clipped: Any = Clipped(0.2, 0.2)
    with pytest.raises(ValueError, match="is no preference objective such as Dpo"):
        linear_preference_loss(hidden, weight, targets, torch.arange(2), objective=clipped)
    rewards: Any = [1.0]
    with pytest.raises(ValueError, match="rewards is a list: must be a tensor"):
        group_advantage(rewards, torch.zeros(1))


def test_inputs_of_a_wrong_type_are_refused():
    hidden = torch.zeros(2, 4)
    weight = torch.zeros(8, 4)
    targets = torch.zeros(2, dtype=torch.int64)
    anything: Any = [0, 0]
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: linear_logprob(hidden.int(), weight, targets), "hidden is torch.int32: must be"),
        (lambda: linear_logprob(hidden, weight.bool(), targets), "weight is torch.bool: must be"),
        (lambda: linear_logprob(hidden, weight, anything), "targets is a list: must be a tensor"),
        (lambda: linear_logprob(hidden, weight, targets, bias=anything), "bias is a list"),
        (
            lambda: linear_logprob(hidden, weight, targets, temperature=anything),
            "temperature is a list: must be a number",
        ),
        (
            lambda: linear_preference_loss(hidden, weight, targets, torch.tensor([0.0, 1.0])),
            "sequence_ids is torch.float32: must be integers",
        ),
        (
            lambda: group_advantage(torch.ones(2), torch.tensor([0.0, 0.5])),
            "group_ids is torch.float32: must be integers",
        ),
        (lambda: group_advantage(torch.ones(2), targets, eps=-1.0), "eps=-1.0: must be at least 0"),
    ]
    for call, says in wrong:
        with pytest.raises(ValueError, match=says):
            call()
