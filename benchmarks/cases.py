"""Shapes and inputs of the op benchmarks, and the implementations that compete in each op."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expo_fast.ops import (
    IGNORE,
    Clipped,
    Dpo,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
)

SHAPES = {  # (V, D) of the LM head
    "smollm2-135m": (49152, 576),
    "qwen2.5-0.5b": (151936, 896),
    "qwen2.5-1.5b": (151936, 1536),
    "llama-3.2-1b": (128256, 2048),
    "qwen2.5-3b": (151936, 2048),
    "llama-3.2-3b": (128256, 3072),
}
ROWS = (1024, 4096, 16384)
ZEROS = (0, 40)  # percentages of zero rows
SEQUENCE = 256  # rows in a sequence
CLIP = 0.2  # clip range of the policy loss
BETA = 0.1  # coefficient of the preference loss, per nat
OURS = "expo_fast"


def head_shape(model: str) -> tuple[int, int]:
    """Return (V, D) of one of `SHAPES`, or of a name such as "8192x576"."""
    if model in SHAPES:
        return SHAPES[model]
    v, d = model.split("x")
    return int(v), int(d)


@dataclass(frozen=True)
class Case:
    """Inputs of an op: B sequences of equal length.

    For a preference loss, all chosen sequences come before all rejected ones. A zero row has no
    target and no gradient.
    """

    hidden: Tensor  # (N, D) bf16
    ref_hidden: Tensor  # (N, D) bf16, hidden states of a reference model with the same LM head
    weight: Tensor  # (V, D) bf16
    targets: Tensor  # (N,), IGNORE in a zero row
    upstream: Tensor  # (N,) d loss / d logp, 0 in a zero row
    row_weight: Tensor  # (N,) weights of the policy loss: the mean over sequences of their means
    old_logp: Tensor  # (N,) nats
    advantage: Tensor  # (B,)
    pair_ids: Tensor  # (N,) in the format of linear_preference_loss

    @property
    def shape(self) -> tuple[int, int]:
        """Return (B, rows in a sequence)."""
        n_sequences = len(self.advantage)
        return n_sequences, len(self.targets) // n_sequences

    @property
    def active(self) -> Tensor:
        """Return (N,) bool: the rows that have a target."""
        return self.targets != IGNORE

    def with_zero_rows(self, percent: int) -> "Case":
        """Return the case with a percentage of zero rows, a multiple of 10.

        In training, prompt tokens and groups without advantage are such rows.
        """
        index = torch.arange(len(self.targets), device=self.targets.device)
        zero = index * 3 % 10 < percent // 10  # times 3: not one run of rows
        targets = self.targets.masked_fill(zero, IGNORE)
        weight = _mean_of_means(targets.view(self.shape))
        upstream = self.upstream.masked_fill(zero, 0)
        return replace(self, targets=targets, upstream=upstream, row_weight=weight)


@lru_cache(maxsize=1)
def make_case(model: str, rows: int, device: str) -> Case:
    """Return random inputs. Raise ValueError if the rows do not divide into sequences."""
    v, d = head_shape(model)
    b = max(4, rows // SEQUENCE)
    if rows % b:
        raise ValueError(f"rows={rows}: must be a multiple of {b}, the number of sequences")
    g = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=g, device=device)
    weight = (normal(v, d) * (2 / d**0.5)).bfloat16()
    targets = torch.randint(v, (rows,), generator=g, device=device)
    # Like sampled tokens, targets are likely: their probability is 1e-2 to 1.
    along_target = torch.empty(rows, 1, device=device).uniform_(2.5, 5.5, generator=g)
    hidden = (normal(rows, d) + along_target * weight[targets]).bfloat16()
    logp = linear_logprob(hidden, weight, targets, backend="torch").logp
    sequences = torch.arange(b, device=device).view(2, -1)
    pair_ids = 2 * (sequences % (b // 2)) + sequences // (b // 2)
    return Case(
        ref_hidden=(hidden + 0.1 * normal(rows, d)).bfloat16(),
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        targets=targets,
        upstream=normal(rows),
        row_weight=_mean_of_means(targets.view(b, -1)),
        old_logp=logp + 0.1 * normal(rows),  # some ratios leave the clip range
        advantage=normal(b),
        pair_ids=pair_ids.repeat_interleave(rows // b),
    )


def _mean_of_means(targets: Tensor) -> Tensor:
    """Return the weights (B * T,) of a mean over sequences of means over their active rows."""
    active = (targets != IGNORE).float()
    per_sequence = active.sum(1, keepdim=True).clamp(min=1)
    return (active / per_sequence / len(active)).reshape(-1)


# The losses by their formulas, from log-probs (N,). `reference` holds the log-probs under the
# reference model.


def weighted_sum(case: Case, logp: Tensor, reference: Tensor | None) -> Tensor:
    return (logp * case.upstream).sum()


def clipped(case: Case, logp: Tensor, reference: Tensor | None) -> Tensor:
    ratio = (logp - case.old_logp).exp()
    advantage = case.advantage.repeat_interleave(case.shape[1])
    bounded = ratio.clamp(1 - CLIP, 1 + CLIP) * advantage
    return -(case.row_weight * torch.minimum(ratio * advantage, bounded)).sum()


def dpo(case: Case, logp: Tensor, reference: Tensor | None) -> Tensor:
    assert reference is not None
    log_ratio = (logp - reference) * case.active
    per_sequence = log_ratio.view(2, -1, case.shape[1]).sum(-1)  # (2, P)
    chosen, rejected = per_sequence
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


# The contestants. A peer is a contestant of an op only where it is installed.

# Takes hidden, weight and targets. Returns log-probs (N,).
Head = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """An implementation of an op."""

    run: Callable[[Case], Tensor]  # returns log-probs (N,), 0 in zero rows, or a loss
    # Time over the limit of the op on one Zen 5 core. Only `estimated_seconds` uses it.
    cost: float
    logit_bytes: int = 0  # peak memory for each of the N * V logits


class Op(NamedTuple):
    """An op: its loss by formula, and its contestants."""

    loss: Callable[[Case, Tensor, Tensor | None], Tensor]
    contestants: Callable[[str], Iterator[tuple[str, Contestant]]]  # takes a device
    backward: bool = True
    head: bool = False  # whether contestants return log-probs, not the loss
    reference: bool = False  # whether the loss needs a reference model's log-probs

    def run(self, contestant: Contestant, case: Case) -> Tensor:
        """Run the timed work. Gradients are left in the tensors of the case."""
        with torch.set_grad_enabled(self.backward):
            value = contestant.run(case)
            if self.backward:
                loss = self.loss(case, value, None) if self.head else value
                loss.backward()
        return value.detach()


def heads(device: str, backward: bool) -> Iterator[tuple[str, Contestant]]:
    """Yield the contestants that compute log-probs."""

    def contestant(head: Head, cost: float, logit_bytes: int = 0) -> Contestant:
        return Contestant(
            lambda case: head(case.hidden, case.weight, case.targets), cost, logit_bytes
        )

    bytes_kept = 16 if backward else 8
    for backend, name in backends(device):
        yield name, contestant(partial(_ours, backend=backend), 1.5)
    yield "eager", contestant(eager, 4, bytes_kept)
    if device != "cpu":
        compiled = torch.compile(eager, dynamic=True)
        yield "eager, torch.compile", contestant(compiled, 2, bytes_kept)
    if hasattr(F, "linear_cross_entropy"):
        from_torch = partial(F.linear_cross_entropy, reduction="none", options=None)
        yield "torch F.linear_cross_entropy", contestant(_negative(from_torch), 2, 5)
    with suppress(ImportError):
        from cut_cross_entropy import (  # pyright: ignore[reportMissingImports]
            linear_cross_entropy,
        )

        impl = "torch_compile" if device == "cpu" else "cce"
        cce = partial(linear_cross_entropy, reduction="none", impl=impl)
        logit_bytes = 2 if device == "cpu" else 0
        yield f"cut_cross_entropy {impl}", contestant(_negative(cce), 1.5, logit_bytes)
    with suppress(ImportError):
        from liger_kernel.ops import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearScaledCrossEntropyFunction as Scaled,
        )

        yield "Liger scaled cross entropy", contestant(_negative(Scaled.apply), 5)
    with suppress(ImportError):
        from trl.trainer.utils import (  # pyright: ignore[reportMissingImports]
            selective_log_softmax,
        )

        trl = partial(_trl, selective_log_softmax)
        yield "TRL selective_log_softmax", contestant(trl, 4, bytes_kept)


def backends(device: str) -> Iterator[tuple[str | None, str]]:
    """Yield the backends of ours to time, each with its name as a contestant."""
    yield None, OURS
    if device != "cpu":
        yield "torch", f"{OURS} torch"


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probs (N,), 0 in zero rows, in plain PyTorch."""
    logits = (hidden @ weight.T).float()
    index = targets.clamp(min=0)[:, None]
    logp = logits.gather(1, index)[:, 0] - logits.logsumexp(-1)
    return torch.where(targets == IGNORE, 0, logp)


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str | None) -> Tensor:
    return linear_logprob(hidden, weight, targets, backend=backend).logp


