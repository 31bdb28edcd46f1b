"""Grade a boxed answer against a reference: plain arithmetic first, then math-verify.

`decide` gives the verdict where string and rational arithmetic suffice. `judge` asks math-verify
(sympy), which may hang in C code or use up all memory. This file is therefore also the program of
the worker processes that `verifier.Verifier` kills at a time limit, so it imports the standard
library alone.

No text is run as code: it goes only to math-verify's LaTeX grammar, and never to its `parse_expr`,
which calls `eval`.
"""
# ruff: noqa: RUF001  (the characters that look like others are intended)

import ctypes
import json
import math
import os
import re
import resource
import signal
import sys
import unicodedata
from contextlib import suppress
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

MAX_CHARS = 1000  # of an answer
MAX_NESTING = 32  # of braces in an answer

BOX = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text


def last_boxed_span(text: str) -> tuple[int, int] | None:
    r"""Return (start, end) of the last `\boxed{...}` after `</think>`; of nested boxes the inner.

    Returns None if there is no box, or if the last one is not closed, too long or nested too
    deeply. An earlier box is not taken instead, because the text did not end with it.
    """
    search_from = max(0, text.rfind("</think>"))
    boxes = list(BOX.finditer(text, search_from))
    if not boxes:
        return None
    box = boxes[-1]
    limit = box.end() + MAX_CHARS + 1
    depth = 0
    for token in BRACE.finditer(text, box.end(), limit):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
        if depth < 0:
            return box.start(), token.end()
        if depth > MAX_NESTING:
            return None
    return None


def last_boxed(text: str) -> str | None:
    r"""Return the stripped content of the last `\boxed{...}`, None as `last_boxed_span`."""
    span = last_boxed_span(text)
    if span is None:
        return None
    start, end = span
    opening = text.index("{", start)
    return text[opening + 1 : end - 1].strip()


SYMBOLS = {
    "−": "-",
    "–": "-",
    "×": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "π": r"\pi ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "∪": r"\cup ",
}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
POWER = re.compile(r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+")
ROOT = re.compile(r"√\s*(\d+|[a-z])")
SPACING = re.compile(r"(?<!\\)(?:\\[,;: ]|\\q?quad\b)|[~\s\x00-\x1f]")
INVISIBLE = re.compile(r"\\!\s*|\\?\$")  # negative space; currency signs and maths delimiters
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)")

DECIMAL = re.compile(
    r"(?P<sign>[+-]?) ?(?P<integer>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<decimals>\d*))?"
)
FRACTION = re.compile(
    r"(?P<sign>[+-]?) ?(?:(?P<whole>\d+) )?(?P<numerator>\d+) ?/ ?(?P<denominator>\d+)"
)
FRAC = re.compile(r" ?\\[dtc]?frac ?(?:\{(\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d))(?!\d)")
WORDS = re.compile(r"[A-Za-z][A-Za-z ']*[A-Za-z]")
LONG_WORD = re.compile(r"[A-Za-z]{4}")
OPENING = re.compile(r"(?:\\left ?)?(\(|\\\{)")
BASE = re.compile(r"\d_\{?(\d+)")
JUXTAPOSED = re.compile(r"\d \d")


def spell(char: str) -> str:
    """Return the LaTeX of a Unicode character: a digit of any script, a vulgar fraction, a sign."""
    kind, *codes = unicodedata.decomposition(char).split() or [""]
    if kind == "<fraction>":
        characters = [chr(int(code, 16)) for code in codes]
        numerator, denominator = "".join(characters).split("\N{FRACTION SLASH}")
        return rf"\frac{{{numerator}}}{{{denominator}}}"
    match unicodedata.category(char):
        case "Nd":
            return str(unicodedata.decimal(char))
        case "Zs":
            return " "
        case "Cf":  # zero-width and bidirectional controls
            return ""
    return SYMBOLS.get(char, char)


