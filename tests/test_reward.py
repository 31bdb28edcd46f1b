"""Answers that hang or take too much memory are stopped; custom rewards are checked."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expo_fast.answers import nursery
from expo_fast.data import grader_pool, workers
from expo_fast.data.grader_pool import GraderPool
from expo_fast.data.problems import Problem
from expo_fast.data.workers import Comparison, Nursery, Worker
from expo_fast.generate import Completion
from expo_fast.reward import (
    boxed_answer_reward,
    call_reward,
    custom_reward,
    load_reward,
    reward_columns,
)
from expo_fast.reward import score_answers as score
from expo_fast.reward_functions import RewardError
from expo_fast.runtime.interruptions import SAVE, STOPS
from fault_runs import descendants

# minutes in one C call of math-verify 0.9.0, which no alarm interrupts. The check of the size finds
# it, so tests of workers switch that check off (`unchecked`).
HANG = "|1E+100000000|"


def box(text):
    return rf"We get \boxed{{{text}}}."


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, timeout_s=10.0) as pool:
        yield pool


@pytest.fixture
def unchecked(monkeypatch):
    """Give answers of any size to the workers."""
    monkeypatch.setattr(grader_pool, "is_too_large", lambda text: False)


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(seconds, pids):
    end = time.monotonic() + seconds
    while any(map(running, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(running, pids))


def test_simple_answers_need_no_worker():
    with GraderPool() as pool:
        golds = ["12", "3/4", "Sunday", "12", "", "1" * 1001]
        texts = [box("12.0"), box("0.75"), box("monday"), "no box", box("12"), box("1")]
        assert pool.verdicts(golds, texts) == [1.0, 1.0, 0.0, 0.0, None, None]
        assert not pool._pool


def test_verdicts_are_in_the_order_of_the_answers(pool):
    n = 60
    golds = [f"|x| + {i % 7}" for i in range(n)]
    texts = [box(f"{i % 5} + |x|") for i in range(n)]
    assert pool.verdicts(golds, texts) == [float(i % 7 == i % 5) for i in range(n)]


def test_a_hang_in_c_code_is_killed_and_affects_no_other_answer(unchecked):
    with GraderPool(workers=1, timeout_s=0.5) as pool:
        pool.verdicts(["|x|"], [box("|y|")])
        before = time.monotonic()
        texts = [box("1+|x|"), box(HANG), box("|x|+1.0"), box("2|x|"), box("12")]
        got = pool.grade(["|x|+1", "|x|+1", "|x|+1", "|x|+1", "12"], texts)
        assert time.monotonic() - before < 10
        assert [grade.verdict for grade in got] == [1.0, None, 1.0, 0.0, 1.0]
        assert got[1].reason == "timeout"


@pytest.mark.slow
def test_a_hostile_reference_affects_no_other_answer(unchecked):
    with GraderPool(workers=1, timeout_s=0.3) as pool:
        for bomb in (HANG, "|((100!)!)!|", "(" * 300):
            verdicts = pool.verdicts([bomb, "|x|+1"], [box("8"), box("1+|x|")])
            assert verdicts in ([None, 1.0], [0.0, 1.0]), bomb


def test_the_memory_of_a_worker_is_limited(unchecked):
    with GraderPool(workers=1, timeout_s=60.0, memory_bytes=64 << 20) as pool:
        got = pool.grade(["|x|+1", "|x|+1"], [box("|2^{2^{40}}|"), box("1+|x|")])
        assert [grade.reason for grade in got] == ["memory", "symbolic"]
        pid = pool._pool[0].pid
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        limit = {line[:26].strip(): line[26:].split()[0] for line in limits}
        assert 64 << 20 < int(limit["Max address space"]) < 1 << 30
        assert limit["Max file size"] == limit["Max core file size"] == "0"


@pytest.mark.slow
def test_the_memory_of_the_trainer_does_not_count_towards_the_limit(unchecked):
    ballast = bytearray(b"1") * (300 << 20)  # getrusage of a child starts at this peak
    with GraderPool(workers=1, timeout_s=60.0, memory_bytes=64 << 20) as pool:
        got = pool.grade(["|x|+1", "|x|+1"], [box("|2^{2^{40}}|"), box("|x|+2")])
        assert [grade.reason for grade in got] == ["memory", "wrong"]
    del ballast


@pytest.mark.slow
def test_hostile_answers_do_not_slow_the_pool_down(unchecked):
    bombs = [box(f"|1E+{10**8 + i}|") for i in range(6)]
    fine = [box(f"|x| + {i}") for i in range(50)]
    with GraderPool(workers=2, timeout_s=0.1) as pool:
        assert [grade.reason for grade in pool.grade(["|x|"] * 6, bombs)] == ["timeout"] * 6
        start = time.monotonic()
        assert pool.verdicts(["|x|+7"] * 50, fine, timeout_s=10.0) == [
            float(i == 7) for i in range(50)
        ]
        assert time.monotonic() - start < 10


def test_equal_comparisons_are_graded_once(unchecked, monkeypatch):
    jobs = []
    assign = Worker.assign

    def spy(self: Worker, job: Comparison, timeout_s: float, cpu_s: float):
        jobs.append(job)
        assign(self, job, timeout_s, cpu_s)

    monkeypatch.setattr(Worker, "assign", spy)
    with GraderPool(workers=2, timeout_s=0.3) as pool:
        assert pool.verdicts(["|x|"] * 64, [box(HANG)] * 64) == [None] * 64
    assert len(jobs) == 1


def test_the_start_of_a_worker_does_not_count_towards_the_time_limit(monkeypatch, tmp_path):
    slow = tmp_path / "slow_nursery.py"
    slow.write_text(f"import time\ntime.sleep(1.2)\n{Path(nursery.__file__).read_text()}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(workers, "NURSERY", "slow_nursery")
    with GraderPool(workers=1, timeout_s=1.0) as pool:
        assert pool.verdicts(["|x|+1"], [box("1+|x|")]) == [1.0]


def test_a_grader_that_cannot_start_raises_an_error(monkeypatch, tmp_path):
    program = Path(nursery.__file__).read_text()
    broken = tmp_path / "broken_nursery.py"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(workers, "NURSERY", "broken_nursery")
    before = descendants()
    broken.write_text(program.replace("for gold,", "import math_verify_absent\n        for gold,"))
    with (
        GraderPool() as pool,
        pytest.raises(RuntimeError, match="No module named 'math_verify_absent'"),
    ):
        pool.verdicts(["|x|+1"], [box("1+|x|")])
    broken.write_text("raise SystemExit(3)")
    with GraderPool() as pool, pytest.raises(RuntimeError, match="exit code 3"):
        pool.verdicts(["|x|+1"], [box("1+|x|")])
    monkeypatch.setattr(workers, "START_LIMIT_S", 0.2)
    broken.write_text("import time; time.sleep(60)")
    with GraderPool() as pool, pytest.raises(RuntimeError, match="did not start within 0 s"):
        pool.verdicts(["|x|+1"], [box("1+|x|")])
    assert descendants() <= before


def test_no_process_outlives_its_pool(unchecked):
    before = descendants()
    with GraderPool(workers=2, timeout_s=0.2) as pool:
        pool.verdicts(["|x|", "|x|", "|x|"], [box(HANG), box("|y|"), box("|(10^{10})!|")])
        # The nursery and two workers: killed ones leave no zombies.
        assert len(descendants() - before) <= 3
    assert gone_within(5, descendants() - before)
    assert descendants() <= before


def test_a_worker_is_replaced_after_its_number_of_jobs(monkeypatch):
    monkeypatch.setattr(workers, "JOBS_PER_WORKER", 3)
    with GraderPool(workers=1, timeout_s=10.0) as pool:
        pool.verdicts(["|x|"], [box("|x|+1")])
        first = pool._pool[0].pid
        verdicts = pool.verdicts(["|x|+3"] * 7, [box(f"|x| + {i}") for i in range(7)])
        assert verdicts == [float(i == 3) for i in range(7)]
        assert first not in descendants()


@pytest.mark.slow
def test_a_worker_lost_between_calls_is_replaced():
    with GraderPool(workers=1, timeout_s=10.0) as pool:
        started = threading.Thread(target=pool.verdicts, args=(["|x|"], [box("|y|")]))
        started.start()
        started.join()  # the kernel kills the worker, because the thread that started it has ended
        assert pool.verdicts(["|x|+1"], [box("1+|x|")]) == [1.0]
        os.kill(pool._pool[0].pid, signal.SIGKILL)
        assert pool._pool[0].channel.poll(5)
        assert pool.verdicts(["|x|+2"], [box("2+|x|")]) == [1.0]
        assert pool._nursery is not None
        os.kill(pool._nursery.process.pid, signal.SIGKILL)
        pool._nursery.process.wait()
        assert pool.verdicts(["|x|+3"], [box("3+|x|")]) == [1.0]


def test_the_end_of_the_nursery_during_a_batch_loses_the_verdicts_of_that_time_only(monkeypatch):
    assign = Worker.assign
    ended = []

    def assign_and_end(self: Worker, job: Comparison, timeout_s: float, cpu_s: float):
        assign(self, job, timeout_s, cpu_s)
        if not ended:
            ended.append(self)
            self._nursery.process.kill()
            self._nursery.process.wait()

    monkeypatch.setattr(Worker, "assign", assign_and_end)
    with GraderPool(workers=1, timeout_s=20.0) as pool:
        references = [f"|x|+{n}" for n in range(4)]
        scores = pool.verdicts(references, [box(f"{n}+|x|") for n in range(4)])
    assert scores == [None, 1.0, 1.0, 1.0]


def test_a_nursery_that_does_not_reply_is_ended():
    """Its late reply would be taken for that to the next request."""
    nursery = Nursery()
    nursery._socket.settimeout(0.01)
    with pytest.raises(TimeoutError):
        nursery._reply()
    assert nursery.lost
    nursery.close()


def test_a_signal_to_all_processes_of_a_job_loses_no_verdict(monkeypatch):
    """The trainer needs verdicts for the step that it completes before it ends."""
    assign = Worker.assign

    def assign_and_send(signum: int, pids: tuple[int, ...]) -> Callable[..., None]:
        def assign_and_signal(self: Worker, job: Comparison, timeout_s: float, cpu_s: float):
            assign(self, job, timeout_s, cpu_s)
            for pid in pids:
                os.kill(pid, signum)

        return assign_and_signal

    with GraderPool(workers=1, timeout_s=10.0) as pool:
        assert pool.verdicts(["|x|"], [box("|y|")]) == [0.0]
        assert pool._nursery is not None
        pids = (pool._nursery.process.pid, pool._pool[0].pid)
        for n, signum in enumerate([*STOPS, SAVE], start=1):
            monkeypatch.setattr(Worker, "assign", assign_and_send(signum, pids))
            verdicts = pool.verdicts([f"|x|+{n}"] * 2, [box(f"{n}+|x|"), box("|x|")])
            assert verdicts == [1.0, 0.0], signum
            assert (pool._nursery.process.pid, pool._pool[0].pid) == pids


PARENT = """
import sys
from expo_fast.data import grader_pool
grader_pool.is_too_large = lambda text: False
pool = grader_pool.GraderPool(workers=2, timeout_s=60.0)
pool.verdicts(["|x|", "|x|+1"], [r"\\boxed{|y|}", r"\\boxed{|z|}"])
print(*[w.pid for w in pool._pool], pool._nursery.process.pid, flush=True)
pool.verdicts(["|x|", "|x|"], [r"\\boxed{|1E+100000000|}", r"\\boxed{|1E+100000001|}"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent_even_inside_c_code(kind):
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert pids and all(map(running, pids))
        time.sleep(0.5)  # into the hang
        parent.send_signal(kind)
        assert parent.wait(10) != 0
    assert gone_within(5, pids)


def test_an_interrupted_call_does_not_change_the_next_verdicts(unchecked):
    # An earlier test of this process may have run a command, which ends at once on SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with GraderPool(workers=1, timeout_s=30.0) as pool:
        pool.verdicts(["|x|"], [box("|y|")])
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            pool.verdicts(["|x|"], [box(HANG)])
        assert pool.verdicts(["|x|+1", "|x|+1"], [box("2|x|"), box("1+|x|")]) == [0.0, 1.0]


def test_score_answers_grades_and_checks_its_arguments():
    golds, texts = ["12", "|x|+1", "|x|+1"], [box("12"), box("1+|x|"), box("2|x|")]
    assert score(golds, texts, timeout_s=10.0) == [1.0, 1.0, 0.0]
    assert score([], []) == []
    with pytest.raises(ValueError, match="2 answers for 1 completions"):
        score(["1", "2"], [box("1")])
    with pytest.raises(ValueError, match=r"timeout_s=0\.0"):
        score(["1"], [box("1")], timeout_s=0.0)
    with pytest.raises(ValueError, match="workers=0"):
        GraderPool(workers=0)


REWARD_FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Weight:
    value: float = 0.5

def length(prompts, completions, completion_ids, level, **columns):
    return [Weight().value * len(i) * l for i, l in zip(completion_ids, level)]

number = 3
"""


def test_a_reward_function_is_loaded_from_a_file_or_a_module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(REWARD_FILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    for dotted in (f"{tmp_path}/mine.py:length", "mine.length"):
        got = call_reward(
            load_reward(dotted), ["p", "p"], ["a", "b"], [[1], [2, 3]], {"level": [2, 3]}
        )
        assert got == [1.0, 3.0]
    assert load_reward("math.sqrt") is math.sqrt


PROBLEMS = [
    Problem("a", "1 + 1?", "2", solution="1 + 1 = 2.", columns={"hint": "two"}),
    Problem("b", "1 + 2?", "3", level=1, columns={"unit": "kg", "id": "a column is replaced"}),
]


def test_the_built_in_reward_is_the_verdict_of_the_boxed_answer():
    assert boxed_answer_reward(PROBLEMS, [box("2"), box("2")], []) == [1.0, 0.0]
    assert boxed_answer_reward([Problem("c", "?", "")], [box("2")], []) == [None]


def test_a_box_that_the_prompt_opens_is_judged():
    chat = (
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "It is \\boxed{"},
    )
    assert boxed_answer_reward([Problem("a", chat, "2")] * 2, ["2}.", "3}."], []) == [1.0, 0.0]


def test_a_custom_reward_gets_all_columns():
    expected = {
        "hint": ["two", None],
        "unit": [None, "kg"],
        "id": ["a", "b"],
        "answer": ["2", "3"],
        "solution": ["1 + 1 = 2.", None],
        "level": [None, 1],
    }
    assert reward_columns(PROBLEMS) == expected
    given = {}

    def fn(**columns):
        given.update(columns)
        return [1, None]

    done = [Completion([5], torch.zeros(1), "stop"), Completion([6, 7], torch.zeros(2), "stop")]
    assert custom_reward(fn)(PROBLEMS, ["|x|", "y"], done) == [1.0, None]
    for name in ("trainer_state", "log_extra", "log_metric"):
        del given[name]
    assert given == expected | {
        "prompts": ["1 + 1?", "1 + 2?"],
        "completions": ["|x|", "y"],
        "completion_ids": [[5], [6, 7]],
    }


@pytest.mark.parametrize(
    ("dotted", "error", "message"),
    [
        ("sqrt", ValueError, "'sqrt': write it as package.module.function or path"),
        ("absent.py:f", FileNotFoundError, r"'absent\.py' does not exist"),
        ("absent_package.module.f", ValueError, "no module 'absent_package'"),
        ("math.absent", ValueError, "math has no function 'absent'"),
        ("math.pi", ValueError, "math has no function 'pi'"),
    ],
)
def test_a_missing_reward_function_is_named(dotted, error, message):
    with pytest.raises(error, match=message):
        load_reward(dotted)


def test_a_missing_dependency_of_a_reward_module_is_named(tmp_path, monkeypatch):
    (tmp_path / "needy.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="absent_dependency"):
        load_reward("needy.f")


def returning(value):
    def my_reward(prompts, completions, completion_ids, **columns):
        return value

    return my_reward


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "my_reward returned a list of 1: return a list of 2"),
        (0.5, "my_reward returned a float: return a list of 2"),
        ({0: 1.0, 1: 2.0}, "my_reward returned a dict"),
        ([1.0, "good"], "my_reward returned 'good' at index 1"),
        ([math.inf, 1.0], "my_reward returned inf at index 0"),
        ([1.0, [1.0]], r"my_reward returned \[1\.0\] at index 1"),
    ],
)
def test_invalid_rewards_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        call_reward(returning(value), ["p", "p"], ["a", "b"], [[1], [2]], {})


def test_rewards_are_converted_to_floats_and_nan_to_none():
    got = call_reward(returning((True, math.nan)), ["p", "p"], ["a", "b"], [[1], [2]], {})
    assert got == [1.0, None] and type(got[0]) is float


def test_an_error_in_a_reward_function_names_the_function():
    def my_reward(**given):
        return [1 / 0 for _ in given["completions"]]

    sentence = r"my_reward raised ZeroDivisionError: .* \(test_reward\.py, line \d+\)"
    with pytest.raises(RewardError, match=sentence) as e:
        call_reward(my_reward, ["p"], ["a"], [[1]], {})
    assert isinstance(e.value.__cause__, ZeroDivisionError)
