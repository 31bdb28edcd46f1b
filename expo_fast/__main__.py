"""The commands of expo_fast: python -m expo_fast COMMAND, or expo-fast COMMAND."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches

import expo_fast
from expo_fast.cli.exit_status import run, run_command
from expo_fast.cli.program import name_of_program

# A command is a module of expo_fast with a function `main(argv)`.
COMMANDS = {
    "train": "train a model",
    "evaluate": "measure the accuracy of a model on a set of problems",
    "report": "write a report on training runs as one HTML file",
    "merge": "merge a LoRA adapter into its base model",
    "check": "show what this machine can run, and test the ops on it",
}


def main() -> int:
    """Run the command line of the process and return the exit status."""
    command, *rest = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        return run_command(command, rest)
    return run(answer)


def answer(argv: Sequence[str]) -> None:
    """Print the help or the version. Raise ValueError for an unknown command."""
    first = argv[0] if argv else "--help"
    if first in ("--help", "-h", "help"):
        print(help_text())
    elif first in ("--version", "-V"):
        print(f"expo-fast {expo_fast.__version__}")
    else:
        near = get_close_matches(first, COMMANDS, n=1)
        hint = f"perhaps you meant {near[0]}" if near else f"need one of {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {first!r}: {hint}; see --help")


def help_text() -> str:
    program = name_of_program()
    lines = [f"usage: {program} COMMAND [FLAGS]", ""]
    lines += [f"  {name:<10}{does}" for name, does in COMMANDS.items()]
    lines += ["", f"{program} COMMAND --help lists the flags of a command.", "", "flags:"]
    lines += ["  --version  print the version", "  --help     print this text"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
