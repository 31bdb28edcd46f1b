r"""A bound on the size of an answer, so that no process computes numbers such as 9^{9^{9^9}}.

`is_too_large` reads a text once and computes no number with many digits. It bounds powers,
factorials, binomial coefficients, sums over ranges, expanded polynomials and nested brackets. What
it does not know, such as a variable or a function, counts as small. So an answer that it passes may
still take long, and the time limit of a worker process stops that.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

MAX_BITS = 1 << 20  # of a number; sympy computes it in milliseconds
MAX_RANGE = 10**6  # of the values that a sum or a product runs over
MAX_WORK = 2 * 10**5  # terms of an expanded power of a sum, times its exponent
MAX_DEPTH = 24  # of nested brackets
MAX_TOWER = 5  # of exponents in exponents
MAX_TERMS = 50  # that are counted of a sum
BITS_OF_DIGIT = math.log2(10)

TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
    r"(?P<exponent>[eE] ?[+-]?\d+)?"
    r"|(?P<command>\\[A-Za-z]+)|(?P<escaped>\\.)|(?P<letter>[A-Za-z])|(?P<sign>\S)",
    re.DOTALL,
)
BARE_EXPONENT = re.compile(r"\^ ?(\d)(\d+)(?= ?\^)")  # 2^43^2 is 2^4 3^2
OPENING = frozenset([*"([{", r"\{", r"\langle", r"\lceil", r"\lfloor", r"\begin"])
CLOSING = frozenset([*")]}", r"\}", r"\rangle", r"\rceil", r"\rfloor", r"\end"])
SEPARATORS = frozenset([*",;&=<>:", "\\\\", r"\le", r"\ge", r"\ne", r"\in", r"\approx", r"\equiv"])
DIVISIONS = frozenset(["/", r"\div"])
ITERATED = frozenset([r"\sum", r"\prod"])
WITH_LIMITS = ITERATED | {r"\int", r"\iint", r"\oint", r"\lim", r"\max", r"\min", r"\bigcup"}
CONSTANTS = {"e": math.e, "i": 1.0, r"\pi": math.pi}  # absolute values


NUMBER = "a number"
POWER = "a power"
FACTORIAL = "a factorial"
BINOMIAL = "a binomial coefficient"
SUM = "a sum or a product"
POLYNOMIAL = "a polynomial"
BRACKETS = "nested brackets"
TOWER = "a tower of powers"


class TooLarge(Exception):
    """A part of the answer exceeds a bound. The message says what it is."""


@dataclass(frozen=True)
class Size:
    """A bound on the size of a part of an answer."""

    value: float | None
    """None if it is unknown, such as that of a variable."""
    bits: float
    """Sum of the bits of numerators and denominators."""
    terms: int = 1
    """Number of terms of a sum with an unknown value."""


ONE = Size(1.0, 0.0)
UNKNOWN = Size(None, 0.0)


def is_too_large(text: str) -> bool:
    """Return whether a tidy text would take much time or memory to compute."""
    return what_is_too_large(text) is not None


@lru_cache(maxsize=4096)  # the samples of a group share their reference and many answers
def what_is_too_large(text: str) -> str | None:
    r"""Return what in a tidy text would take much time or memory to compute, None for nothing.

    math-verify does not read `\bmod`, so that it computes nothing of such a text.
    """
    if r"\bmod" in text:
        return None
    try:
        Reader(text).parts()
    except TooLarge as error:
        return str(error)
    return None


class Reader:
    """Reads a text from left to right. Any text is read, also one that is no LaTeX."""

    def __init__(self, text: str):
        self.tokens = list(TOKEN.finditer(BARE_EXPONENT.sub(r"^\1 \2", text)))
        self.place = 0
        self.depth = 0
        self.tower = 0

    @property
    def next(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        """Return the next token and advance."""
        token = self.next
        self.place += 1
        return token

    def parts(self) -> Size:
        """Return the size of a complete text. A closing bracket without an opening one is left."""
        size = self.content()
        while self.next:
            self.take()
            size = product(size, self.content())
        return size

    def content(self) -> Size:
        """Return the size of the sum up to a closing bracket. Of several parts, it is unknown."""
        sizes = [self.sum()]
        while self.next in SEPARATORS:
            self.take()
            sizes.append(self.sum())
        if len(sizes) == 1:
            return sizes[0]
        return Size(None, max(size.bits for size in sizes))

    def sum(self) -> Size:
        """Return the size of a sum of products."""
        total = self.product()
        while self.next in ("+", "-"):
            negative = self.take() == "-"
            total = added(total, self.product(), negative=negative)
        return total

    def product(self) -> Size:
        """Return the size of a product. Factors follow one another with or without a sign."""
        size = ONE
        last = ONE  # the factor that an exponent belongs to
        divided = False
        while self.next and self.next not in CLOSING and self.next not in SEPARATORS:
            if self.next in ("+", "-"):
                break
            token = self.tokens[self.place]
            if token["sign"] == "^":
                self.take()
                last = power(last, self.exponent())
            elif token["sign"] == "!":
                self.take()
                last = factorial(last)
            elif token["sign"] == "_":
                self.take()
                self.argument()
            elif token[0] in DIVISIONS:
                self.take()
                size = quotient(size, last) if divided else product(size, last)
                last = self.argument()
                divided = True
            else:
                size = quotient(size, last) if divided else product(size, last)
                last = self.atom()
                divided = False
        return quotient(size, last) if divided else product(size, last)

    def exponent(self) -> Size:
        """Return the size of an exponent, with the exponents of the exponent."""
        self.tower += 1
        if self.tower > MAX_TOWER:
            raise TooLarge(TOWER)
        size = self.argument()
        if self.next == "^":
            self.take()
            size = power(size, self.exponent())
        self.tower -= 1
        return size

    def argument(self) -> Size:
        """Return the size of one atom, which may have a sign."""
        negative = False
        while self.next in ("+", "-"):
            negative ^= self.take() == "-"
        if not self.next or self.next in CLOSING:
            return UNKNOWN
        size = self.atom()
        return Size(-size.value, size.bits) if negative and size.value is not None else size

    def atom(self) -> Size:
        """Return the size of a number, a letter, a group, or a command with its arguments."""
        token = self.tokens[self.place]
        if token[0] in OPENING:
            return self.group()
        self.take()
        if token["number"]:
            return number(token["number"], token["exponent"])
        if token["command"]:
            return self.command(token[0])
        if token["letter"]:
            return Size(CONSTANTS.get(token[0]), 0.0)
        return ONE  # a sign without a size, such as | or '

    def group(self) -> Size:
        """Return the size of the content of brackets."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge(BRACKETS)
        opening = self.take()
        if opening == r"\begin":
            self.argument()
        size = self.content()
        closing = self.take()
        if closing == r"\end":
            self.argument()
        self.depth -= 1
        if opening == r"\begin":  # a power of a matrix computes the numbers in it
            return Size(None, max(size.bits, 1.0))
        return size

    def command(self, name: str) -> Size:
        """Return the size of a command with its arguments."""
        if name == r"\frac":
            return quotient(*self.pair())
        if name == r"\binom":
            return binomial(*self.pair())
        if name == r"\sqrt":
            return self.root()
        if name in WITH_LIMITS:
            return self.limits(name)
        if name == r"\Gamma" and self.next == "(":
            return factorial(self.atom())
        return Size(CONSTANTS.get(name), 0.0)

    def pair(self) -> tuple[Size, Size]:
        r"""Return the sizes of two arguments. Those of `\frac12` are 1 and 2."""
        digits = self.next
        if len(digits) == 2 and digits.isdecimal():
            self.take()
            return number(digits[0], None), number(digits[1], None)
        first = self.argument()
        return first, self.argument()

    def root(self) -> Size:
        """Return the size of a root."""
        degree = Size(2.0, 0.0)
        if self.next == "[":
            degree = self.group()
        radicand = self.argument()
        if not radicand.value or not degree.value or radicand.value < 0:
            return Size(None, radicand.bits)
        result = power(radicand, quotient(ONE, degree))
        return Size(result.value, max(result.bits, radicand.bits))

    def limits(self, name: str) -> Size:
        """Read the limits of a sum, a product or an integral."""
        while self.next in ("_", "^"):
            is_upper = self.take() == "^"
            limit = self.argument()
            if is_upper and name in ITERATED and limit.value and limit.value > MAX_RANGE:
                raise TooLarge(SUM)
        return UNKNOWN


