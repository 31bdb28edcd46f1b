"""Accuracy from graded samples: pass@k, majority vote, and bootstrap intervals.

The unbiased estimate of pass@k from n samples with c right ones is 1 - C(n-c, k) / C(n, k)
(arXiv:2107.03374, eq. 1). The majority vote is right if the most common answer is right
(arXiv:2203.11171). maj@k is the mean over the votes of the n // k disjoint groups of k consecutive
samples, and `majority` is that of all n samples. Intervals are from a bootstrap over problems.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from statistics import fmean
from typing import Any

from expo_fast.data.answer_grading import decide, last_boxed, tidy

BOOTSTRAP_RESAMPLES = 1000


@dataclass(frozen=True)
class Graded:
    """One completion and its verdict: a row of `expo_fast.evaluate --output`."""

    id: str  # id of the problem
    sample: int  # index among the samples of the problem
    level: int | None  # level of the problem
    completion: str
    verdict: float | None  # 1.0 right, 0.0 wrong, None undecided, which counts as wrong
    finish_reason: str
    tokens: int  # number of sampled tokens
    reason: str | None = None  # of the verdict, one of `grader_pool.REASONS`; None: not known


Samples = Sequence[Graded]  # all samples of one problem


def by_problem(graded: Sequence[Graded], samples: int) -> list[Samples]:
    """Split completions by problem. `samples` consecutive completions belong to one problem."""
    starts = range(0, len(graded), samples)
    return [graded[start : start + samples] for start in starts]


def by_level(problems: Sequence[Samples]) -> dict[int, list[Samples]]:
    """Return the problems of each level, by level. Problems without a level are left out."""
    levels: dict[int, list[Samples]] = {}
    for problem in problems:
        level = problem[0].level
        if level is not None:
            levels.setdefault(level, []).append(problem)
    return dict(sorted(levels.items()))


def accuracy(
    problems: Sequence[Samples], ks: Sequence[int], votes: Sequence[int] = ()
) -> dict[str, Any]:
    """Return pass@k for each k and `majority`, both with 95% intervals, and `all_fail`.

    problems: one or more, with the same number of samples each.
    votes: values of k for maj@k.
    """
    n_samples = len(problems[0])
    n_right = [_count_right(samples) for samples in problems]
    row: dict[str, Any] = {}
    for k in ks:
        row |= _with_interval(f"pass@{k}", pass_chances(problems, k))
    row["all_fail"] = n_right.count(0) / len(problems)
    for k in votes:
        row |= _with_interval(f"maj@{k}", majorities(problems, k))
    return row | _with_interval("majority", majorities(problems, n_samples))


def pass_chances(problems: Sequence[Samples], k: int) -> list[float]:
    """Return the unbiased estimate of pass@k of each problem."""
    return [pass_at_k(len(samples), _count_right(samples), k) for samples in problems]


def majorities(problems: Sequence[Samples], k: int) -> list[float]:
    """Return maj@k of each problem."""
    return [_majority_at_k(samples, k) for samples in problems]


def _majority_at_k(samples: Samples, k: int) -> float:
    starts = range(0, len(samples) - k + 1, k)
    return fmean([float(majority_is_right(samples[start : start + k])) for start in starts])


def _count_right(samples: Samples) -> int:
    return [sample.verdict for sample in samples].count(1.0)


def _with_interval(name: str, values: Sequence[float]) -> dict[str, Any]:
    low, high = bootstrap_interval(values)
    return {name: fmean(values), f"{name}/interval": [low, high]}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the probability that k of n samples contain a right one, if c of n are right."""
    return 1 - comb(n - c, k) / comb(n, k)


@dataclass
class _Vote:
    """One answer and the samples that box it."""

    answer: str  # in its first spelling
    voters: list[Graded] = field(default_factory=list)


def majority_is_right(samples: Samples) -> bool:
    """Return whether the answer that most samples of a problem box is right.

    Of equally common answers, the one that was boxed first counts. Spellings that are equal without
    math-verify are one answer. An answer is right if the verdict on any of its samples is right. A
    sample without a boxed answer does not vote.
    """
    votes: list[_Vote] = []  # in the order in which they were first boxed
    for sample in samples:
        answer = tidy(last_boxed(sample.completion) or "")
        same = [vote for vote in votes if decide(vote.answer, answer)]
        if not same and answer:
            same = [_Vote(answer)]
            votes += same
        if same:
            same[0].voters.append(sample)
    if not votes:
        return False
    winner = max(votes, key=lambda vote: len(vote.voters))
    return _count_right(winner.voters) > 0


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% bootstrap interval of the mean of values, one per problem."""
    rng = random.Random(0)
    means = []
    for _ in range(BOOTSTRAP_RESAMPLES):
        resample = rng.choices(values, k=len(values))
        means.append(fmean(resample))
    means.sort()
    tail = BOOTSTRAP_RESAMPLES // 40  # 2.5% at each end
    return means[tail], means[-tail - 1]
