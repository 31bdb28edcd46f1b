"""Reward functions of users, with the signature of TRL's reward functions.

A function is called with keyword arguments: `prompts`, `completions` and `completion_ids`, which
are lists with one item per completion, a list for each column of the data, and `trainer_state`,
`log_extra` and `log_metric`. It returns a list of numbers, with None for a completion that it does
not judge. It may be a coroutine function. A function without `**kwargs` gets only the arguments
that it names.

If the prompt of a problem is chat messages, the function gets prompt and completion as lists of
messages. If the prompt is text, it gets both as text, unless it annotates its completions as lists
of messages, as the functions of `trl.rewards` do.
"""

import asyncio
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import re
import reprlib
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence, ValuesView
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache, partial
from numbers import Real
from operator import attrgetter
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from expo_fast.data.columns import Message
from expo_fast.data.problems import Problem
from expo_fast.data.time_limit import TimeLimitExceeded, time_limit
from expo_fast.reporting.metric_table import is_taken

if TYPE_CHECKING:  # scoring answers needs no generator
    from expo_fast.generate import Completion

MOST = torch.finfo(torch.float32).max  # advantages use rewards in fp32, as in TRL

# Arguments that a function gets in addition to the columns of the data.
ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
)
# Columns of completions/step-N.jsonl that the trainer writes.
TRAINERS_COLUMNS = (
    "id",
    "prompt",
    "answer",
    "level",
    "kind",
    "completion",
    "reward",
    "finish_reason",
    "advantage",
    "verdict",
    "rewards",
)
LISTS_OF_LISTS = re.compile(r"(\w+\.)*(list|sequence)\[(\w+\.)*(list|sequence)\b", re.IGNORECASE)


class RewardError(ValueError):
    """A mistake of a user's reward function, in one sentence that names the function."""


@dataclass
class TrainerState:
    """The state of the run, which a reward function gets as `trainer_state`."""

    global_step: int = 0
    """Steps done so far."""
    max_steps: int = 0
    """Steps of the complete run."""
    epoch: float = 0.0
    """Passes over the problems so far."""
    is_world_process_zero: bool = True
    """Whether this is the first rank. Each rank calls the functions for its own completions."""


@dataclass
class RewardLog:
    """The values that reward functions log for a batch of completions."""

    by_function: dict[str, list[float | None]] = field(default_factory=dict)
    """Rewards without weights, by the function's name; empty for the built-in reward."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Columns from `log_extra` for completions/step-N.jsonl, with one value per completion."""
    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Values from `log_metric`. A metric of the step is the mean of its values."""
    reasons: list[str] = field(default_factory=list)
    """The reasons of the built-in reward's verdicts; empty for users' functions."""


class Rewards(list[float | None]):
    """Rewards of a batch of completions, None for undecided, and the log of their functions."""

    def __init__(self, values: Sequence[float | None], log: RewardLog):
        super().__init__(values)
        self.log = log


# (problems, texts, completions), one of each per sample -> rewards, with None for undecided.
# `custom_reward` returns `Rewards`.
Reward = Callable[
    [Sequence[Problem], Sequence[str], Sequence["Completion"]],
    list[float | None],
]


@dataclass(frozen=True)
class RewardFunction:
    """A user's function and the name under which its rewards are logged."""

    name: str
    fn: Callable[..., Any]

    def arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the given arguments that the function takes.

        Leave out arguments that a functools.partial has bound. Leave out columns without a value if
        the function has a default for them.
        """
        parameters = parameters_of(self.fn)
        takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
        bound = bound_names(self.fn)
        taken = {}
        for name, value in given.items():
            parameter = parameters.get(name)
            if name in bound or (parameter is None and not takes_all):
                continue
            optional = parameter is not None and parameter.default is not parameter.empty
            if optional and name not in ARGUMENTS and all(each is None for each in value):
                continue
            taken[name] = value
        return taken

    @property
    def required(self) -> list[str]:
        """The names of the arguments without a default."""
        names = []
        for name, parameter in parameters_of(self.fn).items():
            several = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if parameter.default is parameter.empty and not several:
                names.append(name)
        return names

    @property
    def wants_messages(self) -> bool:
        """Whether the annotation of `completions` is a list of lists of messages."""
        parameter = parameters_of(self.fn).get("completions")
        if parameter is None or parameter.annotation is parameter.empty:
            return False
        annotation = parameter.annotation
        text = annotation if isinstance(annotation, str) else str(annotation)
        return bool(LISTS_OF_LISTS.match(text)) and "|" not in text


def parameters_of(fn: Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters of a function, or `**kwargs` if it has no signature."""
    try:
        return dict(inspect.signature(fn).parameters)
    except (TypeError, ValueError):  # a function in C may have no signature
        anything = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
        return {"kwargs": anything}


