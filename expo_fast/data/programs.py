"""Programs of ours that run in processes of their own."""

import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import expo_fast


def start_program(
    module: str, channel: Connection | socket.socket, *arguments: object
) -> subprocess.Popen:
    """Start a module as a program, without our environment, and return its process.

    channel: the program's end of a channel, which is closed here. The program gets its file
    descriptor as the first argument.
    """
    fd = channel.fileno()
    with channel:
        return subprocess.Popen(
            command_of(module, fd, *arguments),
            pass_fds=[fd],
            env=bare_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # keeps Ctrl-C away
        )


def command_of(module: str, *arguments: object) -> list[str]:
    """Return the command line of a module. -P keeps the current folder off its path."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def bare_environment() -> dict[str, str]:
    """Return what a program needs to find its modules, and nothing else of our environment."""
    paths = [str(Path(expo_fast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONHASHSEED": "0",  # sympy orders by hash: equal texts get equal verdicts
    }
    libraries = os.environ.get("LD_LIBRARY_PATH")
    if libraries:  # some installations of Python need it
        environment["LD_LIBRARY_PATH"] = libraries
    return environment
