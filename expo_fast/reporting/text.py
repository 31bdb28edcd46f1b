"""Format text and numbers for people. Text of a model or a configuration file is untrusted."""

import json
from collections.abc import Mapping
from typing import Any

LONGEST_TEXT = 1200  # maximum characters of a text in the report


def printable(text: str, *, newlines: bool = False) -> str:
    """Return the text with spaces for white space, and other unprintable characters escaped.

    Unprintable characters are control, escape and bidirectional characters and lone surrogates.
    They could control a terminal, reorder the shown text or make an encoder fail.

    newlines: keep line feeds.
    """
    kept = "\n" if newlines else ""
    return "".join(_printable_character(c, kept) for c in text)


def _printable_character(c: str, kept: str) -> str:
    if c.isprintable() or c in kept:
        return c
    if c.isspace():
        return " "
    return c.encode("unicode_escape").decode()


def is_number(value: Any) -> bool:
    """Return whether the value is an int or a float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def short_number(value: Any) -> str:
    """Return a number with three significant digits. Integers are complete, and None is a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def short_numbers(metrics: Mapping[str, Any]) -> str:
    """Return metrics on one line, named by the last part of their names: `exp/rate` is `rate`."""
    parts = []
    for key, value in metrics.items():
        name = key.removesuffix("/max").rpartition("/")[2]
        parts.append(f"{name} {short_number(value)}")
    return "  ".join(parts)


def shown_text(value: Any, longest: int = LONGEST_TEXT) -> str:
    """Return up to `longest` printable characters of a text, and the number of those left out.

    A value that is not text is converted to JSON.
    """
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = printable(text[:longest], newlines=True)
    if len(text) > longest:
        shown += f" ... and {len(text) - longest} more characters"
    return shown
