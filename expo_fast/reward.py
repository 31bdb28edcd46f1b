"""Reward functions: the built-in one for boxed answers, and those of users.

`boxed_answer_reward` and the result of `custom_reward` have the signature `Reward`, which the
training loops call.
"""

import atexit
import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from expo_fast import answers
from expo_fast.data import answer_grading, verifier
from expo_fast.data.problems import Problem
from expo_fast.data.verifier import Verifier

if TYPE_CHECKING:  # scoring answers needs no generator
    from expo_fast.generate import Completion

# (problems, texts, completions), one of each per sample -> rewards, None for undecided
Reward = Callable[
    [Sequence[Problem], Sequence[str], Sequence["Completion"]],
    list[float | None],
]
# f(prompts, completions, completion_ids, **columns), as TRL calls it
RewardFunction = Callable[..., Any]


def boxed_answer_reward(
    problems: Sequence[Problem],
    texts: Sequence[str],
    completions: Sequence["Completion"],
) -> list[float | None]:
    """Return 1.0 if the last box of a text holds the problem's answer, else 0.0.

    None where the verifier is undecided. This is the default reward.
    """
    return score_answers([problem.answer for problem in problems], texts)


def custom_reward(fn: RewardFunction) -> Reward:
    """Return a user's reward function as a `Reward`."""

    def reward(
        problems: Sequence[Problem],
        texts: Sequence[str],
        completions: Sequence["Completion"],
    ) -> list[float | None]:
        prompts = [problem.prompt for problem in problems]
        completion_ids = [completion.token_ids for completion in completions]
        return call_reward(fn, prompts, texts, completion_ids, reward_columns(problems))

    return reward


def reward_columns(problems: Sequence[Problem]) -> dict[str, list[object]]:
    """Return the columns that a user's function gets, one value per problem.

    They are all columns of the data, with None in a problem that lacks one, and `id`, `answer`,
    `solution` and `level`.
    """
    rows: list[dict[str, object]] = []
    names: dict[str, None] = {}  # in the order of their first appearance
    for problem in problems:
        row = {
            **problem.columns,
            "id": problem.id,
            "answer": problem.answer,
            "solution": problem.solution,
            "level": problem.level,
        }
        rows.append(row)
        names |= dict.fromkeys(row)
    return {name: [row.get(name) for row in rows] for name in names}


def score_answers(
    answers: Sequence[str],  # references; if one has a box, the content of its last box
    completions: Sequence[str],  # the last balanced box of each is its answer
    *,
    timeout_s: float = 2.0,  # wall seconds for each answer
) -> list[float | None]:
    """Return 1.0 for a right answer, 0.0 for a wrong one or no box, and None if undecided.

    An answer is undecided after a timeout, at the memory limit, after a crash, or if the reference
    is empty or over 1000 characters.

    Never raises because of a text. Raises ValueError if the lengths differ, and RuntimeError if
    math-verify cannot be loaded.
    """
    return _shared_verifier().judge(answers, completions, timeout_s=timeout_s)


@cache
def _shared_verifier() -> Verifier:
    shared = Verifier()
    atexit.register(shared.close)
    return shared


def grader_hash() -> str:
    """Return a hash of everything that decides `score_answers`.

    Verdicts with equal hashes come from the same grader.
    """
    digest = hashlib.sha256()
    rules = sorted(Path(answers.__file__).parent.glob("*.py"))
    for source in (__file__, verifier.__file__, answer_grading.__file__, *rules):
        digest.update(Path(source).read_bytes())
    with suppress(PackageNotFoundError):  # then only the answers that need it fail
        digest.update(version("math-verify").encode())
    return digest.hexdigest()[:16]


def load_reward(dotted: str) -> RewardFunction:
    """Return the function named `package.module.function` or `path/to/file.py:function`.

    Raises ValueError or FileNotFoundError if there is none. An error that the module itself raises
    is not caught.
    """
    place, _, name = dotted.rpartition(":" if ".py:" in dotted else ".")
    if not place or not name:
        form = "package.module.function or path/to/file.py:function"
        raise ValueError(f"reward function {dotted!r}: write it as {form}")
    module = _load(place)
    fn = getattr(module, name, None)
    if not callable(fn):
        raise ValueError(f"reward function {dotted!r}: {place} has no function {name!r}")
    return fn


def _load(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _load_file(Path(place))
    return _load_module(place)


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"reward file {str(path)!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def _load_module(dotted: str) -> ModuleType:
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if f"{dotted}.".startswith(f"{error.name}."):
            raise ValueError(
                f"reward module {dotted!r}: there is no module {error.name!r}"
            ) from error
        raise  # the module exists, but lacks another one


def call_reward(
    fn: RewardFunction,
    prompts: Sequence,  # text or chat messages
    completions: Sequence,
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, list],  # the other columns of the data, one value per completion
) -> list[float | None]:
    """Return the rewards of a user's function, called as TRL calls it. NaN becomes None.

    Raises ValueError if it does not return one finite number or None per completion. Raises
    RuntimeError, with its name and the cause, if it raises.
    """
    name = f"{fn.__module__}.{getattr(fn, '__qualname__', type(fn).__name__)}"
    try:
        rewards = fn(
            prompts=prompts,
            completions=completions,
            completion_ids=completion_ids,
            **columns,
        )
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"reward function {name} raised {cause}") from error
    n = len(completions)
    is_list = isinstance(rewards, list | tuple)
    if not is_list or len(rewards) != n:
        size = f" of {len(rewards)}" if is_list else ""
        got = f"{type(rewards).__name__}{size}"
        raise ValueError(f"reward function {name} returned a {got}: return a list of {n}")
    return [_checked_reward(name, index, reward) for index, reward in enumerate(rewards)]


def _checked_reward(name: str, index: int, value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or math.isinf(value):
        got = f"returned {value!r} at index {index}"
        raise ValueError(f"reward function {name} {got}: return a finite number or None")
    return None if math.isnan(value) else float(value)
