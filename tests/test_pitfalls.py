"""Show that the ops do not have the bugs of other implementations, one section a bug.

Numbers 12 to 16 and 22, on what torch does around the ops, are in test_pitfalls_torch.py.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from expo_fast.generate import Generator, Request
from expo_fast.kernels import reference
from expo_fast.kernels.head import Head, RowGrads
from expo_fast.modeling.packing import Sample, pack
from expo_fast.ops import (
    Cispo,
    Clipped,
    Dpo,
    Ipo,
    SequenceClipped,
    SimPo,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
)
from judges import (
    clipped_loss,
    completion_logps,
    dpo_loss,
    hidden_states,
    ipo_loss,
    kl_estimate,
    linear_results,
    max_error,
    relative_error,
    simpo_loss,
)
from tiny import tiny_model

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP32, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
ROUNDED = {FP32: 2e-5, BF16: 8e-3}  # bounds of a gradient's relative error


class Case(NamedTuple):
    """Arguments of an op, on the CPU; they are moved to the device that its backend runs on."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    backend: str

    def __call__(self, op: Callable, *given: Any, **named: Any) -> Any:
        def move(x: Tensor) -> Tensor:
            return x.to(GPU if self.backend == "triton" else "cpu")

        given, named = tree_map_only(Tensor, move, ((*self[:3], *given), named))
        return tree_map_only(Tensor, Tensor.cpu, op(*given, backend=self.backend, **named))

    def run(self, loss: Callable) -> list[Tensor]:
        """Return loss(op), where op is this case's `__call__`, and its gradients."""
        hidden, weight = inputs = [x.detach().requires_grad_() for x in self[:2]]
        value = loss(self._replace(hidden=hidden, weight=weight))
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    def truth(self, loss: Callable) -> list[Tensor]:
        """Return loss(logp, entropy, lse) of the definition in fp64, and its gradients."""
        hidden, weight = inputs = [x.detach().double().requires_grad_() for x in self[:2]]
        value = loss(*linear_results(hidden, weight, self.targets))
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (logp, entropy, lse) in fp64."""
        return linear_results(self.hidden.double(), self.weight.double(), self.targets)

    def rows(self, rows: Any) -> "Case":
        return self._replace(hidden=self.hidden[rows], targets=self.targets[rows])


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(params=[FP32, BF16], ids=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


def make_case(backend="torch", dtype=FP32, n=24, d=16, v=300) -> Case:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, d, generator=g).to(dtype) for s in (n, v))
    return Case(hidden, weight, torch.randint(v, (n,), generator=g), backend)


def close(got: list[Tensor], truth: list[Tensor], tolerance: float) -> bool:
    """Return whether the relative error of each tensor is below the tolerance."""
    return all(relative_error(a, t) < tolerance for a, t in zip(got, truth, strict=True))


def all_within(got: Iterable[Tensor], truth: Iterable[Tensor], tolerance: float) -> bool:
    """Return whether the largest absolute error of each tensor is below the tolerance."""
    return all(max_error(a, t) < tolerance for a, t in zip(got, truth, strict=True))


# 1. 32-bit offsets, at 14135 rows of 151936 logits (Liger #1248, #1296)


@pytest.fixture
def far_apart(tmp_path):
    """Return a function that copies rows to places 2^30 elements apart, in sparse files."""
    if GPU.type == "cuda":
        pytest.skip("a GPU has no sparse memory")
    files = []

    def place(x: Tensor) -> Tensor:
        files.append(tmp_path / str(len(files)))
        size = 2**32 + 4096  # a wrapped int32 offset falls into it too
        memory = torch.from_file(str(files[-1]), shared=True, size=size, dtype=x.dtype)
        return memory.as_strided(x.shape, (2**30 + 8, 1), 2**31).copy_(x)

    yield place
    assert sum(os.stat(file).st_blocks for file in files) * 512 < 1e6


@pytest.mark.parametrize("dtype", [FP32, BF16, HALF])
def test_offsets_beyond_2_to_the_31_in_the_weight_are_right(backend, dtype, far_apart):
    near = make_case(backend, dtype, 3, 16, 3)
    near.targets[:] = torch.arange(3)
    far = near._replace(weight=far_apart(near.weight))
    a, b = (case.run(lambda op: torch.stack(op(linear_logprob)).sum()) for case in (near, far))
    assert all(map(torch.equal, a, b))
    assert all(map(torch.equal, near(linear_logprob), far(linear_logprob)))


def test_offsets_beyond_2_to_the_31_in_stored_rows_are_right(far_apart):
    pytest.importorskip("triton")
    from expo_fast.kernels import logprob, rowwise

    case = make_case("triton", BF16, 3, 16, 200)
    head = Head(*case[:2], None, case.targets, 1.0)
    call = logprob._Call.of(head)
    far = replace(call, hidden=far_apart(head.hidden))
    assert all(map(torch.equal, call.target_logits(), far.target_logits()))
    near = logprob.empty_e(head, 3)
    far = far_apart(near.zero_())
    results, log_total = logprob.forward(head, near)
    logprob.forward(head, far)
    assert torch.equal(near, far) and near.count_nonzero() == near.numel()
    row_grads = RowGrads(torch.randn(3), torch.randn(3))
    for e in (near, far):
        logprob.from_stored(head, e, log_total, results, row_grads, e)
    assert torch.equal(near, far)
    for dz in (near.zero_(), far.zero_()):
        logprob.recomputed(head, results, row_grads, 0, dz)
    assert torch.equal(near, far) and near.count_nonzero() == near.numel()

    head = Head(case.hidden.float(), case.weight.float(), None, case.targets, 1.0)
    near = head.hidden @ head.weight.T
    far = far_apart(near)
    tiles = [rowwise.RowTile.softmax(head, z, z) for z in (near, far)]
    assert all(map(torch.equal, *(t.results for t in tiles)))
    assert torch.equal(*(t.logit_gradients(head, row_grads)[0] for t in tiles))


def test_gradients_from_stored_e_may_have_rows_of_another_stride():
    pytest.importorskip("triton")
    from expo_fast.kernels import logprob

    case = make_case("triton", BF16, 5, 16, 201)
    head = Head(*case[:2], None, case.targets, 1.0)
    e = logprob.empty_e(head, 5)  # its rows lie 208 apart
    results, log_total = logprob.forward(head, e)
    row_grads = RowGrads(*torch.randn(2, 5, device=e.device))
    dense = torch.full((6, 201), torch.nan, dtype=BF16, device=e.device)
    logprob.from_stored(head, e, log_total, results, row_grads, dense[:5])
    assert dense[5].isnan().all()
    logprob.from_stored(head, e, log_total, results, row_grads, e)
    assert torch.equal(dense[:5], e)


@pytest.mark.skipif(GPU.type != "cuda", reason="needs 5 GB of E on a GPU")
def test_last_rows_of_16384_by_151936_are_right():
    case = make_case("triton", BF16, 16384, 64, 151936)
    last = case.rows(slice(-64, None))
    _, d_hidden, _ = case.run(lambda op: op(linear_logprob).logp.sum())
    assert max_error(case(linear_logprob).logp[-64:], last.exact()[0]) < 2e-5
    assert (
        relative_error(d_hidden[-64:], last.truth(lambda logp, *_: logp.sum())[1]) < ROUNDED[BF16]
    )


# 2. The y and z of a grid end at 65535, as triton_grpo_loss does at 65536 tokens


def test_70000_rows_are_computed(backend):
    if backend == "triton" and GPU.type != "cuda":
        pytest.skip("minutes in the interpreter; the grids are checked below")
    case = make_case(backend, BF16, 70_000, 8, 5)
    g = torch.linspace(-1, 1, 70_000)
    got = case.run(lambda op: (op(linear_logprob).logp * g).sum())
    assert close(got, case.truth(lambda logp, *_: (logp * g).sum()), ROUNDED[BF16])


def test_every_kernel_is_launched_on_a_grid_of_one_dimension(monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime.jit import KernelInterface

    grids, launch = {}, KernelInterface.__getitem__

    def note(kernel, grid):
        grids[kernel.__name__] = grid
        return launch(kernel, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", note)
    for dtype, fit in ((FP32, 8), (BF16, 8), (BF16, 3)):  # fewer than 5: recomputed
        monkeypatch.setattr(
            "expo_fast.op_backends.triton_fused._rows_within", lambda *_, fit=fit: fit
        )
        case = make_case("triton", dtype, 5)
        case.run(lambda op: torch.stack(op(linear_logprob)).sum())
    expected = {"target_logits", "softmax_sums", "logit_gradients", "scale_stored"}
    assert grids.keys() >= expected | {"row_sums", "row_gradients"}
    assert {len(grid) for grid in grids.values()} == {1}


# 3. A vocabulary that no tile divides, and its phantom tokens of logit 0 (verl #2656, #2899)


@pytest.mark.slow
@pytest.mark.parametrize("v", [1000, 50257, 129920, 151936])
def test_vocabulary_not_a_multiple_of_the_tile_adds_no_phantom_tokens(
    backend, dtype, v, monkeypatch
):
    if backend == "triton" and GPU.type != "cuda":
        from expo_fast.kernels import logprob

        width = 128 if v < 5000 else 2048  # the interpreter's time goes by tiles and their rows
        name = logprob.BY_CARD["default"]
        small = replace(logprob.VARIANTS[name], BN=16, BV=width, BD=16)
        monkeypatch.setitem(logprob.VARIANTS, name, small)
    case = make_case(backend, dtype, 3, 8, v)
    case.hidden[:, 0], case.weight[:, 0] = 1, -30
    case.weight[:, 1:] *= 0.25
    case.targets[-1] = v - 1
    got = case(linear_logprob)
    assert (got.logp <= 0).all()
    assert all_within(got, case.exact(), 2e-5)


# 4. Near p = 1, z_y - lse has no correct digit of 1 - p (Liger #1329)

NEAR_ONE = [10.0**-k for k in range(1, 9)]  # 1 - p of each row, approximately
TIGHT = {FP32: 2e-5, BF16: 3 * 2.0**-8}  # of one value, where E, its factor and the sum are rounded


def near_one_case(backend, dtype, v=1000) -> tuple[Case, Tensor, Tensor]:
    """Return a case whose row i is unit vector i, the rows' logp, and 1 - p.

    The weight's gradient is then dz.T.
    """
    gaps = torch.tensor([math.log(rest / (v - 1)) for rest in NEAR_ONE]).to(dtype)
    weight, targets = gaps.repeat(v, 1), torch.arange(8) + 400
    weight[targets, torch.arange(8)] = 0
    others = gaps.double().exp() * (v - 1)
    case = Case(torch.eye(8, dtype=dtype), weight, targets, backend)
    return case, -torch.log1p(others), others / (1 + others)


@pytest.mark.slow
@pytest.mark.parametrize("on", [False, True])
def test_relative_accuracy_of_a_policy_loss_as_the_probability_goes_to_one(backend, dtype, on):
    case, logp, rest = near_one_case(backend, dtype)
    a, w = torch.tensor([1.0, -0.5, 2.0, 1.0, -1.0, 0.3, 1.0, -2.0]), torch.linspace(0.1, 1, 8)
    for i in range(8):  # one row's weight at a time: the loss is that of the row alone
        alone = torch.where(torch.arange(8) == i, w, 0)
        given = {"objective": Cispo(), "on_policy": torch.full((8,), on)}
        policy = partial(linear_policy_loss, **given)
        loss, _, d_weight = case.run(lambda op, f=policy, x=alone: op(f, a, x).loss)
        scale = -(w * a)[i].item()
        assert loss.item() == pytest.approx(scale * logp[i].item(), rel=2e-5)
        dz = d_weight[400 + i, i].item()
        assert dz == pytest.approx(scale * rest[i].item(), rel=TIGHT[dtype])


def test_relative_accuracy_of_a_preference_loss_as_the_probability_goes_to_one(backend, dtype):
    case, logp, rest = near_one_case(backend, dtype)
    dpo = partial(linear_preference_loss, objective=Dpo(beta=0.3))
    _, _, d_weight = case.run(lambda op: op(dpo, torch.arange(8)).loss)
    chosen, rejected = logp.view(4, 2).T
    grad = -0.3 * torch.sigmoid(-0.3 * (chosen - rejected)) / 4
    truth = torch.stack([grad, -grad], 1).view(-1) * rest
    dz = d_weight[case.targets, torch.arange(8)].double()
    assert (dz / truth - 1).abs().max() < TIGHT[dtype]


# 5. exp(z_j - z_y) overflows fp32 where logp < -88, if the target's logit is the anchor


class Known(NamedTuple):
    """Arguments of the losses below for 16 rows: four sequences, two pairs."""

    old: Tensor
    ref: Tensor
    a: Tensor = torch.linspace(-1, 1, 16)
    w: Tensor = torch.linspace(0.5, 1, 16)
    ids: Tensor = torch.arange(16) // 4

    def sums(self, x: Tensor) -> Tensor:
        return x.new_zeros(4).index_add(0, self.ids, x)


PAIRS = {"dpo": Dpo(), "ipo": Ipo(average=True), "simpo": SimPo()}


def our_loss(name: str, k: Known, op: Callable, **named) -> Tensor:
    if name == "logprob":
        got = op(linear_logprob, **named)
        return (k.a * got.logp + got.entropy - k.w * got.lse).sum()
    if name in PAIRS:
        named |= {"objective": PAIRS[name], "ref_logp": k.sums(k.ref)}
        return op(linear_preference_loss, k.ids, **named).loss
    named |= {"objective": {"policy": Clipped, "sequence": SequenceClipped}[name](0.5, 0.5)}
    named |= {"old_logp": k.old, "ref_logp": k.ref, "kl_coef": 0.1, "sequence_ids": k.ids}
    return op(linear_policy_loss, k.a, k.w, **named).loss


def true_loss(name: str, k: Known, logp: Tensor, entropy: Tensor, lse: Tensor) -> Tensor:
    if name == "logprob":
        return (k.a * logp + entropy - k.w * lse).sum()
    if name in PAIRS:
        h = k.sums(logp if name == "simpo" else logp - k.ref)
        h = h[::2] - h[1::2]
        if name == "dpo":
            return dpo_loss(h, beta=0.1).mean()
        if name == "ipo":
            return ipo_loss(h / 4, beta=0.1).mean()
        return simpo_loss(h / 4, beta=2, gamma=1).mean()
    log_ratio = logp - k.old
    ratio = (log_ratio if name == "policy" else k.sums(log_ratio)[k.ids] / 4).exp()
    value = clipped_loss(ratio, k.a, 0.5, 0.5)
    return (k.w * (value + 0.1 * kl_estimate(logp, k.ref))).sum()


@pytest.mark.slow
@pytest.mark.parametrize("gap", [90.0, 1000.0])
@pytest.mark.parametrize("name", ["logprob", "policy", "sequence", *PAIRS])
def test_losses_are_right_where_targets_have_almost_no_probability(backend, dtype, name, gap):
    case = make_case(backend, dtype, 16)
    rows = case.hidden[2::5].float()
    unlikely = -gap * rows / rows.square().sum(1, keepdim=True)
    case.weight[:3], case.targets[2::5] = unlikely.to(dtype), torch.arange(3)
    logp = case.exact()[0]
    assert logp.min() < -gap
    known = Known(*((logp + 0.2 * torch.sin(torch.arange(16) + i)).float() for i in (0, 1)))
    got = case.run(partial(our_loss, name, known))
    exact = case.truth(partial(true_loss, name, known))
    assert got[0].item() == pytest.approx(exact[0].item(), rel=1e-5 * gap**0.5)
    assert close(got[1:], exact[1:], max(2e-6 * gap, ROUNDED[dtype]))


# 6. A weight gradient that is rounded to bf16 after every chunk (Liger #1472, torch, FLSCE)


@pytest.mark.slow
def test_weight_gradient_of_64_chunks_is_as_accurate_as_of_one(backend, monkeypatch):
    n = 65536 if backend != "triton" or GPU.type == "cuda" else 256
    case, one = make_case(backend, BF16, n, 16, 40), torch.ones(n)
    case.targets[:] = 3  # sums of one sign lose the most
    truth = case.truth(lambda logp, *_: -logp.sum())[2]

    def error(case: Case) -> float:
        return relative_error(case.run(lambda op: op(linear_policy_loss, one, one).loss)[2], truth)

    once = error(case if backend != "native" else case._replace(backend="torch"))
    monkeypatch.setattr(reference, "CHUNK_BYTES", n * 40 * 4 // 64)
    monkeypatch.setattr(reference, "CUDA_CHUNK_BYTES", n * 40 * 4 // 64)
    if backend == "triton":
        monkeypatch.setattr("expo_fast.op_backends.triton_fused._rows_within", lambda *_: n // 64)
    assert error(case) <= 2 * once + 1e-5  # csrc's SPAN makes 64 chunks by itself


# 7. The upstream gradient of the first row is used for all rows (Liger #1298)


@pytest.mark.parametrize("result", range(3))
def test_each_row_has_its_own_upstream_gradient(backend, dtype, result):
    case = make_case(backend, dtype)
    g = torch.logspace(-6, 3, 24) * torch.tensor([0.0, -1.0, 1.0, -1.0]).repeat(6)
    g = g[torch.randperm(24)]
    got = case.run(lambda op: (op(linear_logprob)[result] * g).sum())
    truth = case.truth(lambda *results: (results[result] * g).sum())
    for row in range(24):
        if g[row] == 0:
            assert not got[1][row].count_nonzero()
        else:
            assert (
                relative_error(got[1][row], truth[1][row]) < 3 * ROUNDED[dtype]
            )  # the entropy's u is log E
    assert relative_error(got[2], truth[2]) < ROUNDED[dtype]


def test_each_row_has_its_own_advantage_and_weight_over_nine_decades(backend, dtype):
    case, a, w = make_case(backend, dtype), torch.randn(24), torch.logspace(-6, 3, 24)
    w, a[::5] = w[torch.randperm(24)], 0
    got = case.run(lambda op: op(linear_policy_loss, a, w).loss)[1]
    truth = case.truth(lambda logp, *_: (-w * a * logp).sum())[1]
    assert ((got.double() - truth).norm(dim=1) <= ROUNDED[dtype] * truth.norm(dim=1)).all()


# 8. Batches without gradient give NaN, None or a detached graph (NeMo-Automodel #3796)

WITHOUT_GRADIENT = {"no row": 0, "no target": 5, "no weight": 5, "no advantage": 5}


@pytest.mark.parametrize("what", WITHOUT_GRADIENT)
def test_batches_without_gradient_give_gradients_of_zero(backend, dtype, what):
    n = WITHOUT_GRADIENT[what]
    case = make_case(backend, dtype, n)
    if what == "no target":
        case.targets[:] = -100
    a, w, ids = torch.ones(n), torch.ones(n), torch.zeros(n, dtype=torch.int64)
    {"no advantage": a, "no weight": w}.get(what, w[:0]).zero_()
    for objective in (Clipped(), SequenceClipped()):
        known = {"objective": objective, "old_logp": w - 3, "sequence_ids": ids}
        policy = partial(linear_policy_loss, **known)
        loss, *grads = case.run(lambda op, f=policy: op(f, a, w).loss)
        assert loss == 0 and not any(g.count_nonzero() for g in grads)
    statistics = case(linear_policy_loss, a, w, kl_coef=0.1, ref_logp=w)
    assert all(x.isfinite().all() for x in statistics)
    if what in ("no row", "no target"):
        ref = torch.zeros(4)
        loss, *grads = case.run(lambda op: op(linear_preference_loss, ids, ref_logp=ref).loss)
        assert loss.item() == pytest.approx(math.log(2))  # two pairs with a margin of 0
        assert not any(g.count_nonzero() for g in grads)


def test_a_single_token_among_masked_rows_is_right(backend, dtype):
    case = make_case(backend, dtype)
    case.targets[torch.arange(24) != 17] = -100
    got = case.run(lambda op: torch.stack(op(linear_logprob)).sum())
    assert close(got, case.truth(lambda *results: torch.stack(results).sum()), ROUNDED[dtype])


# 9. Trainer, old, reference and sampler log-probs at different temperatures (TRL #4159, MLX #832)


@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.8}, {"top_k": 5}])  # TRL #6789
def test_ratio_of_trainer_to_sampler_is_one_at_every_temperature(backend, truncation):
    model = tiny_model("qwen3")
    asked = [
        Request((20, 21, 30 + i), 12, temperature=t, seed=i, stop_ids=(), **truncation)
        for i, t in enumerate((0.6, 0.6, 1.3))
    ]
    done = Generator(model).sample(asked)
    samples = [
        Sample(tuple(r.prompt_ids), tuple(c.token_ids), 1.0, 1.0, old_logp=c.logp)
        for r, c in zip(asked, done, strict=True)
    ]
    (p,) = pack(samples, 1000)
    hidden = model.hidden(p.tokens, p.positions, p.cu_seqlens, p.parents)[p.rows].detach()
    hot = torch.tensor([r.temperature for r in asked])[p.sequence_ids]
    case = Case(hidden, model.head_weight.detach(), p.targets, backend)
    assert p.old_logp is not None
    ratio = (case(linear_logprob, temperature=hot).logp - p.old_logp).exp()
    assert max_error(ratio, torch.ones_like(ratio)) < 1e-3
    policy = partial(linear_policy_loss, old_logp=p.old_logp, temperature=hot)
    got = case(policy, p.advantage, p.row_weight)
    assert got.ratio_max.item() == pytest.approx(1, abs=1e-3)
    assert got.ratio_mean.item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", ["logprob", "policy", "dpo"])
def test_a_temperature_equals_a_division_of_the_hidden_states(backend, name, per_row):
    case = make_case(backend, n=16)
    t = torch.linspace(0.5, 2, 16) if per_row else torch.full((16,), 0.6)
    divided = case._replace(hidden=case.hidden / t[:, None])
    known = Known(*(divided(linear_logprob).logp + 0.1 * torch.randn(2, 16)))
    given = t if per_row else 0.6
    got = case.run(lambda op: our_loss(name, known, op, temperature=given))
    loss, d_hidden, d_weight = divided.run(partial(our_loss, name, known))
    assert close(got, [loss, d_hidden / t[:, None], d_weight], 1e-5)


# 10. Log-probs rounded to the inputs' bf16 have an error of 4e-3 (torch, verl)


@pytest.mark.parametrize("default", [FP32, BF16])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (HALF, HALF), (BF16, FP32), (FP32, BF16)])
def test_results_are_fp32_and_exact_for_inputs_of_any_dtype(backend, dtypes, default):
    case = make_case(backend)
    case = case._replace(hidden=case.hidden.to(dtypes[0]), weight=case.weight.to(dtypes[1]))
    truth, one, ids = case.exact(), torch.ones(24), torch.arange(24) // 6
    try:
        torch.set_default_dtype(default)
        got = case(linear_logprob)
        policy = case(linear_policy_loss, one, one, old_logp=one, ref_logp=one, kl_coef=0.1)
        pairs = case(linear_preference_loss, ids)
    finally:
        torch.set_default_dtype(FP32)
    assert {x.dtype for x in (*got, *policy, *pairs)} == {FP32}
    assert all_within((*got, policy.logp), (*truth, truth[0]), 2e-5)
    assert max_error(pairs.chosen_logp, truth[0].view(4, 6).sum(1)[::2]) < 1e-4


# 11. Tied embeddings lose one of the two gradients, or the tie (NeMo-RL #227)


def test_gradients_of_a_tied_weight_as_embedding_and_as_head_add_up(backend):
    tokens, mix, one = torch.randint(50, (24,)), torch.randn(16, 16), torch.ones(24)
    case = make_case(backend, v=50)
    tied, exact = case.weight.clone().requires_grad_(), case.weight.double().requires_grad_()
    hidden = torch.nn.functional.embedding(tokens, exact) @ mix.double()
    (-linear_results(hidden, exact, case.targets)[0].mean()).backward()
    assert exact.grad is not None
    for steps in (1, 2):  # .grad accumulates
        hidden = torch.nn.functional.embedding(tokens, tied) @ mix
        case._replace(hidden=hidden, weight=tied)(linear_policy_loss, one, one / 24).loss.backward()
        assert tied.grad is not None and relative_error(tied.grad, steps * exact.grad) < 1e-5


def test_a_tied_model_is_one_parameter_that_a_step_moves_once():
    model = tiny_model("llama-tied")
    assert model.head_weight is model.model.embed_tokens.weight
    assert sum(p is model.head_weight for p in model.parameters()) == 1
    tokens = torch.arange(20, 30)
    hidden = hidden_states(model, tokens)
    linear_logprob(hidden, model.head_weight, tokens).logp.sum().backward()
    before, grad = model.head_weight.detach().clone(), model.head_weight.grad
    assert grad is not None
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert max_error(model.head_weight, before - 0.1 * grad) < 1e-6


# 17. Atomics and locks give another sum, and another gradient, in each run


@pytest.mark.parametrize("name", ["logprob", "policy", "sequence", "dpo"])
def test_equal_calls_give_equal_bits(backend, dtype, name):
    case, known = make_case(backend, dtype, 16), Known(*torch.randn(2, 16) - 6)
    first, again = (case.run(partial(our_loss, name, known)) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_a_rows_log_prob_depends_on_its_batch_only_by_rounding(backend, dtype):
    case = make_case(backend, dtype)
    in_full_batch = case(linear_logprob).logp[3]
    for rows in (slice(3, 4), slice(3, 8), torch.tensor([3, 20, 5, 11, 3])):
        assert max_error(case.rows(rows)(linear_logprob).logp[0], in_full_batch) < 1e-5


# 18. A target out of range reads other memory, or its check stalls the GPU (Liger FLSCE)


@pytest.mark.parametrize("wrong", [300, -1, -101, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_a_target_outside_the_vocabulary_is_named_by_every_op(wrong, kind):
    case, one = make_case(), torch.ones(24)
    targets = case.targets.to(kind)
    targets[[4, 9]] = torch.tensor([-100, wrong], dtype=kind)
    case, w = case._replace(targets=targets), torch.where(torch.arange(24) == 9, 0, one)
    for op, *given in (
        (linear_logprob,),
        (linear_policy_loss, one, w),  # the row itself has no weight
        (linear_preference_loss, torch.arange(24) // 6),
    ):
        with pytest.raises(ValueError, match=rf"targets\[9\] is {wrong}: must lie in \[0, 300\)"):
            case(op, *given)


# 19. Packing rolls labels across a border of sequences, so NeMo-RL forbids it


@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_packed_sequences_equal_those_of_single_sequences(backend, seed):
    g = torch.Generator().manual_seed(seed)
    model, samples, truth = tiny_model("mistral-window"), list[Sample](), torch.zeros(())
    for i, n in enumerate(torch.randint(2, 14, (5,), generator=g).tolist()):
        text = torch.randint(20, 80, (n,), generator=g)
        cut = int(torch.randint(1, n, (1,), generator=g))
        prompt, completion = tuple(text[:cut].tolist()), tuple(text[cut:].tolist())
        samples.append(Sample(prompt, completion, 1.0, 1 / (i + 1)))
        truth = truth - completion_logps(model, prompt, completion).sum() / (i + 1)
    parameters = list(model.parameters())
    exact = torch.autograd.grad(truth, parameters)
    for budget in (1, 20, 1000):
        for x in parameters:
            x.grad = None
        for p in pack(samples, budget):
            hidden = model.hidden(p.tokens, p.positions, p.cu_seqlens, p.parents)[p.rows]
            case = Case(hidden, model.head_weight, p.targets, backend)
            case(linear_policy_loss, p.advantage, p.row_weight).loss.backward()
        assert close([x.grad for x in parameters if x.grad is not None], list(exact), 1e-4)


# 20. Normalisers under gradient accumulation, and what the ratio, clip and length apply to


def test_a_micro_batch_without_targets_changes_no_normaliser(backend, dtype):
    """In Liger #1082, each micro-batch was divided by its own number of targets."""
    case, a = make_case(backend, dtype), torch.randn(24)
    case.targets[8:16] = -100
    w = (case.targets != -100).float() / 16
    parts = [slice(i, i + 8) for i in (0, 8, 16)]
    split = [
        case.rows(s).run(lambda op, s=s: op(linear_policy_loss, a[s], w[s]).loss) for s in parts
    ]
    loss, d_hidden, d_weight = zip(*split, strict=True)
    truth = case.truth(lambda logp, *_: (-w * a * logp).sum())[1:]
    assert torch.stack(loss).sum().item() == pytest.approx(-(w * a).sum().item(), abs=1e-5)
    got = [torch.cat(d_hidden), torch.stack(d_weight).double().sum(0)]
    assert close(got, truth, ROUNDED[dtype])


