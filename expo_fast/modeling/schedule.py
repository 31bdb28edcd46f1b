"""The learning rate of each update: warm-up, then constant, linear or cosine."""

import math
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int,  # number of updates before this one, 0 for the first
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: Schedule,
) -> float:
    """Return the learning rate of update `step`.

    It depends only on the number of the update, so a resumed run has the same rates. The warm-up is
    linear and starts at peak / warmup_steps, not at 0.

    Raise ValueError for an unknown schedule.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule={schedule!r}: use one of {', '.join(get_args(Schedule))}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    decay_steps = max(1, total_steps - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / decay_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    remaining = 1 - progress if schedule == "linear" else cosine
    return peak * remaining
