"""Text and numbers for people to read. Text of a model or a config file is hostile."""

import json
from collections.abc import Mapping
from typing import Any

LONGEST_TEXT = 1200  # characters of a text that the report shows


def printable(text: str, *, newlines: bool = False) -> str:
    """Return the text with blanks for white space and other unprintable characters escaped.

    Those are control, escape and bidirectional characters and lone surrogates, which could steer a
    terminal, reorder what is shown or break an encoder. With `newlines`, line feeds stay.
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
    """Return whether the value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def short_number(value: Any) -> str:
    """Return a number with three significant digits, an integer in full, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def short_numbers(metrics: Mapping[str, Any]) -> str:
    """Return metrics on one line, each by the last part of its name: `exp/rate` is `rate`."""
    parts = []
    for key, value in metrics.items():
        name = key.removesuffix("/max").rpartition("/")[2]
        parts.append(f"{name} {short_number(value)}")
    return "  ".join(parts)


def shown_text(value: Any, longest: int = LONGEST_TEXT) -> str:
    """Return up to `longest` characters of a text, printable, and how many were left out.

    A value that is no text is shown as JSON.
    """
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = printable(text[:longest], newlines=True)
    if len(text) > longest:
        shown += f" ... and {len(text) - longest} characters more"
    return shown
