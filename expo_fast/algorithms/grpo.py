"""GRPO, and the ExP-SFT term beside it (ExPO, arXiv:2507.02834, section 4.2).

    J = 1/N sum_i 1/T_i sum_t min(r_it A_i, clip(r_it) A_i)
      + exp_sft_coef / P sum_q 1/K_q sum_k mean_t log pi(c_qk,t | q)

    N = P G samples of the plain questions, A_i = (R_i - mean R) / std R over the G of a question,
    r_it = pi / pi_old of a token; c_qk are the K_q accepted explanations of question q.

The explanation stands outside the group: no advantage, ratio, clip or KL. expert-grpo puts the
data's solution in its place, grpo leaves the term out, and star leaves out all but the term. Every
normaliser is a weight of a row, fixed before the first backward, so how samples are packed changes
nothing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from expo_fast.algorithms.diagnostics import Subject
from expo_fast.algorithms.explanations import Explanations, sft_samples
from expo_fast.algorithms.rollout import (
    Rollout,
    completion_rows,
    explained_metrics,
    sampled_metrics,
)
from expo_fast.algorithms.trainer import Learner, Metrics, batch, mean_of
from expo_fast.config import Train
from expo_fast.data.prompts import request_seed
from expo_fast.modeling.packing import Sample
from expo_fast.reporting.run_log import Phases


class Grpo(Learner):
    """grpo, expo-grpo, expert-grpo and star."""

    def learn(self, step: int, phases: Phases) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One batch of P questions: sample, reward, explain, update."""
        sampled, kept = self.rollouts(step, phases)
        with phases.phase("explain"):
            found = self.positives(kept, step)
        shown = found.accepted if self.config.explains else {}
        subjects = [
            Subject(r.problem, r.usable, next(iter(shown.get(r.problem.id, ())), None))
            for r in kept
        ]
        measured = self.diagnose(subjects, phases)
        U = self.config.updates_per_batch
        shares = [*parts(kept, U)]
        with phases.phase("forward_backward"):
            attempts = self.attempts(shares)
        updates = [
            self.update(share, samples, found, step * U + i, phases)
            for i, (share, samples) in enumerate(zip(shares, attempts, strict=True))
        ]
        explained = explained_metrics(found if self.config.explains else Explanations())
        row = sampled_metrics(sampled) | explained | measured | mean_of(updates)
        kind = "expert" if self.config.method == "expert-grpo" else "explanation"
        return row, completion_rows(kept, found, self.prompter, kind)

    def rollouts(self, step: int, phases: Phases) -> tuple[list[Rollout], list[Rollout]]:
        """All groups sampled for this step, and those to learn from.

        They differ where DAPO's dynamic sampling (arXiv:2503.14476, section 3.2) replaces groups
        whose rewards are all equal, as far as `dynamic_sampling` further batches allow.
        """
        c = self.config
        sampled = self.sampler.rollouts(self.batch(step), step, phases)
        for again in range(c.dynamic_sampling):
            if sum(r.mixed for r in sampled) >= c.prompts_per_step:
                break
            asked = {r.problem.id for r in sampled}
            seed = request_seed(c.seed, "refill", again)
            more = batch(self.problems, step, c.prompts_per_step, seed)
            sampled += self.sampler.rollouts([q for q in more if q.id not in asked], step, phases)
        mixed = [r for r in sampled if r.mixed] if c.dynamic_sampling else sampled
        return sampled, (mixed or sampled)[: c.prompts_per_step]

    def positives(self, rollouts: Sequence[Rollout], step: int) -> Explanations:
        """What the ExP-SFT term is to train on, by problem id: explanations, or the expert's."""
        c = self.config
        chosen = [
            r.problem
            for r in rollouts
            if c.exp_sft_max_accuracy == 1
            or (r.accuracy is not None and r.accuracy <= c.exp_sft_max_accuracy)
        ]
        if c.explains:
            return self.sampler.explanations(chosen, step)
        if c.method == "expert-grpo" and c.exp_sft_coef:
            expert = {p.id: [self.prompter.expert(p)] for p in chosen}
            return Explanations(expert, n_questions=len(chosen))
        return Explanations()

    def attempts(self, shares: Sequence[Sequence[Rollout]]) -> list[list[Sample]]:
        """What each update's policy term is made of.

        From the second update on that is with the log-probs under the policy that sampled, as the
        trainer computes them in the same packs: the generator's are off by more, in bf16, than the
        whole clip range of GSPO.
        """
        if self.config.method == "star":
            return [[] for _ in shares]
        first, *later = [policy_samples(share, self.config) for share in shares]
        return [first, *(self.with_old(samples) for samples in later)]

    def with_old(self, samples: list[Sample]) -> list[Sample]:
        logps = self.score(samples)
        return [replace(s, old_logp=logp) for s, logp in zip(samples, logps, strict=True)]

    def update(
        self,
        part: list[Rollout],
        attempts: list[Sample],
        found: Explanations,
        number: int,
        phases: Phases,
    ) -> Metrics:
        """One optimizer step on its share of the batch; `number` counts them over the run."""
        c = self.config
        coef = exp_sft_coef(c, number // c.updates_per_batch)
        chosen = [r.problem for r in part if r.problem.id in found.accepted]
        with phases.phase("forward_backward"):
            policy = self.policy_backward(self.with_reference(attempts))
            self.optimizer.grad_sums.start_new_term()
            positives = sft_samples(
                [(p, found.accepted[p.id]) for p in chosen],
                self.prompter,
                coef=coef,
                n_questions=len(part),
                reduction=c.exp_sft_reduction,
            )
            sft = self.policy_backward(positives)
            policy_norm, sft_norm = self.optimizer.grad_sums.term_norms()
        return {
            "loss": policy["loss"] + sft["loss"],
            "kl": policy["kl"] if c.kl_coef else None,
            "clip_ratio/low": policy["clip_low"],
            "clip_ratio/high": policy["clip_high"],
            "grad_norm/policy": policy_norm,
            "grad_norm/exp_sft": sft_norm,
            "exp_sft_coef": coef if c.method != "grpo" else None,
            "exp/nll": sft["nll"] if positives and c.explains else None,
        } | self.apply(number, phases)

    def with_reference(self, samples: list[Sample]) -> list[Sample]:
        if not self.config.kl_coef:
            return samples
        logps = self.reference_score(samples)
        return [replace(s, ref_logp=logp) for s, logp in zip(samples, logps, strict=True)]


def exp_sft_coef(config: Train, step: int) -> float:
    """The coefficient of step `step` (from 0): constant, or falling to 0 at the run's end."""
    done = min(1.0, step / config.steps)
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.exp_sft_coef * left[config.exp_sft_schedule]


def parts(rollouts: Sequence[Rollout], n: int) -> Iterator[list[Rollout]]:
    """n shares that differ by one at most; none is empty."""
    borders = [i * len(rollouts) // n for i in range(n + 1)]
    yield from (list(rollouts[a:b]) for a, b in pairwise(borders) if a < b)


def policy_samples(rollouts: Sequence[Rollout], config: Train) -> list[Sample]:
    """The group's samples with the normaliser of `config.loss` on each token.

    grpo: 1/(N T_i); dapo: 1/T; dr-grpo: 1/(N L_max). N sequences and T tokens leave out those
    without a reward. A sequence that can't have a gradient is left out of the pack, not of N.
    """
    scored = [
        (r, done, advantage)
        for r in rollouts
        for done, reward, advantage in zip(r.completions, r.rewards, r.advantages, strict=True)
        if reward is not None
    ]
    N, T = len(scored), sum(len(done.token_ids) for _, done, _ in scored)
    tokens = {
        "grpo": lambda done: N * len(done.token_ids),
        "dapo": lambda done: T,
        "dr-grpo": lambda done: N * config.max_completion_length,
    }[config.loss]
    pulled = bool(config.kl_coef or config.entropy_coef)
    return [
        Sample(r.prompt_ids, tuple(done.token_ids), advantage, 1 / tokens(done))
        for r, done, advantage in scored
        if advantage or pulled
    ]
