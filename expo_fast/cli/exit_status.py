"""How a command line ends: with 0, or with one sentence about what is wrong and 2."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

BROKEN_PIPE = 141  # 128 + SIGPIPE, as of any program whose reader leaves
INTERRUPTED = 130  # 128 + SIGINT
USER_ERROR = 2


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run main(argv) and return the exit status; None is the process's own arguments.

    What a user can correct (ValueError, OSError) becomes one sentence on stderr. Where the reader
    of stdout has left, as `| head` does, nothing is printed: the status is 141, or 0 if main itself
    ran to its end.
    """
    try:
        with one_line_warnings():
            main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        flush_stdout()
    return 0


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print our warnings as one line, without the place in our source that gives them."""
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


def flush_stdout() -> None:
    """Flush stdout. Where its reader has left, send the rest to nowhere.

    Otherwise Python would try again as it exits, and complain.
    """
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
