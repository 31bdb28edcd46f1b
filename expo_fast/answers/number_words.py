"""Numbers in words: twelve, twenty-one, one hundred and five, 3.5 million, one half, third."""

import re

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"

UNITS = {word: value for value, word in enumerate(_ONES.split())}
TENS = {word: 20 + 10 * place for place, word in enumerate(_TENS.split())}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_WORD = "|".join([*UNITS, *TENS, "hundred", *SCALES])
# The words of one number, then the end of the text, a unit or a noun.
PHRASE = re.compile(
    rf"(?:\\text\{{ ?)?(?P<number>(?:minus |negative )?(?:{_WORD})(?:(?:[ -]| and )(?:{_WORD}))*)"
    r"(?![A-Za-z0-9'-])(?P<rest>[^0-9]*)",
    re.IGNORECASE,
)
_PART = "half|halves|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth"
PARTS = {"half": 2, "halves": 2, "third": 3, "quarter": 4} | {
    word: size for size, word in enumerate(_PART.split("|")[4:], start=4)
}
# Without a count, "third" is an ordinal.
PART = re.compile(
    rf"(?P<count>an?|{'|'.join(UNITS)})[ -](?P<part>{_PART})s?|(?P<alone>half|quarter)",
    re.IGNORECASE,
)
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"
ORDINALS = {word: value for value, word in enumerate(_ORDINALS.split(), start=1)}
SCALED = re.compile(
    r"(?P<value>-?\d[\d,]*(?:\.\d+)?) ?(?:\\text\{ ?)?(?P<scale>thousand|million|billion|trillion)"
    r"(?![A-Za-z])(?P<rest>.*)",
    re.IGNORECASE,
)


def digits_for_words(text: str) -> str:
    """Return the text with the number words at its start replaced by digits.

    An ordinal alone is an integer, as 3rd is: "third" is 3, and "a third" is 1/3.
    """
    scaled = SCALED.fullmatch(text)
    if scaled:
        scale = SCALES[scaled["scale"].lower()]
        return _shifted(scaled["value"].replace(",", ""), scale) + _rest(text, scaled["rest"])
    if not text[:1].isalpha() and not text.startswith(r"\text"):
        return text
    part = PART.fullmatch(text)
    if part:
        count = UNITS.get((part["count"] or "one").lower(), 1)
        name = (part["part"] or part["alone"]).lower()
        return rf"\frac{{{count}}}{{{PARTS[name]}}}"
    if text.lower() in ORDINALS:
        return str(ORDINALS[text.lower()])
    phrase = PHRASE.fullmatch(text)
    if phrase is None:
        return text
    value = _value(phrase["number"].lower())
    return text if value is None else f"{value}{_rest(text, phrase['rest'])}"


def _rest(text: str, rest: str) -> str:
    r"""Return the text after the number, in `\text{}` if the number was in `\text{}`."""
    opened = text.count("{") - text.count("}") != rest.count("{") - rest.count("}")
    rest = rest.removesuffix("}") if opened and not rest.strip(" }") else rest
    if opened and rest.strip():
        return rf"\text{{{rest}"
    return rest


def _shifted(decimal: str, scale: int) -> str:
    """Return a decimal times a power of ten, as a decimal."""
    zeros = len(str(scale)) - 1
    integer, _, decimals = decimal.partition(".")
    moved = decimals[:zeros].ljust(zeros, "0")
    kept = decimals[zeros:]
    return f"{integer}{moved}.{kept}" if kept else f"{integer}{moved}"


def _value(words: str) -> int | None:
    """Return the value of words such as "two hundred and five".

    Return None if they are not one number, as in "two three".
    """
    sign = -1 if words.startswith(("minus ", "negative ")) else 1
    total = 0  # the part in complete thousands
    group = 0  # the part below a thousand
    smallest = 1000  # magnitude of the last word in the group; the next word must be smaller
    for word in re.findall("[a-z]+", words):
        if word in ("minus", "negative", "and"):
            continue
        if word in SCALES:
            total += (group or 1) * SCALES[word]
            group = 0
            smallest = 1000
        elif word == "hundred":
            if not 0 < group < 100:  # fifteen hundred
                return None
            group *= 100
            smallest = 100
        else:
            value = UNITS.get(word, TENS.get(word, 0))
            magnitude = 20 if word in TENS else 10
            allowed = smallest == 20 and value < 10 and word in UNITS and value > 0
            if not (allowed or smallest > 20):
                return None
            group += value
            smallest = magnitude
    return sign * (total + group)
