"""Metrics of a step."""

from collections.abc import Sequence

Metrics = dict[str, float | None]  # by name; None: the step has no value


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None if there is no value."""
    return sum(values) / len(values) if values else None
