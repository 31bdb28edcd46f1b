"""Run benchmarks/lease.sh as far as possible on a CPU: items, parts, forecasts and training."""

import inspect
import json
import math
import os
import random
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import floors, gpu_decode, gpu_train
from benchmarks.cases import SHAPES
from benchmarks.measure import Ceilings, brief
from expo_fast.generate import Completion, Request
from expo_fast.inference import cuda_engine, paged_attention
from expo_fast.kernels import fused
from expo_fast.kernels.head import Head
from expo_fast.modeling import attention
from expo_fast.modeling.packing import Sample
from expo_fast.op_backends import dispatch

pytest.importorskip("triton")

from benchmarks.lease import __main__ as command
from benchmarks.lease import packs, runner, step_profiles, switches
from benchmarks.lease.plan import CHECK, ITEMS, TIME, Item
from benchmarks.lease.report import Mismatch, Report
from benchmarks.lease.runner import Outcome, Run
from expo_fast.kernels import logprob, rowwise
from judges import relative_error


@pytest.mark.parametrize("model", SHAPES)
def test_expected_times_are_not_below_their_floors(model):
    for best in floors.DATASHEETS.values():
        for name, work in floors.works(16384, *SHAPES[model], best).items():
            assert 0.4 * work.expected < work.floor <= work.expected, name


def test_floors_are_those_of_the_measured_card(tmp_path, monkeypatch, capsys):
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


@pytest.mark.slow
def test_each_timed_part_has_a_forecast(monkeypatch, capsys):
    from benchmarks import parts

    if torch.cuda.is_available():
        pytest.skip("a small model's parts")
    monkeypatch.setitem(SHAPES, "small", (264, 64))
    variants = {name: logprob.VARIANTS[name] for name in ("256x128", "128x256-s4")}
    monkeypatch.setattr(logprob, "VARIANTS", variants)
    found = parts.parts("small", 64, "cpu", 1, Ceilings(flops=1e12, bytes=1e10))
    assert not found["failed"]
    assert set(found["seconds"]) == set(found["floors"]) == set(found["expected"])
    assert {f"fused forward with E, {name}" for name in variants} < set(found["seconds"])
    assert "expected" in capsys.readouterr().out


@pytest.mark.slow
def test_a_broken_kernel_does_not_stop_the_timing_of_other_parts(monkeypatch):
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


def test_timed_results_must_agree_with_plain_pytorch():
    from benchmarks import parts

    logp = torch.randn(8, dtype=torch.float64)
    parts.check(logp + 1e-5, logp)
    with pytest.raises(parts.WrongResult, match="nats off plain PyTorch"):
        parts.check(logp + 1e-3, logp)


