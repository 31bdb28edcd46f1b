"""Supervised fine-tuning (SFT) on given texts under the plain question.

    loss = -coef / P sum_q 1 / K_q sum_k mean_t log pi(c_qk,t | q)

P is the number of questions, and c_qk are the K_q texts of question q. `--method sft` trains on the
data's own texts with coef = 1. `grpo.py` adds the same loss on explanations or on the data's
solutions (ExP-SFT, arXiv:2507.02834, section 4.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expo_fast.algorithms.logprobs import ForwardOptions
from expo_fast.algorithms.metrics import Metrics
from expo_fast.algorithms.rollout import completion_row
from expo_fast.algorithms.trainer import (
    StepResult,
    Trainer,
    batch_of_step,
    optimizer_step,
)
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.packing import Pack, Sample
from expo_fast.ops import linear_policy_loss
from expo_fast.reporting.timing import Phases


@dataclass(frozen=True)
class SftResult:
    """The SFT loss and the NLL of its samples."""

    loss: float
    nll: float
    """In nats: the mean over the samples of the mean over a completion's tokens."""


def run_step(trainer: Trainer, step: int, phases: Phases) -> StepResult:
    """Run one step: train on the data's texts of one batch of questions, without sampling."""
    config = trainer.config
    prompter = trainer.prompter
    questions = batch_of_step(trainer, step, config.seed)
    texts = [(question, [prompter.target(question)]) for question in questions]
    samples = sft_samples(
        texts,
        prompter,
        coef=1.0,
        n_questions=len(questions),
        reduction=config.exp_sft_reduction,
    )
    for sample in samples:
        trainer.data_tokens += len(sample.prompt_ids) + len(sample.completion_ids)
    with phases.phase("forward_backward"):
        result = sft_backward(
            trainer.layout, trainer.own_samples(samples), ForwardOptions.of(config)
        )
    metrics: Metrics = {"loss": result.loss, "expert/nll": result.nll}
    metrics |= optimizer_step(trainer, step, phases)
    rows = []
    for question, (ids,) in texts:
        rows.append(completion_row(question, "expert", prompter.text(ids)))
    return metrics, rows


def sft_samples(
    texts: Sequence[tuple[Problem, Sequence[tuple[int, ...]]]],
    prompter: Prompter,
    *,
    coef: float,
    n_questions: int,
    reduction: str,
) -> list[Sample]:
    """Return the samples of the SFT loss.

    texts: each question with the token ids of its K_q texts.
    n_questions: P, including questions of the batch without a text.
    reduction: `token_mean`, or `seq_sum` for the sum over a text's tokens, as printed in the paper.
    """
    samples = []
    for problem, completions in texts:
        prompt_ids = prompter.solve(problem)
        for ids in completions:
            tokens = len(ids) if reduction == "token_mean" else 1
            sample = Sample(
                prompt_ids=prompt_ids,
                completion_ids=tuple(ids),
                advantage=1.0,
                row_weight=coef / (n_questions * len(completions) * tokens),
                on_policy=True,
            )
            samples.append(sample)
    return samples


def sft_backward(layout: Layout, samples: Sequence[Sample], options: ForwardOptions) -> SftResult:
    """Add the gradients of the SFT loss of the samples, pack by pack.

    samples: those of this rank. The result is that of all ranks.
    """
    model = layout.model
    world = layout.world
    (n_samples,) = world.sums(len(samples))
    losses: list[Tensor] = []
    logps: list[tuple[Pack, Tensor]] = []
    for pack, hidden in layout.passes(samples, options.max_tokens):
        result = linear_policy_loss(
            hidden,
            model.head_weight,
            pack.targets,
            pack.advantage,
            pack.row_weight,
            on_policy=pack.on_policy,
            temperature=options.temperature,
            complete=pack.is_complete(len(model.head_weight)),
        )
        result.loss.backward()
        losses.append(result.loss.detach())
        logps.append((pack, result.logp))
    if not losses:
        loss, nll = world.sums(0.0, 0.0)
        return SftResult(loss=loss, nll=nll)
    # Copy to the CPU after the work of all packs is queued.
    on_cpu = torch.stack(losses).cpu()
    nlls = []
    for pack, logp in logps:
        mean_logps = [values.mean() for _, values in pack.split(logp.cpu())]
        nlls.append(-torch.stack(mean_logps).sum() / n_samples)
    own = torch.stack([on_cpu, torch.stack(nlls)], 1).double().sum(0).tolist()
    loss, nll = world.sums(*own)
    return SftResult(loss=loss, nll=nll)