def _unbound(fn: Callable) -> Callable:
    """Return the function of a functools.partial."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def bound_names(fn: Callable) -> set[str]:
    """Return the keyword arguments that a functools.partial has bound."""
    names: set[str] = set()
    while isinstance(fn, functools.partial):
        names |= fn.keywords.keys()
        fn = fn.func
    return names


# Rewards


def custom_reward(
    functions: Callable[..., Any] | Sequence[RewardFunction],
    weights: Sequence[float] = (),  # one per function; (): all 1
    state: TrainerState | None = None,
    timeout_s: float = 0.0,  # of wall time for a function and a batch; 0: no limit
) -> Reward:
    """Return a `Reward` that is the weighted sum of users' functions.

    As in TRL, the sum of a completion leaves out the functions that return None for it. A
    completion that no function judges has no reward.
    """
    if not isinstance(functions, Sequence):
        functions = [RewardFunction(name_of(functions), functions)]
    weights = weights or [1.0] * len(functions)
    state = state or TrainerState()

    def reward(
        problems: Sequence[Problem],
        texts: Sequence[str],
        completions: Sequence["Completion"],
    ) -> Rewards:
        log = RewardLog()
        results = []
        for function in functions:
            given = arguments_of_batch(function, problems, texts, completions)
            given["trainer_state"] = state
            given["log_extra"] = partial(_log_extra, log, len(texts))
            given["log_metric"] = partial(_log_metric, log)
            results.append(start(function, given, timeout_s))
        rewards = finish(functions, results, len(texts), timeout_s)
        log.by_function = dict(zip([f.name for f in functions], rewards, strict=True))
        sums = [weighted_sum(each, weights) for each in zip(*rewards, strict=True)]
        return Rewards(sums, log)

    return reward


def arguments_of_batch(
    function: RewardFunction,
    problems: Sequence[Problem],
    texts: Sequence[str],
    completions: Sequence["Completion"],
) -> dict[str, Any]:
    """Return the prompts, completions and columns that a function gets for a batch."""
    prompts = []
    replies = []
    always_messages = function.wants_messages
    for problem, text in zip(problems, texts, strict=True):
        if always_messages or not isinstance(problem.prompt, str):
            prompts.append(chat_of(problem))
            replies.append([{"role": "assistant", "content": text}])
        else:
            prompts.append(problem.prompt)
            replies.append(text)
    return {
        "prompts": prompts,
        "completions": replies,
        "completion_ids": [list(completion.token_ids) for completion in completions],
        **reward_columns(problems),
    }


def chat_of(problem: Problem) -> list[Message]:
    """Return the prompt of a problem as messages. They are copies, which the caller may change."""
    if isinstance(problem.prompt, str):
        return [{"role": "user", "content": problem.prompt}]
    return [dict(message) for message in problem.prompt]


def reward_columns(problems: Sequence[Problem]) -> dict[str, list[object]]:
    """Return the columns that a user's function gets, one value per problem.

    They are all columns of the data, and `id`, `answer`, `solution` and `level`. The value is None
    if a problem lacks a column. A `solution` that is only an answer counts as a column of the data.
    """
    rows: list[dict[str, object]] = []
    names: dict[str, None] = {}  # in the order of their first appearance
    for problem in problems:
        row = {
            **problem.columns,
            "id": problem.id,
            "answer": problem.answer or None,
            "solution": problem.solution or problem.columns.get("solution"),
            "level": problem.level,
        }
        rows.append(row)
        names |= dict.fromkeys(row)
    return {name: [row.get(name) for row in rows] for name in names}


def weighted_sum(rewards: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Return the weighted sum of the known rewards, or None if no reward is known.

    Raise RewardError if the sum is beyond the range of fp32.
    """
    known = [w * r for w, r in zip(weights, rewards, strict=True) if r is not None]
    if not known:
        return None
    total = sum(known)
    if not abs(total) <= MOST:
        raise RewardError(
            f"the weighted sum of the rewards {list(rewards)} is {total}: need at most {MOST:.4g}"
        )
    return total


