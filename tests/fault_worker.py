"""A rank of a run under torchrun that fails where FAULT says: KIND:PHASE:STEP:RANK.

    FAULT=kill:reward:2:1 torchrun --nproc-per-node 2 fault_worker.py FLAGS OF expo_fast.train

KIND is kill, hang, raise, memory or term (a signal to this rank alone). A restart does not fail.
The phase `save` is the writing of a checkpoint, `evaluate` that of the held-out problems, and
`layer` the first layer that PyTorch computes in the step.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from expo_fast import train
from expo_fast.algorithms import saving
from expo_fast.cli import exit_status
from expo_fast.modeling.decoder import MLP
from expo_fast.reporting.timing import Phases

torch.set_num_threads(1)
KIND, PHASE, STEP, RANK = os.environ.get("FAULT", "none:none:0:0").split(":")
ARMED = os.environ["RANK"] == RANK and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def fail() -> None:
    if KIND == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if KIND == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if KIND == "hang":
        time.sleep(1000)
    if KIND == "raise":
        raise KeyError("broken")
    if KIND == "memory":
        raise torch.cuda.OutOfMemoryError("tried to allocate 20 GiB")


def arm() -> None:
    phase = Phases.phase
    n_steps = 0

    @contextmanager
    def failing_phase(self: Phases, name: str) -> Iterator[None]:
        with phase(self, name):
            if name == PHASE and n_steps == int(STEP):
                fail()
            yield

    def counted(run_step: train.StepFunction) -> train.StepFunction:
        def run(*given: Any) -> Any:
            nonlocal n_steps
            n_steps += 1
            return run_step(*given)

        return run

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            if n_steps == int(STEP):
                fail()
            return function(*given, **named)

        return run

    Phases.phase = failing_phase
    train.LOOPS |= {name: counted(run_step) for name, run_step in train.LOOPS.items()}
    if PHASE == "save":
        saving.write_shards = failing(saving.write_shards)
    if PHASE == "layer":
        MLP.forward = failing(MLP.forward)
    if PHASE == "evaluate":
        train.evaluate = failing(train.evaluate)


train.score_answers = lambda answers, texts, **_: [1.0] * len(texts)
if ARMED and KIND != "none":
    arm()
raise SystemExit(exit_status.run(train.main, sys.argv[1:]))
