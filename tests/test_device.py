"""Repeatability, memory and gradients on the GPU, or on the CPU where there is none."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import Tensor

from expo_fast.algorithms.grpo import PolicyLossConfig, policy_backward
from expo_fast.config import Train
from expo_fast.generate import Generator, Request
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.packing import Sample
from expo_fast.ops import (
    Clipped,
    Dpo,
    group_advantage,
    linear_logprob,
    linear_policy_loss,
    linear_preference_loss,
)
from judges import relative_error
from tiny import tiny_model

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
N, D, V = (4096, 896, 151936) if GPU else (256, 64, 1000)
REPEATS = 50


def rows() -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = (torch.randn(n, D, device=DEVICE).bfloat16() for n in (N, V))
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(V, (N,), device=DEVICE)


def log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.stack(linear_logprob(hidden, weight, targets)).sum()


def policy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    signs, weights = (torch.linspace(a, 1, N, device=DEVICE) for a in (-1, 0))
    old = -torch.linspace(1, 20, N, device=DEVICE)
    given = signs, weights
    return linear_policy_loss(
        hidden, weight, targets, *given, objective=Clipped(0.2, 0.2), old_logp=old
    ).loss


def preference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    ids = torch.arange(8, device=DEVICE).repeat_interleave(N // 8)
    reference = torch.zeros(8, device=DEVICE)
    loss = linear_preference_loss(
        hidden, weight, targets, ids, objective=Dpo(0.1), ref_logp=reference
    )
    return loss.loss


@pytest.mark.parametrize("op", [log_probs, policy, preference])
def test_repeats_are_equal_to_the_bit(op):
    hidden, weight, targets = rows()

    def run() -> list[Tensor]:
        loss = op(hidden, weight, targets)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    first = run()
    assert all(x.isfinite().all() and x.count_nonzero() for x in first)
    for _ in range(REPEATS - 1):
        assert all(map(torch.equal, first, run()))


def test_advantages_are_equal_to_the_bit():
    rewards = torch.randn(4096, device=DEVICE)
    groups = torch.randint(300, (4096,), device=DEVICE)
    first = group_advantage(rewards, groups)
    assert all(torch.equal(first, group_advantage(rewards, groups)) for _ in range(REPEATS))


def test_sampled_tokens_are_equal_to_the_bit():
    generator = Generator(tiny_model(dtype=torch.bfloat16).to(DEVICE))
    asked = [Request(tuple(range(5, 9 + i)), 24, temperature=1.0, seed=i) for i in range(12)]
    first, *others = ([c.token_ids for c in generator.sample(asked)] for _ in range(4))
    assert sum(map(len, first)) > 100
    assert all(again == first for again in others)


def samples() -> list[Sample]:
    """Return two completions for each of three prompts with a common prefix."""
    made = []
    for q in range(3):
        for k in range(2):
            prompt = (5, 6, 7, *range(20, 24 + q))
            ids = tuple(range(30 + q, 38 + 2 * q + k))
            made.append(Sample(prompt, ids, (-1.0) ** k, 0.1))
    return made


def gradients(model: Decoder) -> list[Tensor]:
    model.requires_grad_()
    config = Train(method="grpo", pack_tokens=40)
    policy_backward(Layout(model), samples(), PolicyLossConfig.of(config))
    return [p.grad.double().cpu() for p in model.parameters() if p.grad is not None]


def test_gradients_of_a_packed_batch_equal_those_in_fp64():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model = tiny_model(dtype=dtype)
        truth = torch.cat([g.flatten() for g in gradients(deepcopy(model).double())])
        found = torch.cat([g.flatten() for g in gradients(model.to(DEVICE))])
        assert relative_error(found, truth) < tolerance


@pytest.mark.skipif(not GPU, reason="torch counts a GPU's memory")
@pytest.mark.parametrize("op", [log_probs, policy, preference])
def test_an_op_frees_its_memory(op):
    hidden, weight, targets = rows()
    run = partial(op, hidden, weight, targets)
    torch.autograd.grad(run(), (hidden, weight))  # caches of the first call
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(run(), (hidden, weight))
    assert torch.cuda.memory_allocated() <= before
    run()  # a call without backward
    assert torch.cuda.memory_allocated() <= before


@pytest.mark.skipif(not GPU, reason="torch counts a GPU's memory")
def test_sampling_frees_its_memory():
    generator = Generator(tiny_model(dtype=torch.bfloat16).to(DEVICE))
    asked = [Request((5, 6, 7), 24, temperature=1.0, seed=i) for i in range(8)]
    generator.sample(asked)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        generator.sample(asked)
    assert torch.cuda.memory_allocated() <= before
