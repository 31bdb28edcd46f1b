"""The program that forks worker processes, so that a killed worker is replaced in milliseconds.

Importing math-verify takes a second, a fork of a process that has imported it some milliseconds.
The nursery imports it once and reads no answer, so that no text can change the workers to come. It
has no environment of the trainer's, such as keys, and it cannot gain privileges. Requests are lines
of JSON: {"fork": memory_bytes} comes with a worker's end of a channel, {"kill": pid} ends a worker.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from expo_fast.answers.worker import judge, serve
from expo_fast.runtime.interruptions import SAVE, STOPS

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
LINE_BYTES = 4096
# Comparisons of several kinds, so that a new worker need not import what they need.
WARM_UP = (
    (r"\frac{1}{2} + |x|", r"|x| + \sqrt{2}"),
    (r"|x|^2 + |y|", r"|y| + |x|^2"),
    (r"\sin(x) + 1", r"1 + \cos(x)"),
    (r"e^{|x|} + \log(2)", r"\ln(2) + e^{|x|} + 0.5"),
    (r"\sqrt[3]{2} + \binom{n}{2}", r"\sum_{k=1}^{n} k"),
)


def main(fd: int, parent: int) -> None:
    """Serve requests until the parent ends.

    fd: number of the socket to the parent.
    """
    ignore_signals()
    die_with(parent)
    ctypes.CDLL(None).prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # If memory runs out, the kernel kills this process and its workers before the trainer.
    Path("/proc/self/oom_score_adj").write_text("1000")
    requests = socket.socket(fileno=fd)
    try:
        # Import and build tables here, before any time limit runs.
        for gold, box in WARM_UP:
            judge(gold, box)
    except ImportError as error:
        send(requests, error=str(error))
        return
    gc.collect()
    gc.freeze()  # a collection in a worker would copy the pages that it shares with this process
    send(requests, ready=True)
    while True:
        line, fds = receive(requests)
        if not line:
            return
        request = json.loads(line)
        if "fork" in request:
            send(requests, pid=fork(requests, fds[0], request["fork"]))
        else:
            send(requests, status=end_worker(request["kill"]))


def ignore_signals() -> None:
    """Ignore the signals that ask a run to end or to save, here and in the workers to come.

    A scheduler sends them to every process of a job. The trainer still needs verdicts for the step
    that it completes.
    """
    for signum in (*STOPS, SAVE):
        signal.signal(signum, signal.SIG_IGN)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the line above
        os._exit(1)


def send(requests: socket.socket, **reply: object) -> None:
    requests.sendall(json.dumps(reply).encode() + b"\n")


def receive(requests: socket.socket) -> tuple[bytes, list[int]]:
    """Return a request and its file descriptors; an empty line at the end of file."""
    line, fds, _, _ = socket.recv_fds(requests, LINE_BYTES, 1)
    while line and not line.endswith(b"\n"):
        line += requests.recv(LINE_BYTES)
    return line, fds


def fork(requests: socket.socket, fd: int, memory_bytes: int) -> int:
    """Start a worker on one end of a channel. Return its process id."""
    nursery = os.getpid()
    pid = os.fork()
    if pid:
        os.close(fd)
        return pid
    code = 1
    try:
        die_with(nursery)
        requests.close()
        serve(Connection(fd), memory_bytes)
        code = 0
    finally:
        os._exit(code)


def end_worker(pid: int) -> int:
    """Kill a worker of this process, unless it has ended. Return its exit code, or -signal."""
    os.kill(pid, signal.SIGKILL)  # the process id is that of a zombie at least
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
