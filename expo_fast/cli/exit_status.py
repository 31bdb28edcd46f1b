"""How a command line ends: 0, or one sentence about what is wrong and 2."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> int:
    """Run main(argv). What a user can mend (ValueError, OSError) becomes a sentence on stderr.

    Where the reader of stdout has left, as `| head` does, nothing is said: 141, or 0 if main itself
    went on to its end.
    """
    try:
        with plain_warnings():
            main(sys.argv[1:] if argv is None else argv)
    except BrokenPipeError:
        return 141  # 128 + SIGPIPE, as of any program that this happens to
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        flush_stdout()
    return 0


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Our warnings as one line, without the place in our source that gives them."""
    usual = warnings.formatwarning

    def formatted(message, category, filename, lineno, line=None) -> str:
        if category is UserWarning:
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


def flush_stdout() -> None:
    try:
        print(end="", flush=True)
    except BrokenPipeError:  # Python would try again as it exits, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
