"""Packs hold each shared token once, and give the hidden states of single sequences."""

import pytest
import torch

from expo_fast.modeling.packing import Pack, Sample, common_prefix, pack
from judges import hidden_states
from tiny import tiny_model


def samples() -> list[Sample]:
    shots = (5, 6, 7)
    a, b = (*shots, 8, 9), (*shots, 10)
    return [
        Sample(a, (11, 12, 13), 0.5, 0.1),
        Sample(b, (14,), -1.0, 0.2, on_policy=True),
        Sample(a, (15, 16), 2.0, 0.3),
        Sample(b, (17, 18, 19, 20), 0.0, 0.4),
    ]


def rows_of(p: Pack) -> list[tuple[int, tuple[int, ...], int]]:
    """Return (sample, visible context, target) of each row, reconstructed from the tree."""
    borders, parents = p.cu_seqlens.tolist(), p.parents.tolist()
    read = []
    for row, target, member in zip(p.rows, p.targets, p.sequence_ids, strict=True):
        segment = next(s for s in range(len(parents)) if borders[s] <= row < borders[s + 1])
        context = p.tokens[borders[segment] : int(row) + 1].tolist()
        while parents[segment] >= 0:
            segment = parents[segment]
            context = p.tokens[borders[segment] : borders[segment + 1]].tolist() + context
        assert int(p.positions[row]) == len(context) - 1
        read.append((p.members[int(member)], tuple(context), int(target)))
    return read


@pytest.mark.parametrize("max_tokens", [1, 9, 12, 1000])
def test_each_target_has_its_own_context(max_tokens: int):
    given = samples()
    read = [row for p in pack(given, max_tokens) for row in rows_of(p)]
    expected = [
        (i, s.prompt_ids + s.completion_ids[:t], s.completion_ids[t])
        for i, s in enumerate(given)
        for t in range(len(s.completion_ids))
    ]
    assert sorted(read) == sorted(expected)


def test_a_pack_reports_properties_that_the_ops_would_check():
    (p,) = pack(samples(), 1000)
    assert p.all_weighted and p.is_complete(21) and not p.is_complete(20)
    assert p.has_targets_below(21)
    assert not p.has_targets_below(20)
    without = [*samples(), Sample((5, 6, 7, 8), (30,), 1.0, 0.0)]
    (p,) = pack(without, 1000)
    assert not p.all_weighted and not p.is_complete(31)
    assert not p.has_targets_below(30)


def test_shared_tokens_are_packed_once():
    (p,) = pack(samples(), 1000)
    # 3 of worked examples, 2 + 1 of the prompts, and completions without their last token
    assert len(p.tokens) == 3 + 2 + 1 + 2 + 1 + 3


def test_packs_keep_within_the_budget_and_hold_each_sample():
    given = [
        Sample((1, 2, 30 + i // 3), tuple(range(40, 40 + 1 + i % 5)), 1.0, 1.0) for i in range(23)
    ]
    packs = list(pack(given, 16))
    assert max(len(p.tokens) for p in packs) <= 16
    assert sorted(i for p in packs for i in p.members) == list(range(23))


def test_rows_have_the_values_of_their_samples():
    given = samples()
    given[0] = Sample(*(given[0].prompt_ids, (11, 12)), 0.5, 0.1, old_logp=torch.tensor([-1.0, -2]))
    (p,) = pack(given, 1000)
    order = [i for i in p.members for _ in given[i].completion_ids]
    assert p.advantage.tolist() == [given[i].advantage for i in order]
    assert p.row_weight.tolist() == pytest.approx([given[i].row_weight for i in order])
    assert p.on_policy.tolist() == [given[i].on_policy for i in order]
    assert p.old_logp is not None
    assert p.old_logp.tolist() == [-1.0, -2.0, *[0.0] * (len(order) - 2)]
    assert p.ref_logp is None
    for i, values in p.split(p.targets):
        assert tuple(values.tolist()) == given[i].completion_ids


def test_a_common_prefix_leaves_each_prompt_a_token():
    assert common_prefix([(1, 2, 3), (1, 2, 4)]) == 2
    assert common_prefix([(1, 2), (1, 2, 3)]) == 1
    assert common_prefix([(1,), (2,)]) == 0
    assert common_prefix([(1, 2, 3)]) == 2


@pytest.mark.parametrize("kind", ["llama", "smollm3-windows"])
def test_hidden_states_of_a_pack_are_those_of_the_sequences_alone(kind: str):
    model, given = tiny_model(kind, dtype=torch.float64), samples()
    for p in pack(given, 1000):
        packed = model.hidden(p.tokens, p.positions, p.cu_seqlens, p.parents)[p.rows]
        for i, hidden in p.split(packed):
            sample = given[i]
            alone = hidden_states(model, [*sample.prompt_ids, *sample.completion_ids])
            torch.testing.assert_close(
                hidden, alone[len(sample.prompt_ids) - 1 : -1], rtol=1e-12, atol=1e-12
            )
