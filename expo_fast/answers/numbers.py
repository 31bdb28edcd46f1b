"""Exact numbers: decimals, fractions, mixed numbers, powers of ten, repeating decimals."""

import re
from fractions import Fraction
from typing import NamedTuple

DECIMAL = re.compile(
    r"(?P<sign>[+-]?) ?(?P<integer>\d{1,3}(?:,\d{3})+|\d*)(?:\.(?P<decimals>\d*))?"
)
FRACTION = re.compile(
    r"(?P<sign>[+-]?) ?(?:(?P<whole>\d+) )?(?P<numerator>\d+) ?/ ?(?P<denominator>\d+)"
)
FRAC = re.compile(r" ?\\[dtc]?frac ?(?:\{ ?(-?\d+) ?\}|(\d)) ?(?:\{ ?(\d+) ?\}|(\d))(?!\d)")
# 1.5e-7, 1.5 \times 10^{-7}, 10^{-7}. Exponents have at most three digits, so that the value is
# small enough to compute.
SCIENTIFIC = re.compile(
    r"(?:(?P<mantissa>[+-]? ?\d[\d,]*(?:\.\d*)?|[+-]? ?\.\d+)"
    r"(?: ?[eE] ?(?P<e>[+-]?\d{1,3})| ?(?:\\times|\\cdot|\*|[xX]) ?(?P<product>10 ?\^)))?"
    r"(?P<alone>(?<!\d)[+-]? ?10 ?\^)?"
    r" ?(?:\{ ?(?P<braced>[+-]? ?\d{1,3}) ?\}|\( ?(?P<parenthesized>[+-]? ?\d{1,3}) ?\)"
    r"|(?P<bare>[+-]?\d{1,3}))?"
)
REPEATING = re.compile(
    r"(?P<sign>[+-]?) ?(?P<integer>\d*)\.(?P<fixed>\d*)"
    r"(?:\\(?:overline|bar|dot) ?(?:\{ ?(?P<braced>\d+) ?\}|(?P<bare>\d))|\((?P<round>\d+)\))"
)


ENDLESS = re.compile(r"(?P<sign>[+-]?) ?(?P<integer>\d*)\.(?P<digits>\d{3,100}) ?\\ldots")


class Number(NamedTuple):
    """An exact number, and the number of decimals that it was written with."""

    value: Fraction
    places: int | None  # decimal places; None if it has none


def plain_number(text: str) -> Number | None:
    """Return the value of a text that is a number, or None for another text."""
    text = FRAC.sub(_slash, text).strip()
    for read in (_fraction, _decimal, _scientific, _repeating, _endless):
        number = read(text)
        if number is not None:
            return number
    return None


def _fraction(text: str) -> Number | None:
    match = FRACTION.fullmatch(text)
    if match is None or not int(match["denominator"]):
        return None
    part = Fraction(int(match["numerator"]), int(match["denominator"]))
    whole = int(match["whole"] or 0)
    return Number(_signed(match["sign"], whole + part), None)


def _decimal(text: str) -> Number | None:
    match = DECIMAL.fullmatch(text)
    if match is None or not (match["integer"] or match["decimals"]):
        return None
    integer = match["integer"].replace(",", "")
    decimals = match["decimals"] or ""
    value = Fraction(int(integer + decimals), 10 ** len(decimals))
    return Number(_signed(match["sign"], value), len(decimals) or None)


def _scientific(text: str) -> Number | None:
    match = SCIENTIFIC.fullmatch(text)
    if match is None:
        return None
    exponent = match["e"] or match["braced"] or match["parenthesized"] or match["bare"]
    times_ten = match["product"] or match["alone"]
    # The text must have exactly one power of ten, in one notation.
    if exponent is None or bool(match["e"]) == bool(times_ten):
        return None
    if match["e"] and (match["braced"] or match["parenthesized"] or match["bare"]):
        return None
    if match["product"] and match["alone"]:
        return None
    shift = int(exponent.replace(" ", ""))
    sign = "-" if (match["alone"] or "").startswith("-") else ""
    mantissa = _decimal(match["mantissa"] or f"{sign}1")
    if mantissa is None:
        return None
    places = (mantissa.places or 0) - shift
    # 1.5e12 is an integer, and is exact. Only a decimal may be rounded.
    return Number(mantissa.value * Fraction(10) ** shift, places if places > 0 else None)


def _repeating(text: str) -> Number | None:
    match = REPEATING.fullmatch(text)
    if match is None:
        return None
    period = match["braced"] or match["bare"] or match["round"]
    fixed = match["fixed"]
    value = Fraction(int((match["integer"] or "0") + fixed), 10 ** len(fixed))
    value += Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(fixed))
    return Number(_signed(match["sign"], value), None)


def _endless(text: str) -> Number | None:
    """Return the value of 0.333... or 0.1212...

    The period must be shown at least twice, and in at least three digits.
    """
    match = ENDLESS.fullmatch(text)
    if match is None:
        return None
    digits = match["digits"]
    for size in range(1, len(digits) // 2 + 1):
        period = digits[-size:]
        fixed = digits
        while fixed.endswith(period):
            fixed = fixed[:-size]
        if len(digits) - len(fixed) >= max(3, 2 * size):
            shown = f"{match['sign']}{match['integer']}.{fixed}"
            return _repeating(rf"{shown}\overline{{{period}}}")
    return None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _slash(match: re.Match[str]) -> str:
    r"""Return `\frac{1}{2}` or `\frac12` as ` 1/2`."""
    numerator = match[1] or match[2]
    denominator = match[3] or match[4]
    return f" {numerator}/{denominator}"


def same_number(a: Number, b: Number) -> bool:
    """Return whether two numbers are equal.

    A decimal may be rounded. It equals a number that differs by less than one unit of its last
    place and by at most a relative 1e-6.
    """
    gap = abs(a.value - b.value)
    places = [number.places for number in (a, b) if number.places is not None]
    if gap == 0 or not places:
        return gap == 0
    last_place = Fraction(10) ** -min(places)
    larger = max(abs(a.value), abs(b.value))
    return gap < last_place and gap * 10**6 <= larger
