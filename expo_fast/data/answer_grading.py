"""From two texts to a verdict: the boxed answer, plain arithmetic, and math-verify behind limits.

Stage A decides what string and rational arithmetic can. The rest goes to math-verify (sympy), which
may hang in C code or eat all memory: this file is also the program of the worker processes which
`reward.Verifier` kills at a time limit, so it imports the standard library alone. No text is run as
code: only math-verify's LaTeX grammar sees it, never its `parse_expr`, which calls `eval`.
"""
# ruff: noqa: RUF001  (the characters which look like others are the point here)

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

MAX_CHARS = 1000  # of an answer
MAX_NESTING = 32  # braces within an answer

BOX = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text


def last_boxed_span(text: str) -> tuple[int, int] | None:
    r"""(start, end) of the last `\boxed{...}` after `</think>`, the inner one where boxes nest.

    None if there is no box, or the last one is open, too long or too deep: an earlier box is not
    what the text ended on.
    """
    boxes = list(BOX.finditer(text, max(0, text.rfind("</think>"))))
    if not boxes:
        return None
    depth, start = 0, boxes[-1].end()
    for token in BRACE.finditer(text, start, start + MAX_CHARS + 1):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth < 0:
            return boxes[-1].start(), token.end()
        if depth > MAX_NESTING:
            return None
    return None


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`, stripped; None where `last_boxed_span` finds none."""
    span = last_boxed_span(text)
    return span and text[text.index("{", span[0]) + 1 : span[1] - 1].strip()


SYMBOLS = {"−": "-", "–": "-", "×": r"\times ", "÷": r"\div ", "·": r"\cdot ", "π": r"\pi "}
SYMBOLS |= {"∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup "}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
POWER = re.compile(r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+")
ROOT = re.compile(r"√\s*(\d+|[a-z])")
SPACING = re.compile(r"(?<!\\)(?:\\[,;: ]|\\q?quad\b)|[~\s\x00-\x1f]")
INVISIBLE = re.compile(r"\\!\s*|\\?\$")  # negative space; currency signs and maths delimiters
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
THOUSANDS = re.compile(r"(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)")

DECIMAL = re.compile(r"([+-]?) ?(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?")
FRACTION = re.compile(r"([+-]?) ?(?:(\d+) )?(\d+) ?/ ?(\d+)")
FRAC = re.compile(r" ?\\[dtc]?frac ?(?:\{(\d+)\}|(\d)) ?(?:\{(\d+)\}|(\d))(?!\d)")
WORDS = re.compile(r"[A-Za-z][A-Za-z ']*[A-Za-z]")
LONG_WORD = re.compile(r"[A-Za-z]{4}")
OPENING = re.compile(r"(?:\\left ?)?(\(|\\\{)")
BASE = re.compile(r"\d_\{?(\d+)")
JUXTAPOSED = re.compile(r"\d \d")


def spell(char: str) -> str:
    """The LaTeX of one Unicode character: digits of any script, vulgar fractions, signs."""
    kind, *codes = unicodedata.decomposition(char).split() or [""]
    plain = "".join(chr(int(code, 16)) for code in codes)
    if kind == "<fraction>":
        return r"\frac{{{}}}{{{}}}".format(*plain.split("\N{FRACTION SLASH}"))
    match unicodedata.category(char):
        case "Nd":
            return str(unicodedata.decimal(char))
        case "Zs":
            return " "
        case "Cf":  # zero-width and bidirectional controls
            return ""
    return SYMBOLS.get(char, char)


def tidy(text: str) -> str:
    """One spelling for what only looks different: Unicode, spaces, currency, full stop, wrapper."""
    if not text.isascii():
        text = POWER.sub(lambda m: f"^{{{m[0].translate(SUPERSCRIPTS)}}}", text)
        text = "".join(map(spell, ROOT.sub(r"\\sqrt{\1}", text)))
    text = INVISIBLE.sub("", text).replace("{,}", ",")
    text = " ".join(SPACING.sub(" ", text).split()).removesuffix(".").rstrip()
    if wrapped := WRAPPED.fullmatch(text):
        text = wrapped[1].strip()
    return THOUSANDS.sub(lambda m: m[0].replace(" ", ""), text)


def plain_number(text: str) -> tuple[Fraction, int | None] | None:
    """(value, decimal places if any) of an integer, decimal, fraction or mixed number, or None."""
    text = FRAC.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text).strip()
    if (m := FRACTION.fullmatch(text)) and int(m[4]):
        return int(m[1] + "1") * (int(m[2] or 0) + Fraction(int(m[3]), int(m[4]))), None
    if (m := DECIMAL.fullmatch(text)) and (m[2] or m[3]):
        places = len(m[3] or "")
        digits = m[2].replace(",", "") + (m[3] or "")
        return int(m[1] + "1") * Fraction(int(digits), 10**places), places or None
    return None


def same_number(a: tuple[Fraction, int | None], b: tuple[Fraction, int | None]) -> bool:
    """Exact; but a decimal also stands for what it rounds, within its last place and 1 in 10^6."""
    (x, x_places), (y, y_places) = a, b
    gap = abs(x - y)
    places = [p for p in (x_places, y_places) if p]
    if gap == 0 or not places:
        return gap == 0
    return gap < Fraction(1, 10 ** min(places)) and gap * 10**6 <= max(abs(x), abs(y))


def decide(gold: str, box: str) -> bool | None:
    """Stage A's verdict on two tidy answers; None: ask math-verify, if there is a reference."""
    if not box or not gold:
        return None if box else False
    if gold == box:
        return True
    x, y = plain_number(gold), plain_number(box)
    if x and y:
        return same_number(x, y)
    if WORDS.fullmatch(gold) and WORDS.fullmatch(box):
        if gold.casefold() == box.casefold():
            return True
        if LONG_WORD.search(gold + box):  # math-verify takes words for products: listen = silent
            return False
    return False if misread(gold, box) else None


def misread(gold: str, box: str) -> bool:
    """Whether math-verify 0.9.0 would call two different answers equal."""
    bases = BASE.findall(gold), BASE.findall(box)  # it drops the base of 204_5
    brackets = {m[1] for m in map(OPENING.match, (gold, box)) if m}  # it equates {1, 2} and (1, 2)
    added = JUXTAPOSED.search(box) and not plain_number(box)  # it takes `1 2` for 3
    return bool((all(bases) and bases[0] != bases[1]) or len(brackets) > 1 or added)


def judge(gold: str, box: str) -> bool:
    r"""Whether math-verify finds the two equal.

    The content is parsed as a box, first match only and without fallback: by default math-verify
    goes on to the last number that it finds, and `10^{10^7} \bmod 7`, which is 4, passes for 7. Its
    own timeouts are off: they are alarms, which wait for C code to return.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    gold_parsed, box_parsed = (
        parse(
            rf"\boxed{{{text}}}",
            config,
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,  # pyright: ignore[reportArgumentType]
            raise_on_error=True,
        )
        for text in (gold, box)
    )
    if not gold_parsed or not box_parsed or is_false_equation(box_parsed[0]):
        return False
    equal = verify(
        gold_parsed,
        box_parsed,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )
    percent = "%" in gold + box  # math-verify takes 50% for 50 as well as for 0.5
    return equal and (percent or same_magnitude(gold_parsed[0], box_parsed[0]))


def is_false_equation(expr) -> bool:
    """Whether `expr` claims something like 8 = 7, of which math-verify would take the 7."""
    from sympy import Eq

    sides = [(e.lhs, e.rhs) for e in expr.atoms(Eq) if not e.free_symbols]
    return any(not close(a, b, 0.01) for a, b in sides)  # people write 1/3 = 0.33


def same_magnitude(gold, box) -> bool:
    """math-verify tests |a - b| < 1e-15, which holds for any tiny numbers: 1/2004! and 1/2006!"""
    from sympy import Eq

    gold, box = (e.rhs if isinstance(e, Eq) else e for e in (gold, box))
    return close(gold, box, 1e-5)


def close(a, b, tolerance: float) -> bool:
    """Whether two numbers agree to a relative tolerance; true of all but finite nonzero numbers."""
    if not all(getattr(e, "is_number", False) for e in (a, b)):
        return True
    x, y = a.evalf(15), b.evalf(15)
    if not (x.is_finite and y.is_finite) or x == 0 or y == 0:
        return True
    return bool(abs(x - y) <= tolerance * max(abs(x), abs(y)))


def serve(fd: int, parent: int, memory_bytes: int) -> None:
    """A worker's life: JSON pairs in, JSON verdicts out; it ends with its parent, or by a limit."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died before the line above
        return
    Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than the trainer
    channel = Connection(fd)
    try:
        judge(
            r"\frac{1}{2} + x^2", r"x^2 + \sqrt{2}"
        )  # imports and first-use tables, off the clock
    except ImportError as error:
        channel.send_bytes(json.dumps({"error": str(error)}).encode())
        return
    limit_resources(memory_bytes)
    ceiling = memory("VmHWM") + memory_bytes // 2
    channel.send_bytes(json.dumps({"ready": True}).encode())
    with suppress(EOFError):
        while True:
            gold, box, timeout_s = json.loads(channel.recv_bytes())
            limit_cpu(timeout_s)
            right = judge_or_die(gold, box, ceiling)
            channel.send_bytes(json.dumps({"right": right}).encode())


def judge_or_die(gold: str, box: str, ceiling: int) -> bool:
    """`judge`; but what came near a limit gets no verdict, and its worker has no future."""
    try:
        right = judge(gold, box)
    except (MemoryError, RecursionError):
        os._exit(1)
    except Exception:  # it can't compare such a pair, say a matrix and an interval: not equal
        right = False
    # sympy and math-verify turn many a MemoryError into "not equal": high water is the only witness
    if not right and memory("VmHWM") > ceiling:
        os._exit(1)
    return right


def memory(field: str) -> int:
    """Bytes, by /proc/self/status: getrusage's maximum begins with the trainer's, through exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) << 10


def limit_resources(memory_bytes: int) -> None:
    """Address space above what the imports took; no file may grow, no core is dumped."""
    space = memory("VmSize") + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(timeout_s: float) -> None:
    """A second net, for when the parent is stopped and can't keep time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(usage.ru_utime + usage.ru_stime + timeout_s) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


if __name__ == "__main__":
    serve(*map(int, sys.argv[1:]))
