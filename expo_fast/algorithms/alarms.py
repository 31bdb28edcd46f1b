"""What is wrong with the steps of a run, by their metrics: alarms and warnings.

Alarms are signs that a run has collapsed, each with a threshold in the configuration. An alarm
other than `grad_spike` needs `alarm_steps` consecutive steps. It follows from the metrics of the
last steps, so a resumed run raises the alarms of an uninterrupted one.

Warnings are of faults that options or data cause from the first step on. Each is given once, at
the first step that has the fault.
"""

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expo_fast.config import Train
from expo_fast.data.grader_pool import REASONS, Grade

Row = Mapping[str, Any]  # metrics of a step

SPIKE_WINDOW = 32  # steps before a spike of the gradient's norm, and
SPIKE_LEAST = 8  # how many of them must have a gradient
NLLS = ("own/nll", "exp/nll", "expert/nll")

# Fraction of completions cut at the length limit from which a run and an evaluation warn, in the
# first step that has it. The alarm `clipped` needs more (`alarm_clipped_ratio`, 0.98 by default)
# and several steps, because it may end the run.
NEARLY_ALL_CUT = 0.8
MANY_UNDECIDED = 0.1  # fraction of attempts without a verdict, from which a run warns


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


class FirstWarnings:
    """The warnings of a run, each of which is given once."""

    def __init__(self, config: Train):
        self._config = config
        self._given: set[str] = set()

    def of_step(self, row: Row) -> list[str]:
        """Return the warnings of a step that no earlier step has given."""
        found = {}
        clipped_ratio = row.get("completions/clipped_ratio") or 0.0
        if clipped_ratio >= NEARLY_ALL_CUT:
            found["cut"] = cut_in_words(clipped_ratio, self._config.max_new_tokens)
        if (row.get("verdicts/undecided") or 0.0) >= MANY_UNDECIDED:
            found["undecided"] = undecided_in_words(row)
        new = [words for name, words in found.items() if name not in self._given]
        self._given |= found.keys()
        return new


def cut_in_words(clipped_ratio: float, max_new_tokens: int) -> str:
    """Return a warning that nearly all completions were cut at the length limit."""
    return (
        f"{clipped_ratio:.0%} of the completions were cut at --max-completion-length "
        f"{max_new_tokens} before they ended: raise it, or shorten answers by --instruction"
    )


def undecided_in_words(row: Row) -> str:
    """Return a warning that many attempts have no verdict, with the reasons."""
    parts = []
    for reason in REASONS:
        share = row.get(f"verdicts/{reason}") or 0.0
        if share and Grade(reason).verdict is None:
            parts.append(f"{share:.0%} {reason}")
    return (
        f"{row['verdicts/undecided']:.0%} of the attempts have no verdict and no reward "
        f"({', '.join(parts)}): look at their answers in the run's completions"
    )


def has_no_finite_logits(row: Row) -> bool:
    """Return whether all completions of a step ended because of logits that were not finite."""
    return row.get("completions/error_ratio") == 1