def _negative(head: Head) -> Head:
    return lambda hidden, weight, targets: -head(hidden, weight, targets).float()


def _trl(selective_log_softmax: Callable, *head: Tensor) -> Tensor:
    hidden, weight, targets = head
    length = min(SEQUENCE, len(hidden))
    logits = (hidden @ weight.T).view(-1, length, len(weight))
    index = targets.clamp(min=0).view(logits.shape[:2])
    logp = selective_log_softmax(logits, index).reshape(-1)
    return torch.where(targets == IGNORE, 0, logp.float())


def policy(device: str) -> Iterator[tuple[str, Contestant]]:
    """Yield the contestants of the policy loss."""
    for backend, name in backends(device):
        yield name, Contestant(partial(_policy, backend=backend), 1.5)
    yield "eager", Contestant(_eager_policy, 4, 16)
    with suppress(ImportError):
        from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearGRPOLoss,
        )

        yield "LigerFusedLinearGRPOLoss", Contestant(partial(_grpo, LigerFusedLinearGRPOLoss), 5)


def _eager(case: Case) -> Tensor:
    return eager(case.hidden, case.weight, case.targets)


def _eager_policy(case: Case) -> Tensor:
    return clipped(case, _eager(case), None)


def _policy(case: Case, backend: str | None) -> Tensor:
    return linear_policy_loss(
        case.hidden,
        case.weight,
        case.targets,
        case.advantage.repeat_interleave(case.shape[1]),
        case.row_weight,
        objective=Clipped(CLIP, CLIP),
        old_logp=case.old_logp,
        backend=backend,
    ).loss


