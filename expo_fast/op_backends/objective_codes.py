"""Objectives as a torch graph can hold them, which takes no objects: a name and numbers."""

import itertools
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch

from expo_fast.objectives import POLICY_OBJECTIVES, PREFERENCE_OBJECTIVES


def _built_in() -> dict[str, type]:
    """Return the classes of the two tables by their names."""
    entries = [*POLICY_OBJECTIVES.values(), *PREFERENCE_OBJECTIVES.values()]
    return {entry.objective.__name__: entry.objective for entry in entries}


BUILT_IN = _built_in()
# of each class, (name, type) of its fields: torch.compile cannot trace dataclasses.fields
FIELDS = {name: [(f.name, f.type) for f in fields(kind)] for name, kind in BUILT_IN.items()}


class CustomObjective:
    """Holds an objective that is not of the tables. Its code is valid as long as this lives."""

    def __init__(self, function: Callable):
        self.function = function


class ObjectiveCode(NamedTuple):
    """What a custom op is given in place of an objective."""

    name: str
    values: list[float]  # the fields of a built-in objective, None as NaN
    custom: CustomObjective | None = None  # to be kept by the caller during the op


_custom_objectives: WeakValueDictionary[str, CustomObjective] = WeakValueDictionary()
_numbers = itertools.count()


def encode(objective: Callable) -> ObjectiveCode:
    """Return the code of an objective.

    Raise ValueError for one that is not built in while torch.compile traces the call.
    """
    name = type(objective).__name__
    if BUILT_IN.get(name) is type(objective):
        values = []
        for field, _ in FIELDS[name]:
            value = getattr(objective, field)
            values.append(math.nan if value is None else float(value))
        return ObjectiveCode(name, values)
    if torch.compiler.is_compiling():
        raise ValueError(f"objective={objective}: torch.compile takes the built-in objectives only")
    custom = CustomObjective(objective)
    name = f"{name} number {next(_numbers)}"  # fresh, so that no other call's code ends with this
    _custom_objectives[name] = custom
    return ObjectiveCode(name, [], custom)


def holder_of(name: str) -> CustomObjective | None:
    """Return what must be kept for the code to stay valid; None for a built-in objective."""
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
