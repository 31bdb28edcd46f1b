"""The name under which the program was started, for its usage."""

import sys
from pathlib import Path

SCRIPT = "expo-fast"


def name_of_program() -> str:
    """Return what starts the program: expo-fast or python -m expo_fast."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m expo_fast"


def name_of_command(command: str) -> str:
    """Return what starts one of its commands: expo-fast train, or python -m expo_fast.train."""
    start = Path(sys.argv[0])
    if start.stem == SCRIPT or start.name == "__main__.py":
        return f"{name_of_program()} {command}"
    return f"python -m expo_fast.{command}"
