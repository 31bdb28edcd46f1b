"""GRPO, and the ExP-SFT term beside it (ExPO, arXiv:2507.02834, section 4.2).

    J = 1/N sum_i 1/T_i sum_t min(r_it A_i, clip(r_it) A_i)
      + exp_sft_coef / P sum_q 1/K_q sum_k mean_t log pi(c_qk,t | q)

    N = P G samples of the plain questions, A_i = (R_i - mean R) / std R over the G of a question,
    r_it = pi / pi_old of a token; c_qk are the K_q accepted explanations of question q.

The explanation stands outside the group: no advantage, ratio, clip or KL. expert-grpo puts the
data's solution in its place, and grpo leaves the term out. Every normaliser is a weight of a row,
fixed before the first backward, so how samples are packed changes nothing.
"""

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from expo_fast.config import Train
from expo_fast.diagnose import Subject, diagnose, mean
from expo_fast.explain import (
    Explanations,
    Score,
    explain,
    keep_likeliest,
    score_tokens,
    sft_samples,
)
from expo_fast.generate import Completion, Generator, Request
from expo_fast.log import Phases
from expo_fast.model import Decoder
from expo_fast.native_engine import exact_hidden
from expo_fast.ops import Clipped, group_advantage, linear_policy_loss
from expo_fast.optim import Optimizer, learning_rate
from expo_fast.pack import Sample, pack
from expo_fast.prompts import Prompter, request_seed
from expo_fast.tasks import Problem

Reward = Callable[[list[Problem], list[str], list[Completion]], list[float | None]]


