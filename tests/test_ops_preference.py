"""Preference losses against their formulas, in fp64 code that shares nothing with the ops."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from expo_fast.kernels import reference
from expo_fast.ops import Dpo, Ipo, linear_preference_loss

LENGTHS = torch.tensor([1, 9, 4, 13, 2, 7])  # targets of each sequence, three pairs
N, D, V = int(LENGTHS.sum()) + 12, 6, 53  # 12 rows without target


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
    return torch.stack([own[rows.ids == i].sum() for i in range(6)]).view(3, 2)


def gradients(f, rows):
    inputs = [x.clone().requires_grad_() for x in rows[:2]]
    loss = f(*inputs)
    return loss, *torch.autograd.grad(loss, inputs, torch.full_like(loss, 1.7))


def worst(got, truth) -> float:
    return (got.double() - truth.double()).abs().max().item()


def dpo_formula(policy, ref, length, beta=0.2, flipped=0.0):
    s = beta * ((policy[:, 0] - ref[:, 0]) - (policy[:, 1] - ref[:, 1]))
    return -(1 - flipped) * F.logsigmoid(s) - flipped * F.logsigmoid(-s)


def ipo_formula(policy, ref, length, beta=0.2, average=False):
    r = (policy - ref) / (length if average else 1)
    return (r[:, 0] - r[:, 1] - 1 / (2 * beta)) ** 2


PREFERENCES = {
    "dpo": (Dpo(beta=0.2), dpo_formula),
    "smoothed": (Dpo(beta=0.2, label_smoothing=0.1), partial(dpo_formula, flipped=0.1)),
    "ipo": (Ipo(beta=0.2), ipo_formula),
    "averaged_ipo": (Ipo(beta=0.2, average=True), partial(ipo_formula, average=True)),
}


@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("pair_weight", [None, torch.tensor([0.5, 0.0, 2.0])])
@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_loss_and_gradients_equal_the_formula(name, pair_weight, with_reference):
    objective, formula = PREFERENCES[name]
    rows = make_rows()
    ref = torch.linspace(-40, -10, 6).double() if with_reference else torch.zeros(6)

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


def test_pairs_split_into_micro_batches_add_up():
    rows, ref = make_rows(), torch.linspace(-40, -10, 6).double()
    share = torch.full((3,), 1 / 3, dtype=torch.float64)

    def loss_of(pairs, h, w):
        ids = rows.ids - 2 * pairs.start
        mine = (ids >= 0) & (rows.ids < 2 * pairs.stop)
        targets = torch.where(mine, rows.targets, -100)
        part = ref[2 * pairs.start : 2 * pairs.stop]
        return linear_preference_loss(
            h, w, targets, ids, ref_logp=part, pair_weight=share[pairs], temperature=0.8
        ).loss

    def whole(h, w):
        return linear_preference_loss(
            h, w, rows.targets, rows.ids, ref_logp=ref, temperature=0.8
        ).loss

    parts = [gradients(partial(loss_of, pairs), rows) for pairs in (slice(0, 1), slice(1, 3))]
    for truth, *split in zip(gradients(whole, rows), *parts, strict=True):
        assert worst(sum(split), truth) < 1e-12


def test_pairs_that_do_not_fit_are_named():
    rows = make_rows()
    loss = partial(linear_preference_loss, *rows)
    with pytest.raises(ValueError, match=r"sequence_ids holds [45]: 2 pairs have ids 0 to 3"):
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
    ],
)
def test_impossible_objectives_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
