"""Attempts at the plain questions: requests for the generator, judged groups, and metrics.

In a step, a question gets `config.group_size` attempts and, if the method explains,
`explanations_per_question` explanations. `generation_budget` sets the sum of both, so that methods
can be compared at equal cost.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from expo_fast.algorithms.explanation_filter import leaks
from expo_fast.algorithms.metrics import Metrics, mean
from expo_fast.config import Train
from expo_fast.data.grader_pool import REASONS, Grade
from expo_fast.data.problems import Problem, last_question
from expo_fast.data.prompts import Prompter, request_seed
from expo_fast.generate import Completion, Request
from expo_fast.kernels.advantage import are_unequal
from expo_fast.reward_functions import Reward, RewardLog, Rewards

Verifier = Callable[[list[str], list[str]], list[float | None]]
"""(answers, texts) -> verdicts: 1.0 right, 0.0 wrong, None undecided."""


@dataclass(frozen=True)
class Group:
    """A question with its G judged attempts."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    completions: list[Completion]
    texts: list[str]
    rewards: list[float | None]
    """None: the attempt could not be judged, or `is_masked` leaves it out of the loss."""
    advantages: list[float] = field(default_factory=list)
    """One per attempt, 0 for an attempt without a reward. Empty until GRPO computes them."""
    right_above: float = 0.0
    """An attempt with a higher reward is right."""
    log: RewardLog = field(default_factory=RewardLog)
    """What the user's reward functions left of these attempts."""

    @property
    def accuracy(self) -> float | None:
        """Fraction of the judged attempts that are right. None if no attempt was judged."""
        return mean([reward > self.right_above for reward in self.rewards if reward is not None])

    @property
    def all_fail(self) -> bool:
        return self.accuracy == 0

    @property
    def has_unequal_rewards(self) -> bool:
        """Whether the rewards differ by more than rounding, before the overlong punishment."""
        return are_unequal([reward for reward in self.rewards if reward is not None])

    @property
    def failed(self) -> list[Completion]:
        """The attempts that are known to be wrong and are not blank."""
        wrong = []
        for completion, text, reward in zip(
            self.completions, self.texts, self.rewards, strict=True
        ):
            if reward is not None and reward <= self.right_above and text.strip():
                wrong.append(completion)
        return wrong

    @property
    def judged(self) -> list[Completion]:
        """The attempts that have a reward and at least one token."""
        kept = []
        for completion, reward in zip(self.completions, self.rewards, strict=True):
            if reward is not None and completion.token_ids:
                kept.append(completion)
        return kept


def make_request(
    prompt_ids: Sequence[int],
    prompter: Prompter,
    config: Train,
    *,
    temperature: float,
    seed_key: tuple[int | str, ...],
) -> Request:
    """Return a request with the run's sampling options.

    seed_key: identifies the request within the run. The request's seed is a hash of it and of the
    run's seed.
    """
    return Request(
        prompt_ids,
        config.max_new_tokens,
        temperature=temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        seed=request_seed(config.seed, *seed_key),
        stop_strings=prompter.stop_strings,
    )


def attempt_requests(
    questions: Sequence[Problem], prompter: Prompter, config: Train, step: int
) -> list[Request]:
    """Return G requests for each question, in the order of the questions."""
    requests = []
    for question in questions:
        prompt_ids = prompter.solve(question)
        for attempt in range(config.group_size):
            request = make_request(
                prompt_ids,
                prompter,
                config,
                temperature=config.temperature,
                seed_key=("solve", step, question.id, attempt),
            )
            requests.append(request)
    return requests


def judge_attempts(
    questions: Sequence[Problem],
    completions: Sequence[Completion],
    prompter: Prompter,
    reward: Reward,
    config: Train,
) -> list[Group]:
    """Return the group of each question, with its attempts and their rewards.

    What is judged is an attempt's text before the end or the stop string that ended it.

    completions: in the order of `attempt_requests`.
    """
    size = config.group_size
    texts = [prompter.text(completion.token_ids) for completion in completions]
    attempted = [question for question in questions for _ in range(size)]
    judged = reward(attempted, texts, completions)
    log = judged.log if isinstance(judged, Rewards) else RewardLog()
    rewards = [
        None if is_masked(completion, config) else reward
        for completion, reward in zip(completions, judged, strict=True)
    ]
    groups = []
    for i, question in enumerate(questions):
        members = slice(i * size, (i + 1) * size)
        group = Group(
            problem=question,
            prompt_ids=prompter.solve(question),
            completions=list(completions[members]),
            texts=texts[members],
            rewards=rewards[members],
            right_above=config.right_above,
            log=log_of_members(log, members),
        )
        groups.append(group)
    return groups


def log_of_members(log: RewardLog, members: slice) -> RewardLog:
    """Return what reward functions left of some of the completions, and all their metrics."""
    return RewardLog(
        by_function={name: rewards[members] for name, rewards in log.by_function.items()},
        columns={name: values[members] for name, values in log.columns.items()},
        metrics=log.metrics,
        reasons=log.reasons[members],
    )


def is_masked(completion: Completion, config: Train) -> bool:
    """Return whether the loss, its normalisers and the group statistics leave a completion out."""
    if completion.finish_reason == "error":
        return True
    return config.mask_truncated and completion.finish_reason == "length"