# Sizes of results


def number(digits: str, exponent: str | None) -> Size:
    """Return the size of a decimal number, such as 1,000.5 or 1E+10."""
    plain = digits.replace(",", "")
    value = float(plain)
    bits = math.log2(value) if 1 < value < math.inf else 0.0
    if "." in plain or math.isinf(value):
        bits = len(plain) * BITS_OF_DIGIT
    if exponent is not None:
        shift = exponent[1:].replace(" ", "")
        size = abs(int(shift)) if len(shift) < 16 else math.inf
        bits += size * BITS_OF_DIGIT
        value = _safe(lambda: value * 10.0 ** int(shift[:16])) or math.inf
    if bits > MAX_BITS:
        raise TooLarge(NUMBER)
    return Size(value, bits)


def added(a: Size, b: Size, *, negative: bool) -> Size:
    """Return the size of a sum or a difference."""
    bits = a.bits + b.bits
    if a.value is None or b.value is None:
        return Size(None, bits, min(a.terms + b.terms, MAX_TERMS))
    return Size(a.value - b.value if negative else a.value + b.value, bits)


def product(a: Size, b: Size) -> Size:
    """Return the size of a product."""
    bits = a.bits + b.bits
    if a.value is None or b.value is None:
        return Size(None, bits, min(a.terms * b.terms, MAX_TERMS))
    return Size(a.value * b.value, bits)


