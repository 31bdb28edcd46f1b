"""Questions in, judged attempts and accepted explanations out.

A question costs `group_size` attempts and, where the method explains, `explanations_per_question`
explanations on top; `generation_budget` makes that sum the same for all methods.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from expo_fast.algorithms.diagnostics import mean
from expo_fast.algorithms.explanation_filter import leaks
from expo_fast.algorithms.explanations import (
    Explanations,
    Ranking,
    Score,
    explain,
    keep_best,
    shuffled,
)
from expo_fast.config import Train
from expo_fast.data.problems import Problem, last_question
from expo_fast.data.prompts import Prompter, request_seed
from expo_fast.generate import Completion, Generator, Request
from expo_fast.ops import group_advantage
from expo_fast.reporting.timing import Phases

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
    right_above: float = 0.0  # a reward beyond it is a right answer's

    @property
    def accuracy(self) -> float | None:
        """Share of the scored samples that are right."""
        return mean([r > self.right_above for r in self.rewards if r is not None])

    @property
    def all_fail(self) -> bool:
        return self.accuracy == 0

    @property
    def mixed(self) -> bool:
        """Do the rewards differ, length not counted?"""
        return len({r for r in self.rewards if r is not None}) > 1

    @property
    def failed(self) -> list[Completion]:
        """The samples known to be wrong, of those that say something."""
        scored = zip(self.completions, self.texts, self.rewards, strict=True)
        wrong = [
            (done, text) for done, text, r in scored if r is not None and r <= self.right_above
        ]
        return [done for done, text in wrong if text.strip()]

    @property
    def usable(self) -> list[Completion]:
        """The samples that were scored and say something."""
        scored = zip(self.completions, self.rewards, strict=True)
        return [done for done, r in scored if r is not None and done.token_ids]


@dataclass
class Sampler:
    """Samples and judges for one run. What a resume needs of it is `state()`."""

    config: Train
    prompter: Prompter
    generator: Generator
    reward: Reward
    verify: Score  # of explanations
    rank: Ranking  # of accepted explanations, the best highest
    n_tokens: int = 0  # prompt and completion tokens sampled so far
    cache: dict[str, tuple[int, list[tuple[int, ...]]]] = field(default_factory=dict)
    # accepted explanations by problem id, and the step that they were sampled at
    earlier: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    # the last accepted ones of every question, kept for the shuffled control alone

    def rollouts(self, questions: Sequence[Problem], step: int, phases: Phases) -> list[Rollout]:
        """The questions' groups with rewards and, from them, advantages."""
        with phases.phase("generate"):
            completions = self._sample(questions, step)
        with phases.phase("reward"):
            return self._judge(questions, completions)

    def _sample(self, questions: Sequence[Problem], step: int) -> list[Completion]:
        """(P G,) completions of the plain questions, group after group."""
        c = self.config
        requests = [
            self._request(prompt, c.temperature, "solve", step, q.id, g)
            for q in questions
            for prompt in [self.prompter.solve(q)]
            for g in range(c.group_size)
        ]
        completions = self.generator.sample(requests)
        self.n_tokens += sum(len(r.prompt_ids) for r in requests)
        self.n_tokens += sum(len(done.token_ids) for done in completions)
        return completions

    def _request(self, prompt: Sequence[int], temperature: float, *key: int | str) -> Request:
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

    def _judge(self, questions: Sequence[Problem], completions: list[Completion]) -> list[Rollout]:
        c, G = self.config, self.config.group_size
        texts = [self.prompter.text(done.token_ids) for done in completions]
        rewards = self.reward([q for q in questions for _ in range(G)], texts, completions)
        judged = zip(completions, rewards, strict=True)
        rewards = [None if self._masked(done) else r for done, r in judged]
        judged = zip(completions, rewards, strict=True)
        values = [float("nan") if r is None else r - overlong(done, c) for done, r in judged]
        groups = torch.arange(len(questions)).repeat_interleave(G)
        advantages = group_advantage(torch.tensor(values), groups, scale=c.advantage_scale).tolist()

        def rollout(i: int, q: Problem) -> Rollout:
            mine, prompt = slice(i * G, (i + 1) * G), self.prompter.solve(q)
            group = texts[mine], rewards[mine], advantages[mine]
            return Rollout(q, prompt, completions[mine], *group, c.right_above)

        return [rollout(i, q) for i, q in enumerate(questions)]

    def _masked(self, done: Completion) -> bool:
        """Out of loss, normalisers and group statistics."""
        cut = self.config.mask_truncated and done.finish_reason == "length"
        return cut or done.finish_reason == "error"

    def explanations(self, questions: Sequence[Problem], step: int) -> Explanations:
        """The accepted explanations of the questions, by problem id: cached, or sampled now."""
        c = self.config

        def request(p: Problem, k: int, prompt: tuple[int, ...]) -> Request:
            return self._request(prompt, c.explain_temperature, "explain", step, p.id, k)

        stale = [p for p in questions if not self._fresh(p.id, step)]
        n = c.explanations_per_question
        made_with = (self.prompter, self.generator, self.verify, request, n, c.append_answer)
        found = explain(stale, *made_with)
        self.n_tokens += found.n_tokens
        problems = {p.id: p for p in stale}
        found.accepted = keep_best(found.accepted, problems, c.keep_explanations, self.rank)
        self.cache |= {key: (step, ids) for key, ids in found.accepted.items()}
        self.cache = {key: row for key, row in self.cache.items() if self._fresh(key, step)}
        found.accepted = {p.id: self.cache[p.id][1] for p in questions if p.id in self.cache}
        if c.shuffle_explanations:
            self.earlier |= found.accepted
            seed = request_seed(c.seed, "shuffle", step)
            found.accepted = shuffled(found.accepted, self.earlier, seed)
        found.n_questions = len(questions)
        return found

    def _fresh(self, key: str, step: int) -> bool:
        every = self.config.explain_every
        return key in self.cache and (not every or step - self.cache[key][0] < every)

    def state(self) -> dict[str, Any]:
        cache = {
            key: [step, [list(ids) for ids in lists]] for key, (step, lists) in self.cache.items()
        }
        earlier = {key: [list(ids) for ids in lists] for key, lists in self.earlier.items()}
        return {"n_tokens": self.n_tokens, "explanations": cache, "earlier": earlier}

    def load_state(self, values: dict[str, Any]) -> None:
        self.n_tokens = values["n_tokens"]
        cache = values["explanations"]
        self.cache = {key: (step, [tuple(x) for x in ids]) for key, (step, ids) in cache.items()}
        self.earlier = {key: [tuple(x) for x in ids] for key, ids in values["earlier"].items()}