def test_training_steps_are_complete_and_counted(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("trains complete models on a GPU")
    *_, found = gpu_train.measure("qwen2.5-0.5b", "cpu", 1e12)
    assert {"generate", "explain", "forward_backward", "optimizer"} <= set(found["phases"])
    c = gpu_train.SMOKE
    attempts = c.prompts_per_step * c.num_generations * c.max_new_tokens
    assert found["sampled"] == 2 * attempts  # and as many explanations
    assert 0 < found["learnt"] <= 2 * attempts
    assert found["mfu"] > 0


def test_counted_flops_equal_those_computed_by_hand():
    model = gpu_decode.random_model(gpu_decode.TINY, "cpu")
    done = [Completion([7, 8], torch.zeros(2), "length")] * 2
    generator = SimpleNamespace(sample=lambda asked: done)
    count = gpu_train.Count(model)
    count.watch(generator)
    backward = count.counted(lambda model, samples, config: None)
    ten = torch.arange(10), torch.arange(10), torch.tensor([0, 10], dtype=torch.int32)

    def counted(run: Callable[[], Any]) -> float:
        count.flops = 0.0
        run()
        return count.flops

    assert counted(lambda: model.hidden(*ten)) == 6 * 10 * count.body  # and backward, twice that
    with torch.no_grad():
        assert counted(lambda: model.hidden(*ten)) == 2 * 10 * count.body
    asked = [Request((1, 2, 3, 4, 5), 2, seed=i) for i in range(2)]  # one prompt, computed once
    sampled = counted(lambda: generator.sample(asked))
    assert sampled == 2 * count.body * (5 + 4) + 2 * count.head * 4
    learnt = counted(lambda: backward(model, [Sample((1,), (2, 3, 4))], None))
    assert learnt == 6 * count.head * 3
    assert (count.sampled, count.learnt) == (4, 3)


def test_kernels_are_classified_by_their_names():
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


def test_busy_and_idle_time_is_that_of_the_phase():
    phases = step_profiles.MarkedPhases(spins=False)
    for name in ("generate", "reward", "generate"):
        with phases.phase(name):
            pass
    runs = [
        gpu_train.KernelRun(0.0, 0.0, "spin_kernel"),
        gpu_train.KernelRun(1.0, 2.0, "a"),  # after 1 s without a kernel
        gpu_train.KernelRun(2.0, 3.0, "b"),  # of which 2 s beside no other
        gpu_train.KernelRun(2.5, 1.0, "a"),
        gpu_train.KernelRun(9.0, 0.0, "spin_kernel"),
        gpu_train.KernelRun(9.5, 0.5, "between"),
        gpu_train.KernelRun(10.0, 0.0, "spin_kernel"),
        gpu_train.KernelRun(10.5, 0.0, "spin_kernel"),
        gpu_train.KernelRun(11.0, 0.0, "spin_kernel"),
        gpu_train.KernelRun(11.0, 1.0, "a"),
        gpu_train.KernelRun(12.0, 0.0, "spin_kernel"),
    ]
    found = step_profiles.by_phase(runs, phases.marks)
    assert set(found) == {"generate", "reward"}
    generate = found["generate"]
    assert (generate.seconds, generate.busy, generate.launches) == (10.0, 5.0, 4)
    assert generate.gaps == [1.0, 4.0]  # before the first kernel, and after the last one
    assert generate.kernels == {"a": 4.0, "b": 3.0}
    assert (found["reward"].seconds, found["reward"].busy) == (0.5, 0.0)
    with pytest.raises(ValueError, match="5 kernels named spin: needs 6"):
        step_profiles.by_phase(runs[1:], phases.marks)


class Programs(Run):
    """Runs a Python program for each item in place of its work."""

    programs: ClassVar[dict[str, str]] = {}

    def command(self, item: str, limit: float) -> list[str]:
        begin = f"import json, os, time; file = {str(self.folder / item)!r} + '.json';"
        return [sys.executable, "-c", begin + self.programs[item]]


def make_run(folder: Path, seconds: float = 1000, **programs: str) -> Programs:
    work = folder / "work"
    work.mkdir()
    run = Programs("check", work, folder / "check.tar.gz", time.monotonic() + seconds)
    run.programs = programs  # pyright: ignore[reportAttributeAccessIssue]
    return run


def items_of(run: Programs, seconds: float = 60, **how: Any) -> list[Item]:
    return [Item(name, "none:none", seconds, **how) for name in run.programs]


def archived(run: Run) -> dict[str, bytes]:
    with tarfile.open(run.archive) as tar:
        files = {name: tar.extractfile(name) for name in tar.getnames()}
        return {Path(name).name: file.read() for name, file in files.items() if file}


SAVE = "saved = open(file, 'w'); saved.write(json.dumps({})); saved.close(); "


def test_a_failing_item_does_not_affect_the_results_of_others(tmp_path, monkeypatch, capsys):
    """One item ends well, one fails, one is killed, and one hangs after it has saved a result."""
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0)
    run = make_run(
        tmp_path,
        first=SAVE.format("{'brief': {'ms': 1.5}}"),
        fails=SAVE.format("{'error': 'Traceback\\n  in work\\nValueError: too large'}") + "exit(1)",
        killed="os.kill(os.getpid(), 9)",
        hangs=SAVE.format("{'brief': {'ms': 2.5}}") + "time.sleep(600)",
        last=SAVE.format("{'brief': {'ms': 3.5}}"),
    )
    monkeypatch.setattr(run, "probe", lambda: None)
    items = items_of(run, alone=True)
    items[3] = replace(items[3], seconds=2)
    run.work(items, jobs=1)
    states = {outcome.item.name: outcome.state for outcome in run.outcomes}
    assert states == {
        "first": "ok",
        "fails": "failed",
        "killed": "failed: exit code -9",
        "hangs": "stopped after 2 s",
        "last": "ok",
    }
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["item"] for line in lines] == list(states)
    assert [line.get("ms") for line in lines] == [1.5, None, None, 2.5, 3.5]
    assert lines[1]["error"] == "ValueError: too large"
    (run.folder / "first.json").write_text("{")
    assert run.found("first") == {"error": "first.json is not JSON"}
    kept = archived(run)
    assert {"first.json", "fails.json", "fails.log", "killed.log", "hangs.json"} < set(kept)
    assert json.loads(kept["last.json"]) == {"brief": {"ms": 3.5}}


