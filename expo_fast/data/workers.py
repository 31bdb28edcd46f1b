"""Processes that judge answers for `grader_pool`: the nursery and the workers it forks."""

import json
import math
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, Literal, NamedTuple

from expo_fast.answers.worker import OUT_OF_MEMORY
from expo_fast.data.programs import start_program

# A worker is then replaced: sympy's caches grow, and nothing that a text planted in it may last.
JOBS_PER_WORKER = 500
NURSERY = "expo_fast.answers.nursery"  # the module that the nursery runs
START_LIMIT_S = 120.0  # a start takes 1 s; this is for a cold network disk on a busy machine
ANSWER_LIMIT_S = 30.0  # of the nursery to a request, which takes milliseconds
REPLY_BYTES = 1 << 16

Ending = Literal["timeout", "memory", "crash"]


class Comparison(NamedTuple):
    """What is to be compared. Both texts are tidy, and "" if there is none."""

    reference: str
    answer: str  # the content of the box


class Nursery:
    """A process that has imported math-verify, and forks workers.

    Raise RuntimeError if it could not start, since no text has caused that.
    """

    def __init__(self):
        self._socket, theirs = socket.socketpair()
        self.process = start_program(NURSERY, theirs, os.getpid())
        # When this thread ends, the operating system kills the nursery, and with it its workers.
        self._starter = threading.current_thread()
        self._socket.settimeout(START_LIMIT_S)
        try:
            reply = self._reply()
        except TimeoutError:
            self.close()
            raise RuntimeError(
                f"an answer checker did not start within {START_LIMIT_S:.0f} s"
            ) from None
        except OSError:
            reply = {"error": f"exit code {self.process.wait()}"}
        if "error" in reply:
            self.close()
            raise RuntimeError(f"math-verify can't be loaded to check answers: {reply['error']}")
        self._socket.settimeout(ANSWER_LIMIT_S)

    @property
    def lost(self) -> bool:
        """Whether its process has ended, or will, because the thread that started it has."""
        return self.process.poll() is not None or not self._starter.is_alive()

    def fork(self, channel: Connection, memory_bytes: int) -> int:
        """Start a worker on one end of a channel. Return its process id."""
        request = json.dumps({"fork": memory_bytes}).encode() + b"\n"
        socket.send_fds(self._socket, [request], [channel.fileno()])
        return self._reply()["pid"]

    def end_worker(self, pid: int) -> int:
        """Kill a worker, unless it has ended. Return its exit code, or -signal."""
        self._socket.sendall(json.dumps({"kill": pid}).encode() + b"\n")
        return self._reply()["status"]

    def close(self) -> None:
        """End the process and its workers."""
        self.process.kill()
        self.process.wait()
        self._socket.close()

    def _reply(self) -> dict[str, Any]:
        line = b""
        while not line.endswith(b"\n"):
            try:
                part = self._socket.recv(REPLY_BYTES)
            except TimeoutError:  # a late reply would be taken for that to the next request
                self.process.kill()
                self.process.wait()
                raise
            if not part:
                raise ConnectionError("the process that starts answer checkers has ended")
            line += part
        return json.loads(line)


class Worker:
    """A process that judges one comparison at a time."""

    def __init__(self, nursery: Nursery, memory_bytes: int):
        self._nursery = nursery
        self.channel, theirs = Pipe()
        with theirs:
            self.pid = nursery.fork(theirs, memory_bytes)
        self.job: Comparison | None = None
        self.deadline = math.inf
        self.jobs_left = JOBS_PER_WORKER

    @property
    def lost(self) -> bool:
        """Whether an idle worker has ended. It sends nothing without a job."""
        return self._nursery.lost or self.channel.poll()

    def assign(self, job: Comparison, timeout_s: float, cpu_s: float) -> None:
        """Give it a comparison to judge, with limits of wall time and of CPU time."""
        self.job = job
        self.deadline = time.monotonic() + timeout_s
        self.jobs_left -= 1
        message = json.dumps([job.reference, job.answer, cpu_s])
        with suppress(BrokenPipeError):  # `reply` then reads the end of file, as after any crash
            self.channel.send_bytes(message.encode())

    def reply(self) -> dict[str, bool] | None:
        """Return what it has sent, or None if it died or sent something else than JSON."""
        try:
            return json.loads(self.channel.recv_bytes(REPLY_BYTES))
        except (EOFError, OSError, ValueError):
            return None

    def end(self) -> Ending:
        """End its process. Return how it ended, if it had ended by itself."""
        self.channel.close()
        if self._nursery.lost:
            return "crash"
        try:
            code = self._nursery.end_worker(self.pid)
        except OSError:  # the nursery has just ended, and its workers with it
            return "crash"
        if code == -signal.SIGPROF:
            return "timeout"
        return "memory" if code == OUT_OF_MEMORY else "crash"
