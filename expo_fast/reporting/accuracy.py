"""Accuracy from graded samples: pass@k, majority vote, and bootstrap intervals.

pass@k is estimated without bias from n samples of which c are right, 1 - C(n-c, k) / C(n, k)
(arXiv:2107.03374, eq. 1). The majority vote is right where the most common answer is
(arXiv:2203.11171). Intervals are a bootstrap over problems.
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

    id: str  # of the problem
    sample: int  # index among the samples of the problem
    level: int | None  # of the problem
    completion: str
    verdict: float | None  # 1.0 right, 0.0 wrong, None undecided, which counts as wrong
    finish_reason: str
    tokens: int  # sampled


Samples = Sequence[Graded]  # all of one problem


def by_problem(graded: Sequence[Graded], samples: int) -> list[Samples]:
    """Split completions, of which the `samples` of a problem follow each other, by problem."""
    starts = range(0, len(graded), samples)
    return [graded[start : start + samples] for start in starts]


def by_level(problems: Sequence[Samples]) -> dict[int, list[Samples]]:
    """Return the problems of each level, in order; those without a level are left out."""
    levels: dict[int, list[Samples]] = {}
    for problem in problems:
        level = problem[0].level
        if level is not None:
            levels.setdefault(level, []).append(problem)
    return dict(sorted(levels.items()))


def accuracy(problems: Sequence[Samples], ks: Sequence[int]) -> dict[str, Any]:
    """Return pass@k for each k and `majority`, both with 95% intervals, and `all_fail`.

    problems: one or more, with the same number of samples each.
    """
    n_samples = len(problems[0])
    n_right = [_count_right(samples) for samples in problems]
    row: dict[str, Any] = {}
    for k in ks:
        chances = [pass_at_k(n_samples, c, k) for c in n_right]
        row |= _with_interval(f"pass@{k}", chances)
    row["all_fail"] = n_right.count(0) / len(problems)
    votes = [float(majority_is_right(samples)) for samples in problems]
    return row | _with_interval("majority", votes)


def _count_right(samples: Samples) -> int:
    return [sample.verdict for sample in samples].count(1.0)


def _with_interval(name: str, values: Sequence[float]) -> dict[str, Any]:
    low, high = bootstrap_interval(values)
    return {name: fmean(values), f"{name}/interval": [low, high]}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n samples, of which c are right, contain a right one."""
    return 1 - comb(n - c, k) / comb(n, k)


@dataclass
class _Vote:
    """One answer and the samples that box it."""

    answer: str  # as first spelt
    voters: list[Graded] = field(default_factory=list)


def majority_is_right(samples: Samples) -> bool:
    """Return whether the answer that most samples of a problem box is right.

    Of two equally common answers, the one boxed first counts. Two spellings that are equal without
    math-verify are one answer, which is right where the verdict on one of its samples is. A sample
    without an answer in a box does not vote.
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
    """Return the 95% bootstrap interval of the mean over problems that have these values."""
    rng = random.Random(0)
    means = []
    for _ in range(BOOTSTRAP_RESAMPLES):
        resample = rng.choices(values, k=len(values))
        means.append(fmean(resample))
    means.sort()
    tail = BOOTSTRAP_RESAMPLES // 40  # 2.5% at each end
    return means[tail], means[-tail - 1]