@dataclass(frozen=True)
class Rollout:
    """A question with its G samples."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    completions: list[Completion]
    texts: list[str]
    rewards: list[float | None]  # None: could not be scored, or masked as truncated
    advantages: list[float]

    @property
    def all_fail(self) -> bool:
        """Some sample was scored, and none earned anything (of the built-in reward: was right)."""
        decided = [r for r in self.rewards if r is not None]
        return bool(decided) and max(decided) <= 0


@dataclass
class Trainer:
    """One run's loop state. What a resume needs of it is `state()`."""

    config: Train
    model: Decoder
    reference: Decoder | None  # frozen; only where kl_coef is positive
    prompter: Prompter
    problems: Sequence[Problem]
    reward: Reward
    score: Score  # the verifier of explanations
    generator: Generator = field(init=False)
    optimizer: Optimizer = field(init=False)
    n_tokens: int = 0  # prompt and completion tokens sampled so far
    broken: int = 0  # steps in a row up to now: see `step`
    cache: dict[str, tuple[int, list[tuple[int, ...]]]] = field(default_factory=dict)
    # accepted explanations by problem id, and the step that they were sampled at

    def __post_init__(self):
        c = self.config
        tokenizer, exact = self.prompter.tokenizer, c.batch_invariant
        self.generator = Generator(self.model, tokenizer=tokenizer, batch_invariant=exact)
        self.model.exact = exact_hidden(self.model) if exact else None
        self.optimizer = Optimizer(
            self.model.named_parameters(), betas=c.betas, eps=c.eps, weight_decay=c.weight_decay
        )

    def step(self, step: int) -> tuple[dict[str, Any], list[Rollout], Explanations]:
        """One batch of P questions: sample, reward, explain, update.

        It counts as broken where an update was skipped or no completion had finite logits.
        """
        phases, skipped = Phases(), self.optimizer.skipped
        questions = batch(self.problems, step, self.config.prompts_per_step, self.config.seed)
        with phases.phase("generate"):
            completions = self.sample(questions, step)
        with phases.phase("reward"):
            rollouts = self.judge(questions, completions)
        with phases.phase("explain"):
            found = self.explanations(rollouts, step)
        with phases.phase("diagnose"):
            measured = self.diagnose(rollouts, found)
        U = self.config.updates_per_batch
        updates = [
            self.update(part, found, step * U + i, phases)
            for i, part in enumerate(parts(rollouts, U))
        ]
        row = {"step": step + 1} | sampled_metrics(rollouts) | explained_metrics(found) | measured
        row |= mean_of(updates) | {"skipped_steps": self.optimizer.skipped}
        row |= {"num_tokens": self.n_tokens} | phases.seconds()
        broken = row["completions/error_ratio"] == 1 or self.optimizer.skipped > skipped
        self.broken = self.broken + 1 if broken else 0
        return row, rollouts, found

    def sample(self, questions: Sequence[Problem], step: int) -> list[list[Completion]]:
        """(P, G) completions of the plain questions."""
        c = self.config
        prompts = [self.prompter.solve(q) for q in questions]
        requests = [
            self.request(prompt, c.temperature, "solve", step, q.id, g)
            for q, prompt in zip(questions, prompts, strict=True)
            for g in range(c.num_generations)
        ]
        flat = self.generator.sample(requests)
        self.n_tokens += sum(len(r.prompt_ids) for r in requests)
        self.n_tokens += sum(len(done.token_ids) for done in flat)
        G = c.num_generations
        return [flat[i : i + G] for i in range(0, len(flat), G)]

    def request(self, prompt: Sequence[int], temperature: float, *key: int | str) -> Request:
        c = self.config
        return Request(
            prompt,
            c.max_completion_length,
            temperature=temperature,
            top_p=c.top_p,
            top_k=c.top_k,
            min_p=c.min_p,
            seed=request_seed(c.seed, *key),
            stop_strings=self.prompter.stop_strings,
        )

    def judge(
        self, questions: Sequence[Problem], completions: list[list[Completion]]
    ) -> list[Rollout]:
        """Rewards, and from them the advantages, of (P, G) completions."""
        G = self.config.num_generations
        flat = [done for group in completions for done in group]
        texts = [self.prompter.text(done.token_ids) for done in flat]
        rewards = self.reward([q for q in questions for _ in range(G)], texts, flat)
        rewards = [None if self._masked(d) else r for d, r in zip(flat, rewards, strict=True)]
        groups = torch.arange(len(questions)).repeat_interleave(G)
        values = torch.tensor([float("nan") if r is None else r for r in rewards])
        scale = self.config.advantage_scale
        advantages = group_advantage(values, groups, scale=scale).tolist()

        def rollout(q: Problem, group: list[Completion], i: int) -> Rollout:
            mine = slice(i, i + G)
            prompt = self.prompter.solve(q)
            return Rollout(q, prompt, group, texts[mine], rewards[mine], advantages[mine])

        starts = range(0, len(flat), G)
        return [rollout(*each) for each in zip(questions, completions, starts, strict=True)]

    def _masked(self, done: Completion) -> bool:
        """Out of loss, normalisers and group statistics."""
        cut = self.config.mask_truncated and done.finish_reason == "length"
        return cut or done.finish_reason == "error"

    def explanations(self, rollouts: list[Rollout], step: int) -> Explanations:
        """What the ExP-SFT term is to train on, by problem id: sampled, cached or the expert's."""
        c = self.config
        if c.method == "grpo" or not c.exp_sft_coef:
            return Explanations()
        chosen = [r.problem for r in rollouts if c.exp_sft_on == "all" or r.all_fail]
        if c.method == "expert-grpo":
            expert = {p.id: [self.prompter.expert(p)] for p in chosen}
            return Explanations(expert, n_questions=len(chosen))

        def request(p: Problem, k: int, prompt: tuple[int, ...]) -> Request:
            return self.request(prompt, c.explain_temperature, "explain", step, p.id, k)

        stale = [p for p in chosen if not self._fresh(p.id, step)]
        n = c.explanations_per_question
        found = explain(stale, self.prompter, self.generator, self.score, request, n)
        self.n_tokens += found.n_tokens
        if c.keep_explanations:
            prompts = {r.problem.id: r.prompt_ids for r in rollouts}
            found.accepted = keep_likeliest(
                found.accepted, prompts, c.keep_explanations, self._score_tokens
            )
        self.cache |= {key: (step, ids) for key, ids in found.accepted.items()}
        self.cache = {key: row for key, row in self.cache.items() if self._fresh(key, step)}
        found.accepted = {p.id: self.cache[p.id][1] for p in chosen if p.id in self.cache}
        found.n_questions = len(chosen)
        return found

    def _fresh(self, key: str, step: int) -> bool:
        every = self.config.explain_every
        return key in self.cache and (not every or step - self.cache[key][0] < every)

    def update(
        self, part: list[Rollout], found: Explanations, number: int, phases: Phases
    ) -> dict[str, float | None]:
        """One optimizer step on its share of the batch; `number` counts them over the run."""
        c = self.config
        accepted = found.accepted
        with phases.phase("forward_backward"):
            policy = self.backward(self._with_reference(policy_samples(part, c)))
            self.optimizer.mark()
            chosen = [(r.problem, accepted[r.problem.id]) for r in part if r.problem.id in accepted]
            samples = sft_samples(
                chosen,
                self.prompter,
                coef=c.exp_sft_coef,
                n_questions=len(part),
                reduction=c.exp_sft_reduction,
            )
            sft = self.backward(samples)
            policy_norm, sft_norm = self.optimizer.norms_since_mark()
        lr = learning_rate(
            number,
            peak=c.learning_rate,
            warmup_steps=c.warmup_steps,
            total_steps=c.steps * c.updates_per_batch,
            schedule=c.schedule,
        )
        with phases.phase("optimizer"):
            report = self.optimizer.step(lr, c.max_grad_norm)
        return {
            "loss": policy["loss"] + sft["loss"],
            "kl": policy["kl"] if self.reference is not None else None,
            "clip_ratio/low": policy["clip_low"],
            "clip_ratio/high": policy["clip_high"],
            "grad_norm": report.grad_norm,
            "grad_norm/policy": policy_norm,
            "grad_norm/exp_sft": sft_norm,
            "update_norm": report.update_norm,
            "learning_rate": lr,
            "exp/nll": sft["nll"] if samples and c.method == "expo-grpo" else None,
        }

    def backward(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Add the samples' gradients, pack after pack; the loss and its statistics."""
        c = self.config
        total = dict.fromkeys(("loss", "kl", "clip_low", "clip_high", "nll"), 0.0)
        weight = sum(s.row_weight * len(s.completion_ids) for s in samples)
        n_rows = sum(len(s.completion_ids) for s in samples)
        for p in pack(samples, c.pack_tokens):
            p = p.to(self.model.device)
            hidden = self.model.hidden(p.tokens, p.positions, p.cu_seqlens, p.parents)[p.rows]
            result = linear_policy_loss(
                hidden,
                self.model.head_weight,
                p.targets,
                p.advantage,
                p.row_weight,
                objective=Clipped(c.clip_low, c.clip_high),
                old_logp=p.old_logp,
                ref_logp=p.ref_logp,
                on_policy=p.on_policy,
                kl_coef=c.kl_coef if p.ref_logp is not None else 0.0,
                entropy_coef=c.entropy_coef,
                temperature=c.temperature,
            )
            result.loss.backward()
            total["nll"] -= sum(float(logp.mean()) for _, logp in p.split(result.logp))
            total["loss"] += float(result.loss.detach())
            total["kl"] += float(result.kl * p.row_weight.sum()) / weight
            for name in ("clip_low", "clip_high"):  # shares of rows
                total[name] += float(getattr(result, name)) * len(p.rows) / n_rows
        return total | {"nll": total["nll"] / max(1, len(samples))}

    def _with_reference(self, samples: list[Sample]) -> list[Sample]:
        if self.reference is None:
            return samples
        c = self.config
        logps = score_tokens(self.reference, samples, c.temperature, c.pack_tokens)
        return [replace(s, ref_logp=logp) for s, logp in zip(samples, logps, strict=True)]

    def diagnose(self, rollouts: list[Rollout], found: Explanations) -> dict[str, float | None]:
        subjects, expo = [], self.config.method == "expo-grpo"
        for r in rollouts[: self.config.diagnose]:
            own = [d for d in r.completions if d.token_ids and not self._masked(d)]
            explained = found.accepted.get(r.problem.id) if expo else None
            subjects.append(Subject(r.problem, own, explained[0] if explained else None))
        return diagnose(subjects, self.prompter, self._score_tokens)

    def _score_tokens(self, samples: Sequence[Sample]) -> list[Tensor]:
        c = self.config
        return score_tokens(self.model, samples, c.temperature, c.pack_tokens)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What an exact resume needs beside the weights and the step's number."""
        tensors, values = self.optimizer.state_dict()
        cache = {
            key: [step, [list(ids) for ids in lists]] for key, (step, lists) in self.cache.items()
        }
        counts = {"n_tokens": self.n_tokens, "broken": self.broken}
        return tensors, {"optimizer": values, **counts, "explanations": cache}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(tensors, values["optimizer"])
        self.n_tokens, self.broken = values["n_tokens"], values.get("broken", 0)
        cache = values["explanations"]
        self.cache = {key: (step, [tuple(x) for x in ids]) for key, (step, ids) in cache.items()}


def sampled_metrics(rollouts: Sequence[Rollout]) -> dict[str, float | None]:
    """Of the P G samples; names follow TRL's where the thing is the same."""
    completions = [done for r in rollouts for done in r.completions]
    rewards = [[x for x in r.rewards if x is not None] for r in rollouts]
    means = [statistics.fmean(group) for group in rewards if group]
    stds = [statistics.stdev(group) for group in rewards if len(group) > 1]
    lengths = [len(done.token_ids) for done in completions]
    ends = [done.finish_reason for done in completions]
    surprise = [-done.logp for done in completions if len(done.logp)]
    return {
        "reward": mean(means),
        "reward_std": mean(stds),
        "frac_reward_zero_std": mean([std == 0 for std in stds]),
        "frac_all_fail": mean([r.all_fail for r in rollouts]),
        "entropy": mean([x for each in surprise for x in each.tolist()]),  # unbiased
        "own/nll": mean([float(x.mean()) for x in surprise]),
        "completions/mean_length": mean(lengths),
        "completions/clipped_ratio": mean([end == "length" for end in ends]),
        "completions/error_ratio": mean([end == "error" for end in ends]),
    }


def explained_metrics(found: Explanations) -> dict[str, float | None]:
    lengths = [len(ids) for each in found.accepted.values() for ids in each]
    return {
        "exp/rate": found.rate,
        "exp/accepted": sum(map(len, found.accepted.values())),
        "exp/right_ratio": found.n_right / found.n_sampled if found.n_sampled else None,
        "exp/leak_rate": found.leak_rate,
        "exp/mean_length": mean(lengths),
    }


def mean_of(updates: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    """Over the batch's optimizer steps."""
    columns = {name: [u[name] for u in updates] for name in updates[0]}
    return {name: mean([x for x in xs if x is not None]) for name, xs in columns.items()}


def batch(problems: Sequence[Problem], step: int, size: int, seed: int) -> list[Problem]:
    """The step's questions: each epoch is a permutation of its own, known from (seed, epoch).

    An epoch leaves out what does not fill a batch, so that no question is twice in one.
    """
    epoch, place = divmod(step, len(problems) // size)
    order = _permutation(len(problems), seed, epoch)
    return [problems[i] for i in order[place * size : (place + 1) * size]]


def _permutation(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(request_seed(seed, "order", epoch)).sample(range(n), n)


def parts(rollouts: Sequence[Rollout], n: int) -> Iterator[list[Rollout]]:
    size = len(rollouts) // n
    yield from (list(rollouts[i : i + size]) for i in range(0, len(rollouts), size))


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
    off_policy = config.updates_per_batch > 1
    return [
        Sample(
            r.prompt_ids,
            tuple(done.token_ids),
            advantage,
            1 / tokens(done),
            old_logp=done.logp if off_policy else None,
        )
        for r, done, advantage in scored
        if advantage or pulled
    ]
