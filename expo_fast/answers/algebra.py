"""Exact comparison of expressions.

A parser reads arithmetic LaTeX as quotients of polynomials. A part without a polynomial form, such
as sin(x), a cube root or 2^n, becomes an opaque generator: a name without relations. Two
expressions without opaque generators are equal exactly if their difference has no terms. With
opaque generators, a difference with terms does not prove that they are unequal.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from expo_fast.answers.quotients import (
    MAX_BITS,
    MAX_DEGREE,
    MAX_POWER,
    Quotient,
    Unsupported,
    add,
    as_number,
    difference,
    divide,
    exact_logarithm,
    exact_root,
    generator,
    multiply,
    multiply_terms,
    negate,
    power,
    rational,
    shown,
    square_root,
    uses,
)

MAX_DEPTH = 24  # of nested groups
INFINITY = r"\infty"
INFINITE = generator(INFINITY)


@dataclass(frozen=True)
class Expression:
    """A parsed expression."""

    value: Quotient
    opaque: bool  # has opaque generators, so that a difference proves nothing
    rounded: bool  # has decimals, which may be rounded


TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
    r"|(?P<command>\\[A-Za-z]+)"
    r"|(?P<letter>[A-Za-z])"
    r"|(?P<sign>[-+*/^_!(){}\[\]'|]))"
)
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi "
    "rho sigma tau upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi "
    "Omega hbar ell pi infty"
)
_FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp"
GREEK = frozenset(_GREEK.split())
FUNCTIONS = frozenset(_FUNCTIONS.split())
ARGUMENTS = GREEK | {"frac", "sqrt"}  # commands that may follow ^ without braces
TIMES = ("*", r"\cdot", r"\times")
OVER = ("/", r"\div")
OPENING = {"(": ")", "{": "}", "[": "]"}


def tokens_of(text: str) -> list[tuple[str, str]]:
    """Return (kind, text) of each token. Raise Unsupported for an unknown character."""
    tokens = []
    place = 0
    text = text.rstrip()
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None or match.lastgroup is None:
            raise Unsupported(f"a character at {place}")
        tokens.append((match.lastgroup, match[match.lastgroup]))
        place = match.end()
    return tokens


class Parser:
    """A recursive-descent parser of the arithmetic subset of LaTeX."""

    def __init__(self, text: str):
        self.tokens = tokens_of(text)
        self.place = 0
        self.depth = 0
        self.opaque = False
        self.rounded = False
        self.raised_last = False

    def parse(self) -> Quotient:
        """Return the value of the complete text."""
        value = self.sum()
        if self.place < len(self.tokens):
            raise Unsupported(f"unexpected {self.tokens[self.place][1]}")
        return value

    @property
    def next(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ""

    @property
    def next_kind(self) -> str:
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        """Return the next token and advance."""
        token = self.next
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        """Skip this token. Raise Unsupported if another token is next."""
        if self.take() != token:
            raise Unsupported(f"{token} is missing")

    def sum(self) -> Quotient:
        """Return a sum of products."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unsupported("nested too deeply")
        total = self.product()
        while self.next in ("+", "-"):
            sign = self.take()
            term = self.product()
            total = add(total, negate(term) if sign == "-" else term)
        self.depth -= 1
        return total

    def product(self) -> Quotient:
        """Return a product with its sign, such as -2x(y+1)/3.

        Raise Unsupported for an ambiguous product: 1/2x may be (1/2)x or 1/(2x).
        """
        negative = False
        while self.next in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.power()
        divided = False
        while self.starts_factor() or self.next in TIMES or self.next in OVER:
            if self.next in TIMES:
                self.take()
                value = multiply(value, self.signed_power())
                divided = False
            elif self.next in OVER:
                self.take()
                value = divide(value, self.signed_power())
                divided = True
            else:
                if divided or (self.next_kind == "number" and not self.raised_last):
                    raise Unsupported("a product without a sign after a division or a number")
                value = multiply(value, self.power())
        return negate(value) if negative else value

    def starts_factor(self) -> bool:
        """Return whether the next token starts a factor that is multiplied without a sign."""
        if self.next in ("(", "[", "{"):
            return True
        if self.next_kind == "command":
            return self.next not in TIMES and self.next not in OVER
        return self.next_kind in ("letter", "number")

    def signed_power(self) -> Quotient:
        """Return the power after a multiplication sign. It may begin with + or -."""
        negative = False
        while self.next in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.power()
        return negate(value) if negative else value

    def power(self) -> Quotient:
        """Return an atom with its factorials and its exponent."""
        self.raised_last = False
        base = self.atom()
        while self.next == "!":
            self.take()
            base = self.factorial(base)
        if self.next != "^":
            return base
        self.take()
        value = self.raised(base, self.argument())
        if self.next in ("^", "!"):
            raise Unsupported("a power of a power")
        self.raised_last = True  # 2^6 3^5 is a product, while 2 3 may be one number
        return value

    def argument(self) -> Quotient:
        r"""Return an argument of `^` or `\frac`: a group in braces, a digit, a letter or a command.

        Unlike TeX, read a sign and several digits as one argument: 10^-3 and 2^10.
        """
        if self.next == "{":
            return self.group()
        negative = self.next == "-"
        if negative:
            self.take()
        single = self.next_kind in ("number", "letter") or self.next == "("
        if single or (self.next_kind == "command" and self.next[1:] in ARGUMENTS):
            value = self.atom()
        else:
            raise Unsupported("an argument is missing")
        return negate(value) if negative else value

    def group(self) -> Quotient:
        """Return the value of a group in brackets of any kind."""
        opening = self.take()
        value = self.sum()
        self.expect(OPENING[opening])
        return value

    def raised(self, base: Quotient, exponent: Quotient) -> Quotient:
        """Return a power: an integer power, a root, or an opaque generator."""
        number = as_number(exponent)
        if number is not None and number.denominator == 1:
            return power(base, int(number))
        value = as_number(base)
        if number is not None and value is not None and number.denominator <= MAX_DEGREE:
            return self.root(power(base, number.numerator), number.denominator)
        return self.opaque_generator(f"({shown(base)})^({shown(exponent)})")

    def root(self, value: Quotient, degree: int) -> Quotient:
        """Return the root of a number, or an opaque generator."""
        number = as_number(value)
        found = square_root(value) if degree == 2 else None
        if number is not None and degree > 2:
            exact = exact_root(number, degree)
            found = None if exact is None else rational(exact)
        if found is not None:
            return found
        return self.opaque_generator(f"root {degree} of {shown(value)}")

    def opaque_generator(self, name: str) -> Quotient:
        """Return an opaque generator, and note that the expression has one."""
        self.opaque = True
        return generator(name)

    def factorial(self, value: Quotient) -> Quotient:
        """Return the factorial of a small integer, or an opaque generator."""
        number = as_number(value)
        if number is None:
            return self.opaque_generator(f"factorial of {shown(value)}")
        if number.denominator != 1 or not 0 <= number <= 300:
            raise Unsupported("a factorial is too large")
        return rational(math.factorial(int(number)))

    def atom(self) -> Quotient:
        """Return a number, a variable, a group or a command with its arguments."""
        if self.next_kind == "number":
            return self.number()
        if self.next_kind == "letter":
            return self.variable()
        if self.next in OPENING:
            return self.group()
        if self.next_kind == "command":
            return self.command()
        raise Unsupported(f"unexpected {self.next or 'end'}")

    def number(self) -> Quotient:
        r"""Return a number. It may be a mixed number: `1\frac{1}{2}`."""
        literal = self.take().replace(",", "")
        self.rounded |= "." in literal
        if len(literal) * 4 > MAX_BITS:
            raise Unsupported("a number is too large")
        value = rational(Fraction(literal.removesuffix(".")))
        if self.next == "_":
            raise Unsupported("a numeral in a base")
        if self.next == r"\frac" and "." not in literal:
            fraction = self.command()
            part = as_number(fraction)
            if part is not None and self.next != "^":
                return add(value, fraction) if part > 0 else multiply(value, fraction)
            if self.next == "^":
                raise Unsupported("a power of a mixed number")
            return multiply(value, fraction)
        return value

    def variable(self) -> Quotient:
        """Return a letter with its index and primes."""
        return generator(self.named(self.take()))

    def named(self, name: str) -> str:
        """Return the name of a variable with its index and primes."""
        if self.next == "_":
            self.take()
            name += "_" + self.index()
        while self.next == "'":
            name += self.take()
        return name

    def index(self) -> str:
        """Return an index without its braces."""
        if self.next != "{":
            return self.take()
        self.take()
        parts = []
        while self.next not in ("}", "{", ""):
            parts.append(self.take())
        self.expect("}")
        return "".join(parts)

    def command(self) -> Quotient:
        r"""Return a command with its arguments, such as `\frac{1}{2}`, `\sqrt[3]{5}` or `\pi`."""
        name = self.take()
        if name == r"\frac":
            top, bottom = self.pair()
            return divide(top, bottom)
        if name == r"\binom":
            return self.binomial(*self.pair())
        if name == r"\sqrt":
            return self.square_or_higher_root()
        if name[1:] in FUNCTIONS:
            return self.function(name)
        if name[1:] in GREEK:
            return generator(self.named(name))
        raise Unsupported(f"the command {name}")

    def pair(self) -> tuple[Quotient, Quotient]:
        r"""Return two arguments. Without braces, as in `\frac12`, each is a single digit."""
        if self.next_kind != "number":
            first = self.argument()
            return first, self.argument()
        digits = self.tokens[self.place][1]
        if not digits.isdigit():
            raise Unsupported("a decimal without braces")
        self.take()
        if len(digits) == 1:
            return rational(int(digits)), self.argument()
        if len(digits) == 2:
            return rational(int(digits[0])), rational(int(digits[1]))
        raise Unsupported("digits without braces")

    def binomial(self, n: Quotient, k: Quotient) -> Quotient:
        """Return a binomial coefficient of small integers, or an opaque generator."""
        top = as_number(n)
        bottom = as_number(k)
        if top is None or bottom is None or top.denominator * bottom.denominator != 1:
            return self.opaque_generator(f"{shown(n)} choose {shown(k)}")
        if not 0 <= bottom <= top <= 1000:
            raise Unsupported("a binomial coefficient is too large")
        return rational(math.comb(int(top), int(bottom)))

    def square_or_higher_root(self) -> Quotient:
        r"""Return the root after `\sqrt`, which may have a degree in brackets."""
        degree = 2
        if self.next == "[":
            number = as_number(self.group())
            if number is None or number.denominator != 1 or not 2 <= number <= MAX_DEGREE:
                raise Unsupported("the degree of a root")
            degree = int(number)
        if self.next_kind == "number" and self.next.isdigit() and len(self.next) > 1:
            raise Unsupported("digits without braces")
        return self.root(self.argument(), degree)

    def function(self, name: str) -> Quotient:
        """Return a function with its argument: a group in brackets, a number or a variable."""
        exponent = 1
        if self.next == "^":
            self.take()
            number = as_number(self.argument())
            if number is None or number.denominator != 1 or not 1 <= number <= MAX_POWER:
                raise Unsupported("an exponent of a function")
            exponent = int(number)
        base = None
        if self.next == "_":
            self.take()
            base = self.argument()
            name += "_" + shown(base)
        bracketed = self.next in ("(", "{")
        value = self.group() if bracketed else self.argument()
        if not bracketed and self.starts_factor():
            raise Unsupported("a function of a product without brackets")
        if self.next == "^":
            raise Unsupported("a power of a function without brackets")
        exact = exact_logarithm(value, base) if base and name.startswith(r"\log") else None
        if exact is not None:
            return power(rational(exact), exponent)
        return power(self.opaque_generator(f"{name} of {shown(value)}"), exponent)