def overlong_punishment(completion: Completion, config: Train) -> float:
    """Return DAPO's soft overlong punishment (arXiv:2503.14476, eq. 13).

    It rises linearly over the last `overlong_buffer` tokens before the length limit, from 0 to 1.
    """
    if not config.overlong_buffer:
        return 0.0
    start = config.max_new_tokens - config.overlong_buffer
    return max(0, len(completion.token_ids) - start) / config.overlong_buffer


def attempt_metrics(groups: Sequence[Group]) -> Metrics:
    """Return metrics of the attempts. A quantity that TRL logs has TRL's name."""
    completions = [completion for group in groups for completion in group.completions]
    reward_means = []
    reward_stds = []
    zero_stds = []
    for group in groups:
        rewards = [reward for reward in group.rewards if reward is not None]
        if rewards:
            reward_means.append(statistics.fmean(rewards))
        if len(rewards) > 1:
            reward_stds.append(statistics.stdev(rewards))
            zero_stds.append(not group.has_unequal_rewards)
    lengths = [len(completion.token_ids) for completion in completions]
    reasons = [completion.finish_reason for completion in completions]
    token_nlls = [-completion.logp for completion in completions if len(completion.logp)]
    texts = [text for group in groups for text in group.texts]
    return {
        "reward": mean(reward_means),
        "reward_std": mean(reward_stds),
        "frac_reward_zero_std": mean(zero_stds),
        "frac_all_fail": mean([group.all_fail for group in groups if group.accuracy is not None]),
        # The mean NLL of sampled tokens is an unbiased estimate of the entropy.
        "entropy": mean([nll for nlls in token_nlls for nll in nlls.tolist()]),
        "own/nll": mean([float(nlls.mean()) for nlls in token_nlls]),
        "own/leak_rate": mean([leaks(text) for text in texts]),
        "completions/mean_length": mean(lengths),
        "completions/clipped_ratio": mean([reason == "length" for reason in reasons]),
        "completions/error_ratio": mean([reason == "error" for reason in reasons]),
    } | verdict_metrics(groups)


def verdict_metrics(groups: Sequence[Group]) -> Metrics:
    """Return the fraction of the attempts with each reason of the built-in reward's verdicts.

    Return no metric for users' reward functions, which give no reasons.
    """
    reasons = [reason for group in groups for reason in group.log.reasons]
    if not reasons:
        return {}
    counts = Counter(reasons)
    metrics: Metrics = {}
    for reason in REASONS:
        metrics[f"verdicts/{reason}"] = counts[reason] / len(reasons)
    undecided = [counts[reason] for reason in REASONS if Grade(reason).verdict is None]
    metrics["verdicts/undecided"] = sum(undecided) / len(reasons)
    return metrics


def reward_function_metrics(groups: Sequence[Group]) -> Metrics:
    """Return what TRL logs of each reward function, and what the functions logged themselves."""
    by_function: dict[str, list[float]] = {}
    logged: dict[str, list[float]] = {}
    for group in groups:
        for name, rewards in group.log.by_function.items():
            known = [reward for reward in rewards if reward is not None]
            by_function.setdefault(name, []).extend(known)
        for name, values in group.log.metrics.items():
            logged.setdefault(name, []).extend(values)
    metrics: Metrics = {}
    for name, rewards in by_function.items():
        metrics[f"rewards/{name}/mean"] = mean(rewards)
        several = len(rewards) > 1
        metrics[f"rewards/{name}/std"] = statistics.stdev(rewards) if several else None
    for name, values in logged.items():
        metrics[name] = mean(values)
    return metrics


def completion_rows(
    groups: Sequence[Group],
    positives: dict[str, list[tuple[int, ...]]],
    prompter: Prompter,
    kind: str,
) -> list[dict[str, Any]]:
    """Return the rows of completions/step-N.jsonl for attempts and positive samples.

    positives: token ids by problem id.
    kind: `kind` of the rows of positive samples.
    """
    rows = []
    for group in groups:
        for i, text in enumerate(group.texts):
            row = completion_row(group.problem, "own", text, group.rewards[i])
            row["finish_reason"] = group.completions[i].finish_reason
            row["advantage"] = group.advantages[i]
            rows.append(row | columns_of_attempt(group.log, i))
        for ids in positives.get(group.problem.id, ()):
            rows.append(completion_row(group.problem, kind, prompter.text(ids)))
    return rows


def columns_of_attempt(log: RewardLog, i: int) -> dict[str, Any]:
    """Return the columns that rewards add to the row of attempt i of a group."""
    added: dict[str, Any] = {}
    if log.reasons:
        added["verdict"] = log.reasons[i]
    if log.by_function:
        added["rewards"] = {name: rewards[i] for name, rewards in log.by_function.items()}
    for name, values in log.columns.items():
        added[name] = values[i]
    return added


def completion_row(
    problem: Problem, kind: str, text: str, reward: float | None = None
) -> dict[str, Any]:
    """Return one row of completions/step-N.jsonl."""
    return {
        "id": problem.id,
        "prompt": last_question(problem),
        "answer": problem.answer,
        "level": problem.level,
        "kind": kind,
        "completion": text,
        "reward": reward,
    }
