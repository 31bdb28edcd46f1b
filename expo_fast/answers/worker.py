"""What a worker process does: it judges, with math-verify (sympy), what the exact rules leave open.

math-verify may hang in C code or use all memory, so `data.grader_pool` kills a worker at a time
limit. No text is run as code: it is parsed only by math-verify's LaTeX grammar, and never by its
`parse_expr`, which calls `eval`.
"""

import json
import os
import re
import resource
import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from expo_fast.answers.numbers import plain_number
from expo_fast.answers.rules import compare

OUT_OF_MEMORY = 3  # exit codes of a worker
CRASHED = 4
MAX_FILES = 64  # open at once; sympy opens its modules when they are needed

JUXTAPOSED = re.compile(r"\d \d")
BASE = re.compile(r"\d ?_ ?\{? ?(\d+)")
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
DEGREES = re.compile(r"(\d+(?:\.\d+)?) ?\^ ?\{? ?\\circ ?\}?")  # math-verify reads 30^\circ as 30
OPENING = re.compile(r"\(|\[|\\\{")


@dataclass(frozen=True)
class Judgement:
    """Whether two answers are equal, and whether math-verify could read the second one."""

    right: bool
    readable: bool = True


def judge(gold: str, box: str) -> Judgement:
    """Judge two answers. math-verify decides the parts that no rule decides."""
    unreadable: list[str] = []

    def leaf(gold: str, box: str) -> bool:
        judgement = judge_leaf(gold, box)
        if not judgement.readable:
            unreadable.append(box)
        return judgement.right

    right = bool(compare(gold, box, leaf))
    return Judgement(right, readable=right or not unreadable)


def judge_leaf(gold: str, box: str) -> Judgement:
    """Judge two expressions with math-verify.

    Its own timeouts are off, because they are alarms, which wait for C code to return.
    """
    from math_verify import verify

    if misread(gold, box):
        return Judgement(False)
    gold_parsed = [with_imaginary_unit(part) for part in _parse(gold)]
    box_parsed = [with_imaginary_unit(part) for part in _parse(box)]
    if not gold_parsed or not box_parsed:
        return Judgement(False, readable=bool(box_parsed))
    if is_false_equation(box_parsed[0]):
        return Judgement(False)
    equal = verify(
        gold_parsed,
        box_parsed,
        allow_set_relation_comp=True,
        timeout_seconds=None,
        raise_on_error=True,
    )
    return Judgement(equal and same_magnitude(gold_parsed[0], box_parsed[0]))


def misread(gold: str, box: str) -> bool:
    """Return whether math-verify 0.9.0 may misread the answers, and call different ones equal."""
    if BASE.findall(gold) != BASE.findall(box):  # it ignores the base of 204_5
        return True
    gold_bracket = OPENING.match(gold)  # it equates {1, 2} and (1, 2)
    box_bracket = OPENING.match(box)
    if gold_bracket and box_bracket and gold_bracket[0] != box_bracket[0]:
        return True
    if r"\text" in box and box != gold:  # it drops words: `8 \text{ is wrong}`
        return True
    juxtaposed = JUXTAPOSED.search(box)  # it reads `1 2` as 3
    return juxtaposed is not None and plain_number(box) is None


def _parse(text: str) -> list:
    r"""Parse an answer as the content of a box. Use the first match only, without fallback.

    By default, math-verify falls back to the last number that it finds. Then `10^{10^7} \bmod 7`,
    which is 4, would equal 7.
    """
    from math_verify import LatexExtractionConfig, parse

    if TRIGONOMETRIC.search(text):
        text = DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    return parse(
        rf"\boxed{{{text}}}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # pyright: ignore[reportArgumentType]
        raise_on_error=True,
    )


def with_imaginary_unit(parsed):
    """Return a parsed number with i as the imaginary unit. math-verify reads i as a variable."""
    from sympy import Expr, I

    if not isinstance(parsed, Expr):
        return parsed
    symbols = parsed.free_symbols
    if [str(symbol) for symbol in symbols] != ["i"]:
        return parsed
    return parsed.subs(symbols.pop(), I)


def is_false_equation(expr) -> bool:
    """Return whether `expr` is a false equation, such as 8 = 7. math-verify would use the 7.

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
    """Return whether two numbers agree to a relative 1e-5. Return True for anything else.

    math-verify tests |a - b| < 1e-15, which is true for any tiny numbers, like 1/2004! and 1/2006!
    """
    from sympy import Eq

    if isinstance(gold, Eq):
        gold = gold.rhs
    if isinstance(box, Eq):
        box = box.rhs
    return close(gold, box, 1e-5)


def close(a, b, tolerance: float) -> bool:
    """Return whether two numbers agree to a relative tolerance.

    Return True for anything but two finite nonzero numbers.
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


def serve(channel: Connection, memory_bytes: int) -> None:
    """Read (reference, answer, seconds of CPU time) and write judgements, until the end of file.

    Messages are JSON. The process ends at the limits of memory and of CPU time.
    """
    limit_resources(memory_bytes)
    ceiling = memory("VmHWM") + memory_bytes // 2
    with suppress(EOFError):
        while True:
            gold, box, cpu_s = json.loads(channel.recv_bytes())
            # The kernel then kills this process, also inside C code.
            signal.setitimer(signal.ITIMER_PROF, cpu_s)
            judgement = judge_or_die(gold, box, ceiling)
            signal.setitimer(signal.ITIMER_PROF, 0)
            reply = {"right": judgement.right, "readable": judgement.readable}
            channel.send_bytes(json.dumps(reply).encode())


def judge_or_die(gold: str, box: str, ceiling: int) -> Judgement:
    """Return `judge`'s result, or end this process if the memory limit may have caused it."""
    try:
        judgement = judge(gold, box)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except RecursionError:
        os._exit(CRASHED)
    except Exception:  # sympy cannot compare the two, such as a matrix and an interval: not equal
        judgement = Judgement(False)
    # sympy and math-verify turn many MemoryErrors into "not equal". The peak of memory shows them.
    if not judgement.right and memory("VmHWM") > ceiling:
        os._exit(OUT_OF_MEMORY)
    return judgement


def memory(field: str) -> int:
    """Return a field of /proc/self/status in bytes.

    The maximum of getrusage does not help: it begins at the trainer's maximum, which exec keeps.
    """
    status = Path("/proc/self/status").read_text()
    _, _, rest = status.partition(f"{field}:")
    kibibytes = rest.split()[0]
    return int(kibibytes) << 10


def limit_resources(memory_bytes: int) -> None:
    """Limit the address space beyond that of the imports, and the open files.

    Forbid core dumps and growing files.
    """
    space = memory("VmSize") + memory_bytes
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
