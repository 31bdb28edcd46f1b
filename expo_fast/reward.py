"""Rewards: is the boxed answer right, however hostile its text; or a function of the user's."""

import atexit
import hashlib
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Pipe, wait
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from expo_fast.data import answer_grading
from expo_fast.data.answer_grading import last_boxed
from expo_fast.data.answer_grading import last_boxed_span as last_boxed_span

JOBS_PER_WORKER = 500  # then a fresh process: sympy's caches grow, and nothing planted in one lasts
START_LIMIT_S = 120.0  # it takes 1 s warm; this is for a cold network disk on a busy machine

Pair = tuple[str, str]  # (reference answer, content of the box), both tidy


class Worker:
    """A process that judges one pair at a time, and the pair that it has."""

    def __init__(self, memory_bytes: int):
        self.channel, theirs = Pipe()
        arguments = theirs.fileno(), os.getpid(), memory_bytes
        with theirs:
            # -P keeps this package's folder, full of short module names, off the program's path;
            # a session of its own keeps Ctrl-C away
            self.process = subprocess.Popen(
                [sys.executable, "-P", answer_grading.__file__, *map(str, arguments)],
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ,
                    "PYTHONHASHSEED": "0",
                },  # sympy orders by hash: same text, same verdict
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.starter = threading.current_thread()  # the kernel ends the worker with this thread
        self.ready = False
        self.pair: Pair | None = None
        self.deadline = time.monotonic() + START_LIMIT_S  # infinite while idle
        self.jobs_left = JOBS_PER_WORKER

    @property
    def idle(self) -> bool:
        return self.ready and self.pair is None

    def give(self, pair: Pair, timeout_s: float) -> None:
        self.pair, self.deadline = pair, time.monotonic() + timeout_s
        self.jobs_left -= 1
        with suppress(BrokenPipeError):  # its end of file is read below, like any other crash
            self.channel.send_bytes(json.dumps([*pair, timeout_s]).encode())

    def reply(self) -> dict | None:
        """What it has sent; None if it died or babbles."""
        try:
            return json.loads(self.channel.recv_bytes(1 << 16))
        except (EOFError, OSError, ValueError):
            return None

    def started(self) -> None:
        """Take a new worker's greeting; RuntimeError if there is none, for no text caused that."""
        reply = self.reply() or {"error": f"exit code {self.process.wait()}"}
        if "error" in reply:
            raise RuntimeError(f"math-verify can't be loaded to check answers: {reply['error']}")
        self.ready, self.deadline = True, math.inf

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()


class Verifier:
    """Scores boxed answers; its worker processes start when the first answer needs one.

    Counts `timeouts`, and `crashes`: workers that died of an answer, by the memory limit mostly. A
    context manager; `close` ends the workers.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 2.0,  # wall time for one answer
        memory_bytes: int = 1 << 30,  # address space of a worker, above what its imports took
    ):
        if workers < 1:
            raise ValueError(
                f"workers={workers}: answers need at least one process to be checked in"
            )
        self.workers, self.timeout_s, self.memory_bytes = workers, timeout_s, memory_bytes
        self.timeouts = self.crashes = 0
        self._pool: list[Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for worker in list(self._pool):
            self._drop(worker)

    def score(
        self,
        answers: Sequence[str],
        completions: Sequence[str],
        *,
        timeout_s: float | None = None,  # None: the verifier's own
    ) -> list[float | None]:
        """As `score_answers`."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s}: an answer needs some time to be checked")
        if len(answers) != len(completions):
            raise ValueError(f"{len(answers)} answers for {len(completions)} completions")
        pairs = [tidy_pair(a, c) for a, c in zip(answers, completions, strict=True)]
        # A group often repeats itself: each different pair is judged once.
        verdicts = {pair: answer_grading.decide(*pair) for pair in pairs}
        hard = [pair for pair, verdict in verdicts.items() if verdict is None and pair[0]]
        with self._lock:
            verdicts |= self._judge(hard, timeout_s)
        values = [verdicts[pair] for pair in pairs]
        return [None if value is None else float(value) for value in values]

    def _judge(self, pairs: list[Pair], timeout_s: float) -> dict[Pair, bool | None]:
        waiting, verdicts = deque(pairs), {}
        self._replace_dead()
        try:
            while len(verdicts) < len(pairs):
                self._hand_out(waiting, timeout_s)
                active = [w for w in self._pool if not w.idle]
                patience = min(w.deadline for w in active) - time.monotonic()
                heard = wait([w.channel for w in active], max(0.0, patience))
                for worker in active:
                    self._attend(worker, worker.channel in heard, verdicts)
        finally:  # an interrupted call must not leave its verdicts to the next
            for worker in [w for w in self._pool if not w.idle]:
                self._drop(worker)
        return verdicts

    def _replace_dead(self) -> None:
        for worker in list(self._pool):
            if worker.process.poll() is not None or not worker.starter.is_alive():
                self._drop(worker)

    def _hand_out(self, waiting: deque[Pair], timeout_s: float) -> None:
        free = [w for w in self._pool if w.pair is None]
        while len(free) < len(waiting) and len(self._pool) < self.workers:
            free.append(Worker(self.memory_bytes))
            self._pool.append(free[-1])
        for worker in free:
            if worker.ready and waiting:
                worker.give(waiting.popleft(), timeout_s)

    def _attend(self, worker: Worker, heard: bool, verdicts: dict[Pair, bool | None]) -> None:
        """Take what it has to say; drop it if it died, is late or has served long enough."""
        late = not heard and time.monotonic() >= worker.deadline
        if not heard and not late:
            return
        if worker.pair is None:
            if late:
                raise RuntimeError(f"an answer checker did not start within {START_LIMIT_S:.0f} s")
            return worker.started()
        reply = worker.reply() if heard else None
        verdicts[worker.pair] = reply["right"] if reply else None
        worker.pair, worker.deadline = None, math.inf
        self.timeouts += late
        self.crashes += heard and reply is None
        if reply is None or worker.jobs_left == 0:
            self._drop(worker)

    def _drop(self, worker: Worker) -> None:
        self._pool.remove(worker)
        worker.kill()


