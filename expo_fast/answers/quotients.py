"""Quotients of polynomials over the rationals, with i and the square roots of primes.

A polynomial has generators, which are names. They are variables, pi and e, i (with i^2 = -1), the
square roots of primes (with known squares), and any other names, which have no relations. The
square roots of distinct primes and i are independent over the rationals. So a polynomial is zero
exactly if it has no terms.

Every size is bounded. Functions raise Unsupported for values that are too large.
"""

import math
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_TERMS = 500  # of a polynomial
MAX_BITS = 4096  # of a number
MAX_POWER = 24  # of a sum
MAX_DEGREE = 64  # of a root
MAX_RADICAND = 10**9  # of a square root, which is factored by trial division

Monomial = tuple[tuple[str, int], ...]  # generators and their exponents, sorted
Terms = dict[Monomial, Fraction]

ONE: Monomial = ()
CONSTANTS = {r"\pi": math.pi, "e": math.e}
I = "i"  # noqa: E741  (the name of the imaginary unit)


class Unsupported(Exception):
    """A notation that the parser does not support, or a value that is too large."""


class Quotient(NamedTuple):
    """A quotient of two polynomials."""

    top: Terms
    bottom: Terms


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
    """Return a product of monomials, and the factor from i^2 and from squared roots."""
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
    """Return the square of i or of the root of a prime, or None for another generator."""
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
    """Return the value of a quotient that is a rational number, or None for another quotient."""
    if a.top.keys() <= {ONE} and a.bottom.keys() == {ONE}:
        return a.top.get(ONE, Fraction(0)) / a.bottom[ONE]
    return None


def approximation(a: Quotient) -> float | None:
    """Return a number made of rationals, square roots, pi and e; None for another quotient."""
    try:
        return _sum_of_terms(a.top) / _sum_of_terms(a.bottom)
    except (KeyError, OverflowError, ZeroDivisionError):
        return None


def _sum_of_terms(terms: Terms) -> float:
    """Return the value of a polynomial. Raise KeyError if it has a variable."""
    total = 0.0
    for monomial, coefficient in terms.items():
        factor = float(coefficient)
        for name, exponent in monomial:
            square = _square(name) or 0
            value = math.sqrt(square) if square > 0 else CONSTANTS[name]
            factor *= value**exponent
        total += factor
    return total


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
    """Return the |exponent|-th power of a polynomial of one term."""
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
    """Return the square root of a rational number, or None.

    None means that the quotient is not a rational number, or that its root is too large to factor.
    """
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
    """Return s and roots of distinct primes, where sqrt(n) is s times the product of the roots."""
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
    """Return a quotient as text, for the name of a generator.

    Most equal quotients have the same text.
    """
    lead = max(a.bottom)
    scale = 1 / a.bottom[lead]
    parts = []
    for terms in (a.top, a.bottom):
        scaled = sorted((monomial, value * scale) for monomial, value in terms.items())
        parts.append(repr(scaled))
    return "/".join(parts)


def uses(value: Quotient, name: str) -> bool:
    """Return whether a quotient contains a generator."""
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


def ratio(a: Terms, b: Terms) -> Fraction | None:
    """Return the number r with a = r b, or None if there is none or if a or b is zero."""
    if not a or a.keys() != b.keys():
        return None
    ratios = {a[monomial] / b[monomial] for monomial in a}
    return ratios.pop() if len(ratios) == 1 else None


def linear_in_one_variable(terms: Terms) -> tuple[str, Fraction, Fraction] | None:
    """Return (x, c, d) for the polynomial c x + d with numbers c and d, or None for another."""
    names = {name for monomial in terms for name, _ in monomial}
    if len(names) != 1:
        return None
    name = names.pop()
    variable: Monomial = ((name, 1),)
    if variable not in terms or not terms.keys() <= {variable, ONE}:
        return None
    return name, terms[variable], terms.get(ONE, Fraction(0))
