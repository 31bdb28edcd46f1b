"""Verdicts on boxed answers from worker processes that have limits of time and memory.

The workers run the module `expo_fast.answers.worker`. math-verify (sympy) may hang in C code,
where no alarm reaches it, or use up all memory. Such a worker is killed and replaced.
"""

import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import NamedTuple

from expo_fast.data import answer_grading
from expo_fast.data.answer_grading import MAX_CHARS, last_boxed, tidy
from expo_fast.data.processes import start_program

# A worker is then replaced: sympy's caches grow, and nothing that a text planted in it may last.
JOBS_PER_WORKER = 500
WORKER = "expo_fast.answers.worker"  # the module that a worker runs
START_LIMIT_S = 120.0  # a start takes 1 s; this is for a cold network disk on a busy machine
REPLY_BYTES = 1 << 16

Verdict = bool | None  # None: undecided


class Comparison(NamedTuple):
    """What is to be compared. Both texts are tidy, and "" if there is none."""

    reference: str
    answer: str  # the content of the box


Verdicts = dict[Comparison, Verdict]


class Worker:
    """A process that judges one comparison at a time."""

    def __init__(self, memory_bytes: int):
        self.channel, self.process = start_program(WORKER, os.getpid(), memory_bytes)
        # When this thread ends, the operating system kills the worker.
        self.starter = threading.current_thread()
        self.ready = False
        self.job: Comparison | None = None
        self.deadline = time.monotonic() + START_LIMIT_S  # infinite while it is idle
        self.jobs_left = JOBS_PER_WORKER

    @property
    def idle(self) -> bool:
        """Whether it has started and has no job."""
        return self.ready and self.job is None

    @property
    def lost(self) -> bool:
        """Whether its process has ended, or will, because the thread that started it has."""
        return self.process.poll() is not None or not self.starter.is_alive()

    def assign(self, job: Comparison, timeout_s: float) -> None:
        self.job = job
        self.deadline = time.monotonic() + timeout_s
        self.jobs_left -= 1
        message = json.dumps([job.reference, job.answer, timeout_s])
        with suppress(BrokenPipeError):  # `reply` then reads the end of file, as after any crash
            self.channel.send_bytes(message.encode())

    def reply(self) -> dict | None:
        """Return what it has sent, or None if it died or sent something else than JSON."""
        try:
            return json.loads(self.channel.recv_bytes(REPLY_BYTES))
        except (EOFError, OSError, ValueError):
            return None

    def finish_start(self) -> None:
        """Take the first message of a new worker.

        Raises RuntimeError if it could not start, since no text has caused that.
        """
        reply = self.reply() or {"error": f"exit code {self.process.wait()}"}
        if "error" in reply:
            raise RuntimeError(f"math-verify can't be loaded to check answers: {reply['error']}")
        self.ready = True
        self.deadline = math.inf

    def finish_job(self) -> None:
        self.job = None
        self.deadline = math.inf

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.channel.close()


class Verifier:
    """A pool of workers that judge boxed answers. They start when the first answer needs one.

    A context manager: `close` ends the workers.

    Attributes:
        timeouts: how many workers were killed at the time limit.
        crashes: how many workers died of an answer, most of them by the memory limit.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 2.0,  # wall time for one answer
        memory_bytes: int = 1 << 30,  # address space of a worker beyond that of its imports
    ):
        if workers < 1:
            raise ValueError(
                f"workers={workers}: answers need at least one process to be checked in"
            )
        self.workers = workers
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes
        self.timeouts = 0
        self.crashes = 0
        self._pool: list[Worker] = []
        self._lock = threading.Lock()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for worker in list(self._pool):
            self._drop(worker)

    def judge(
        self,
        references: Sequence[str],
        completions: Sequence[str],
        *,
        timeout_s: float | None = None,  # None: the verifier's own
    ) -> list[float | None]:
        """Return 1.0, 0.0 or None for each completion, as `reward.score_answers` does."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s}: an answer needs some time to be checked")
        if len(references) != len(completions):
            raise ValueError(f"{len(references)} answers for {len(completions)} completions")
        comparisons = []
        for reference, completion in zip(references, completions, strict=True):
            comparisons.append(comparison_of(reference, completion))
        # Many samples of a group are equal. Each different comparison is judged once.
        verdicts = {job: answer_grading.decide(*job) for job in comparisons}
        undecided = [job for job, verdict in verdicts.items() if verdict is None]
        jobs = [job for job in undecided if job.reference]
        with self._lock:
            verdicts |= self._judge(jobs, timeout_s)
        return [_as_number(verdicts[job]) for job in comparisons]

    def _judge(self, jobs: list[Comparison], timeout_s: float) -> Verdicts:
        waiting = deque(jobs)
        verdicts: Verdicts = {}
        self._replace_lost()
        try:
            while len(verdicts) < len(jobs):
                self._hand_out(waiting, timeout_s)
                busy = [worker for worker in self._pool if not worker.idle]
                heard = _wait_for(busy)
                for worker in busy:
                    self._attend(worker, worker.channel in heard, verdicts)
        finally:  # after an interrupt, no old reply may be read by the next call
            for worker in list(self._pool):
                if not worker.idle:
                    self._drop(worker)
        return verdicts

    def _replace_lost(self) -> None:
        for worker in list(self._pool):
            if worker.lost:
                self._drop(worker)

    def _hand_out(self, waiting: deque[Comparison], timeout_s: float) -> None:
        """Start workers as far as they are needed, and give a job to each that is idle."""
        free = [worker for worker in self._pool if worker.job is None]
        while len(free) < len(waiting) and len(self._pool) < self.workers:
            worker = Worker(self.memory_bytes)
            free.append(worker)
            self._pool.append(worker)
        for worker in free:
            if worker.ready and waiting:
                worker.assign(waiting.popleft(), timeout_s)

    def _attend(
        self,
        worker: Worker,
        heard: bool,  # it has sent something, or died
        verdicts: Verdicts,
    ) -> None:
        """Record a worker's verdict. Drop a worker that died, is late or has had enough jobs."""
        late = not heard and time.monotonic() >= worker.deadline
        if not heard and not late:
            return
        if worker.job is None:
            if late:
                raise RuntimeError(f"an answer checker did not start within {START_LIMIT_S:.0f} s")
            worker.finish_start()
            return
        reply = worker.reply() if heard else None
        verdicts[worker.job] = reply["right"] if reply else None
        worker.finish_job()
        self.timeouts += late
        self.crashes += heard and reply is None
        if reply is None or worker.jobs_left == 0:
            self._drop(worker)

    def _drop(self, worker: Worker) -> None:
        self._pool.remove(worker)
        worker.kill()


def _wait_for(workers: Sequence[Worker]) -> list:
    """Wait until a worker sends something or the first deadline. Return the readable channels."""
    deadline = min(worker.deadline for worker in workers)
    patience = deadline - time.monotonic()
    channels = [worker.channel for worker in workers]
    return wait(channels, max(0.0, patience))


def comparison_of(reference: str, completion: str) -> Comparison:
    """Return what is to be compared for a reference answer and a completion.

    A reference of over 1000 characters (MAX_CHARS) counts as none.
    """
    expected = last_boxed(reference) or reference
    answer = last_boxed(completion) or ""
    if len(expected) > MAX_CHARS:
        return Comparison("", tidy(answer))
    return Comparison(tidy(expected), tidy(answer))


def _as_number(verdict: Verdict) -> float | None:
    return None if verdict is None else float(verdict)
