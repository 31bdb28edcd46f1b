"""Messages of the ranks in the key-value store of the run, which outlives a rank that ends.

A rank writes what it works on. If it ends or hangs, another rank finds here which one it was, and
in which phase. The first rank that fails leaves its cause, and one rank prints it.
"""

import json
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

BEAT_S = 1.0  # a living process writes as often
GRACE_S = 15.0  # a process that hangs is ended so long after another rank has failed
FAILURE = "failure"
VOICE = "voice"


@dataclass(frozen=True)
class RankProgress:
    """How far a rank has come."""

    exchanges: int
    """Number of exchanges that it has reached."""
    phase: str
    step: int

    def __str__(self) -> str:
        return f"phase {self.phase!r}" + (f" of step {self.step}" if self.step else "")


class Board:
    """The messages of one rank. store: a torch.distributed.Store."""

    def __init__(self, store: Any, rank: int, size: int):
        self._store = store
        self._rank = rank
        self._size = size
        self._exchanges = 0
        self._phase = "set-up"
        self._step = 0
        self._closed = threading.Event()
        self._write_progress()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread that tells the others that this process lives."""
        self._closed.set()
        self._thread.join()

    def enter(self, phase: str, step: int) -> None:
        """Write which phase this rank is in."""
        self._phase = phase
        self._step = step
        self._write_progress()

    def arrive(self) -> None:
        """Write that this rank has reached the next exchange."""
        self._exchanges += 1
        self._write_progress()

    @property
    def progress(self) -> RankProgress:
        return RankProgress(self._exchanges, self._phase, self._step)

    def post_failure(self, cause: str) -> None:
        """Leave the cause of a failure of this rank, if no other rank has failed before."""
        message = json.dumps([self._rank, f"rank {self._rank} failed in {self.progress}: {cause}"])
        self._store.compare_set(FAILURE, "", message)

    def failure(self, wait_s: float = 0.0) -> str | None:
        """Return the failure that another rank has left, waiting a while for it."""
        end = time.monotonic() + wait_s
        while True:
            if self._store.check([FAILURE]):
                rank, text = json.loads(self._store.get(FAILURE))
                return text if rank != self._rank else None
            if time.monotonic() >= end:
                return None
            time.sleep(0.1)

    def may_speak(self) -> bool:
        """Return whether this rank is the first to ask, so that one rank prints a message."""
        return self._store.add(VOICE, 1) == 1

    def lost(self, error: str, timeout_s: float) -> str:
        """Return in words which rank ended or hangs, after an exchange or a collective failed."""
        timed_out = any(words in error.lower() for words in ("timed out", "timeout"))
        others = [rank for rank in range(self._size) if rank != self._rank]
        reached = {rank: self._progress_of(rank) for rank in others}
        silent = [rank for rank in others if reached[rank].exchanges < self._exchanges]
        if not timed_out or not silent:
            silent = self._without_beat(others) or silent
        names = ", ".join(f"rank {rank} in {reached[rank]}" for rank in silent) or "a rank"
        if timed_out:
            return f"{names} did not answer within --collective-timeout {timeout_s:g} s"
        return (
            f"{names} ended without a message: the process was killed, or the machine ran out of "
            "memory"
        )

    def _progress_of(self, rank: int) -> RankProgress:
        return RankProgress(*json.loads(self._store.get(f"progress/{rank}")))

    def _write_progress(self) -> None:
        progress = json.dumps([self._exchanges, self._phase, self._step])
        self._store.set(f"progress/{self._rank}", progress)

    def _without_beat(self, ranks: list[int]) -> list[int]:
        """Return the ranks whose process does not live any more."""
        before = [self._store.add(f"beat/{rank}", 0) for rank in ranks]
        time.sleep(2.5 * BEAT_S)
        after = [self._store.add(f"beat/{rank}", 0) for rank in ranks]
        return [rank for rank, a, b in zip(ranks, before, after, strict=True) if a == b]

    def _beat(self) -> None:
        """Tell the others that this process lives. End it if it hangs after a failure elsewhere."""
        failed_at = None
        while not self._closed.wait(BEAT_S):
            try:
                self._store.add(f"beat/{self._rank}", 1)
                if failed_at is None and self.failure() is not None:
                    failed_at = time.monotonic()
            except RuntimeError:  # the store has ended, and the run with it
                return
            if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
                os._exit(1)
