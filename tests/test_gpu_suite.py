"""benchmarks/gpu.py, as far as a CPU goes: its parts, forecasts and training steps."""

import json
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import floors, gpu, gpu_decode, gpu_train
from benchmarks.cases import SHAPES
from benchmarks.measure import Ceilings, brief
from expo_fast.generate import Completion, Request
from expo_fast.pack import Sample

pytest.importorskip("triton")

from expo_fast.kernels import logprob


@pytest.mark.parametrize("model", SHAPES)
def test_nothing_is_expected_below_its_floor(model):
    for best in floors.DATASHEETS.values():
        for name, work in floors.works(16384, *SHAPES[model], best).items():
            assert 0.4 * work.expected < work.floor <= work.expected, name


def test_floors_are_those_of_the_card_that_was_measured(tmp_path, monkeypatch, capsys):
    file = tmp_path / "ceilings.json"
    floors.write(file, {"some card": Ceilings(flops=5e14, bytes=2e12)})
    assert floors.read(file) == {"some card": Ceilings(flops=5e14, bytes=2e12)}
    asked = ["floors", "--ceilings", str(file), "--card", "some card", "--models", "qwen2.5-3b"]
    monkeypatch.setattr(sys, "argv", asked)
    floors.main()
    out = capsys.readouterr().out
    assert "some card: 500 TFLOP/s, 2000 GB/s" in out
    v, d = SHAPES["qwen2.5-3b"]
    assert f"| {2 * 16384 * v * d / 5e14 * 1e3:.2f} |" in out
    monkeypatch.setattr(sys, "argv", ["floors", "--card", "unknown"])
    with pytest.raises(SystemExit):
        floors.main()


def test_every_part_that_is_timed_has_a_forecast(monkeypatch, capsys):
    from benchmarks import parts

    if torch.cuda.is_available():
        pytest.skip("a small model's parts")
    monkeypatch.setitem(SHAPES, "small", (264, 64))
    variants = {name: logprob.VARIANTS[name] for name in ("256x128", "128x128-s4")}
    monkeypatch.setattr(logprob, "VARIANTS", variants)
    found = parts.parts("small", 64, "cpu", 1, Ceilings(flops=1e12, bytes=1e10))
    assert not found["failed"]
    assert set(found["seconds"]) == set(found["floors"]) == set(found["expected"])
    assert {f"fused forward with E, {name}" for name in variants} < set(found["seconds"])
    assert "expected" in capsys.readouterr().out


def test_a_kernel_that_is_broken_costs_no_other_part_its_time(monkeypatch):
    from benchmarks import parts

    if torch.cuda.is_available():
        pytest.skip("a small model's parts")

    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(SHAPES, "small", (264, 64))
    monkeypatch.setattr(logprob, "forward", broken)
    found = parts.parts("small", 64, "cpu", 1, Ceilings(flops=1e12, bytes=1e10))
    assert {"GEMM E @ weight, fp32", "dz from E", "row kernels, one pass"} <= set(found["seconds"])
    assert "E" in found["failed"] and "fused forward, 256x128" in found["failed"]
    assert all(brief(why) == "RuntimeError: no such kernel" for why in found["failed"].values())


def test_what_is_timed_must_agree_with_plain_pytorch():
    from benchmarks import parts

    logp = torch.randn(8, dtype=torch.float64)
    parts.check(logp + 1e-5, logp)
    with pytest.raises(parts.Wrong, match="nats off plain PyTorch"):
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


def test_flops_are_those_of_what_runs():
    model = gpu_decode.random_model(gpu_decode.TINY, "cpu")
    done = [Completion([7, 8], torch.zeros(2), "length")] * 2
    learner: Any = SimpleNamespace(
        generator=SimpleNamespace(sample=lambda asked: done), policy_backward=lambda samples: {}
    )
    count = gpu_train.Count(model)
    count.watch(learner)
    ten = torch.arange(10), torch.arange(10), torch.tensor([0, 10], dtype=torch.int32)

    def counted(run: Callable[[], Any]) -> float:
        count.flops = 0.0
        run()
        return count.flops

    assert counted(lambda: model.hidden(*ten)) == 6 * 10 * count.body  # and backward, twice that
    with torch.no_grad():
        assert counted(lambda: model.hidden(*ten)) == 2 * 10 * count.body
    asked = [Request((1, 2, 3, 4, 5), 2, seed=i) for i in range(2)]  # one prompt, computed once
    sampled = counted(lambda: learner.generator.sample(asked))
    assert sampled == 2 * count.body * (5 + 4) + 2 * count.head * 4
    learnt = counted(lambda: learner.policy_backward([Sample((1,), (2, 3, 4))]))
    assert learnt == 6 * count.head * 3
    assert (count.sampled, count.learnt) == (4, 3)