def tidy(text: str) -> str:
    """Return one spelling of equal answers: Unicode, spaces, currency, full stop, wrapper."""
    if not text.isascii():
        text = POWER.sub(_power, text)
        text = ROOT.sub(r"\\sqrt{\1}", text)
        text = "".join(map(spell, text))
    text = INVISIBLE.sub("", text)
    text = text.replace("{,}", ",")
    words = SPACING.sub(" ", text).split()
    text = " ".join(words)
    text = text.removesuffix(".").rstrip()
    wrapped = WRAPPED.fullmatch(text)
    if wrapped:
        text = wrapped[1].strip()
    return THOUSANDS.sub(_without_spaces, text)


def _power(match: re.Match[str]) -> str:
    exponent = match[0].translate(SUPERSCRIPTS)
    return f"^{{{exponent}}}"


def _without_spaces(match: re.Match[str]) -> str:
    return match[0].replace(" ", "")


class Number(NamedTuple):
    """An exact number, and how it was written."""

    value: Fraction
    places: int | None  # decimal places; None if it has none


def plain_number(text: str) -> Number | None:
    """Return the integer, decimal, fraction or mixed number that a text is, or None."""
    text = FRAC.sub(_slash, text).strip()
    match = FRACTION.fullmatch(text)
    if match and int(match["denominator"]):
        numerator = int(match["numerator"])
        part = Fraction(numerator, int(match["denominator"]))
        whole = int(match["whole"] or 0)
        return Number(_signed(match, whole + part), None)
    match = DECIMAL.fullmatch(text)
    if match and (match["integer"] or match["decimals"]):
        integer = match["integer"].replace(",", "")
        decimals = match["decimals"] or ""
        value = Fraction(int(integer + decimals), 10 ** len(decimals))
        return Number(_signed(match, value), len(decimals) or None)
    return None


def _signed(match: re.Match[str], value: Fraction) -> Fraction:
    return -value if match["sign"] == "-" else value


def _slash(match: re.Match[str]) -> str:
    r"""Return `\frac{1}{2}` or `\frac12` as ` 1/2`."""
    numerator = match[1] or match[2]
    denominator = match[3] or match[4]
    return f" {numerator}/{denominator}"


def same_number(a: Number, b: Number) -> bool:
    """Return whether two numbers are equal.

    A decimal also equals what it may be rounded from: within one unit of its last place, and to a
    relative 1e-6.
    """
    gap = abs(a.value - b.value)
    places = [number.places for number in (a, b) if number.places]
    if gap == 0 or not places:
        return gap == 0
    last_place = Fraction(1, 10 ** min(places))
    larger = max(abs(a.value), abs(b.value))
    return gap < last_place and gap * 10**6 <= larger


def decide(gold: str, box: str) -> bool | None:
    """Return the verdict on two tidy answers without math-verify.

    None: only math-verify can tell, or there is no reference.
    """
    if not box:
        return False
    if not gold:
        return None
    if gold == box:
        return True
    x = plain_number(gold)
    y = plain_number(box)
    if x and y:
        return same_number(x, y)
    if WORDS.fullmatch(gold) and WORDS.fullmatch(box):
        if gold.casefold() == box.casefold():
            return True
        # math-verify reads words as products of letters: listen = silent
        if LONG_WORD.search(gold + box):
            return False
    return False if misread(gold, box) else None


def misread(gold: str, box: str) -> bool:
    """Return whether math-verify 0.9.0 would call two different answers equal."""
    gold_bases = BASE.findall(gold)  # it ignores the base of 204_5
    box_bases = BASE.findall(box)
    if gold_bases and box_bases and gold_bases != box_bases:
        return True
    gold_bracket = OPENING.match(gold)  # it equates {1, 2} and (1, 2)
    box_bracket = OPENING.match(box)
    if gold_bracket and box_bracket and gold_bracket[1] != box_bracket[1]:
        return True
    juxtaposed = JUXTAPOSED.search(box)  # it reads `1 2` as 3
    return juxtaposed is not None and plain_number(box) is None


def judge(gold: str, box: str) -> bool:
    """Return whether math-verify finds two answers equal.

    Its own timeouts are off: they are alarms, which wait for C code to return.
    """
    from math_verify import verify

    gold_parsed = _parse(gold)
    box_parsed = _parse(box)
    if not gold_parsed or not box_parsed or is_false_equation(box_parsed[0]):
        return False
    equal = verify(
        gold_parsed,
        box_parsed,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )
    if "%" in gold + box:  # math-verify accepts 50 as well as 0.5 for 50%
        return equal
    return equal and same_magnitude(gold_parsed[0], box_parsed[0])


