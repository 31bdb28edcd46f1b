"""Training runs in forked processes, which tests kill, stop and compare.

A forked process has torch and transformers imported, so that a run takes a second. It has one
thread, because a thread pool of the parent would not survive the fork.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from expo_fast import train
from expo_fast.algorithms import explanations
from expo_fast.cli import exit_status
from expo_fast.data import grader_pool
from expo_fast.modeling.optimizer import Optimizer
from expo_fast.reporting.jsonl import read_rows
from expo_fast.runtime import interruptions
from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from jobs import without_times, write_rows
from tiny import tiny_model, tiny_tokenizer

STEPS = 5
HANGING = r"\boxed{|1E+100000000|}"  # minutes in one C call of math-verify
BASE = (
    f"--shots 0 --steps {STEPS} --prompts-per-step 2 --num-generations 3 --learning-rate 1e-3 "
    "--max-completion-length 8 --eval-every 2 --eval-limit 2 --eval-samples 2 --checkpoint-every 1 "
    "--dtype bfloat16 "
)
EXPLAINS = "--explanations-per-question 2 "
METHODS = {
    "grpo": "--method grpo --updates-per-batch 2 --objective gspo",
    "grpo-kl": "--method grpo --updates-per-batch 2 --kl-coef 0.02 --dynamic-sampling 2",
    "expo-grpo": f"--method expo-grpo {EXPLAINS} --updates-per-batch 2 --explain-every 2",
    "expo-shuffled": f"--method expo-grpo {EXPLAINS} --explain-every 3 --shuffle-explanations",
    "expo-dpo": f"--method expo-dpo {EXPLAINS}",
    "expo-dpo-online": f"--method expo-dpo {EXPLAINS} --pairs-every 2 --refresh-reference",
    "lora": f"--method expo-grpo {EXPLAINS} --lora-rank 4 --explain-every 2",
    "sft": "--method sft",
}


def make_job(root: Path) -> Path:
    """Write a tiny model, data and a reward into a folder, and return it."""
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


def flags(job: Path, method: str, run: Path, more: str = "") -> list[str]:
    """Return the flags of a run of a method in `METHODS`."""
    given = f"--model {job}/model --train-data {job}/train.jsonl --eval-data {job}/eval.jsonl "
    given += f"--output-dir {run} {BASE} {METHODS[method]} {more}"
    if method != "sft":
        given += f" --reward {job}/rewards.py:odd"
    else:
        given = given.replace("--num-generations 3", "")
    return given.split()


def start(given: list[str], log: Path, prepare: Callable[[], None] | None = None) -> int:
    """Start a run in a forked process and return its id.

    prepare: called in the process before the run.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.setsid()
        torch.set_num_threads(1)  # the parent's thread pool does not survive the fork
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        warnings.simplefilter("default")
        warnings.showwarning = print_warning  # pytest collects those of this process
        # No explanation of a random model is right, so each is accepted.
        train.score_answers = lambda answers, texts: [1.0] * len(texts)
        explanations.is_unfit = lambda text, problem: False
        if prepare is not None:
            prepare()
        status = exit_status.run(train.main, given)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def print_warning(message: Any, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def wait(pid: int, seconds: float | None = None) -> int | None:
    """Return the exit status of a process, minus a signal's number if that killed it.

    Return None if it is still running after `seconds`.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            return None
        time.sleep(0.001)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL


def finish(given: list[str], log: Path) -> None:
    """Run to the end. Fail with the output if the exit status is not 0."""
    status = wait(start(given, log))
    assert status == 0, log.read_text()[-3000:]


def snapshot(run: Path) -> dict[str, Any]:
    """Return everything of a run that must be equal in an uninterrupted one."""
    found: dict[str, Any] = {}
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        found[name] = without_times(read_rows(run / name))
    for pattern in ("completions/*", "pairs/*", "checkpoints/step-*/**/*"):
        for path in sorted(run.glob(pattern)):
            if path.is_file() and ".bad-" not in str(path):
                name = str(path.relative_to(run))
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return the names of what differs between two snapshots."""
    names = ours.keys() | theirs.keys()
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def fresh(path: Path) -> Path:
    """Return a path at which nothing is."""
    shutil.rmtree(path, ignore_errors=True)
    return path


def interruptions_before_the_run() -> None:
    """Do what the command line does before the run: a signal ends the process with one line."""
    interruptions.leave_at_once_outside_the_run()


def save_when_continued(run: Path, log: Path) -> NoReturn:
    """Stop this process. When it is continued, save step 3 of a run and exit: 2 for an OSError."""
    status = 3
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        model = tiny_model()
        optimizer = Optimizer(
            model.named_parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
        )
        tensors, _ = optimizer.state_dict()
        values = {"step": 3, "identity": {}, "trainer": {}}
        write = partial(save_model, model, tiny_tokenizer())
        with checkpoint.run_lock(run):
            os.kill(os.getpid(), signal.SIGSTOP)
            checkpoint.save(run, 3, write, tensors, values, keep=2)
        status = 0
    except OSError as error:
        os.write(1, f"{error}\n".encode())
        status = 2
    except BaseException as error:
        os.write(1, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def record_usage(file: Path) -> None:
    """Write what the process and its children use after each step, one row per step.

    Each fifth step has an answer that hangs in a worker of the grader, which is then replaced.
    """
    grader_pool.is_too_large = lambda text: False
    pool = grader_pool.GraderPool(workers=1, timeout_s=0.5)
    for name, usual in list(train.LOOPS.items()):
        train.LOOPS[name] = partial(_run_measured_step, usual, file, pool)


def _run_measured_step(usual: Any, file: Path, pool: Any, trainer, step, phases) -> Any:
    result = usual(trainer, step, phases)
    if step % 5 == 0:
        assert pool.verdicts(["|x|"], [HANGING]) == [None]
    assert pool.verdicts([f"|x|+{step}"], [rf"\boxed{{{step}+|x|}}"]) == [1.0]
    own = Path("/proc/self")
    pages = int((own / "statm").read_text().split()[1])
    row = {
        "descriptors": len(os.listdir(own / "fd")),
        "threads": len(os.listdir(own / "task")),
        "processes": len(descendants()),
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
    }
    with file.open("a") as log:
        log.write(json.dumps(row) + "\n")
    return result


def descendants(pid: int | str = "self") -> set[int]:
    """Return the ids of the processes that a process has started, and of those that they have."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= {int(child), *descendants(child)}
    return found


def fill_disk(disk: Path, *, at: int, until: int) -> None:
    """Fill a disk at the start of a step (from 1), and empty it at the start of another."""
    filler = disk / "filler"
    for name, usual in list(train.LOOPS.items()):
        train.LOOPS[name] = partial(_run_step, usual, filler, at, until)


def _run_step(usual: Any, filler: Path, at: int, until: int, trainer, step, phases) -> Any:
    if step + 1 == at:
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    if step + 1 == until:
        filler.unlink()
    return usual(trainer, step, phases)
