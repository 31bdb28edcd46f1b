"""Encode objectives as a name and numbers, because a torch graph cannot hold objects."""

import itertools
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary

import torch

from expo_fast.objectives import POLICY_OBJECTIVES, PREFERENCE_OBJECTIVES


def _built_in() -> dict[str, type]:
    """Return the classes of the tables in objectives.py, by class name."""
    entries = [*POLICY_OBJECTIVES.values(), *PREFERENCE_OBJECTIVES.values()]
    return {entry.objective.__name__: entry.objective for entry in entries}


BUILT_IN = _built_in()
NAMES = {
    "policy": {entry.objective.__name__ for entry in POLICY_OBJECTIVES.values()},
    "preference": {entry.objective.__name__ for entry in PREFERENCE_OBJECTIVES.values()},
}
# (name, type) of the fields of each class, because torch.compile cannot trace dataclasses.fields
FIELDS = {name: [(f.name, f.type) for f in fields(kind)] for name, kind in BUILT_IN.items()}


class CustomObjective:
    """An objective that is not in the tables. Its code is valid while this object exists."""

    def __init__(self, function: Callable):
        self.function = function


class ObjectiveCode(NamedTuple):
    """The encoding of an objective, which is passed to a custom op."""

    name: str
    values: list[float]  # the fields of a built-in objective, with NaN for None
    custom: CustomObjective | None = None  # the caller must keep it during the op


_custom_objectives: WeakValueDictionary[str, CustomObjective] = WeakValueDictionary()
_numbers = itertools.count()


def encode(objective: Callable, kind: Literal["policy", "preference"]) -> ObjectiveCode:
    """Return the code of an objective.

    Raise ValueError for what is no objective of this kind, and if torch.compile traces the call and
    the objective is not built in.
    """
    name = type(objective).__name__
    example = "Clipped(0.2, 0.2)" if kind == "policy" else "Dpo(beta=0.1)"
    if isinstance(objective, type) or not callable(objective):
        raise ValueError(f"objective={objective!r}: must be an object such as {example}")
    if BUILT_IN.get(name) is type(objective):
        if name not in NAMES[kind]:
            raise ValueError(f"objective={objective!r}: is no {kind} objective such as {example}")
        values = []
        for field, _ in FIELDS[name]:
            value = getattr(objective, field)
            values.append(math.nan if value is None else float(value))
        return ObjectiveCode(name, values)
    if torch.compiler.is_compiling():
        raise ValueError(f"objective={objective}: torch.compile needs a built-in objective")
    custom = CustomObjective(objective)
    name = f"{name} number {next(_numbers)}"  # unique, so that calls do not share a code
    _custom_objectives[name] = custom
    return ObjectiveCode(name, [], custom)


def holder_of(name: str) -> CustomObjective | None:
    """Return the object that keeps the code valid, or None for a built-in objective."""
    return _custom_objectives.get(name)


def decode(name: str, values: list[float]) -> Any:
    """Return the objective of a code."""
    custom = _custom_objectives.get(name)
    if custom is not None:
        return custom.function
    arguments = {}
    for (field, kind), value in zip(FIELDS[name], values, strict=True):
        if math.isnan(value):
            arguments[field] = None
        else:
            arguments[field] = bool(value) if kind is bool else value
    return BUILT_IN[name](**arguments)