def _parse(text: str) -> list:
    r"""Parse an answer as the content of a box: the first match only, and without fallback.

    By default math-verify goes on to the last number that it finds, and `10^{10^7} \bmod 7`, which
    is 4, passes for 7.
    """
    from math_verify import LatexExtractionConfig, parse

    return parse(
        rf"\boxed{{{text}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
        raise_on_error=True,
    )


def is_false_equation(expr) -> bool:
    """Return whether `expr` claims something like 8 = 7, of which math-verify would take the 7.

    The tolerance is 1%, because people write 1/3 = 0.33.
    """
    from sympy import Eq

    for equation in expr.atoms(Eq):
        if equation.free_symbols:
            continue
        if not close(equation.lhs, equation.rhs, 0.01):
            return True
    return False


def same_magnitude(gold, box) -> bool:
    """Return whether two numbers agree to a relative 1e-5; True for anything else.

    math-verify tests |a - b| < 1e-15, which is true of any tiny numbers, like 1/2004! and 1/2006!
    """
    from sympy import Eq

    if isinstance(gold, Eq):
        gold = gold.rhs
    if isinstance(box, Eq):
        box = box.rhs
    return close(gold, box, 1e-5)


def close(a, b, tolerance: float) -> bool:
    """Return whether two numbers agree to a relative tolerance.

    True for anything but two finite nonzero numbers.
    """
    if not _is_number(a) or not _is_number(b):
        return True
    x = a.evalf(15)
    y = b.evalf(15)
    if not (x.is_finite and y.is_finite):
        return True
    if x == 0 or y == 0:
        return True
    larger = max(abs(x), abs(y))
    return bool(abs(x - y) <= tolerance * larger)


def _is_number(expr) -> bool:
    return getattr(expr, "is_number", False)


def serve(fd: int, parent: int, memory_bytes: int) -> None:
    """Run a worker: read (reference, answer, timeout) as JSON, and write verdicts as JSON.

    It ends with its parent, or at a limit.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # the parent died before the line above
        return
    # Out of memory, the kernel shall kill this process rather than the trainer.
    Path("/proc/self/oom_score_adj").write_text("1000")
    channel = Connection(fd)
    try:
        # The imports and the tables of first use are made before any time limit runs.
        judge(r"\frac{1}{2} + x^2", r"x^2 + \sqrt{2}")
    except ImportError as error:
        _send(channel, error=str(error))
        return
    limit_resources(memory_bytes)
    ceiling = memory("VmHWM") + memory_bytes // 2
    _send(channel, ready=True)
    with suppress(EOFError):
        while True:
            gold, box, timeout_s = json.loads(channel.recv_bytes())
            limit_cpu(timeout_s)
            right = judge_or_die(gold, box, ceiling)
            _send(channel, right=right)


def _send(channel: Connection, **message: object) -> None:
    channel.send_bytes(json.dumps(message).encode())


def judge_or_die(gold: str, box: str, ceiling: int) -> bool:
    """Return `judge`'s verdict, or end this process if the memory limit may have caused it."""
    try:
        right = judge(gold, box)
    except (MemoryError, RecursionError):
        os._exit(1)
    except Exception:  # it cannot compare the two, say a matrix and an interval: not equal
        right = False
    # sympy and math-verify turn many MemoryErrors into "not equal". The memory's peak shows them.
    if not right and memory("VmHWM") > ceiling:
        os._exit(1)
    return right


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes.

    getrusage's maximum is of no use: it starts with the trainer's, which exec passes on.
    """
    status = Path("/proc/self/status").read_text()
    _, _, rest = status.partition(f"{field}:")
    kibibytes = rest.split()[0]
    return int(kibibytes) << 10


def limit_resources(memory_bytes: int) -> None:
    """Limit the address space beyond that of the imports. Forbid growing files and core dumps."""
    space = memory("VmSize") + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(timeout_s: float) -> None:
    """Limit the CPU time, in case the parent is stopped and cannot enforce the time limit."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    used = usage.ru_utime + usage.ru_stime
    soft = math.ceil(used + timeout_s) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
