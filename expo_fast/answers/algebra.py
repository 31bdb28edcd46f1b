"""Exact comparison of expressions: quotients of polynomials over the rationals.

The generators are variables, pi, e, i (with i^2 = -1), square roots of primes (with their squares
known) and, as names without meaning, what has no polynomial form: sin(x), cube roots, 2^n. Without
such names, two expressions are equal exactly if their difference has no terms, since the square
roots of distinct primes and i are independent over the rationals. With them, a difference proves
nothing.

Every size is bounded. What is too large or has another notation raises `Unsupported`.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_TERMS = 500  # of a polynomial
MAX_BITS = 4096  # of a number
MAX_POWER = 24  # of a sum
MAX_DEGREE = 64  # of a root
MAX_DEPTH = 24  # of nested groups
MAX_RADICAND = 10**9  # is factored by trial division

Monomial = tuple[tuple[str, int], ...]  # generators and their exponents, sorted
Terms = dict[Monomial, Fraction]

ONE: Monomial = ()
I = "i"  # noqa: E741  (the name of the imaginary unit)
INFINITY = r"\infty"


class Unsupported(Exception):
    """A notation that the parser does not read, or a value that is too large."""


class Quotient(NamedTuple):
    """A quotient of two polynomials."""

    top: Terms
    bottom: Terms


@dataclass(frozen=True)
class Expression:
    """A parsed expression."""

    value: Quotient
    opaque: bool  # it has generators without meaning: a difference proves nothing
    rounded: bool  # it has decimals, which may be rounded


def constant(value: int | Fraction) -> Terms:
    """Return a polynomial without variables."""
    return {ONE: Fraction(value)} if value else {}


def rational(value: int | Fraction) -> Quotient:
    """Return a number as a quotient."""
    return Quotient(constant(value), constant(1))


def generator(name: str) -> Quotient:
    """Return a variable or a constant by its name."""
    return Quotient({((name, 1),): Fraction(1)}, constant(1))


def add_terms(a: Terms, b: Terms) -> Terms:
    """Return the sum of two polynomials."""
    total = dict(a)
    for monomial, coefficient in b.items():
        total[monomial] = total.get(monomial, Fraction(0)) + coefficient
        if not total[monomial]:
            del total[monomial]
    return total


def scale_terms(a: Terms, factor: Fraction) -> Terms:
    """Return a polynomial times a number."""
    return {monomial: factor * value for monomial, value in a.items()} if factor else {}


def multiply_terms(a: Terms, b: Terms) -> Terms:
    """Return the product of two polynomials. Raise Unsupported if it is too large."""
    if len(a) * len(b) > MAX_TERMS:
        raise Unsupported("too many terms")
    product: Terms = {}
    for left, x in a.items():
        for right, y in b.items():
            monomial, factor = _multiply_monomials(left, right)
            value = product.get(monomial, Fraction(0)) + x * y * factor
            if value.numerator.bit_length() + value.denominator.bit_length() > MAX_BITS:
                raise Unsupported("a number is too large")
            product[monomial] = value
    return {monomial: value for monomial, value in product.items() if value}


def _multiply_monomials(left: Monomial, right: Monomial) -> tuple[Monomial, int]:
    """Return a product of monomials, and the factor that comes of i^2 and of squared roots."""
    exponents = dict(left)
    for name, exponent in right:
        exponents[name] = exponents.get(name, 0) + exponent
    factor = 1
    for name, exponent in list(exponents.items()):
        square = _square(name)
        if square is None:
            continue
        factor *= square ** (exponent // 2)
        exponents[name] = exponent % 2
        if not exponents[name]:
            del exponents[name]
    return tuple(sorted(exponents.items())), factor


def _square(name: str) -> int | None:
    """Return the square of i or of the root of a prime; None for another generator."""
    if name == I:
        return -1
    return int(name[1:]) if name.startswith("\N{SQUARE ROOT}") else None


def add(a: Quotient, b: Quotient) -> Quotient:
    """Return the sum of two quotients."""
    if a.bottom == b.bottom:
        return Quotient(add_terms(a.top, b.top), a.bottom)
    left = multiply_terms(a.top, b.bottom)
    right = multiply_terms(b.top, a.bottom)
    return Quotient(add_terms(left, right), multiply_terms(a.bottom, b.bottom))


def multiply(a: Quotient, b: Quotient) -> Quotient:
    """Return the product of two quotients."""
    return Quotient(multiply_terms(a.top, b.top), multiply_terms(a.bottom, b.bottom))


def negate(a: Quotient) -> Quotient:
    """Return the negative of a quotient."""
    return Quotient(scale_terms(a.top, Fraction(-1)), a.bottom)


def divide(a: Quotient, b: Quotient) -> Quotient:
    """Return a / b. Raise Unsupported for a division by zero."""
    if not b.top:
        raise Unsupported("division by zero")
    number = as_number(b)
    if number is not None:
        return Quotient(scale_terms(a.top, 1 / number), a.bottom)
    return Quotient(multiply_terms(a.top, b.bottom), multiply_terms(a.bottom, b.top))


def as_number(a: Quotient) -> Fraction | None:
    """Return the rational number that a quotient is; None if it is not one."""
    if a.top.keys() <= {ONE} and a.bottom.keys() == {ONE}:
        return a.top.get(ONE, Fraction(0)) / a.bottom[ONE]
    return None


def power(base: Quotient, exponent: int) -> Quotient:
    """Return an integer power. Raise Unsupported if it is too large."""
    number = as_number(base)
    if number is not None and abs(number) != 1:
        bits = number.numerator.bit_length() + number.denominator.bit_length()
        if bits * abs(exponent) > MAX_BITS:
            raise Unsupported("a number is too large")
        if not number and exponent <= 0:
            raise Unsupported("a power of zero")
        return rational(number**exponent)
    if len(base.top) == len(base.bottom) == 1 and abs(exponent) <= 10**6:
        base = Quotient(_monomial_power(base.top, exponent), _monomial_power(base.bottom, exponent))
        return base if exponent >= 0 else Quotient(base.bottom, base.top)
    if abs(exponent) > MAX_POWER:
        raise Unsupported("a power is too large")
    result = rational(1)
    for _ in range(abs(exponent)):
        result = multiply(result, base)
    return result if exponent >= 0 else divide(rational(1), result)


def _monomial_power(terms: Terms, exponent: int) -> Terms:
    """Return |exponent|-th power of a polynomial of one term."""
    ((monomial, coefficient),) = terms.items()
    bits = coefficient.numerator.bit_length() + coefficient.denominator.bit_length()
    if bits * abs(exponent) > MAX_BITS and abs(coefficient) != 1:
        raise Unsupported("a number is too large")
    raised = tuple((name, power * abs(exponent)) for name, power in monomial)
    if any(
        _square(name) and power * MAX_RADICAND.bit_length() > MAX_BITS for name, power in raised
    ):
        raise Unsupported("a power is too large")
    reduced, factor = _multiply_monomials(raised, ONE)
    return {reduced: coefficient ** abs(exponent) * factor}


def square_root(a: Quotient) -> Quotient | None:
    """Return the square root of a rational number; None for another quotient."""
    number = as_number(a)
    if number is None:
        return None
    radicand = abs(number.numerator * number.denominator)
    if radicand > MAX_RADICAND:
        root = math.isqrt(radicand)
        if root * root != radicand:
            return None
        factor, primes = root, ()
    else:
        factor, primes = _square_part(radicand)
    names = [*primes, I] if number < 0 else primes
    monomial = tuple((name, 1) for name in sorted(names))
    if not number:
        return rational(0)
    return Quotient({monomial: Fraction(factor, number.denominator)}, constant(1))


@lru_cache(maxsize=1024)
def _square_part(n: int) -> tuple[int, tuple[str, ...]]:
    """Return s and the roots of distinct primes whose product is the root of n / s^2."""
    factor = 1
    roots = []
    prime = 2
    while prime * prime <= n:
        count = 0
        while n % prime == 0:
            n //= prime
            count += 1
        factor *= prime ** (count // 2)
        if count % 2:
            roots.append(f"\N{SQUARE ROOT}{prime}")
        prime += 1 if prime == 2 else 2
    if n > 1:
        roots.append(f"\N{SQUARE ROOT}{n}")
    return factor, tuple(roots)


def exact_root(number: Fraction, degree: int) -> Fraction | None:
    """Return the real root of a rational number if it is rational, or None."""
    if number < 0 and degree % 2 == 0:
        return None
    roots = []
    for part in (abs(number.numerator), number.denominator):
        guess = round(part ** (1 / degree)) if part < 10**300 else 0
        if guess**degree != part:
            return None
        roots.append(guess)
    root = Fraction(roots[0], roots[1])
    return -root if number < 0 else root


def exact_logarithm(value: Quotient, base: Quotient) -> int | None:
    """Return the integer logarithm of a number, or None."""
    x = as_number(value)
    b = as_number(base)
    if x is None or b is None or x <= 0 or b <= 1:
        return None
    sign = 1 if x >= 1 else -1
    target = x**sign
    result = 0
    reached = Fraction(1)
    while reached < target:
        reached *= b
        result += 1
        if result > MAX_DEGREE:
            return None
    return sign * result if reached == target else None


def shown(a: Quotient) -> str:
    """Return a text of a quotient that equal ones mostly share, as the name of a generator."""
    lead = max(a.bottom)
    scale = 1 / a.bottom[lead]
    parts = []
    for terms in (a.top, a.bottom):
        scaled = sorted((monomial, value * scale) for monomial, value in terms.items())
        parts.append(repr(scaled))
    return "/".join(parts)


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
CLOSING = frozenset(")}]")


def tokens_of(text: str) -> list[tuple[str, str]]:
    """Return (kind, text) of each token. Raise Unsupported for a character that has no token."""
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
        """Return the next token and go past it."""
        token = self.next
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        """Go past this token. Raise Unsupported if another one is next."""
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
        """Return a product, with its sign: 2x(y+1)/3.

        In 1/2x it is not clear what the 2 divides. Raise Unsupported for such a one.
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
        """Return a power after a sign of multiplication, which may have a sign of its own."""
        negative = False
        while self.next in ("+", "-"):
            negative ^= self.take() == "-"
        value = self.power()
        return negate(value) if negative else value

    def power(self) -> Quotient:
        """Return an atom with factorials and an exponent."""
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
        r"""Return an argument of `^` or `\frac`: a group in braces, or one digit, letter, command.

        A sign and several digits are taken as one, against TeX: 10^-3 and 2^10.
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
        """Return a power: an integer one, a square root, or an opaque one."""
        number = as_number(exponent)
        if number is not None and number.denominator == 1:
            return power(base, int(number))
        value = as_number(base)
        if number is not None and value is not None and number.denominator <= MAX_DEGREE:
            return self.root(power(base, number.numerator), number.denominator)
        return self.opaque_generator(f"({shown(base)})^({shown(exponent)})")

    def root(self, value: Quotient, degree: int) -> Quotient:
        """Return the root of a number, or an opaque one."""
        number = as_number(value)
        found = square_root(value) if degree == 2 else None
        if number is not None and degree > 2:
            exact = exact_root(number, degree)
            found = None if exact is None else rational(exact)
        if found is not None:
            return found
        return self.opaque_generator(f"root {degree} of {shown(value)}")

    def opaque_generator(self, name: str) -> Quotient:
        """Return a generator whose meaning is not known here."""
        self.opaque = True
        return generator(name)

    def factorial(self, value: Quotient) -> Quotient:
        """Return the factorial of a small integer, or an opaque one."""
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
        r"""Return a number, with a fraction after it if it is mixed: `1\frac{1}{2}`."""
        literal = self.take().replace(",", "")
        self.rounded |= "." in literal
        if len(literal) * 4 > MAX_BITS:
            raise Unsupported("a number is too large")
        value = rational(Fraction(literal.removesuffix(".")))
        if self.next == "_":
            raise Unsupported("a numeral in a base")
        if self.next == r"\frac" and "." not in literal:
            fraction = self.command()
            if as_number(fraction) is not None and self.next != "^":
                return add(value, fraction)
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
        r"""Return two arguments: those of `\frac12` are single digits."""
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
        """Return a binomial coefficient of small integers."""
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
        """Return a function of an argument in brackets, or of one number or variable alone."""
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
    """Return a parsed expression; None for what the parser does not read."""
    try:
        parser = Parser(text)
        value = parser.parse()
    except (Unsupported, RecursionError):
        return None
    if uses(value, INFINITY) and value not in (INFINITE, negate(INFINITE)):
        return None
    return Expression(value, parser.opaque, parser.rounded)


INFINITE = generator(INFINITY)


def uses(value: Quotient, name: str) -> bool:
    """Return whether a generator is in a quotient."""
    for terms in value:
        for monomial in terms:
            if any(part == name for part, _ in monomial):
                return True
    return False


def difference(a: Quotient, b: Quotient) -> Terms:
    """Return the numerator of a - b. Raise Unsupported if it is too large."""
    left = multiply_terms(a.top, b.bottom)
    right = multiply_terms(b.top, a.bottom)
    return add_terms(left, scale_terms(right, Fraction(-1)))


HUGE = re.compile(
    r"[+-]? ?(?:(?P<base>\d+) ?\^ ?\{(?P<exponent>.*)\}|(?P<factorial>\d+|\(.*\)) ?!"
    r"|\d[\d.]* ?[eE] ?\+?\d{4,})"
)


def is_huge(text: str) -> bool:
    """Return whether a text is one number beyond MAX_BITS: a tower, a factorial, 1e9999."""
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
    """Return whether two expressions are equal; None if that is not known."""
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
    """Return left - right of an equation or inequality; None if it is not read."""
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


def ratio(a: Terms, b: Terms) -> Fraction | None:
    """Return the number r with a = r b; None if there is none, or if one of them is zero."""
    if not a or a.keys() != b.keys():
        return None
    ratios = {a[monomial] / b[monomial] for monomial in a}
    return ratios.pop() if len(ratios) == 1 else None


def linear_in_one_variable(terms: Terms) -> tuple[str, Fraction, Fraction] | None:
    """Return (x, c, d) of the polynomial c x + d with numbers c and d; None for another one."""
    names = {name for monomial in terms for name, _ in monomial}
    if len(names) != 1:
        return None
    name = names.pop()
    variable: Monomial = ((name, 1),)
    if variable not in terms or not terms.keys() <= {variable, ONE}:
        return None
    return name, terms[variable], terms.get(ONE, Fraction(0))
