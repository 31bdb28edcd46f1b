"""Check each public op on each backend of this machine, in seconds.

An op is right if its error, relative to fp64, is at most twice that of plain PyTorch in the same
dtype. The error is a norm over the result and all gradients.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from expo_fast.kernels.head import Head
from expo_fast.op_backends import dispatch
from expo_fast.ops import (
    Clipped,
    Dpo,
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
)

N_ROWS = 96
DEPTH = 128
VOCABULARY = 1003  # a multiple of no block size
MOST_OF_PLAIN = 2.0
ROUNDING = {
    torch.float32: 1e-6,
    torch.bfloat16: 1e-3,
}  # for results that plain PyTorch gets exactly

# (hidden, weight, backend) -> a scalar that depends on all results
Op = Callable[[Tensor, Tensor, str], Tensor]


@dataclass(frozen=True)
class OpResult:
    """The errors of one op on one backend."""

    op: str
    backend: str
    dtype: torch.dtype
    error: float
    plain_error: float
    seconds: float

    @property
    def ok(self) -> bool:
        return self.error <= MOST_OF_PLAIN * self.plain_error + ROUNDING[self.dtype]


def check_ops() -> Iterator[OpResult]:
    """Run each op, forward and backward, on each backend of the CPU and of the first GPU."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        for dtype in ROUNDING:
            for name, op in ops_on(device).items():
                yield from check_op(name, op, device, dtype)
        yield check_group_advantage(device)


def check_op(name: str, op: Op, device: str, dtype: torch.dtype) -> Iterator[OpResult]:
    """Compare an op with fp64 on each backend."""
    hidden, weight = inputs(device)
    truth = values_and_grads(op, hidden.to(dtype).double(), weight.to(dtype).double(), "torch")
    hidden = hidden.to(dtype)
    weight = weight.to(dtype)
    plain = relative_error(values_and_grads(op, hidden, weight, "torch"), truth)
    targets = torch.zeros(N_ROWS, dtype=torch.int64, device=device)
    head = Head(hidden, weight, None, targets, 1.0)
    for backend in dispatch.BACKENDS:
        if backend == "torch" or not dispatch.runs(backend, head):
            continue
        if backend == "native" and not dispatch.compiles():
            continue
        start = time.monotonic()
        got = values_and_grads(op, hidden, weight, backend)
        seconds = time.monotonic() - start
        yield OpResult(name, backend, dtype, relative_error(got, truth), plain, seconds)


def inputs(device: str) -> tuple[Tensor, Tensor]:
    """Return hidden states (N, D) and a weight (V, D)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N_ROWS, DEPTH, generator=generator)
    weight = torch.randn(VOCABULARY, DEPTH, generator=generator) / DEPTH**0.5
    return hidden.to(device), weight.to(device)


def ops_on(device: str) -> dict[str, Op]:
    """Return the ops that have a head, with all other arguments."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(VOCABULARY, (N_ROWS,), generator=generator).to(device)
    advantage = torch.randn(N_ROWS, generator=generator).to(device)
    row_weight = (torch.rand(N_ROWS, generator=generator) / N_ROWS).to(device)
    old_logp = (-7 + torch.randn(N_ROWS, generator=generator)).to(device)
    sequences = (torch.arange(N_ROWS) * 8 // N_ROWS).to(device)
    return {
        "linear_logprob": partial(logprob_sum, targets, row_weight),
        "linear_policy_loss": partial(policy_loss, targets, advantage, row_weight, old_logp),
        "linear_preference_loss": partial(preference_loss, targets, sequences),
    }


def logprob_sum(
    targets: Tensor, row_weight: Tensor, hidden: Tensor, weight: Tensor, backend: str
) -> Tensor:
    result = linear_logprob(hidden, weight, targets, backend=backend)
    return ((result.logp + 0.1 * result.entropy - 0.2 * result.lse) * row_weight).sum()


def policy_loss(
    targets: Tensor,
    advantage: Tensor,
    row_weight: Tensor,
    old_logp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    backend: str,
) -> Tensor:
    result = linear_policy_loss(
        hidden,
        weight,
        targets,
        advantage,
        row_weight,
        objective=Clipped(0.2, 0.28),
        old_logp=old_logp,
        ref_logp=old_logp,
        kl_coef=0.1,
        entropy_coef=0.01,
        backend=backend,
    )
    return result.loss


def preference_loss(
    targets: Tensor, sequences: Tensor, hidden: Tensor, weight: Tensor, backend: str
) -> Tensor:
    result = linear_preference_loss(
        hidden, weight, targets, sequences, objective=Dpo(beta=0.1), backend=backend
    )
    return result.loss


def values_and_grads(op: Op, hidden: Tensor, weight: Tensor, backend: str) -> list[Tensor]:
    """Return the value and the gradients in both inputs, in fp64."""
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    value = op(hidden, weight, backend)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [value.detach().double(), hidden.grad.double(), weight.grad.double()]


def relative_error(got: list[Tensor], truth: list[Tensor]) -> float:
    """Return the largest error of a tensor, relative to the tensor's norm. NaN is an error."""
    errors = []
    for x, y in zip(got, truth, strict=True):
        error = float((x - y).norm() / y.norm())
        errors.append(error if error == error else float("inf"))
    return max(errors)


def check_group_advantage(device: str) -> OpResult:
    """Compare `group_advantage` with its formula in fp64."""
    generator = torch.Generator().manual_seed(2)
    rewards = torch.rand(12, 8, generator=generator)
    groups = torch.arange(12).repeat_interleave(8)
    centred = rewards.double() - rewards.double().mean(1, keepdim=True)
    truth = centred / (rewards.double().std(1, keepdim=True) + 1e-4)
    start = time.monotonic()
    got = group_advantage(rewards.flatten().to(device), groups.to(device))
    error = relative_error([got.cpu().double()], [truth.flatten()])
    seconds = time.monotonic() - start
    backend = "triton" if device == "cuda" else "torch"
    return OpResult("group_advantage", backend, torch.float32, error, 0.0, seconds)