def _log_extra(log: RewardLog, n: int, column: str, values: Any) -> None:
    """Add a column to the table of completions, as `log_extra` of TRL does.

    Raise ValueError for the name of a column of the trainer's, and another number of values.
    """
    if column in TRAINERS_COLUMNS:
        raise ValueError(f"log_extra: {column!r} is a column of the trainer's: rename yours")
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    if len(values) != n:
        raise ValueError(
            f"log_extra got {len(values)} values for the column {column!r}: give one for each of "
            f"the {n} completions"
        )
    log.columns[column] = [_plain_value(value) for value in values]


def _plain_value(value: Any) -> Any:
    """Return a value as JSON stores it. A value without a form in JSON becomes text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return json.loads(json.dumps(value, default=str))


def _log_metric(log: RewardLog, name: str, value: Any) -> None:
    """Add a value of a metric, as `log_metric` of TRL does. Leave out NaN and None.

    Raise ValueError for the name of a metric of the trainer's, and a value that is no number.
    """
    if is_taken(name):
        raise ValueError(f"log_metric: {name!r} is a metric of the trainer's: rename yours")
    number = _number(value)
    if value is not None and number is None:
        raise ValueError(
            f"log_metric got {reprlib.repr(value)} for the metric {name!r}: give a number"
        )
    if number is not None and not math.isnan(number):
        log.metrics.setdefault(name, []).append(number)


# Calls


def call_reward(
    fn: Callable[..., Any],
    prompts: Sequence,  # text or chat messages
    completions: Sequence,
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, list],  # the other columns of the data, one value per completion
) -> list[float | None]:
    """Return the rewards of one function, called as TRL calls it. NaN becomes None.

    Raise RewardError if it raises an exception, or does not return one finite number or None per
    completion.
    """
    function = RewardFunction(name_of(fn), fn)
    given = {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        **columns,
    }
    return finish([function], [start(function, given)], len(completions))[0]


def start(function: RewardFunction, given: dict[str, Any], timeout_s: float = 0.0) -> Any:
    """Call a function, and return its result. The result may be an awaitable."""
    try:
        with time_limit(timeout_s):
            returned = function.fn(**function.arguments(given))
            return list(returned) if isinstance(returned, Iterator) else returned
    except TimeLimitExceeded:
        raise RewardError(_late(function.name, timeout_s)) from None
    except (Exception, SystemExit) as error:
        raise _failure(function, error) from error


def finish(
    functions: Sequence[RewardFunction],
    started: Sequence[Any],
    n: int,  # number of completions
    timeout_s: float = 0.0,  # for all coroutines together; 0: no limit
) -> list[list[float | None]]:
    """Return the rewards of each function. Run all coroutines concurrently."""
    waiting = [i for i, returned in enumerate(started) if inspect.isawaitable(returned)]
    results = list(started)
    if waiting:
        jobs = [_awaited(functions[i], started[i]) for i in waiting]
        future = asyncio.run_coroutine_threadsafe(_all_of(jobs), _event_loop())
        try:
            done = future.result(timeout_s or None)
        except TimeoutError:
            future.cancel()
            names = ", ".join(functions[i].name for i in waiting)
            raise RewardError(_late(names, timeout_s)) from None
        for i, returned in zip(waiting, done, strict=True):
            results[i] = returned
    pairs = zip(functions, results, strict=True)
    return [checked_rewards(function.name, returned, n) for function, returned in pairs]


async def _all_of(jobs: Sequence[Awaitable]) -> list[Any]:
    return await asyncio.gather(*jobs)


async def _awaited(function: RewardFunction, returned: Awaitable) -> Any:
    try:
        return await returned
    except (Exception, SystemExit) as error:
        raise _failure(function, error) from error


def _failure(function: RewardFunction, error: BaseException) -> RewardError:
    """Return an exception of a function as one sentence, with the line that raised it."""
    cause = shorten(f"{type(error).__name__}: {error}", 300)
    return RewardError(
        f"reward function {function.name} raised {cause}{_place_of(function, error)}"
    )


def _place_of(function: RewardFunction, error: BaseException) -> str:
    """Return the innermost line of the function's file that an exception passed through."""
    code = getattr(inspect.unwrap(_unbound(function.fn)), "__code__", None)
    place = ""
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if code is not None and frame.f_code.co_filename == code.co_filename:
            place = f" ({Path(code.co_filename).name}, line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    return place


