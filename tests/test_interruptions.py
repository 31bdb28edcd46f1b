"""A signal saves the last step boundary and ends the run, and the resumed run equals another."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expo_fast import train
from expo_fast.algorithms import dpo, explanations, grpo, trainer
from expo_fast.cli import exit_status
from expo_fast.inference.scheduler import Scheduler
from expo_fast.modeling.optimizer import Optimizer
from expo_fast.runtime import interruptions
from expo_fast.runtime.endings import Stopped
from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from jobs import rows_in, run_flags, without_times, write_rows
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("lenient")

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model, data, and a reward that some samples of a group earn."""
    root = tmp_path_factory.mktemp("job")
    model = tiny_model(eos_token_id=list(range(1, 70)))  # half of its completions have an end
    save_model(model, tiny_tokenizer(), root / "model")
    for name, first in (("train", 0), ("eval", 100)):
        rows = [
            {"question": f"{n} + 1?", "answer": str(n + 1), "solution": f"{n} + 1 = {n + 1}."}
            for n in range(first, first + 9)
        ]
        write_rows(root / f"{name}.jsonl", rows)
    (root / "rewards.py").write_text(
        "def odd(completion_ids, **columns):\n"
        "    return [float(sum(ids) % 2) for ids in completion_ids]\n"
    )
    return root


def flags(folder: Path, run: Path, **changes: object) -> list[str]:
    given: dict[str, object] = {
        "eval_data": folder / "eval.jsonl",
        "method": "expo-grpo",
        "exp_sft_coef": 1,
        "explanations_per_question": 2,
        "steps": STEPS,
        "updates_per_batch": 2,
        "eval_every": 2,
        "eval_limit": 2,
        "eval_samples": 2,
        "report_to": "none",
        "checkpoint_every": 2,
    }
    return run_flags(folder, run, **(given | changes))


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """Return a function that returns the files of a run that was never stopped."""
    found: dict[str, dict] = {}

    def files(**changes: object) -> dict:
        key = str(changes)
        if key not in found:
            run = tmp_path_factory.mktemp("unbroken") / "run"
            assert exit_status.run(train.main, flags(folder, run, **changes)) == 0
            found[key] = files_of(run)
        return found[key]

    return files


def files_of(run: Path) -> dict[str, Any]:
    """Return the rows of a run without times, its texts, its pairs and its last checkpoint."""
    found: dict[str, Any] = {}
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        found[name] = without_times(rows_in(run / name))
    for file in [*run.glob("completions/*"), *run.glob("pairs/*")]:
        found[file.name] = file.read_bytes()
    last = run / f"checkpoints/step-{STEPS}"
    for file in ("model.safetensors", "trainer_state/state.safetensors"):
        found |= {f"{file}: {name}": x for name, x in load_file(last / file).items()}
    found["state"] = json.loads((last / "trainer_state/state.json").read_text())
    return found


def assert_equal(ours: dict[str, Any], others: dict[str, Any]) -> None:
    assert ours.keys() == others.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, others[name]), name
        else:
            assert value == others[name], name


def signal_at_call(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, signum: int
) -> None:
    """Send a signal to this process at a call of a function, counted from 1."""
    usual = getattr(owner, name)
    calls = iter(range(1, 10_000))

    def signalled(*given: Any, **named: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signum)
        return usual(*given, **named)

    monkeypatch.setattr(owner, name, signalled)


