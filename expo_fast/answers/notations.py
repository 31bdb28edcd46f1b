"""Rules for notations: times, letters of a choice, ratios, residues, numerals in a base, units."""

import re

from expo_fast.answers import algebra
from expo_fast.answers.numbers import plain_number, same_number
from expo_fast.answers.quotients import constant, linear_in_one_variable
from expo_fast.answers.structures import COMMA, labelled, split_top
from expo_fast.answers.units import Quantity, same_dimension, split_unit, unit_of
from expo_fast.answers.verdicts import PASS, Comparer, Pass, Verdict, every

CLOCK = re.compile(
    r"(?P<hour>\d{1,2})(?: ?: ?(?P<minute>\d\d)(?: ?: ?(?P<second>\d\d))?)?"
    r" ?(?:\\text ?\{ ?)?(?P<half>[ap])?(?(half)\.? ?m\.?) ?\}?",
    re.IGNORECASE,
)


DAYTIME = re.compile(
    r"(?:\\text ?\{ ?)?in the (?:morning|afternoon|evening) ?\}?$",
    re.IGNORECASE,
)


def clock_times(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare times of day: 3:30 PM equals 3:30 p.m. and 15:30.

    If one side has no "a.m." or "p.m.", its time may be either.
    """
    x = CLOCK.fullmatch(_in_digits(gold))
    y = CLOCK.fullmatch(_in_digits(box))
    if not x or not y or not (x["minute"] or x["half"]) or not (y["minute"] or y["half"]):
        return PASS
    exact = _minutes(x) == _minutes(y)
    if x["half"] and y["half"]:
        return exact
    if not x["half"] and not y["half"]:  # they may be ratios
        return exact if x["second"] or y["second"] else PASS
    # The hours as written: 15:00 may be 3 pm, but not 3 am.
    return exact or (int(x["hour"]) == int(y["hour"]) and _minutes(x)[1:] == _minutes(y)[1:])


def _in_digits(text: str) -> str:
    """Return "noon" as 12:00 pm, and 3:30 "in the afternoon" as 3:30 pm."""
    text = DAYTIME.sub(lambda match: "am" if "morning" in match[0] else "pm", text)
    return {"noon": "12:00 pm", "midnight": "12:00 am"}.get(text.lower(), text)


def _minutes(match: re.Match[str]) -> tuple[int, int, int]:
    """Return the hour (0 to 23), the minute and the second of a time."""
    hour = int(match["hour"])
    if match["half"]:
        hour = hour % 12 + (12 if match["half"].lower() == "p" else 0)
    return hour, int(match["minute"] or 0), int(match["second"] or 0)


CHOICE = re.compile(
    r"(?:(?:\\text ?\{ ?)?(?i:option|choice|answer) ?\}? ?)?"
    r"\(? ?(?:\\text ?\{ ?)?\(? ?([A-Z]) ?\)? ?\}? ?\)?\.?"
)
CHOICE_AND_TEXT = re.compile(
    r"(?:\(|\\text ?\{ ?\() ?([A-Z]) ?\) ?\}? ?[^\s,;%!].*|([A-Z]) ?[.:)] [^\s,;%!].*"
)
SMALL_CHOICES = ("a", "b", "c", "d")  # without e and i, which are constants
CHOICE_MARK = re.compile(r"\( ?[A-Z] ?\)")


def choices(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare letters of a multiple choice: B equals (B), b and `(B) 12`."""
    x = "" if gold in SMALL_CHOICES else _choice(gold)  # a small letter may be a variable
    y = _choice(box)
    if not x or not y:
        return PASS
    # If both answers have a text beside the letter, the texts decide.
    return PASS if _choice_and_text(gold) and _choice_and_text(box) else x == y


def _choice(text: str) -> str:
    """Return the letter of a choice, or "" if there is none."""
    match = CHOICE.fullmatch(text.upper() if text.strip("()") in SMALL_CHOICES else text)
    return match[1] if match else _choice_and_text(text)


def _choice_and_text(text: str) -> str:
    """Return the letter of `(B) 12`. Return "" for another text and for a text with two letters."""
    match = CHOICE_AND_TEXT.fullmatch(text)
    if match is None or len(CHOICE_MARK.findall(text)) > 1:
        return ""
    return match[1] or match[2]


RATIO = frozenset(":")


def ratios(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare ratios part by part.

    2:3 and 4:6 differ, because a ratio may be a time, and 2:30 is not 4:60.
    """
    x, x_signs = split_top(gold, RATIO)
    y, y_signs = split_top(box, RATIO)
    if not x_signs or not y_signs or "=" in gold + box or "|" in gold + box:
        return PASS
    return every(map(equal, x, y)) if len(x) == len(y) else False


# Residues, numerals, units

MODULO = re.compile(
    r"(?P<value>.*?)(?:\(|\\text ?\{)? ?"
    r"(?:\\(?:pmod|pod) ?\{? ?|\\b?mod ?\{? ?|(?<![a-z\\])mod(?:ulo)? ?\}? ?)"
    r"(?P<modulus>\d+) ?\}? ?\)?"
)
RESIDUE = re.compile(r"(?:[A-Za-z] ?(?:\\equiv|=) ?)?(?P<residue>[+-]?\d+)")


def residues(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    r"""Compare residue classes.

    `x \equiv 3 \pmod 7`, `3 mod 7`, `10 \pmod 7` and `x = 3 + 7k` are the same class.
    """
    x = MODULO.fullmatch(gold)
    y = MODULO.fullmatch(box)
    if not x and not y:
        return PASS
    if x and y:
        return _same_class(x, y)
    if y and labelled(gold).label:
        return _is_progression(y, gold)
    if y:  # the reference is the residue itself
        residue = RESIDUE.fullmatch(y["value"].strip())
        if residue is None:
            return PASS
        reduced = abs(int(residue["residue"])) < int(y["modulus"])
        return equal(gold, residue["residue"]) if reduced else False
    assert x is not None
    residue = RESIDUE.fullmatch(x["value"].strip())
    if residue is None:
        return PASS
    if labelled(box).label:
        return _is_progression(x, box)
    return equal(residue["residue"], box) or _is_progression(x, box)


def _same_class(x: re.Match[str], y: re.Match[str]) -> Verdict | Pass:
    a = RESIDUE.fullmatch(x["value"].strip())
    b = RESIDUE.fullmatch(y["value"].strip())
    if not a or not b:
        return PASS
    modulus = int(x["modulus"])
    if modulus != int(y["modulus"]) or not modulus:
        return False
    return int(a["residue"]) % modulus == int(b["residue"]) % modulus


def _is_progression(x: re.Match[str], box: str) -> Verdict | Pass:
    """Return whether an answer is the progression of a residue: 3 + 7k for 3 modulo 7."""
    residue = RESIDUE.fullmatch(x["value"].strip())
    parsed = algebra.parse(split_top(labelled(box).value, COMMA)[0][0])  # 3+7k, k an integer
    if residue is None or parsed is None:
        return PASS
    linear = linear_in_one_variable(parsed.value.top)
    if linear is None or parsed.value.bottom != constant(1):
        return False
    name, step, start = linear
    modulus = int(x["modulus"])
    if name not in ("k", "n", "m", "t", "j") or abs(step) != modulus or not modulus:
        return False
    return (start - int(residue["residue"])) % modulus == 0


NUMERAL = re.compile(
    r"(?P<digits>[0-9A-Fa-f]{0,40}[0-9][0-9A-Fa-f]{0,40}?)"
    r"(?:_(?:base)?|(?:in)?base)(?P<base>\d+|[a-z]+)"
)
NUMERAL_MARKUP = re.compile(r"\\text|[ {}()]")
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
BASES |= {"ten": 10, "eleven": 11, "twelve": 12, "sixteen": 16}
DIGITS = re.compile(r"[0-9A-F]+")


def numerals(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare numerals in a base: 101_2 is 101 in base two.

    A numeral without a base has the base of the other numeral.
    """
    x = _numeral(gold)
    y = _numeral(box)
    if x is None and y is None:
        return PASS
    if x and y:
        return x == y
    digits, _ = x or y or ("", 0)
    plain = box if x else gold
    other = re.sub(r"\\text ?\{([0-9A-F]+)\}|[ ,]", r"\1", plain)
    return DIGITS.fullmatch(other) is not None and digits == (other.lstrip("0") or "0")


def _numeral(text: str) -> tuple[str, int] | None:
    """Return the digits and the base of `101_2`, `101_{two}` or `101 base 2`, else None."""
    match = NUMERAL.fullmatch(NUMERAL_MARKUP.sub("", text))
    if match is None:
        return None
    base = BASES.get(match["base"]) or (int(match["base"]) if match["base"].isdigit() else 0)
    digits = match["digits"]
    if not 2 <= base <= 36 or max(int(digit, 36) for digit in digits) >= base:
        return None
    return digits.upper().lstrip("0") or "0", base


DEGREES = unit_of(r"\text{degrees}", wrapped=True, spaced=True)
RADIANS = unit_of(r"\text{radians}", wrapped=True, spaced=True)


def units(gold: str, box: str, equal: Comparer) -> Verdict | Pass:
    """Compare values with units.

    One side may lack its unit. Units of one dimension are converted within a system: 3 m is 300 cm,
    and 500 ml is 500 cm^3, but no metric length is a length in feet. Other units are unequal.
    """
    x = split_unit(gold)
    y = split_unit(box)
    if x.glued:
        return PASS
    if not (x.unit or y.unit or x.percent or y.percent):
        return PASS
    if _is_in_radians(x, y, gold):
        return True
    verdict = _same_quantity(x, y, equal)
    if not verdict and (x.ambiguous or y.ambiguous) and not (x.percent or y.percent):
        return PASS
    return verdict


def _is_in_radians(x: Quantity, y: Quantity, gold: str) -> bool:
    r"""Return whether a reference with the sign of degrees, 90^\circ, is answered by \pi/2."""
    in_degrees = gold.endswith(r"^\circ") and x.unit == DEGREES
    if not in_degrees or y.percent or y.unit not in (None, RADIANS) or r"\pi" not in y.value:
        return False
    return algebra.same_expression(rf"({x.value}) \pi", f"180 ({y.value})") is True


def _same_quantity(x: Quantity, y: Quantity, equal: Comparer) -> Verdict:
    if x.percent or y.percent:
        if x.unit or y.unit:
            return False
        return _same_percentage(x, y, equal)
    if x.unit is None or y.unit is None or x.unit == y.unit:
        return equal(x.value, y.value)
    if not same_dimension(x.unit, y.unit):
        return False
    a = plain_number(x.value)
    b = plain_number(y.value)
    if a is None or b is None:
        return equal(x.value, y.value) if x.unit.size == y.unit.size else False
    return a.value * x.unit.size == b.value * y.unit.size


def _same_percentage(x: Quantity, y: Quantity, equal: Comparer) -> Verdict:
    """Compare a percentage: 50% equals 50 and 0.5."""
    verdict = equal(x.value, y.value)
    if x.percent and (y.percent or verdict):
        return verdict
    percent = plain_number(x.value if x.percent else y.value)
    share = plain_number(y.value if x.percent else x.value)
    if percent is None or share is None:
        return False
    if verdict and abs(percent.value) >= 1:  # the reference may lack the percent sign
        return True
    places = None if percent.places is None else percent.places + 2
    return same_number(percent._replace(value=percent.value / 100, places=places), share)
