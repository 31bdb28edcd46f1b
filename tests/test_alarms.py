"""A collapsed run raises alarms with their reasons, keeps its good checkpoint, and may end."""

import json
from pathlib import Path
from typing import Any

import pytest

from expo_fast import train
from expo_fast.algorithms.alarms import SPIKE_LEAST, Alarms
from expo_fast.cli import exit_status
from expo_fast.config import Train
from expo_fast.reporting.jsonl import read_rows
from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from tiny import tiny_model, tiny_tokenizer

HEALTHY: dict[str, Any] = {
    "reward": 0.5,
    "grad_norm": 1.0,
    "completions/clipped_ratio": 0.1,
    "entropy": 0.7,
    "kl": 0.01,
    "own/nll": 0.7,
    "exp/nll": None,
}
FAULTS = {
    # alarm: metrics of a bad step, of a step that is nearly as bad, and words of the reason
    "no_gradient": ({"reward": 0.0, "grad_norm": 0.0}, {"reward": 1.0, "grad_norm": 0.0}, "reward"),
    "no_reward": ({"reward": None}, {"reward": 0.0}, "no attempt has a reward"),
    "clipped": (
        {"completions/clipped_ratio": 0.98},
        {"completions/clipped_ratio": 0.97},
        "98% of the attempts",
    ),
    "entropy": ({"entropy": 0.0099}, {"entropy": 0.01}, "0.0099 nats"),
    "kl": ({"kl": 5.1}, {"kl": 5.0}, "5.1 nats"),
    "nll": ({"exp/nll": 8.1}, {"exp/nll": 8.0}, "8.1 nats"),
}
SWITCHED_OFF: dict[str, dict[str, Any]] = {
    "clipped": {"alarm_clipped_ratio": 0.0},
    "entropy": {"alarm_entropy": 0.0},
    "kl": {"alarm_kl": 0.0},
    "nll": {"alarm_nll": 0.0},
}


def rows(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"step": step, **HEALTHY, **change} for step, change in enumerate(changes, start=1)]


@pytest.mark.parametrize("name", FAULTS)
def test_an_alarm_needs_several_steps_in_a_row(name: str):
    bad, nearly, words = FAULTS[name]
    alarms = Alarms(Train(alarm_steps=3))
    begun = [alarms.update(row) for row in rows(bad, bad, nearly, bad, bad, bad, bad, {})]
    assert begun == [[], [], [], [], [], [name], [], []]
    assert list(alarms.raised) == [name]
    assert alarms.raised[name].startswith("step 7: ")
    assert words in alarms.raised[name]
    assert alarms.raised[name].endswith("(steps in a row: 4)")
    assert alarms.active == {}
    assert alarms.collapse is None


@pytest.mark.parametrize("name", FAULTS)
def test_metrics_name_the_alarms_of_a_step(name: str):
    bad, nearly, _ = FAULTS[name]
    alarms = Alarms(Train(alarm_steps=1), rows(nearly))
    assert alarms.metrics() == {"alarms": 0}
    alarms.update(rows(bad)[0])
    assert alarms.metrics() == {"alarms": 1, f"alarm/{name}": 1}
    assert alarms.collapse is not None
    if name in SWITCHED_OFF:
        alarms = Alarms(Train(alarm_steps=1, **SWITCHED_OFF[name]), rows(bad))
        assert alarms.active == {}


def test_a_spike_of_the_gradient_is_an_alarm_and_no_collapse():
    usual = [{"grad_norm": 0.9 + 0.02 * n} for n in range(SPIKE_LEAST)]
    for before, factor, raised in (
        (usual, 20.0, True),
        (usual[2:], 20.0, False),
        (usual, 0.0, False),
    ):
        spikes = [{"grad_norm": norm} for norm in (None, 0.0, 19.0, 30.0)]
        alarms = Alarms(Train(alarm_grad_spike=factor), rows(*before, *spikes))
        assert ("grad_spike" in alarms.active) is raised
        assert alarms.collapse is None
    alarms = Alarms(Train(), rows(*usual, {"grad_norm": 30.0}))
    assert alarms.active == {"grad_spike": "the norm of the gradient is 30, usually 0.97"}


def test_a_resumed_run_has_the_alarms_of_the_run_before():
    bad, _, _ = FAULTS["entropy"]
    history = rows(*[{"grad_norm": 0.9}] * 9, bad, bad, {"grad_norm": 90.0} | bad)
    config = Train(alarm_steps=3)
    unbroken = Alarms(config)
    for row in history:
        unbroken.update(row)
    resumed = Alarms(config, history[:-2])
    for row in history[-2:]:
        resumed.update(row)
    assert resumed.active == unbroken.active
    assert set(resumed.active) == {"entropy", "grad_spike"}
    assert resumed.raised == unbroken.raised


def collapsing(tmp_path: Path, *more: str) -> list[str]:
    """Return the flags of a run whose learning rate of 1 breaks the model at step 2."""
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "model")
    lines = [json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) for n in range(9)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "rewards.py").write_text(
        "def few(trainer_state, completion_ids, **columns):\n"
        "    first = trainer_state.global_step == 0\n"
        "    return [float(first and i % 2) for i in range(len(completion_ids))]\n"
    )
    given = f"--model {tmp_path}/model --train-data {tmp_path}/train.jsonl --output-dir "
    given += f"{tmp_path}/run --reward {tmp_path}/rewards.py:few --method grpo --steps 8 "
    given += "--eval-every 0 --shots 0 --max-completion-length 8 --prompts-per-step 2 "
    given += "--learning-rate 1 --warmup-steps 0 --checkpoint-every 1 --keep-checkpoints 2 "
    given += "--alarm-steps 3 --report-to none"
    return [*given.split(), *more]


def test_a_collapsed_run_keeps_its_best_checkpoint_and_says_why(tmp_path: Path, capsys):
    assert exit_status.run(train.main, collapsing(tmp_path)) == 0
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step-1", "step-7", "step-8"}
    metrics = list(read_rows(tmp_path / "run/metrics.jsonl"))
    assert [row.get("alarm/no_gradient") for row in metrics] == [None] * 3 + [1] * 5
    printed = capsys.readouterr().out
    assert "alarm: step 4: the gradient is 0 and so is the reward (steps in a row: 3)" in printed
    assert "\nalarm: step 8: the gradient is 0 and so is the reward (steps in a row: 7)" in printed
    assert f"\nbest checkpoint: {tmp_path}/run/checkpoints/step-1 (mean reward 0.5" in printed


def test_a_collapsed_run_ends_if_that_is_asked_for(tmp_path: Path, capsys):
    given = collapsing(tmp_path, "--stop-on-collapse", "--alarm-clipped-ratio", "0")
    assert exit_status.run(train.main, given) == exit_status.COLLAPSED == 3
    (line,) = capsys.readouterr().err.splitlines()
    run = tmp_path / "run"
    assert line == (
        "error: step 4: the gradient is 0 and so is the reward (steps in a row: 3); the same "
        f"command resumes the run from {run}/checkpoints/step-3; the best checkpoint is "
        f"{run}/checkpoints/step-1 (mean reward 0.500)"
    )
    assert checkpoint.newest(run) == run / "checkpoints/step-3"
