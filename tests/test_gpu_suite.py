"""benchmarks/gpu.py, as far as a CPU goes: its parts, forecasts and training steps."""

import json
import time

import pytest
import torch

from benchmarks import floors, gpu, gpu_train
from benchmarks.cases import SHAPES

pytest.importorskip("triton")


@pytest.mark.parametrize("model", SHAPES)
def test_nothing_is_expected_below_its_floor(model):
    for name, work in floors.works(16384, *SHAPES[model]).items():
        assert 0.5 * work.expected < work.floor <= work.expected, name


def test_every_part_that_is_timed_has_a_forecast(monkeypatch, capsys):
    from benchmarks import parts

    if torch.cuda.is_available():
        pytest.skip("a small model's parts")
    monkeypatch.setitem(SHAPES, "small", (264, 64))
    monkeypatch.setattr(parts, "CONFIGS", parts.CONFIGS[:2])
    found = parts.parts("small", 64, "cpu", 1)
    assert not found["failed"]
    assert {name.partition(", (")[0] for name in found["seconds"]} == set(found["foreseen"])
    assert "expected on an H200" in capsys.readouterr().out


def test_another_configuration_must_agree_with_the_shipped_one():
    from benchmarks import parts

    logp = torch.randn(8, dtype=torch.float64)
    parts.check(logp + 1e-5, logp)
    with pytest.raises(parts.Wrong, match="nats off the shipped"):
        parts.check(logp + 1e-3, logp)


def test_training_steps_are_whole_and_counted(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("trains the whole models there")
    found = gpu_train.measure("qwen2.5-0.5b", "cpu", 1e12)
    assert {"generate", "explain", "forward_backward", "optimizer"} <= set(found["phases"])
    c = gpu_train.SMOKE
    attempts = c.prompts_per_step * c.num_generations * c.max_completion_length
    assert found["sampled"] == 2 * attempts  # and as many explanations
    assert 0 < found["learnt"] <= 2 * attempts
    assert found["mfu"] > 0


def test_kernels_are_told_apart_by_their_names():
    named = {
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT": 4.0,
        "softmax_sums": 2.0,
        "void flash::flash_fwd_kernel<traits>": 1.0,
        "attend_items": 0.5,
        "place_heads": 0.25,
        "void at::native::vectorized_elementwise_kernel<4>": 0.75,
    }
    found = gpu_train.shares(named.items(), wall=10.0)
    kinds = {"products": 6.0, "attention": 1.5, "decoding": 0.25, "others": 0.75, "idle": 1.5}
    assert found["kernels"] == kinds
    assert found["outside"] == pytest.approx(0.225)


def test_a_stage_that_fails_is_named_and_the_next_begins(tmp_path, capsys):
    run = gpu.Run(tmp_path, time.monotonic() + 1000)

    def work(name: str) -> dict[str, str]:
        if name == "broken":
            raise RuntimeError("no such kernel")
        return {"model": name}

    run.models("train", ["broken", "whole"], work)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["train"] == [{"model": "whole"}]
    assert report["failed"] == {"train, broken": "RuntimeError: no such kernel"}
    assert "no such kernel" in capsys.readouterr().out


def test_a_model_is_not_begun_without_time(tmp_path):
    run = gpu.Run(tmp_path, time.monotonic())
    run.models("decode", ["late"], lambda name: pytest.fail("began"))
    assert run.report["failed"] == {"decode, late": "no time"}