def _grpo(liger: Callable, case: Case) -> Tensor:
    loss = liger(
        beta=0.0, use_ref_model=False, loss_type="grpo", epsilon_low=CLIP, epsilon_high=CLIP
    )
    return loss(
        case.hidden.view(*case.shape, -1),
        case.weight,
        case.targets.clamp(min=0).view(case.shape),
        case.active.float().view(case.shape),
        case.advantage,
        old_per_token_logps=case.old_logp.view(case.shape),
    )[0]


def preference(device: str) -> Iterator[tuple[str, Contestant]]:
    """Yield the contestants of the preference loss, log-probs of the reference model included."""
    for backend, name in backends(device):
        yield name, Contestant(partial(_preference, backend=backend), 1.5)
    yield "eager", Contestant(_eager_dpo, 4, 16)
    with suppress(ImportError):
        from liger_kernel.chunked_loss import (  # pyright: ignore[reportMissingImports]
            LigerFusedLinearDPOLoss,
        )

        yield "LigerFusedLinearDPOLoss", Contestant(partial(_liger_dpo, LigerFusedLinearDPOLoss), 2)


def _preference(case: Case, backend: str | None) -> Tensor:
    head = (case.weight, case.targets)
    with torch.no_grad():
        logp = linear_logprob(case.ref_hidden, *head, backend=backend).logp
        per_sequence = logp.view(2, -1, case.shape[1]).sum(-1)
        reference = per_sequence.T.reshape(-1)
    return linear_preference_loss(
        case.hidden,
        *head,
        case.pair_ids,
        objective=Dpo(BETA),
        ref_logp=reference,
        backend=backend,
    ).loss


def _eager_dpo(case: Case) -> Tensor:
    with torch.no_grad():
        reference = eager(case.ref_hidden, case.weight, case.targets)
    return dpo(case, _eager(case), reference)


def _liger_dpo(liger: Callable, case: Case) -> Tensor:
    return liger(beta=BETA, compute_nll_loss=False)(
        case.weight,
        case.hidden.view(*case.shape, -1),
        case.targets.view(case.shape),
        ref_input=case.ref_hidden.view(*case.shape, -1),
        ref_weight=case.weight.detach(),
    )[0]


OPS = {
    "logprob forward": Op(
        loss=weighted_sum,
        contestants=partial(heads, backward=False),
        backward=False,
        head=True,
    ),
    "logprob forward+backward": Op(
        loss=weighted_sum,
        contestants=partial(heads, backward=True),
        head=True,
    ),
    "policy loss": Op(clipped, policy),
    "preference loss": Op(dpo, preference, reference=True),
}


@dataclass(frozen=True)
class Group:
    """One setting of an op, in which its contestants are timed against each other."""

    op: str
    model: str  # see `head_shape`
    rows: int
    zeros: int  # percentage of zero rows

    def __str__(self) -> str:
        zeros = f", {self.zeros}% zero" if self.zeros else ""
        return f"{self.op}, {self.model}, {self.rows} rows{zeros}"

    def case(self, device: str) -> Case:
        """Return the inputs."""
        case = make_case(self.model, self.rows, device)
        return case.with_zero_rows(self.zeros) if self.zeros else case


def groups(
    models: list[str] | None = None,
    rows: list[int] | None = None,
    ops: list[str] | None = None,
    zeros: Sequence[int] = ZEROS,
) -> list[Group]:
    """Return all settings of these models, row counts and ops; None stands for all."""
    settings = product(rows or ROWS, models or SHAPES, zeros, ops or OPS)
    return [Group(op, model, n, zeros) for n, model, zeros, op in settings]