def quotient(a: Size, b: Size) -> Size:
    """Return the size of a quotient."""
    divisor = b.value
    inverse = None if divisor is None else _safe(lambda: 1 / divisor)
    return product(a, Size(inverse, b.bits, b.terms))


def power(base: Size, exponent: Size) -> Size:
    """Return the size of a power. Raise TooLarge for a number or a polynomial beyond the bounds."""
    raised = base.value
    raised_to = exponent.value
    if raised_to is None:
        return Size(None, base.bits + exponent.bits)
    n = abs(raised_to)
    if base.bits and not base.bits * n <= MAX_BITS:
        raise TooLarge(POWER)
    if raised is None and base.terms > 1 and _expanded_terms(base.terms, n) * n > MAX_WORK:
        raise TooLarge(POLYNOMIAL)
    value = None if raised is None else _safe(lambda: raised**raised_to)
    return Size(value, base.bits * n if base.bits else 0.0, base.terms)


def _expanded_terms(terms: int, n: float) -> float:
    """Return the number of monomials of degree n, which (x_1 + ... + x_terms)^n expands to."""
    if not n <= MAX_WORK:  # also for infinity and NaN, which have no integer
        return math.inf
    return math.comb(int(n) + terms - 1, terms - 1)


def factorial(size: Size) -> Size:
    """Return the size of a factorial."""
    n = size.value
    if n is None or n < 2:
        return Size(None if n is None else 1.0, size.bits)
    bits = n * math.log2(n)
    if not bits <= MAX_BITS:
        raise TooLarge(FACTORIAL)
    return Size(math.gamma(n + 1) if n < 170 else math.inf, bits)


def binomial(n: Size, k: Size) -> Size:
    """Return the size of a binomial coefficient."""
    if n.value is None or n.value < 2:
        return Size(None, n.bits + k.bits)
    chosen = n.value / 2
    if k.value is not None:
        chosen = min(abs(k.value), abs(n.value - k.value))
    bits = chosen * math.log2(n.value)
    if not bits <= MAX_BITS:
        raise TooLarge(BINOMIAL)
    return Size(_safe(lambda: 2.0**bits), bits)


def _safe(compute: Callable[[], float | complex]) -> float | None:
    """Return the real result of a computation: infinity for an overflow, None if undefined."""
    try:
        value = compute()
    except OverflowError:
        return math.inf
    except ZeroDivisionError:
        return None
    return None if isinstance(value, complex) else value
