"""Verifiable rewards: the built-in one for boxed answers, and those of users' functions.

`boxed_answer_reward` and the result of `custom_reward` have the signature `Reward`, which the
training loops call.
"""

import atexit
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from expo_fast import answers
from expo_fast.data import answer_grading, grader_pool, workers
from expo_fast.data.grader_pool import Grade, GraderPool
from expo_fast.data.problems import Problem
from expo_fast.reward_functions import (
    Reward,
    RewardLog,
    Rewards,
    call_reward,
    custom_reward,
    load_reward,
    reward_columns,
)

if TYPE_CHECKING:  # scoring answers needs no generator
    from expo_fast.generate import Completion

__all__ = [
    "Grade",
    "Reward",
    "boxed_answer_reward",
    "call_reward",
    "custom_reward",
    "grade_answers",
    "grader_hash",
    "load_reward",
    "reward_columns",
    "score_answers",
]


def boxed_answer_reward(
    problems: Sequence[Problem],
    texts: Sequence[str],
    completions: Sequence["Completion"],
) -> Rewards:
    """Return 1.0 if the last box of a text holds the problem's answer, else 0.0.

    None where the verifier is undecided. This is the default reward. The beginning of an answer
    that the prompt gives belongs to the text.
    """
    answers = [problem.answer for problem in problems]
    complete = [p.prefill + text for p, text in zip(problems, texts, strict=True)]
    grades = grade_answers(answers, complete)
    log = RewardLog(reasons=[grade.reason for grade in grades])
    return Rewards([grade.verdict for grade in grades], log)


def score_answers(
    answers: Sequence[str],  # references; if one has a box, the content of its last box
    completions: Sequence[str],  # the last balanced box of each is its answer
    *,
    timeout_s: float = 2.0,  # wall seconds for each answer
) -> list[float | None]:
    """Return 1.0 for a right answer, 0.0 for a wrong one or no box, and None if undecided.

    An answer is undecided if it is too large to compute, after a timeout, at the memory limit of
    512 MiB, after a crash, or if the reference is empty or over 1000 characters. `grade_answers`
    says which.

    Never raises because of a text. Raises ValueError if the lengths differ, and RuntimeError if
    math-verify cannot be loaded.
    """
    return _shared_pool().verdicts(answers, completions, timeout_s=timeout_s)


def grade_answers(
    answers: Sequence[str],
    completions: Sequence[str],
    *,
    timeout_s: float = 2.0,
) -> list[Grade]:
    """Return the verdicts of `score_answers` with their reasons. The arguments are the same.

    A grade has the `verdict`, and the `reason`: one of `grader_pool.REASONS`.
    """
    return _shared_pool().grade(answers, completions, timeout_s=timeout_s)


@cache
def _shared_pool() -> GraderPool:
    pool = GraderPool()
    atexit.register(pool.close)
    return pool


def grader_hash() -> str:
    """Return a hash of everything that decides `score_answers`.

    Verdicts with equal hashes come from the same grader.
    """
    digest = hashlib.sha256()
    rules = sorted(Path(answers.__file__).parent.glob("*.py"))
    for source in (
        __file__,
        grader_pool.__file__,
        workers.__file__,
        answer_grading.__file__,
        *rules,
    ):
        digest.update(Path(source).read_bytes())
    with suppress(PackageNotFoundError):  # then only the answers that need it fail
        digest.update(version("math-verify").encode())
    return digest.hexdigest()[:16]