def _late(names: str, timeout_s: float) -> str:
    return (
        f"reward function {names} gave no result within {timeout_s:g} s: let it end earlier, or "
        "raise --reward-timeout (0: no limit)"
    )


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that runs in a thread for the life of the process.

    All steps use the same loop, because a client that a function keeps from step to step belongs to
    the loop of its first step.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


def checked_rewards(name: str, returned: Any, n: int) -> list[float | None]:
    """Return the result of a function as n numbers, with None for None and NaN.

    Raise RewardError if the result is not n finite numbers, NaN or None.
    """
    values = _as_list(returned)
    if values is None or len(values) != n:
        raise RewardError(
            f"reward function {name} returned {_described(returned)}: return a list of {n} "
            "rewards, one for each completion"
        )
    return [_checked_reward(name, index, reward) for index, reward in enumerate(values)]


def _as_list(returned: Any) -> list[Any] | None:
    """Return a result as a list: a sequence, an array or a tensor. None for another result."""
    try:
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if isinstance(values, Sequence | ValuesView) and not isinstance(values, str | bytes):
            return list(values)
    except Exception:  # a class of the user's may raise anything
        return None
    return None


def _described(returned: Any) -> str:
    """Return a description of a function's result."""
    kind = type(returned).__name__
    if returned is None:
        return "None"
    if hasattr(returned, "shape"):
        return f"a {kind} of shape {tuple(returned.shape)}"
    if isinstance(returned, list | tuple):
        return f"a {kind} of {len(returned)}"
    return f"a {kind}"


def _checked_reward(name: str, index: int, value: object) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is not None and math.isnan(number):
        return None
    if number is None or abs(number) > MOST:
        got = f"returned {_shown(value)} at index {index}"
        need = f"return a finite number, at most {MOST:.4g} in size, or None"
        raise RewardError(f"reward function {name} {got}: {need}")
    return number


def _shown(value: object) -> str:
    """Return a value as a short text. That of an integer with thousands of digits is its size."""
    if isinstance(value, int) and value.bit_length() > 10_000:
        return f"an integer of {value.bit_length()} bits"
    try:
        return reprlib.repr(value)
    except Exception:  # a class of the user's may raise anything
        return f"a {type(value).__name__}"


def _number(value: Any) -> float | None:
    """Return a number as a float, or None for anything else. numpy and torch numbers count."""
    try:
        if not isinstance(value, Real) and getattr(value, "ndim", None) == 0:
            value = value.item()
        return float(value) if isinstance(value, Real | Decimal) else None
    except OverflowError:  # an integer beyond fp64
        return math.inf
    except Exception:  # a class of the user's may raise anything
        return None


# Functions by name