def overlong(done: Completion, config: Train) -> float:
    """DAPO's soft punishment (arXiv:2503.14476, eq. 13): 0 up to the buffer, 1 at the limit."""
    if not config.overlong_buffer:
        return 0.0
    start = config.max_completion_length - config.overlong_buffer
    return max(0, len(done.token_ids) - start) / config.overlong_buffer


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
        "frac_all_fail": mean([r.all_fail for r in rollouts if r.accuracy is not None]),
        "entropy": mean([x for each in surprise for x in each.tolist()]),  # unbiased
        "own/nll": mean([float(x.mean()) for x in surprise]),
        "own/leak_rate": mean([leaks(text) for r in rollouts for text in r.texts]),
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
        "exp/unfit_rate": found.unfit_rate,
        "exp/mean_length": mean(lengths),
    }


def completion_rows(
    rollouts: Sequence[Rollout], found: Explanations, prompter: Prompter, kind: str
) -> list[dict[str, Any]]:
    """The samples and, as `kind`, the positives beside them."""
    rows = []
    for r in rollouts:
        groups = zip(r.texts, r.completions, r.rewards, r.advantages, strict=True)
        for text, done, reward, advantage in groups:
            end = {"finish_reason": done.finish_reason, "advantage": advantage}
            rows.append(said(r.problem, "own", text, reward) | end)
        accepted = found.accepted.get(r.problem.id, ())
        rows += [said(r.problem, kind, prompter.text(ids)) for ids in accepted]
    return rows


def said(
    problem: Problem, kind: str, completion: str, reward: float | None = None
) -> dict[str, Any]:
    """A row of completions/step-N.jsonl."""
    asked = {"id": problem.id, "prompt": last_question(problem), "answer": problem.answer}
    return {**asked, "kind": kind, "completion": completion, "reward": reward}
