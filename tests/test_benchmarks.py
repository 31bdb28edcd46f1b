"""The benchmarks compare contestants that compute the same."""

import torch

from benchmarks import body, cases, judge
from tiny import tiny_model, transformers_copy


def test_contestants_of_the_layers_compute_the_same_gradients():
    model = tiny_model("qwen2", num_hidden_layers=2)
    peer = transformers_copy(model).model
    job = body.Job(common=3, own=4, new=5, questions=2, group=3, micro_batch=4)
    samples = job.samples(model.shape.vocabulary)
    packs = {body.OURS: body.shared(samples), body.APART: body.apart(samples)}
    assert len(packs[body.OURS].tokens) == 3 + 2 * (4 + 3 * 4)
    assert len(packs[body.APART].tokens) == 6 * (3 + 4 + 4)
    found = body.errors(model, peer, job, samples, packs)
    assert set(found) == {body.OURS, body.APART, body.THEIRS}
    assert max(found.values()) < 1e-5


def test_a_wrong_gradient_of_the_layers_is_an_error():
    truth = {"a": torch.ones(4).double(), "b": torch.zeros(2).double()}
    wrong = {"a": torch.ones(4).double(), "b": torch.full((2,), 0.2).double()}
    assert abs(body.error(wrong, truth) - 0.2 / 2**0.5) < 1e-6


def test_gradients_are_compared_in_active_rows_too(monkeypatch):
    # With 90% zero rows, 64 evenly spaced ones of 4096 are all zero.
    monkeypatch.setitem(cases.SHAPES, "tiny", (97, 8))
    case = cases.make_case("tiny", rows=4096, device="cpu").with_zero_rows(90)
    rows, _ = judge.sampled(case)
    assert case.active[rows].sum() >= 32
    assert not case.active[rows].all()
    assert {0, 4095} <= set(rows.tolist())