def load_rewards(places: Sequence[str]) -> list[RewardFunction]:
    """Return the functions at these places, with unique names. Load each module once.

    Raise ValueError or FileNotFoundError as `load_reward` does.
    """
    modules: dict[str, ModuleType] = {}
    functions: list[RewardFunction] = []
    for place in places:
        fn = load_reward(place, modules)
        name = name_of(fn, place)
        taken = [function.name for function in functions]
        number = 2
        unique = name
        while unique in taken:
            unique = f"{name}_{number}"
            number += 1
        functions.append(RewardFunction(unique, fn))
    return functions


def name_of(fn: Callable[..., Any], place: str | None = None) -> str:
    """Return a function's name as in TRL. A lambda gets the name at the end of its place."""
    fn = _unbound(fn)
    name = getattr(fn, "__name__", type(fn).__name__)
    if name == "<lambda>" and place is not None:
        return re.split(r"[.:]", place)[-1]
    return name


def source_hash(functions: Sequence[RewardFunction]) -> str | None:
    """Return a hash of the files that define these functions, None if no source is found.

    A function of `__main__` counts without the rest of its program, which also sets options.
    """
    sources = set()
    for function in functions:
        defined = inspect.unwrap(_unbound(function.fn))
        if not hasattr(defined, "__code__"):  # an instance of a class
            defined = type(defined)
        with suppress(OSError, TypeError):  # built-in, or typed into a shell
            file = inspect.getsourcefile(defined)
            if defined.__module__ == "__main__" or file is None:
                sources.add(inspect.getsource(defined).encode())
            else:
                sources.add(Path(file).read_bytes())
    if not sources:
        return None
    return hashlib.sha256(b"\0".join(sorted(sources))).hexdigest()


def load_reward(place: str, modules: dict[str, ModuleType] | None = None) -> Callable[..., Any]:
    """Return the function at a place.

    place: `package.module.function`, `package.module:function` or `path/to/file.py:function`.
    modules: the modules that were loaded before, by name or path. New modules are added to it.

    Raise ValueError or FileNotFoundError if there is no such function. An error that the module
    itself raises is not caught.
    """
    modules = {} if modules is None else modules
    module_name, _, name = place.rpartition(":" if ":" in place else ".")
    if not module_name or not name:
        form = "package.module.function or path/to/file.py:function"
        raise ValueError(f"reward function {place!r}: write it as {form}")
    if module_name not in modules:
        modules[module_name] = _load(module_name)
    try:
        fn = attrgetter(name)(modules[module_name])
    except AttributeError:
        fn = None
    if not callable(fn):
        raise ValueError(f"reward function {place!r}: {module_name} has no function {name!r}")
    if inspect.isclass(fn):
        raise ValueError(
            f"reward function {place!r}: {name} is a class: make an instance in its module, "
            f"mine = {name}(...), and name the instance"
        )
    return fn


def _load(place: str) -> ModuleType:
    if place.endswith(".py"):
        return _load_file(Path(place).expanduser())
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


# Checks before a run


def check_reward_functions(
    functions: Sequence[RewardFunction], source: str, problems: Sequence[Problem]
) -> None:
    """Raise ValueError if a function needs an argument that the data do not have."""
    needed = {name for function in functions for name in function.required} - set(ARGUMENTS)
    for problem in problems:
        if not needed:
            return
        needed -= {
            name for name, (value,) in reward_columns([problem]).items() if value is not None
        }
    for function in functions:
        for name in function.required:
            if name not in needed:
                continue
            raise ValueError(
                f"reward function {function.name} needs the argument {name!r}, which is neither a "
                f"column of {source} nor one of {', '.join(ARGUMENTS)}"
            )


def check_reward_columns(source: str, problem: Problem) -> None:
    """Raise ValueError if a column of the data has the name of another argument."""
    taken = problem.columns.keys() & set(ARGUMENTS)
    if taken:
        raise ValueError(
            f"{source} has a column {min(taken)!r}, but the trainer passes an argument of that "
            "name to the reward function: rename the column"
        )
