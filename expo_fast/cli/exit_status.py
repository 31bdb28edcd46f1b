"""Exit status of a command line: 0, or another one with one sentence about the error."""

import importlib
import os
import select
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from expo_fast.cli.missing_packages import advice_on
from expo_fast.distributed.launch import prints
from expo_fast.runtime import interruptions
from expo_fast.runtime.endings import COLLAPSED, Collapsed, Stopped

BROKEN_PIPE = 141  # 128 + SIGPIPE, as for other programs whose output is closed
INTERRUPTED = 130  # 128 + SIGINT
USER_ERROR = 2
EXIT_S = 5.0  # a stopped process that does not end in this time, as a user's thread may, is ended


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run main(argv) and return the exit status.

    argv: None means the arguments of the process.

    An error that a user can correct (ValueError, OSError, a package of ours that is not installed)
    is printed to stderr as one sentence. If stdout was closed, as by `| head`, nothing is printed.
    The status is then 141, or 0 if main ran to its end. It is 3 if the run collapsed, and 128 + the
    number of the signal that stopped it.
    """
    try:
        with one_line_warnings():
            main(sys.argv[1:] if argv is None else argv)
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            return BROKEN_PIPE
        if prints(error):
            print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except ModuleNotFoundError as error:
        advice = advice_on(error)
        if advice is None:
            raise
        if prints(error):
            print(f"error: {advice}", file=sys.stderr)
        return USER_ERROR
    except Collapsed as error:
        if prints(error):
            print(f"error: {error}", file=sys.stderr)
        return COLLAPSED
    except Stopped as stop:
        return stop.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        flush_stdout()
    return 0


def run_command(command: str, argv: Sequence[str] | None = None) -> int:
    """Run `main` of the module expo_fast.COMMAND and return the exit status.

    The module is imported here, so that a package that its imports lack is one sentence too.
    """
    if command == "train":
        interruptions.leave_at_once_outside_the_run()

    def main(argv: Sequence[str]) -> None:
        importlib.import_module(f"expo_fast.{command}").main(argv)

    status = run(main, argv)
    if status > 128:
        timer = threading.Timer(EXIT_S, os._exit, [status])
        timer.daemon = True
        timer.start()
    return status


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print our warnings as one line, without their location in the source."""
    original = warnings.formatwarning

    def formatted(message, category, filename, lineno, line=None) -> str:
        if category is UserWarning:
            return f"warning: {message}\n"
        return original(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = original


def output_is_closed() -> bool:
    """Return whether what reads stdout or stderr has ended. Another pipe may be broken too."""
    poller = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # a stream without a descriptor
            poller.register(stream.fileno(), 0)
    return bool(poller.poll(0))  # only errors and ends are asked for


def flush_stdout() -> None:
    """Flush stdout. If it was closed, redirect it to the null device.

    Otherwise Python would flush it again at exit and print an error.
    """
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
