"""Programs of ours that run in processes of their own."""

import os
import sys
from pathlib import Path

import expo_fast


def command_of(module: str, *arguments: object) -> list[str]:
    """Return the command line of a module. -P keeps the current folder off its path."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def bare_environment() -> dict[str, str]:
    """Return what a program needs to find its modules, and nothing else of our environment."""
    paths = [str(Path(expo_fast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    libraries = os.environ.get("LD_LIBRARY_PATH")
    if libraries:  # some installations of Python need it
        environment["LD_LIBRARY_PATH"] = libraries
    return environment
