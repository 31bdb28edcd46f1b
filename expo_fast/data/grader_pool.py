"""Verdicts on boxed answers from worker processes that have limits of time and memory.

The exact rules decide most answers. What they leave open goes to math-verify (sympy), which may
hang in C code, where no alarm reaches it, or use up all memory. So it runs in processes, and such a
process is killed and replaced. Answers that are too large to compute are not given to it.
"""

import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Literal, get_args

from expo_fast.answers.magnitude import is_too_large
from expo_fast.data import answer_grading
from expo_fast.data.answer_grading import MAX_CHARS, last_boxed, tidy
from expo_fast.data.workers import Comparison, Ending, Nursery, Worker

# While MANY of the last WINDOW answers end at a limit, SHORTENED of the time limit is the limit of
# CPU time. It is then 0.25 s, and an ordinary answer takes 0.03 s. It is no wall time, because a
# busy machine must not make ordinary answers late.
WINDOW = 16
MANY = 4
SHORTENED = 1 / 8

Reason = Literal[
    "exact",  # right by the exact rules
    "symbolic",  # right by math-verify
    "wrong",
    "no_answer",  # no box, or an empty one
    "unparsable",  # math-verify cannot read the answer
    "too_large",  # a number in it is too large to compute
    "timeout",
    "memory",
    "crash",
    "no_reference",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
RIGHT: tuple[Reason, ...] = ("exact", "symbolic")
WRONG: tuple[Reason, ...] = ("wrong", "no_answer", "unparsable")


@dataclass(frozen=True)
class Grade:
    """The verdict on a completion, with its reason."""

    reason: Reason

    @property
    def verdict(self) -> float | None:
        """1.0 for a right answer, 0.0 for a wrong one, and None if it is undecided."""
        if self.reason in RIGHT:
            return 1.0
        return 0.0 if self.reason in WRONG else None


Reasons = dict[Comparison, Reason]


class GraderPool:
    """A pool of workers that grade boxed answers. They start when the first answer needs one.

    A context manager: `close` ends the workers.
    """

    def __init__(
        self,
        workers: int = 2,
        timeout_s: float = 2.0,  # wall time for one answer
        memory_bytes: int = 512 << 20,  # address space of a worker beyond that of its imports
    ):
        if workers < 1:
            raise ValueError(
                f"workers={workers}: answers need at least one process to be checked in"
            )
        self.workers = workers
        self.timeout_s = timeout_s
        self.memory_bytes = memory_bytes
        self._nursery: Nursery | None = None
        self._pool: list[Worker] = []
        self._limited: deque[bool] = deque(maxlen=WINDOW)  # whether the last answers were stopped
        self._lock = threading.Lock()

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for worker in list(self._pool):
            self._drop(worker)
        if self._nursery is not None:
            self._nursery.close()
        self._nursery = None

    def verdicts(
        self,
        references: Sequence[str],
        completions: Sequence[str],
        *,
        timeout_s: float | None = None,  # None: that of the pool
    ) -> list[float | None]:
        """Return 1.0, 0.0 or None for each completion, as `reward.score_answers` does."""
        grades = self.grade(references, completions, timeout_s=timeout_s)
        return [grade.verdict for grade in grades]

    def grade(
        self,
        references: Sequence[str],
        completions: Sequence[str],
        *,
        timeout_s: float | None = None,  # None: that of the pool
    ) -> list[Grade]:
        """Return the grade of each completion, as `reward.grade_answers` does."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s}: an answer needs some time to be checked")
        if len(references) != len(completions):
            raise ValueError(f"{len(references)} answers for {len(completions)} completions")
        comparisons = []
        for reference, completion in zip(references, completions, strict=True):
            comparisons.append(comparison_of(reference, completion))
        # Many samples of a group are equal. Each different comparison is graded once.
        reasons: Reasons = {}
        jobs = []
        for job in dict.fromkeys(comparisons):
            reason = reason_without_worker(job)
            if reason is None:
                jobs.append(job)
            else:
                reasons[job] = reason
        if jobs:
            with self._lock:
                reasons |= self._grade(jobs, timeout_s)
        return [Grade(reasons[job]) for job in comparisons]

    def _grade(self, jobs: list[Comparison], timeout_s: float) -> Reasons:
        waiting = deque(jobs)
        reasons: Reasons = {}
        try:
            while len(reasons) < len(jobs):
                self._forget_lost()
                self._hand_out(waiting, timeout_s)
                busy = [worker for worker in self._pool if worker.job is not None]
                heard = _wait_for(busy)
                for worker in busy:
                    self._attend(worker, worker.channel in heard, reasons)
        finally:  # after an interrupt, no old reply may be read by the next call
            for worker in list(self._pool):
                if worker.job is not None:
                    self._drop(worker)
        return reasons

    def _forget_lost(self) -> None:
        """Forget idle workers and a nursery that have ended. `_attend` sees when busy ones end."""
        for worker in list(self._pool):
            if worker.job is None and worker.lost:
                self._drop(worker)
        if self._nursery is not None and self._nursery.lost:
            self._nursery.close()
            self._nursery = None

    def _hand_out(self, waiting: deque[Comparison], timeout_s: float) -> None:
        """Start workers as far as they are needed, and give a job to each that is idle."""
        if self._nursery is None:
            self._nursery = Nursery()
        idle = [worker for worker in self._pool if worker.job is None]
        while len(idle) < len(waiting) and len(self._pool) < self.workers:
            try:
                worker = Worker(self._nursery, self.memory_bytes)
            except OSError:  # the nursery has just ended, and its workers with it
                return
            idle.append(worker)
            self._pool.append(worker)
        cpu_s = timeout_s * SHORTENED if sum(self._limited) >= MANY else timeout_s
        for worker in idle:
            if waiting:
                worker.assign(waiting.popleft(), timeout_s, cpu_s)

    def _attend(
        self,
        worker: Worker,
        heard: bool,  # it has sent something, or died
        reasons: Reasons,
    ) -> None:
        """Record a worker's verdict. Drop a worker that died, is late or has had enough jobs."""
        late = not heard and time.monotonic() >= worker.deadline
        if not heard and not late:
            return
        job = worker.job
        assert job is not None
        reply = worker.reply() if heard else None
        worker.job = None
        self._limited.append(reply is None)
        if reply is not None:
            reasons[job] = reason_of_reply(**reply)
            if worker.jobs_left == 0:
                self._drop(worker)
            return
        ending = self._drop(worker)
        reasons[job] = "timeout" if late else ending

    def _drop(self, worker: Worker) -> Ending:
        """End a worker. Return how it ended, if it had ended by itself."""
        self._pool.remove(worker)
        return worker.end()


def reason_without_worker(job: Comparison) -> Reason | None:
    """Return the verdict that needs no worker, or None if only math-verify can tell."""
    if not job.answer:
        return "no_answer"
    if not job.reference:
        return "no_reference"
    try:
        right = answer_grading.decide(*job)
        if right is not None:
            return "exact" if right else "wrong"
        if is_too_large(job.reference) or is_too_large(job.answer):
            return "too_large"
    except Exception as error:  # a fault of ours, which must not end a run that samples such a text
        warnings.warn(
            f"the rules of the grader failed on {job}: {error!r}: the answer is left undecided",
            stacklevel=2,
        )
        return "crash"
    return None


def reason_of_reply(*, right: bool, readable: bool) -> Reason:
    """Return the reason of a worker's verdict."""
    if right:
        return "symbolic"
    return "wrong" if readable else "unparsable"


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
