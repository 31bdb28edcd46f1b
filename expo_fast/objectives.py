"""The objectives that the flags --objective and --preference choose from.

To add one, write its class in kernels/objectives.py or kernels/preferences.py, add its name to that
file's `__all__`, and add one line to a table below. The line says which training option sets which
field of the class. Three things are derived from the tables: the objective that training creates,
the options that are refused because the objective ignores them, and the encoding for torch.compile.
The encoding can hold fields that are numbers, booleans or None.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from expo_fast.kernels.objectives import Cispo, Clipped, SequenceClipped, SoftAdaptive
from expo_fast.kernels.preferences import Cpo, Dpo, DpoPositive, Hinge, Ipo, Orpo, RDpo, SimPo


@dataclass(frozen=True)
class Option:
    """A training option that sets a field of an objective.

    convert: a function from the option's value to the field's. None: both are the same.
    """

    name: str
    convert: Callable[[Any], Any] | None = None

    def value(self, config: Any) -> Any:
        value = getattr(config, self.name)
        return value if self.convert is None else self.convert(value)


class Entry:
    """The class of an objective and the sources of its fields.

    fields: an `Option`, or a constant for a field that no option sets. A field that is not named
    keeps the default of the class.
    """

    def __init__(self, objective: type, **fields: Any):
        self.objective = objective
        self.fields = fields

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the training options that the objective reads."""
        return tuple(field.name for field in self.fields.values() if isinstance(field, Option))

    def build(self, config: Any) -> Any:
        """Return the objective with the values of `config`, which has the options as attributes."""
        values = {}
        for name, field in self.fields.items():
            values[name] = field.value(config) if isinstance(field, Option) else field
        return self.objective(**values)


class PreferenceEntry(Entry):
    """An entry of PREFERENCE_OBJECTIVES.

    needs_reference: whether the loss reads the reference's log-probs.
    averages: whether implicit rewards are means over a sequence's targets, not sums.
    """

    def __init__(
        self,
        objective: type,
        *,
        needs_reference: bool = True,
        averages: bool = False,
        **fields: Any,
    ):
        super().__init__(objective, **fields)
        self.needs_reference = needs_reference
        self.averages = averages


LOW = Option("clip_low")
HIGH = Option("clip_high")
BETA = Option("dpo_beta")
RATIO_CAP = Option("clip_high", lambda clip_high: 1 + clip_high)

POLICY_OBJECTIVES: dict[str, Entry] = {
    "clipped": Entry(Clipped, low=LOW, high=HIGH),
    "gspo": Entry(SequenceClipped, low=LOW, high=HIGH),
    "cispo": Entry(Cispo, cap=RATIO_CAP),
    "sapo": Entry(SoftAdaptive),
}

PREFERENCE_OBJECTIVES: dict[str, PreferenceEntry] = {
    "dpo": PreferenceEntry(Dpo, beta=BETA, label_smoothing=Option("label_smoothing")),
    "ipo": PreferenceEntry(Ipo, averages=True, beta=BETA, average=True),
    "hinge": PreferenceEntry(Hinge, beta=BETA),
    "simpo": PreferenceEntry(SimPo, needs_reference=False, averages=True, beta=BETA),
    "cpo": PreferenceEntry(Cpo, needs_reference=False, beta=BETA),
    "orpo": PreferenceEntry(Orpo, needs_reference=False, averages=True, beta=BETA),
    "dpop": PreferenceEntry(DpoPositive, beta=BETA),
    "rdpo": PreferenceEntry(RDpo, alpha=Option("rdpo_alpha"), beta=BETA),
}


def ignored_options(table: Mapping[str, Entry], chosen: str) -> tuple[str, ...]:
    """Return the options that other entries of the table read and the chosen one does not."""
    read = table[chosen].options
    others = [name for entry in table.values() for name in entry.options]
    return tuple(sorted(set(others) - set(read)))