def tidy_pair(reference: str, completion: str) -> Pair:
    """What is to be compared; an empty string where there is no usable reference, or no box."""
    gold = last_boxed(reference) or reference
    gold = "" if len(gold) > answer_grading.MAX_CHARS else answer_grading.tidy(gold)
    return gold, answer_grading.tidy(last_boxed(completion) or "")


@cache
def shared_verifier() -> Verifier:
    verifier = Verifier()
    atexit.register(verifier.close)
    return verifier


def score_answers(
    answers: Sequence[str],  # reference answers; the content of the last box of one that has a box
    completions: Sequence[str],  # the last balanced box of each is the answer
    *,
    timeout_s: float = 2.0,  # wall seconds for each answer
) -> list[float | None]:
    """1.0 right; 0.0 wrong or no box; None undecided.

    Undecided: timeout, memory limit, crash, or a reference that is empty or over 1000 characters.
    Never raises because of what a text says. ValueError if the lengths differ; RuntimeError if
    math-verify can't be loaded.
    """
    return shared_verifier().score(answers, completions, timeout_s=timeout_s)


def grader_hash() -> str:
    """Of what decides `score_answers`: results with equal hashes were graded alike."""
    digest = hashlib.sha256()
    for source in (__file__, answer_grading.__file__):
        digest.update(Path(source).read_bytes())
    with suppress(PackageNotFoundError):  # then only answers that need it fail
        digest.update(version("math-verify").encode())
    return digest.hexdigest()[:16]


RewardFunction = Callable[..., Any]  # f(prompts, completions, completion_ids, **columns)


def load_reward(dotted: str) -> RewardFunction:
    """The function named `package.module.function` or `path/to/file.py:function`.

    ValueError or FileNotFoundError if there is none; what the module itself raises passes through.
    """
    place, _, name = dotted.rpartition(":" if ".py:" in dotted else ".")
    if not place or not name:
        form = "package.module.function or path/to/file.py:function"
        raise ValueError(f"reward function {dotted!r}: write it as {form}")
    module = load_file(Path(place)) if place.endswith(".py") else load_module(place)
    fn = getattr(module, name, None)
    if not callable(fn):
        raise ValueError(f"reward function {dotted!r}: {place} has no function {name!r}")
    return fn


def load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"reward file {str(path)!r} does not exist")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def load_module(dotted: str) -> ModuleType:
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        if f"{dotted}.".startswith(f"{error.name}."):
            raise ValueError(
                f"reward module {dotted!r}: there is no module {error.name!r}"
            ) from error
        raise  # the module is there, and lacks something itself


def call_reward(
    fn: RewardFunction,
    prompts: Sequence,  # text or chat messages
    completions: Sequence,
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, list],  # the data's other columns, one value a completion
) -> list[float | None]:
    """Rewards by a user's function, called as TRL calls it; NaN becomes None.

    ValueError if it does not return one finite number or None for each completion; RuntimeError,
    with its name and cause, if it raises.
    """
    name = f"{fn.__module__}.{getattr(fn, '__qualname__', type(fn).__name__)}"
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    try:
        rewards = fn(**given, **columns)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise RuntimeError(f"reward function {name} raised {cause}") from error
    if not isinstance(rewards, list | tuple) or len(rewards) != len(completions):
        size = f" of {len(rewards)}" if isinstance(rewards, list | tuple) else ""
        got = f"{type(rewards).__name__}{size}"
        raise ValueError(
            f"reward function {name} returned a {got}: return a list of {len(completions)}"
        )
    return [checked_reward(name, i, value) for i, value in enumerate(rewards)]


def checked_reward(name: str, index: int, value: object) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or math.isinf(value):
        got = f"returned {value!r} at index {index}"
        raise ValueError(f"reward function {name} {got}: return a finite number or None")
    return None if math.isnan(value) else float(value)