def test_the_archive_is_complete_after_each_item(tmp_path, monkeypatch):
    run = make_run(tmp_path, a=SAVE.format("{}"), b=SAVE.format("{}"))
    first, second = items_of(run)
    run.one(first)
    assert set(archived(run)) == {"a.json", "a.log"}
    run.one(second)
    assert set(archived(run)) == {"a.json", "a.log", "b.json", "b.log"}
    monkeypatch.setattr(runner, "ARCHIVE_BYTES", 1 << 16)
    (run.folder / "trace.json.gz").write_bytes(random.Random(0).randbytes(1 << 17))
    run.pack()
    assert set(archived(run)) == {"a.json", "a.log", "b.json", "b.log"}


def test_no_item_starts_without_time_and_no_limit_is_negative(tmp_path):
    run = make_run(tmp_path, 0, late="exit(0)")
    run.work(items_of(run), jobs=2)
    assert run.left() == 0
    assert [outcome.state for outcome in run.outcomes] == ["not run: no time"]


def test_a_hanging_program_is_stopped_with_its_child_processes(tmp_path):
    run = make_run(tmp_path)
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert run.bounded([sys.executable, "-c", program], "log.txt", 5) == "stopped after 5 s"
    deadline = time.monotonic() + 10
    while running(int((run.folder / "log.txt").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    assert run.bounded(failing, "log.txt", 60) == "exit code 3"


def test_no_item_starts_on_a_lost_device(tmp_path, monkeypatch):
    run = make_run(
        tmp_path, breaks=SAVE.format("{'error': 'x', 'lost': True}") + "exit(1)", after="0"
    )
    answers = iter(["exit code 1", "exit code 1"])
    bounded = run.bounded

    def with_probes(command: list[str], log: str, seconds: float) -> str:
        return next(answers) if log == "probe.log" else bounded(command, log, seconds)

    monkeypatch.setattr(run, "bounded", with_probes)
    run.work(items_of(run, alone=True), jobs=1)
    assert [o.state for o in run.outcomes] == ["failed", "not run: the device is lost"]


def test_a_lost_context_ends_only_one_item(tmp_path, monkeypatch):
    run = make_run(
        tmp_path, breaks=SAVE.format("{'error': 'x', 'lost': True}") + "exit(1)", after="0"
    )
    bounded = run.bounded

    def with_probes(command: list[str], log: str, seconds: float) -> str:
        return "exit code 0" if log == "probe.log" else bounded(command, log, seconds)

    monkeypatch.setattr(run, "bounded", with_probes)
    run.work(items_of(run, alone=True), jobs=1)
    assert [o.state for o in run.outcomes] == ["failed", "ok"]


def test_a_failed_item_keeps_its_traceback_warnings_and_results(tmp_path, monkeypatch):
    def work(item: Item, report: Report) -> None:
        report.add(early=1)
        warnings.warn("without CUDA graphs", stacklevel=1)
        report.compare("z", torch.tensor([math.nan]), torch.ones(1), 1.0)

    monkeypatch.setattr(Item, "run", work)
    monkeypatch.setattr(command, "context_is_lost", lambda device: False)
    assert command.run_item("versions", tmp_path, 60, dry=False) == 1
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found["early"] == 1 and found["warned"] == ["without CUDA graphs"]
    assert (
        found["error"].startswith("Traceback") and "in work\n" in found["error"]
    )  # with the place
    assert "z: error nan, allowed 1e+00" in brief(found["error"])
    assert set(torch.load(tmp_path / "versions.pt")) == {"got", "truth"}


def test_a_lost_context_is_distinguished_from_an_error(monkeypatch):
    def gone() -> None:
        raise torch.AcceleratorError("CUDA error: misaligned address\nCompile with ...")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    assert command.context_is_lost("cuda") and not command.context_is_lost("cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not command.context_is_lost("cuda")


def test_a_failed_comparison_keeps_at_most_a_megabyte(tmp_path):
    report = Report("item", tmp_path)
    large = torch.randn(1 << 20)
    with pytest.raises(Mismatch) as caught:
        report.compare("z", large, large + 1, 0.1)
    report.dump(caught.value.tensors)
    assert (tmp_path / "item.pt").stat().st_size < 1.1 * (1 << 20)


def test_kernels_that_fail_in_a_check_are_switched_off_in_the_timings(tmp_path):
    run = make_run(tmp_path)
    states = {"target-logits": "failed", "capture": "stopped after 45 s", "varlen": "ok"}
    states |= {"attend": "not run: no time", "attend-other": "failed"}
    run.outcomes = [Outcome(ITEMS[name], state) for name, state in states.items()]
    command.finish_check(run, [tmp_path])
    assert switches.load([tmp_path / "nowhere", tmp_path]) == ["LEASE_ROWS", "LEASE_NO_GRAPHS"]
    assert switches.load([tmp_path / "nowhere"]) == []
    assert switches.wanted({"LEASE_SDPA": "1", "LEASE_ROWS": "0"}) == ["LEASE_SDPA"]


def test_switches_select_the_code_that_they_name(monkeypatch):
    for owner, name in (
        (logprob, "supports"),
        (cuda_engine, "supports"),
        (paged_attention, "varlen_attention"),
        (attention, "varlen_attention"),
        (fused, "runs"),
        (cuda_engine.CudaEngine, "__init__"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # so that it is restored
    for name in switches.MEANING:
        monkeypatch.setenv(name, "1")
    switches.apply()
    hidden = torch.randn(3, 16).bfloat16()
    head = Head(hidden, torch.randn(9, 16).bfloat16(), None, torch.zeros(3).long(), 1.0)
    assert dispatch.choose("triton", head) is rowwise.ROWWISE
    model = gpu_decode.random_model(gpu_decode.TINY, "cpu")
    monkeypatch.setattr(cuda_engine, "has_triton", lambda device: True)
    assert not cuda_engine.CudaEngine(model).wants_graphs
    assert not cuda_engine.supports(model)
    assert fused.runs() is False
    assert paged_attention.varlen_attention is attention.varlen_attention is switches.each_sequence


@pytest.mark.parametrize("window", [None, 50])
def test_attention_one_sequence_at_a_time_equals_the_definition(window):
    report = Report("varlen", Path(), dry=True)
    q, k, v, cu_queries, cu_keys = packs.sequences(report)
    layer = attention.Layer(0, packs.DIM**-0.5, window)
    got = switches.each_sequence(layer, q, k, v, cu_queries, cu_keys, 0, 0)
    truth = packs.by_definition(layer, *(x.double() for x in (q, k, v)))
    assert relative_error(got, truth) < packs.ERROR


def test_items_name_existing_functions_with_their_arguments():
    wrong = []
    for item in ITEMS.values():
        module, function = item.work.split(":")
        work = getattr(import_module(f"benchmarks.lease.{module}"), function)
        try:
            inspect.signature(work).bind(Report(item.name, Path()), **item.given)
        except TypeError as error:
            wrong.append(f"{item.name}: {error}")
    assert wrong == []


def test_plans_fit_their_time():
    """Some items of a check run in parallel; the last items of the timings may have no time."""
    assert {item.name for item in CHECK}.isdisjoint(item.name for item in TIME)
    assert sum(item.seconds for item in CHECK if item.alone) < command.SECONDS["check"]
    assert all(item.alone for item in TIME)
    assert {item.switch for item in CHECK} - {None} == set(switches.MEANING)


def dry_run(folder: Path, what: str, *names: str) -> list[dict[str, Any]]:
    """Return the lines of JSON that a dry run prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHON": sys.executable}
    called = ["bash", "benchmarks/lease.sh", what, *names, "--dry-run", "--keep", str(folder)]
    done = subprocess.run(called, cwd=runner.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (folder / f"{what}.tar.gz").exists()
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_dry_run_compiles_the_kernels_that_it_would_launch(tmp_path):
    lines = dry_run(tmp_path, "check", "addmm-fp32-out", "append")
    assert {line["item"]: line["state"] for line in lines} == {
        "addmm-fp32-out": "ok",
        "append": "ok",
    }
    assert json.loads((tmp_path / "check/append.json").read_text())["launches"] == {
        "append_tokens": 1
    }
    assert (tmp_path / "switches.env").read_text() == ""


@pytest.mark.long
@pytest.mark.parametrize("what", ["check", "time"])
def test_a_dry_run_runs_each_item(tmp_path, what):
    lines = dry_run(tmp_path, what)
    assert {line["item"]: line["state"] for line in lines} == {
        item.name: "ok" for item in (CHECK if what == "check" else TIME)
    }


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie: ended, and not waited for
