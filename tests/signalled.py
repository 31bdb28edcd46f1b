"""Train, and send SIGTERM to this process at a call of a function.

    python tests/signalled.py MODULE:FUNCTION CALL FLAGS OF expo_fast.train

CALL counts from 1. Without a function, the signal comes CALL seconds after the start. Prints
"signal at" and the time.
"""

import importlib
import os
import signal
import sys
import threading
import time
from typing import Any

from expo_fast.cli.exit_status import run_command


def send() -> None:
    os.write(1, f"signal at {time.time()}\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)


def send_at_call(function: str, number: int) -> None:
    """Replace a function by one that sends the signal at the given call."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    usual = getattr(owner, name)
    calls = iter(range(1, 1_000_000))

    def signalled(*given: Any, **named: Any) -> Any:
        if next(calls) == number:
            send()
        return usual(*given, **named)

    setattr(owner, name, signalled)


def main() -> int:
    function, number, *flags = sys.argv[1:]
    if function:
        send_at_call(function, int(number))
    else:
        threading.Timer(float(number), send).start()
    return run_command("train", flags)


if __name__ == "__main__":
    sys.exit(main())
