"""The tables of objectives: the objects that they build, and the options that they read."""

from dataclasses import dataclass, fields
from types import SimpleNamespace

from expo_fast import ops
from expo_fast.kernels import objectives as policy_classes
from expo_fast.kernels import preferences as preference_classes
from expo_fast.objectives import (
    POLICY_OBJECTIVES,
    PREFERENCE_OBJECTIVES,
    Entry,
    Option,
    ignored_options,
)
from expo_fast.op_backends import objective_codes

CONFIG = SimpleNamespace(
    clip_low=0.1, clip_high=0.3, dpo_beta=0.4, label_smoothing=0.05, rdpo_alpha=0.02
)
BUILT = {
    "clipped": ops.Clipped(0.1, 0.3),
    "gspo": ops.SequenceClipped(0.1, 0.3),
    "cispo": ops.Cispo(1.3),
    "sapo": ops.SoftAdaptive(),
    "dpo": ops.Dpo(0.4, 0.05),
    "ipo": ops.Ipo(0.4, average=True),
    "hinge": ops.Hinge(0.4),
    "simpo": ops.SimPo(0.4),
    "cpo": ops.Cpo(0.4),
    "orpo": ops.Orpo(0.4),
    "dpop": ops.DpoPositive(0.4),
    "rdpo": ops.RDpo(alpha=0.02, beta=0.4),
}
TABLES = POLICY_OBJECTIVES | PREFERENCE_OBJECTIVES


def test_entries_build_their_objectives_from_their_named_options():
    assert BUILT.keys() == TABLES.keys()
    for name, entry in TABLES.items():
        read = SimpleNamespace(**{option: getattr(CONFIG, option) for option in entry.options})
        assert entry.build(read) == BUILT[name], name


def test_objectives_are_encoded_as_a_name_and_numbers():
    for objective in BUILT.values():
        is_policy = type(objective).__name__ in objective_codes.NAMES["policy"]
        code = objective_codes.encode(objective, "policy" if is_policy else "preference")
        assert code.custom is None, objective
        assert all(type(value) is float for value in code.values), objective
        assert objective_codes.decode(code.name, code.values) == objective


def test_a_field_of_none_is_encoded_and_decoded():
    for objective in (ops.Clipped(cap=None), ops.Clipped(cap=3.0)):
        code = objective_codes.encode(objective, "policy")
        assert objective_codes.decode(code.name, code.values) == objective


def test_each_exported_objective_has_a_flag():
    exported = {*policy_classes.__all__, *preference_classes.__all__}
    assert exported <= set(ops.__all__)
    assert {entry.objective.__name__ for entry in TABLES.values()} == exported


def test_a_class_and_a_table_entry_add_an_objective(monkeypatch):
    @dataclass(frozen=True)
    class Doubled:
        low: float = 0.2

    entry = Entry(Doubled, low=Option("clip_low", lambda clip_low: 2 * clip_low))
    monkeypatch.setitem(POLICY_OBJECTIVES, "doubled", entry)
    assert POLICY_OBJECTIVES["doubled"].build(CONFIG) == Doubled(0.2)
    assert objective_codes._built_in()["Doubled"] is Doubled


def test_options_that_an_objective_ignores_are_named():
    assert ignored_options(POLICY_OBJECTIVES, "clipped") == ()
    assert ignored_options(POLICY_OBJECTIVES, "cispo") == ("clip_low",)
    assert ignored_options(POLICY_OBJECTIVES, "sapo") == ("clip_high", "clip_low")
    assert ignored_options(PREFERENCE_OBJECTIVES, "dpo") == ("rdpo_alpha",)
    assert ignored_options(PREFERENCE_OBJECTIVES, "rdpo") == ("label_smoothing",)
    assert ignored_options(PREFERENCE_OBJECTIVES, "ipo") == ("label_smoothing", "rdpo_alpha")


def test_entries_know_which_losses_need_a_reference_and_which_average():
    entries = PREFERENCE_OBJECTIVES.items()
    assert {n for n, e in entries if not e.needs_reference} == {"simpo", "cpo", "orpo"}
    assert {n for n, e in entries if e.averages} == {"ipo", "simpo", "orpo"}


def test_entries_name_fields_that_their_class_has():
    for name, entry in TABLES.items():
        assert set(entry.fields) <= {field.name for field in fields(entry.objective)}, name
