"""Mistakes of users' reward functions end a run with one sentence that names function and value."""

import array
import asyncio
import contextlib
import re
import signal
import threading
import time
from collections import deque
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expo_fast.cli import exit_status
from expo_fast.data.time_limit import TimeLimitExceeded, time_limit
from expo_fast.reward_functions import (
    RewardError,
    RewardFunction,
    call_reward,
    checked_rewards,
    finish,
    start,
)
from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from jobs import write_rows
from tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    "returned",
    [
        (1, 0),
        [True, False],
        np.array([1.0, 0.0]),
        np.array([1, 0]),
        np.array([True, False]),
        [np.float64(1), np.float32(0)],
        [np.int64(1), np.array(0.0)],
        torch.tensor([1.0, 0.0]),
        torch.tensor([1.0, 0.0], requires_grad=True),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor(0)],
        [Fraction(1), Decimal(0)],
        deque([1.0, 0.0]),
        array.array("d", [1.0, 0.0]),
        {"a": 1.0, "b": 0.0}.values(),
    ],
    ids=str,
)
def test_rewards_in_many_forms_are_read(returned):
    assert checked_rewards("f", returned, 2) == [1.0, 0.0]


class Odd:
    """A value that raises in everything."""

    ndim = 0

    def item(self):
        raise KeyError("odd")

    def __repr__(self):
        raise KeyError("odd")


class OddList:
    def tolist(self):
        raise KeyError("odd")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "f returned a list of 1: return a list of 2"),
        (None, "f returned None: return a list of 2"),
        ("10", "f returned a str"),
        ({1.0, 0.0}, "f returned a set"),
        (np.zeros((2, 1)), "f returned [0.0] at index 0"),
        (np.zeros(3), "f returned a ndarray of shape (3,): return a list of 2"),
        (torch.tensor(1.0), "f returned a Tensor of shape ()"),
        (["1", "0"], "f returned '1' at index 0"),
        ([1.0, float("inf")], "f returned inf at index 1"),
        ([1.0, float("-inf")], "f returned -inf at index 1"),
        ([1.0, 10**400], "f returned 1000000000"),
        ([1.0, 10**5000], "f returned an integer of 16610 bits at index 1"),
        ([1e39, 0.0], "f returned 1e+39 at index 0"),
        ([1.0, 1j], "f returned 1j at index 1"),
        ([1.0, Odd()], "at index 1"),
        (OddList(), "f returned a OddList"),
    ],
)
def test_a_wrong_result_is_described(returned, message):
    with pytest.raises(RewardError) as error:
        checked_rewards("f", returned, 2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def raising(error: BaseException):
    def my_reward(completions, **columns):
        raise error

    return my_reward


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(3), ValueError("a\nb"), Exception()])
def test_an_exception_is_one_sentence_with_its_line(error):
    with pytest.raises(RewardError) as caught:
        call_reward(raising(error), ["p"], ["a"], [[1]], {})
    sentence = str(caught.value)
    assert sentence.startswith(f"reward function my_reward raised {type(error).__name__}")
    assert re.search(r"\(test_reward_mistakes\.py, line \d+\)$", sentence)
    assert "\n" not in sentence


def test_ctrl_c_in_a_function_is_no_mistake():
    with pytest.raises(KeyboardInterrupt):
        call_reward(raising(KeyboardInterrupt()), ["p"], ["a"], [[1]], {})


def sleeps(**columns):
    time.sleep(60)


def loops(**columns):
    while True:
        pass


def matches(**columns):
    re.match(r"(a+)+$", "a" * 40 + "b")


def swallows(**columns):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(60)


async def waits(**columns):
    await asyncio.sleep(60)


@pytest.mark.parametrize("fn", [sleeps, loops, matches, swallows, waits])
def test_a_function_that_hangs_is_ended(fn):
    function = RewardFunction(fn.__name__, fn)
    began = time.monotonic()
    sentence = f"{fn.__name__} gave no result within 0.1 s: .* --reward-timeout"
    with pytest.raises(RewardError, match=sentence):
        finish([function], [start(function, {}, 0.1)], 1, 0.1)
    assert time.monotonic() - began < 5


def test_a_time_limit_restores_the_handler_and_the_timer_before():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(30):
        with pytest.raises(TimeLimitExceeded, match=r"no result within 0\.05 s"), time_limit(0.05):
            time.sleep(10)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left <= 30
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_time_limit_does_nothing_in_other_threads():
    found: list[Any] = []

    def work():
        with time_limit(0.01):
            time.sleep(0.05)
        found.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["done"]


MISTAKES = """
import time

def raises(completions, answer, **columns):
    return [float(answer[i] == columns["absent"]) for i in range(len(completions))]

def hangs(completions, **columns):
    time.sleep(60)

def text(completions, **columns):
    return ["1"] * len(completions)

def taken(completions, log_metric, **columns):
    log_metric("reward", 1.0)
    return [1.0] * len(completions)

def late(completions, trainer_state, **columns):
    return [1.0 / (1 - trainer_state.global_step)] * len(completions)
"""


def status_of_run(folder: Path, name: str, *, steps: int, more: str) -> int:
    """Return the exit status of a run with one of the functions above."""
    save_model(tiny_model(), tiny_tokenizer(), folder / "model")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(4)]
    write_rows(folder / "train.jsonl", rows)
    (folder / "rewards.py").write_text(MISTAKES)
    given = f"--method grpo --model {folder}/model --train-data {folder}/train.jsonl "
    given += f"--steps {steps} --output-dir {folder}/run --reward {folder}/rewards.py:{name} "
    given += "--eval-every 0 --prompts-per-step 2 --num-generations 2 --max-completion-length 4 "
    given += f"--dtype float32 --report-to none {more}"
    return exit_status.run_command("train", given.split())


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("raises", "error: reward function raises raised KeyError: 'absent' (rewards.py, line 5)"),
        ("hangs", "error: reward function hangs gave no result within 0.1 s: let it end earlier"),
        ("text", "error: reward function text returned '1' at index 0: return a finite number"),
        (
            "taken",
            "error: reward function taken raised ValueError: log_metric: 'reward' is a ",
        ),
    ],
)
def test_a_run_ends_with_one_sentence(name, sentence, tmp_path: Path, capsys):
    status = status_of_run(tmp_path, name, steps=1, more="--reward-timeout 0.1")
    assert status == exit_status.USER_ERROR
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith(sentence)
    assert not any("Traceback" in line for line in printed)


def test_the_steps_before_a_mistake_are_saved(tmp_path: Path, capsys):
    status = status_of_run(tmp_path, "late", steps=3, more="--checkpoint-every 3")
    assert status == exit_status.USER_ERROR
    printed = capsys.readouterr()
    assert "reward function late raised ZeroDivisionError" in printed.err
    assert printed.out.splitlines()[-1] == (
        "ended by an error of a reward function: step 1 is saved, the same command resumes the run "
        "from it"
    )
    assert checkpoint.newest(tmp_path / "run") == tmp_path / "run/checkpoints/step-1"
