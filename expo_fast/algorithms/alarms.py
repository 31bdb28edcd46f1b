"""Alarms: signs that a run has collapsed, each with a threshold in the configuration.

An alarm other than `grad_spike` needs `alarm_steps` consecutive steps. It follows from the metrics
of the last steps, so a resumed run raises the alarms of an uninterrupted one.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expo_fast.config import Train

Row = Mapping[str, Any]  # metrics of a step

SPIKE_WINDOW = 32  # steps before a spike of the gradient's norm, and
SPIKE_LEAST = 8  # how many of them must have a gradient
NLLS = ("own/nll", "exp/nll", "expert/nll")


@dataclass(frozen=True)
class Alarm:
    """A sign of a collapse in the metrics of one step."""

    name: str
    fault: Callable[[Row, Train], str | None]
    """Returns what is wrong with a step, in words; None: nothing."""


def no_gradient(row: Row, config: Train) -> str | None:
    """Return a fault if the gradient and, where there is one, the reward are 0."""
    if row.get("grad_norm") == 0 and row.get("reward", 0) == 0:
        return "the gradient is 0" + (" and so is the reward" if "reward" in row else "")
    return None


def no_reward(row: Row, config: Train) -> str | None:
    """Return a fault if attempts were sampled and none of them has a reward."""
    if "reward" in row and row["reward"] is None:
        return "no attempt has a reward"
    return None


def clipped(row: Row, config: Train) -> str | None:
    """Return a fault if nearly all attempts are cut at the length limit."""
    ratio = row.get("completions/clipped_ratio")
    limit = config.alarm_clipped_ratio
    if limit and ratio is not None and ratio >= limit:
        return f"{ratio:.0%} of the attempts are cut at the length limit"
    return None


def entropy(row: Row, config: Train) -> str | None:
    """Return a fault if the attempts are nearly deterministic."""
    value = row.get("entropy")
    if value is not None and value < config.alarm_entropy:
        return f"the entropy is {value:.2g} nats per token"
    return None


def divergence(row: Row, config: Train) -> str | None:
    """Return a fault if the policy is far from the initial one."""
    value = row.get("kl")
    if config.alarm_kl and value is not None and value > config.alarm_kl:
        return f"the KL divergence is {value:.3g} nats per token"
    return None


def likelihood(row: Row, config: Train) -> str | None:
    """Return a fault if texts that are sampled or trained on are unlikely."""
    values = [row[name] for name in NLLS if row.get(name) is not None]
    if config.alarm_nll and values and max(values) > config.alarm_nll:
        return f"the NLL is {max(values):.3g} nats per token"
    return None


COLLAPSES = (
    Alarm("no_gradient", no_gradient),
    Alarm("no_reward", no_reward),
    Alarm("clipped", clipped),
    Alarm("entropy", entropy),
    Alarm("kl", divergence),
    Alarm("nll", likelihood),
)
GRAD_SPIKE = "grad_spike"


class Alarms:
    """The alarms of a run.

    rows: the metrics of the steps so far.
    """

    def __init__(self, config: Train, rows: Iterable[Row] = ()):
        self._config = config
        self._n_steps = dict.fromkeys([alarm.name for alarm in COLLAPSES], 0)
        self._norms: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.active: dict[str, str] = {}
        """Reason by name of the alarms that the last step raised."""
        self.raised: dict[str, str] = {}
        """The last step and reason of each alarm of the run, by its name."""
        for row in rows:
            self.update(row)

    def update(self, row: Row) -> list[str]:
        """Read the metrics of a step. Return the names of the alarms that it begins."""
        before = self.active
        self.active = {}
        for alarm in COLLAPSES:
            fault = alarm.fault(row, self._config)
            n_steps = self._n_steps[alarm.name] + 1 if fault else 0
            self._n_steps[alarm.name] = n_steps
            if fault and n_steps >= self._config.alarm_steps:
                self.active[alarm.name] = f"{fault} (steps in a row: {n_steps})"
        spike = self._spike(row.get("grad_norm"))
        if spike:
            self.active[GRAD_SPIKE] = spike
        for name, reason in self.active.items():
            self.raised[name] = f"step {row['step']}: {reason}"
        return [name for name in self.active if name not in before]

    def _spike(self, norm: float | None) -> str | None:
        """Return a fault if a gradient is much larger than those of the last steps."""
        if not norm:  # None: the step was skipped
            return None
        usual = statistics.median(self._norms) if len(self._norms) >= SPIKE_LEAST else None
        self._norms.append(norm)
        factor = self._config.alarm_grad_spike
        if usual is None or not factor or norm <= factor * usual:
            return None
        return f"the norm of the gradient is {norm:.3g}, usually {usual:.3g}"

    @property
    def collapse(self) -> str | None:
        """The reasons of the active alarms that need several steps, None if there is none."""
        reasons = [reason for name, reason in self.active.items() if name != GRAD_SPIKE]
        return "; ".join(reasons) or None

    def metrics(self) -> dict[str, int]:
        """Return the number of active alarms, and 1 for each of them by its name."""
        return {"alarms": len(self.active)} | {f"alarm/{name}": 1 for name in self.active}