@lru_cache(maxsize=4096)
def parse(text: str) -> Expression | None:
    """Return a parsed expression, or None if the parser does not support the text."""
    try:
        parser = Parser(text)
        value = parser.parse()
    except (Unsupported, RecursionError):
        return None
    if uses(value, INFINITY) and value not in (INFINITE, negate(INFINITE)):
        return None
    return Expression(value, parser.opaque, parser.rounded)


HUGE = re.compile(
    r"[+-]? ?(?:(?P<base>\d+) ?\^ ?\{(?P<exponent>.*)\}|(?P<factorial>\d+|\(.*\)) ?!"
    r"|\d[\d.]* ?[eE] ?\+?\d{4,})"
)


def is_huge(text: str) -> bool:
    """Return whether a text is a number beyond MAX_BITS: a power, a factorial or 1e9999."""
    match = HUGE.fullmatch(text)
    if match is None:
        return False
    if match["base"]:
        exponent = parse(match["exponent"])
        value = exponent and as_number(exponent.value)
        large = is_huge(match["exponent"]) or (value is not None and value > MAX_BITS)
        return large and int(match["base"][:9]) > 1 and not match["exponent"].startswith("-")
    if match["factorial"]:
        argument = match["factorial"]
        parsed = parse(argument)
        value = parsed and as_number(parsed.value)
        inner = argument.removeprefix("(").removesuffix(")")
        return is_huge(inner) or (value is not None and value > 999)
    return True


def same_expression(a: str, b: str) -> bool | None:
    """Return whether two expressions are equal, or None if that is unknown."""
    if is_huge(a) != is_huge(b):
        other = parse(b if is_huge(a) else a)
        return False if other and not other.opaque else None
    x = parse(a)
    y = parse(b)
    if x is None or y is None:
        return None
    try:
        equal = not difference(x.value, y.value)
    except Unsupported:
        return None
    if equal:
        return True
    return None if x.opaque or y.opaque or x.rounded or y.rounded else False


def side_difference(left: str, right: str) -> Expression | None:
    """Return left - right of an equation or inequality, or None if a side cannot be parsed."""
    x = parse(left)
    y = parse(right)
    if x is None or y is None:
        return None
    try:
        value = Quotient(
            difference(x.value, y.value), multiply_terms(x.value.bottom, y.value.bottom)
        )
    except Unsupported:
        return None
    return Expression(value, x.opaque or y.opaque, x.rounded or y.rounded)
