"""What the loops have in common: weights, reference, optimizer, and the record of a step.

A loop (grpo.py, dpo.py, sft.py) adds gradients with `policy_backward` or its own, ends each update
with `apply`, and returns a row of metrics and what was said. The reference is the initial policy: a
frozen copy or, with LoRA, the same weights with the adapter switched off.
"""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo_fast.algorithms.diagnostics import Subject, diagnose, mean
from expo_fast.algorithms.explanations import Score, ranking, score_tokens
from expo_fast.algorithms.rollout import Reward, Sampler
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter, request_seed
from expo_fast.generate import Generator
from expo_fast.inference.cpu_engine import exact_hidden
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import MergedCopy, is_attached, merged_copy, switched_off
from expo_fast.modeling.optimizer import Optimizer
from expo_fast.modeling.packing import Sample, forward
from expo_fast.modeling.schedule import learning_rate
from expo_fast.ops import Cispo, Clipped, SequenceClipped, SoftAdaptive, linear_policy_loss
from expo_fast.reporting.run_log import Phases

Metrics = dict[str, float | None]
STATISTICS = ("loss", "kl", "clip_low", "clip_high", "nll")  # of `policy_backward`


@dataclass
class Learner(ABC):
    """One run's loop state. What a resume needs of it is `state()`."""

    config: Train
    model: Decoder
    frozen: Decoder | None  # the reference, where it is a model of its own
    prompter: Prompter
    problems: Sequence[Problem]
    reward: Reward
    verify: Score  # of explanations
    generator: Generator = field(init=False)
    sampler: Sampler = field(init=False)
    optimizer: Optimizer = field(init=False)
    merged_copy: MergedCopy | None = field(init=False)  # to sample from; None without adapters
    origin: str = field(init=False)  # of the weights that the run began with: see `checksum`
    broken: int = 0  # steps in a row up to now without finite logits or an update
    read: int = 0  # tokens of data that no sampler drew

    def __post_init__(self):
        c = self.config
        self.origin = checksum(self.model)
        self.merged_copy = merged_copy(self.model) if is_attached(self.model) else None
        sampled = self.model if self.merged_copy is None else self.merged_copy.model
        tokenizer, exact = self.prompter.tokenizer, c.batch_invariant
        self.generator = Generator(sampled, tokenizer=tokenizer, batch_invariant=exact)
        self.model.exact = exact_hidden(self.model) if exact else None
        self.sampler = Sampler(
            c,
            self.prompter,
            self.generator,
            self.reward,
            self.verify,
            ranking(c.choose_explanations, self.prompter, self.score),
        )
        self.optimizer = Optimizer(
            self.model.named_parameters(), betas=c.betas, eps=c.eps, weight_decay=c.weight_decay
        )

    def check(self, run_dir: Path, start: int) -> None:  # noqa: B027, most loops need nothing
        """ValueError where the run can't go on from step `start` (from 0) in that folder."""

    def begin(self, run_dir: Path, start: int) -> None:  # noqa: B027
        """Called once, before step `start`, with the folder that the run may write to."""

    def step(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One update or several: the row of metrics, and what was said as rows of text."""
        skipped, phases = self.optimizer.skipped, Phases()
        row, texts = self.learn(step, phases)
        row |= {"skipped_steps": self.optimizer.skipped}
        row |= {"num_tokens": self.sampler.n_tokens + self.read} | phases.seconds()
        broken = row.get("completions/error_ratio") == 1 or self.optimizer.skipped > skipped
        self.broken = self.broken + 1 if broken else 0
        return {"step": step + 1} | row, texts

    @abstractmethod
    def learn(self, step: int, phases: Phases) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """What `step` returns, short of what all loops report."""

    def batch(self, step: int) -> list[Problem]:
        return batch(self.problems, step, self.config.prompts_per_step, self.config.seed)

    def policy_backward(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Add the samples' gradients, pack after pack; the loss and its statistics.

        The statistics are read from the device once, when all packs are under way.
        """
        c = self.config
        weight = sum(s.row_weight * len(s.completion_ids) for s in samples)
        n_rows = sum(len(s.completion_ids) for s in samples)
        found: list[Tensor] = []
        for p, hidden in forward(self.model, samples, c.pack_tokens):
            result = linear_policy_loss(
                hidden,
                self.model.head_weight,
                p.targets,
                p.advantage,
                p.row_weight,
                objective=policy_objective(c),
                old_logp=p.old_logp,
                ref_logp=p.ref_logp,
                on_policy=p.on_policy,
                kl_coef=c.kl_coef if p.ref_logp is not None else 0.0,
                entropy_coef=c.entropy_coef,
                temperature=c.temperature,
                sequence_ids=p.sequence_ids,
            )
            result.loss.backward()
            share = len(p.rows) / n_rows
            kl = result.kl * p.row_weight.sum() / weight
            nll = -torch.stack([logp.mean() for _, logp in p.split(result.logp)]).sum()
            clips = result.clip_low * share, result.clip_high * share
            found.append(torch.stack([result.loss.detach(), kl, *clips, nll / len(samples)]))
        totals = torch.stack(found).double().sum(0).tolist() if found else [0.0] * len(STATISTICS)
        return dict(zip(STATISTICS, totals, strict=True))

    def apply(self, number: int, phases: Phases) -> Metrics:
        """One optimizer step with the gradients added so far; `number` counts them over the run."""
        c = self.config
        lr = learning_rate(
            number,
            peak=c.learning_rate,
            warmup_steps=c.warmup_steps,
            total_steps=c.steps * c.updates_per_batch,
            schedule=c.schedule,
        )
        with phases.phase("optimizer"):
            report = self.optimizer.step(lr, c.max_grad_norm)
            if self.merged_copy is not None:
                self.merged_copy.refresh()
        return {
            "grad_norm": report.grad_norm,
            "update_norm": report.update_norm,
            "learning_rate": lr,
        }

    def score(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Log-probs of each completion's tokens under the policy, fp32 nats."""
        return self._score(self.model, samples)

    def reference_score(self, samples: Sequence[Sample]) -> list[Tensor]:
        """The same under the initial policy."""
        if self.frozen is not None:
            return self._score(self.frozen, samples)
        with switched_off(self.model):
            return self._score(self.model, samples)

    def _score(self, model: Decoder, samples: Sequence[Sample]) -> list[Tensor]:
        c = self.config
        return score_tokens(model, samples, c.temperature, c.pack_tokens)

    def diagnose(self, subjects: Sequence[Subject], phases: Phases) -> Metrics:
        with phases.phase("diagnose"):
            return diagnose(subjects[: self.config.diagnose], self.prompter, self.score)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What an exact resume needs beside the weights and the step's number."""
        tensors, values = self.optimizer.state_dict()
        counts = {"broken": self.broken, "read": self.read}
        return tensors, {"optimizer": values, **counts, **self.sampler.state()}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(tensors, values["optimizer"])
        self.broken, self.read = values["broken"], values["read"]
        self.sampler.load_state(values)
        if self.merged_copy is not None:
            self.merged_copy.refresh()


def checksum(model: Decoder) -> str:
    """Of the parameters' bits, in integers: the same for any number of threads."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        bits = p.detach().view(torch.int16 if p.dtype.itemsize == 2 else torch.int32)
        total = sum(int(piece.sum()) for piece in bits.flatten().split(1 << 24))
        digest.update(f"{name} {tuple(p.shape)} {total}\n".encode())
    return digest.hexdigest()[:16]


def policy_objective(config: Train) -> Clipped | SequenceClipped | Cispo | SoftAdaptive:
    low, high = config.clip_low, config.clip_high
    return {
        "clipped": lambda: Clipped(low, high),
        "gspo": lambda: SequenceClipped(low, high),
        "cispo": lambda: Cispo(1 + high),
        "sapo": SoftAdaptive,
    }[config.objective]()


def batch(problems: Sequence[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """The step's questions: each epoch is a permutation of its own, known from (seed, epoch).

    An epoch leaves out what does not fill a batch, so that no question is twice in one.
    """
    epoch, place = divmod(step, len(problems) // size)
    order = _permutation(len(problems), seed, epoch)
    return [problems[i] for i in order[place * size : (place + 1) * size]]


def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(request_seed(seed, "order", epoch)).sample(range(n), n)


def mean_of(updates: Sequence[Metrics]) -> Metrics:
    """Over the batch's optimizer steps."""
    columns = {name: [u[name] for u in updates] for name in updates[0]}
    return {name: mean([x for x in xs if x is not None]) for name, xs in columns.items()}


def summed(logps: Sequence[Tensor]) -> Tensor:
    """(S,) fp32 nats: each sequence's log-prob."""
    return torch.stack([logp.sum() for logp in logps])
