"""Objectives as a graph holds them, which has no objects: a name, and numbers."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch

from expo_fast.kernels import objectives as o
from expo_fast.kernels import preferences as p

POLICY = o.Clipped, o.SequenceClipped, o.Cispo, o.SoftAdaptive
PAIRS = p.Dpo, p.Ipo, p.Hinge, p.SimPo, p.Cpo, p.Orpo, p.RDpo, p.DpoPositive
BUILT_IN: dict[str, type] = {c.__name__: c for c in (*POLICY, *PAIRS)}
FIELDS = {name: tuple((f.name, f.type) for f in fields(c)) for name, c in BUILT_IN.items()}
_CUSTOM: dict[str, Callable] = {}


def described(objective: Callable) -> tuple[str, list[float]]:
    """An objective as a graph holds it, which has no objects: name and fields, None as NaN."""
    name = type(objective).__name__
    if BUILT_IN.get(name) is type(objective):
        values = [getattr(objective, field) for field, _ in FIELDS[name]]
        return name, [math.nan if x is None else float(x) for x in values]
    if torch.compiler.is_compiling():
        raise ValueError(f"objective={objective}: torch.compile takes the built-in objectives only")
    name = f"{name} at {id(objective)}"
    _CUSTOM[name] = objective  # and so keeps its id
    return name, []


def objective_of(name: str, values: list[float]) -> Any:
    if name in _CUSTOM:
        return _CUSTOM[name]
    known = zip(FIELDS[name], values, strict=True)
    return BUILT_IN[name](
        *(None if x != x else bool(x) if kind is bool else x for (_, kind), x in known)
    )
