"""Compare losses and gradients with those of Liger, in fp32."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from expo_fast.ops import (
    Cispo,
    Clipped,
    Dpo,
    SequenceClipped,
    SoftAdaptive,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
)
from judges import relative_error

liger = pytest.importorskip("liger_kernel.chunked_loss", exc_type=ImportError)
TOLERANCE = 1e-4  # relative to the norm of Liger's
MAX_LENGTH = 32


@dataclass(frozen=True)
class Batch:
    """B sequences of T rows, the form of Liger; the ops take B * T rows."""

    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (B, T)
    mask: Tensor  # (B, T) 1 for a row that counts
    advantage: Tensor  # (B,)
    old_logp: Tensor  # (B, T) nats
    ref_logp: Tensor  # (B, T) nats


def make_batch(b=6, t=11, d=24, v=4500) -> Batch:  # Liger's chunks are of 4096 vocabulary entries
    hidden, weight = torch.randn(b, t, d), torch.randn(v, d) / d**0.5
    targets = torch.randint(v, (b, t))
    hidden = hidden + 4 * torch.rand(b, t, 1) * weight[targets]
    lengths = torch.tensor([t, 1, 5, 8, t, 3])[:b, None]
    logp = linear_logprob(hidden, weight, targets, backend="torch").logp
    return Batch(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets,
        mask=(torch.arange(t) < lengths).float(),
        advantage=torch.tensor([1.0, -1.0, 0.7, -2.0, 0.0, 0.3])[:b],
        old_logp=logp + 0.4 * torch.randn(b, t),
        ref_logp=logp + 0.3 * torch.randn(b, t),
    )


def same(batch: Batch, ours: Tensor, theirs: Tensor) -> None:
    inputs = (batch.hidden, batch.weight)
    pairs = [(ours, theirs)]
    pairs += zip(
        torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True
    )
    for a, b in pairs:
        assert relative_error(a, b) < TOLERANCE


def row_weight(mask: Tensor, loss_type: str) -> Tensor:  # (B, T)
    b, length = len(mask), mask.sum(1, keepdim=True)
    if loss_type in ("grpo", "sapo"):
        return mask / (b * length)
    if loss_type == "dr_grpo":
        return mask / (b * MAX_LENGTH)
    return mask / mask.sum()


CLIP = {"epsilon_low": 0.2, "epsilon_high": 0.28}
POLICY: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (Clipped(0.2, 0.28), CLIP | {"loss_type": "grpo"}),
    "bnpo": (Clipped(0.2, 0.28), CLIP | {"loss_type": "bnpo"}),
    "dapo": (Clipped(0.2, 0.28), CLIP | {"loss_type": "dapo"}),
    "dr_grpo": (
        Clipped(0.2, 0.28),
        CLIP | {"loss_type": "dr_grpo", "max_completion_length": MAX_LENGTH},
    ),
    "delta": (Clipped(0.2, 0.28, cap=1.5), CLIP | {"loss_type": "dapo", "delta": 1.5}),
    # here epsilon_high is the cap itself, as ours is, not its distance from 1
    "cispo": (Cispo(cap=1.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
    "sapo": (
        SoftAdaptive(0.8, 1.2),
        {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.2},
    ),
    "gspo": (
        SequenceClipped(0.2, 0.28),
        CLIP | {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", POLICY)
def test_policy_loss_and_gradients_equal_ligers(name, beta, temperature):
    batch, (objective, settings) = make_batch(), POLICY[name]
    theirs = liger.LigerFusedLinearGRPOLoss(
        beta=beta, use_ref_model=beta > 0, temperature=temperature, compiled=False, **settings
    )(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.mask,
        batch.advantage,
        ref_per_token_logps=batch.ref_logp,
        old_per_token_logps=batch.old_logp,
    )[0]
    b, t = batch.mask.shape
    ours = linear_policy_loss(
        batch.hidden.view(b * t, -1),
        batch.weight,
        batch.targets.masked_fill(batch.mask == 0, -100).view(-1),
        batch.advantage.repeat_interleave(t),
        row_weight(batch.mask, settings["loss_type"]).view(-1),
        objective=objective,
        old_logp=batch.old_logp.view(-1),
        ref_logp=batch.ref_logp.view(-1),
        kl_coef=beta,
        temperature=temperature,
        sequence_ids=torch.arange(b).repeat_interleave(t),
    ).loss
    same(batch, ours, theirs)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("with_reference", [True, False])
def test_preference_loss_and_gradients_equal_ligers(beta, with_reference):
    batch = make_batch()
    targets = batch.targets.masked_fill(batch.mask == 0, -100)
    ref_hidden = (batch.hidden + 0.3 * torch.randn(batch.hidden.shape)).detach()
    ref_weight = batch.weight.detach() * 1.1
    theirs = liger.LigerFusedLinearDPOLoss(
        beta=beta, use_ref_model=with_reference, compute_nll_loss=False, compiled=False
    )(batch.weight, batch.hidden, targets, ref_input=ref_hidden, ref_weight=ref_weight)[0]
    b, t = targets.shape
    # Liger's first half is chosen, its second rejected; in ours they alternate
    ids = torch.arange(b).view(-1, 2).T.reshape(-1)
    summed = linear_logprob(ref_hidden, ref_weight, targets).logp.sum(1)
    ours = linear_preference_loss(
        batch.hidden.view(b * t, -1),
        batch.weight,
        targets.view(-1),
        ids.repeat_interleave(t),
        objective=Dpo(beta),
        ref_logp=summed[ids.argsort()] if with_reference else None,
    ).loss
    same(batch, ours, theirs)
