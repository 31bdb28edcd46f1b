"""Start programs of ours as processes, with a channel to each."""

import os
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import expo_fast


def start_program(module: str, *arguments: int) -> tuple[Connection, subprocess.Popen]:
    """Start a module as a program. Return the channel to it, and its process.

    The program gets the file descriptor of its channel as its first argument.
    """
    ours, theirs = Pipe()
    fd = theirs.fileno()
    # -P keeps the current folder off its path.
    command = [sys.executable, "-P", "-m", module, *map(str, (fd, *arguments))]
    environment = dict(os.environ)
    paths = [str(Path(expo_fast.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["PYTHONHASHSEED"] = "0"  # sympy orders by hash: equal texts get equal verdicts
    with theirs:
        process = subprocess.Popen(
            command,
            pass_fds=[fd],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # keeps Ctrl-C away
        )
    return ours, process