def test_kernels_are_told_apart_by_their_names():
    named = {
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT": 4.0,
        "softmax_sums": 2.0,
        "void pytorch_flash::flash_fwd_kernel<Traits<cutlass::bfloat16_t>>": 1.0,
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
    (why,) = report["failed"].values()
    assert why.startswith("Traceback") and "in work\n" in why  # where, too
    assert brief(why) == "RuntimeError: no such kernel"
    assert "no such kernel" in capsys.readouterr().out


def test_warnings_are_part_of_the_report(tmp_path):
    run = gpu.Run(tmp_path, time.monotonic() + 1000)
    assert run.attempt("decode", lambda: warnings.warn("without CUDA graphs", stacklevel=1)) is None
    assert run.report == {"warned": {"decode": ["without CUDA graphs"]}}


def test_no_stage_follows_on_a_device_that_is_lost(tmp_path, monkeypatch):
    run = gpu.Run(tmp_path, time.monotonic() + 1000)

    def lost() -> None:
        raise torch.AcceleratorError("CUDA error: misaligned address\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    run.attempt("ops", lost)  # and yet the device answers
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(
        SystemExit, match=r"parts broke the device's context: .*misaligned address$"
    ):
        run.attempt("parts", lost)
    assert (
        "misaligned address"
        in json.loads((tmp_path / "report.json").read_text())["failed"]["parts"]
    )


def test_stages_run_apart_and_their_reports_become_one(tmp_path, monkeypatch, capsys):
    """Of three: one is whole, one fails in part and is killed, one leaves nothing."""
    left = {
        "ceilings": {"machine": {"device": "some"}, "ceilings": {"copy GB/s": 1.0}},
        "parts": {"parts": [{"model": "a"}], "failed": {"parts, b": "too large"}},
    }
    stale = tmp_path / "train"
    stale.mkdir()
    (stale / "report.json").write_text('{"train": "of another run"}')
    outcomes = {"ceilings": "exit code 0", "parts": "stopped after 3 s", "train": "exit code 1"}
    commands = {}

    def bounded(command: list[str], log: Path, seconds: float) -> str:
        flags = dict(pairwise(command))
        stage, folder = flags["--stages"], Path(flags["--output"])
        commands[stage] = flags
        assert log == tmp_path / f"{stage}.txt" and folder == tmp_path / stage
        assert float(flags["--seconds"]) == pytest.approx(seconds - gpu.MARGIN)
        assert not (folder / "report.json").exists()
        if stage in left:
            folder.mkdir()
            (folder / "report.json").write_text(json.dumps(left[stage]))
        return outcomes[stage]

    monkeypatch.setattr(gpu, "bounded", bounded)
    asked = ["--output", str(tmp_path), "--stages", "train", "parts", "ceilings"]
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", *asked, "--device", "cpu", "--models", "qwen2.5-3b"]
    )
    gpu.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("failed") == {
        "parts, b": "too large",
        "parts": "stopped after 3 s, see parts.txt",
        "train": "exit code 1, see train.txt",
    }
    assert report == left["ceilings"] | {"parts": [{"model": "a"}]}
    assert list(commands) == ["ceilings", "parts", "train"]  # in the order that is best
    assert float(commands["train"]["--seconds"]) > 500  # all that is left
    assert all(flags["--models"] == "qwen2.5-3b" for flags in commands.values())
    assert "parts: stopped after 3 s" in capsys.readouterr().out


def test_what_hangs_is_stopped_with_all_that_it_started(tmp_path):
    log = tmp_path / "log.txt"
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.bounded([sys.executable, "-c", program], log, 5) == "stopped after 5 s"
    deadline = time.monotonic() + 10
    while running(int(log.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert gpu.bounded([sys.executable, "-c", "raise SystemExit(3)"], log, 60) == "exit code 3"


def test_a_model_is_not_begun_without_time(tmp_path):
    run = gpu.Run(tmp_path, time.monotonic())
    run.models("decode", ["late"], lambda name: pytest.fail("began"))
    assert run.report["failed"] == {"decode, late": "no time"}


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # dead, and nobody has asked yet