@pytest.mark.parametrize("objective", [Clipped(), Clipped(cap=1.5), Cispo(), SequenceClipped()])
def test_a_kl_term_is_not_multiplied_by_the_ratio_nor_clipped(backend, objective):
    case = make_case(backend)
    logp = case(linear_logprob).logp
    ref, known = logp + 0.5 * torch.randn(24), {"objective": objective, "kl_coef": 0.3}
    known |= {"ref_logp": ref, "old_logp": logp - torch.linspace(-2, 2, 24)}
    known |= {"sequence_ids": torch.arange(24) // 6}
    policy = partial(linear_policy_loss, **known)
    got = case.run(lambda op: op(policy, torch.zeros(24), torch.ones(24)).loss)

    def k3(logp, *_):
        return 0.3 * kl_estimate(logp, ref).sum()

    assert close(got, case.truth(k3), 1e-5)


def test_a_sequences_length_is_that_of_its_targets(backend):
    """Prompt rows in the denominator would pull the sequence's ratio towards 1."""
    case, ids = make_case(backend), torch.arange(24) // 6
    old, a = case(linear_logprob).logp - 0.3 * torch.randn(24), torch.randn(4)[ids]
    policy = partial(linear_policy_loss, objective=SequenceClipped(0.1, 0.1))

    def run(more: Tensor) -> list[Tensor]:
        """Return loss and gradients with `more` rows without target after each row."""
        at = torch.arange(24).repeat_interleave(1 + more)
        first = torch.cat([torch.tensor([True]), at[1:] != at[:-1]])
        long = case.rows(at)
        long.targets[~first] = -100
        known = {"old_logp": old[at], "sequence_ids": ids[at]}
        loss, d_hidden, d_weight = long.run(lambda op: op(policy, a[at], a[at] ** 2, **known).loss)
        assert not d_hidden[~first].count_nonzero()
        return [loss, d_hidden[first], d_weight]

    prompts = (torch.arange(24) % 6 < ids).long()
    assert close(run(prompts), run(0 * prompts), 1e-5)


# 21. 0 * NaN: a masked row makes the weight's gradient NaN, and so does a row of certain target


def test_nan_in_masked_rows_changes_no_result(backend, dtype):
    case, (a, old, ref) = make_case(backend, dtype), torch.randn(3, 24)
    masked = torch.arange(24) % 3 == 0
    case.targets[::6] = -100  # half of them have no target, the other half no weight
    w = torch.where(masked, 0, 1 / 16)

    def run(x: float) -> list[Tensor]:
        dirty = case._replace(hidden=case.hidden.masked_fill(masked[:, None], x))
        b, old_, ref_ = (y.masked_fill(masked, x) for y in (a, old - 6, ref - 6))
        known = {"old_logp": old_, "ref_logp": ref_, "kl_coef": 0.1, "entropy_coef": 0.01}
        return dirty.run(lambda op: op(linear_policy_loss, b, w, **known).loss)

    clean = run(0.0)
    assert all(x.isfinite().all() for x in clean)
    for x in (math.nan, math.inf):
        assert all(map(torch.equal, run(x), clean))


def test_certain_rows_without_advantage_have_no_gradient(backend, dtype):
    case, one = make_case(backend, dtype), torch.ones(24)
    case.targets[::2] = torch.arange(12)
    case.weight[:12] = 40 * case.hidden[::2]  # of probability 1
    a = (torch.arange(24) % 2).float()
    for known in ({}, {"old_logp": case(linear_logprob).logp - 100}, {"on_policy": one.bool()}):
        policy = partial(linear_policy_loss, **known)
        loss, d_hidden, d_weight = case.run(lambda op, f=policy: op(f, a, one).loss)
        assert loss.isfinite() and d_weight.isfinite().all()
        assert not d_hidden[::2].count_nonzero()