PHASES = {
    # phase: the function, the number of its call, and the step that is saved (0: none)
    "first evaluation": (Scheduler, "_step", 2, 0),
    "sampling of step 1": (trainer, "attempt_requests", 1, 0),
    "sampling": (trainer, "attempt_requests", 2, 1),
    "grading": (trainer, "judge_attempts", 2, 1),
    "explanations": (explanations, "explanation_requests", 2, 1),
    "filter of explanations": (explanations, "accept_explanations", 2, 1),
    "diagnosis": (grpo, "diagnostic_samples", 2, 1),
    "first update": (grpo, "policy_backward", 3, 1),
    "first update, with gradients": (grpo, "sft_backward", 3, 1),
    "optimizer": (Optimizer, "step", 3, 2),
    "second update": (grpo, "policy_backward", 4, 2),
    "evaluation": (train, "evaluate", 2, 2),
    "save": (checkpoint, "_write_state", 1, 2),
    "last evaluation": (train, "evaluate", 3, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_run_stopped_in_any_phase_is_saved_and_resumed_exactly(
    phase: str, folder: Path, tmp_path: Path, monkeypatch, capsys, unbroken
):
    expected = unbroken()
    assert sum(row["exp/accepted"] for row in expected["metrics.jsonl"]) > 2
    owner, name, call, saved = PHASES[phase]
    given = flags(folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at_call(patch, owner, name, call, signal.SIGTERM)
        assert exit_status.run(train.main, given) == 128 + signal.SIGTERM
    *_, last = capsys.readouterr().out.splitlines()
    if saved:
        assert last == (
            f"interrupted by SIGTERM: step {saved} is saved, the same command resumes the run "
            "from it"
        )
        assert checkpoint.newest(tmp_path / "run") == tmp_path / f"run/checkpoints/step-{saved}"
    else:
        assert last.startswith("interrupted by SIGTERM before the end of step 1: the same command")
    assert exit_status.run(train.main, given) == 0
    assert_equal(files_of(tmp_path / "run"), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (trainer, "attempt_requests", 2),
        (explanations, "accept_explanations", 2),
        (dpo, "preference_backward", 2),
    ],
)
def test_a_run_on_pairs_is_stopped_and_resumed_exactly(
    owner: ModuleType, name: str, call: int, folder: Path, tmp_path: Path, monkeypatch, unbroken
):
    changes = {"method": "expo-dpo", "updates_per_batch": 1, "exp_sft_coef": 0.04}
    changes |= {"pairs_every": 1, "checkpoint_every": 1}
    expected = unbroken(**changes)
    assert sum(row["pairs"] for row in expected["metrics.jsonl"]) > 1
    given = flags(folder, tmp_path / "run", **changes)
    with monkeypatch.context() as patch:
        signal_at_call(patch, owner, name, call, signal.SIGINT)
        assert exit_status.run(train.main, given) == exit_status.INTERRUPTED
    assert exit_status.run(train.main, given) == 0
    assert_equal(files_of(tmp_path / "run"), expected)


def test_a_stop_inside_a_step_saves_the_step_before(
    folder: Path, tmp_path: Path, monkeypatch, capsys
):
    given = flags(folder, tmp_path, eval_every=0, checkpoint_every=9, steps=2)
    signal_at_call(monkeypatch, trainer, "judge_attempts", 2, signal.SIGHUP)
    assert exit_status.run(train.main, given) == 128 + signal.SIGHUP
    assert "interrupted by SIGHUP: step 1 is saved" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-1"


def test_sigusr1_saves_and_the_run_goes_on(folder: Path, tmp_path: Path, monkeypatch, capsys):
    given = flags(folder, tmp_path, eval_every=0, checkpoint_every=0, steps=2)
    signal_at_call(monkeypatch, trainer, "judge_attempts", 1, signal.SIGUSR1)
    assert exit_status.run(train.main, given) == 0
    assert "step 1 is saved, as a signal asked for" in capsys.readouterr().out
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-1"


def test_sigusr1_in_the_last_step_saves_the_step(folder: Path, tmp_path: Path, monkeypatch):
    given = flags(folder, tmp_path, eval_every=0, checkpoint_every=0, steps=2)
    signal_at_call(monkeypatch, trainer, "judge_attempts", 2, signal.SIGUSR1)
    assert exit_status.run(train.main, given) == 0
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-2"


def test_a_run_that_saves_nothing_says_so(folder: Path, tmp_path: Path, monkeypatch, capsys):
    given = flags(folder, tmp_path, eval_every=0, checkpoint_every=0, steps=2)
    signal_at_call(monkeypatch, trainer, "judge_attempts", 2, signal.SIGTERM)
    assert exit_status.run(train.main, given) == 128 + signal.SIGTERM
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "interrupted by SIGTERM: step 1 is not saved: --checkpoint-every 0; there is no "
        "checkpoint, the same command starts the run again"
    )


def test_signals_have_their_earlier_handlers_after_a_run():
    signums = (*interruptions.STOPS, interruptions.SAVE)
    before = [signal.getsignal(signum) for signum in signums]
    with interruptions.watching(5.0):
        assert [signal.getsignal(signum) for signum in signums] != before
    assert [signal.getsignal(signum) for signum in signums] == before
    interruptions.check()  # raises nothing


def test_an_ignored_signal_remains_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptions.watching(5.0):
            os.kill(os.getpid(), signal.SIGHUP)
            interruptions.check()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_interrupts_a_call_that_waits_but_no_update():
    with pytest.raises(Stopped), interruptions.watching(20.0), interruptions.immediate():
        threading.Timer(0.05, os.kill, [os.getpid(), signal.SIGTERM]).start()
        time.sleep(3)
        pytest.fail("the call was not interrupted")
    with interruptions.watching(5.0):
        interruptions.defer()
        with interruptions.immediate():
            os.kill(os.getpid(), signal.SIGTERM)
            interruptions.check()
        interruptions.allow()
        with pytest.raises(Stopped):
            interruptions.check()


def test_only_the_thread_of_the_loop_is_stopped():
    raised: list[BaseException] = []

    def work() -> None:
        try:
            interruptions.check()
        except BaseException as error:
            raised.append(error)

    with interruptions.watching(5.0):
        os.kill(os.getpid(), signal.SIGTERM)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with pytest.raises(Stopped):
            interruptions.check()
    assert not raised


# A process that was asked to end and does not: it never calls `check`.
DEAF = """
import os, signal, sys, time
from expo_fast.runtime import interruptions
with interruptions.watching(float(sys.argv[1])):
    print(os.getpid(), flush=True)
    time.sleep(60)
"""


def deaf(stop_within: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF, str(stop_within)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_process_that_does_not_end_in_time_is_ended():
    process = deaf(0.2)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert 0.15 < time.monotonic() - start < 10
    assert errors == ("interrupted: nothing was saved within --stop-within 0.2 s of SIGTERM\n")


def test_a_second_signal_ends_the_process_at_once():
    process = deaf(0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # a launcher forwards a signal that came to all processes
    time.sleep(interruptions.SAME_REQUEST_S + 0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == exit_status.INTERRUPTED
    assert errors == "interrupted: ended at once by a second signal, SIGINT\n"


@pytest.mark.parametrize("signum", interruptions.STOPS)
def test_a_signal_before_the_run_gives_one_line(signum: signal.Signals):
    code = (
        "import os, time\n"
        "from expo_fast.runtime import interruptions\n"
        "interruptions.leave_at_once_outside_the_run()\n"
        f"os.kill(os.getpid(), {int(signum)})\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signum
    (line,) = done.stderr.splitlines()
    assert line.startswith("interrupted: nothing was trained yet")
    assert line.endswith(signum.name)
