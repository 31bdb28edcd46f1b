"""Units of a value, and their exact conversions.

A unit follows its value, or precedes it like a dollar sign. A value without a unit equals the same
value with a unit. Two values with units are equal if they are equal in a common unit: 3 m is 300
cm, and not 3 cm. A noun, such as "apples", is a unit too.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from expo_fast.answers.spelling import strip_edges

# {dimension: {names of a unit: its size}}
_SIZES: dict[str, dict[str, int | str]] = {
    "length": {
        "mm millimeter millimetre": "1/1000",
        "cm centimeter centimetre": "1/100",
        "dm decimeter decimetre": "1/10",
        "m meter metre": 1,
        "km kilometer kilometre": 1000,
    },
    "imperial length": {
        "in inch inches": 1,
        "ft foot feet": 12,
        "yd yard": 36,
        "mi mile": 63360,
    },
    "mass": {"mg milligram": "1/1000", "g gram gm": 1, "kg kilogram kilo": 1000, "tonne": 10**6},
    "imperial mass": {"oz ounce": 1, "lb lbs pound": 16, "ton": 32000},
    "time": {
        "ms millisecond": "1/1000",
        "s sec second": 1,
        "min minute": 60,
        "h hr hrs hour": 3600,
        "day": 86400,
        "week wk": 604800,
    },
    "months": {"month": 1, "year yr": 12, "decade": 120, "century centuries": 1200},
    "money": {"cent": "1/100", "dollar usd buck": 1},
    "sterling": {"pence penny": "1/100", "pounds-sterling gbp": 1},
    "euro": {"euro eur": 1},
    "yen": {"yen": 1},
    "yuan": {"yuan rmb": 1},
    "rupee": {"rupee rs inr": 1},
    "volume": {  # in cubic meters
        "ml milliliter millilitre": "1/1000000",
        "cl": "1/100000",
        "l liter litre": "1/1000",
    },
    "imperial volume": {"cup": 1, "pint pt": 2, "quart qt": 4, "gallon gal": 16},
    "angle": {"degree deg": 1},
    "radian": {"radian rad": 1},
    "celsius": {"celsius": 1},
    "fahrenheit": {"fahrenheit": 1},
    "unit": {"unit": 1},
    "acre": {"acre": 1},
    "energy": {"joule J": 1, "kilojoule kJ": 1000},
    "force": {"newton N": 1, "kilonewton kN": 1000},
    "frequency": {"hertz hz Hz": 1, "kilohertz kHz": 1000, "megahertz MHz": 10**6},
    "power": {"watt W": 1, "kilowatt kW": 1000},
    "voltage": {"volt V": 1},
    "pressure": {"pascal Pa": 1, "kilopascal kPa": 1000},
    "charge": {"coulomb": 1},
}
_POWERS = {"volume": ("length", 3)}  # dimensions that are powers of others
_COMPOUNDS = {"mph": "mile", "kph": "km", "kmh": "km", "kmph": "km"}  # per hour
_SYMBOL_NAMES = "J kJ N kN Hz kHz MHz W kW V A K C F Pa kPa mol"
SYMBOLS = frozenset(_SYMBOL_NAMES.split())  # units whose case counts

UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(size))
    for dimension, sizes in _SIZES.items()
    for names, size in sizes.items()
    for name in names.split()
}

# A phrase with one of these words is more than a unit: "8 is wrong", "8 or 9".
_OTHER_WORDS = (
    "is are was were be not no nor or and but if then than to too from with without wrong right "
    "false true incorrect correct maybe perhaps possibly approximately about around almost nearly "
    "under over above below between times plus minus divided multiplied more less fewer greater "
    "smaller least most except instead rather answer answers actually either neither any other "
    "another mod modulo pi base where when for every all half quarter third thirds percent "
    "hundred thousand million billion am pm a.m p.m noon midnight o'clock up down inf infinity "
    "thousands dozen dozens hundreds millions billions sqrt sin cos tan log ln"
)
_FILLER_WORDS = "of the in a an each total altogether approx exactly only"
# Words after a unit that tell what is measured: 5 cm in length, 12 years old.
_MEASURE_WORDS = (
    "length width height depth area volume perimeter diameter weight mass long wide tall high deep "
    "old"
)
NO_NOUNS = frozenset(_OTHER_WORDS.split())
MEASURES = frozenset(_MEASURE_WORDS.split())
FILLERS = frozenset(_FILLER_WORDS.split())  # words that do not change a unit
NOUNS = ("people", "children", "men", "women")  # and any word of four letters or more
PREFIXES = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
SUFFIXES = {"squared": 2, "cubed": 3}


@dataclass(frozen=True)
class Unit:
    """A product of powers of dimensions, and its size in their base units."""

    powers: frozenset[tuple[str, int]]
    size: Fraction


@dataclass(frozen=True)
class Quantity:
    """A text that has been split into its value and unit."""

    value: str
    unit: Unit | None  # None: no unit
    percent: bool = False
    ambiguous: bool = False  # the unit may be a product of variables: 5 m
    glued: bool = False  # the unit is more likely a product of variables: 5m^2


CURRENCY = re.compile(
    r"^([+-]? ?)(?:\\text ?\{ ?(euros|pounds sterling|yen|USD|Rs\.?) ?\}|USD|Rs\.?)"
)
PERCENT = re.compile(
    r"(?:%|(?:\\text ?\{ ?)?(?:%|(?<![A-Za-z])(?:percent|per cent|pct|percentage)s?\.?) ?\}?)$"
)
DEGREE = re.compile(
    r"\^\\circ ?(?:\\text ?\{ ?)?(?P<scale>(?:C|F|Celsius|Fahrenheit)(?![A-Za-z]))? ?\}?$"
)
TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
PARENTHESIZED = re.compile(r"(?<=[0-9}]) \(([A-Za-z]{2}[A-Za-z .]*)\)$")
SUM = re.compile(
    r"(?P<number>\d+(?:\.\d+)?) ?(?:\\text ?\{ ?)?(?P<unit>[A-Za-z]+)\.? ?(?:,|and)? ?\}? ?"
    r"(?:\\text ?\{ ?and ?\} ?|and )?"
)
PIECE = re.compile(
    r"(?P<text>\\text ?\{[^{}]*\})|(?P<word>[A-Za-z][A-Za-z.'-]*)"
    r"|(?P<power>\^ ?(?:\{ ?-?\d ?\}|-?\d))|(?P<sign> |/|\*|\\cdot(?![A-Za-z]))|\\[A-Za-z]+|."
)
GLUED = re.compile(
    r"m ?\^ ?\{? ?[23] ?\}?|m/s(?:\^ ?\{? ?2 ?\}?)?"
)  # the only ones with one letter
MARKUP = re.compile(r"\\text|\\cdot|[{}]")
WORD = re.compile(r"(?P<name>[A-Za-z][A-Za-z.'-]*)|\^ ?\{? ?(?P<power>-?\d)|(?P<over>/)")
VALUE_END = re.compile(r"[\d)}\]!.]$|\\(?:pi|infty)$|^-?[a-z]$")


@lru_cache(maxsize=4096)
def split_unit(text: str) -> Quantity:
    """Return the value and the unit of a tidy text."""
    percent = PERCENT.search(text)
    if percent and percent.start():
        return Quantity(strip_edges(text[: percent.start()]), None, percent=True)
    currency = CURRENCY.match(text)
    if currency:
        name = (currency[2] or "usd").strip("\\. ").lower().replace(" ", "-")
        rest = split_unit(currency[1] + text[currency.end() :].strip())
        if rest.value:
            unit = _unit([(name, 1)])
            return Quantity(rest.value, _times(unit, rest.unit, name))
    degree = DEGREE.search(text)
    if degree and degree.start() and not TRIGONOMETRIC.search(text):
        scale = {"c": "celsius", "f": "fahrenheit", "": "degree"}[
            (degree["scale"] or "")[:1].lower()
        ]
        return Quantity(text[: degree.start()].strip(), _unit([(scale, 1)]))
    return _split_sum(text) or _split_words(PARENTHESIZED.sub(r" \1", text))


def _times(currency: Unit, rest: Unit | None, name: str) -> Unit:
    """Return the unit of `$5 per hour`. The unit of `$5 dollars` is dollars."""
    if rest is None or rest == currency:
        return currency
    powers = dict(currency.powers)
    for dimension, power in rest.powers:
        powers[dimension] = powers.get(dimension, 0) + power
    return Unit(frozenset(powers.items()), currency.size * rest.size)


def _split_sum(text: str) -> Quantity | None:
    """Return a sum in its first unit, or None for another text.

    1 hour 30 minutes is in hours, and 5 ft 3 in is in feet.
    """
    terms = list(SUM.finditer(text))
    if len(terms) < 2 or "".join(term[0] for term in terms) != text:
        return None
    names = [_canonical(term["unit"]) for term in terms]
    if not all(name in UNITS for name in names):
        return None
    sizes = [UNITS[name][1] for name in names]
    if len({UNITS[name][0] for name in names}) > 1 or sizes != sorted(set(sizes), reverse=True):
        return None
    total = sum(Fraction(term["number"]) * size for term, size in zip(terms, sizes, strict=True))
    return Quantity(str(total / sizes[0]), _unit([(names[0], 1)]))


def _split_words(text: str) -> Quantity:
    """Return a value and the unit that follows it."""
    start = _start_of_words(text)
    value = text[:start]
    if start == len(text) or not VALUE_END.search(value.rstrip()):
        return Quantity(text, None)
    phrase = text[start:]
    wrapped = phrase.startswith(r"\text")
    spaced = value.endswith(" ")
    glued = GLUED.fullmatch(phrase) is not None and not spaced
    unit = unit_of(phrase, wrapped=wrapped, spaced=spaced or glued)
    if unit is None:
        return Quantity(text, None)
    return Quantity(strip_edges(value), unit, ambiguous=not wrapped, glued=glued)


def _start_of_words(text: str) -> int:
    """Return the index where the unit at the end of a text begins: words, powers and signs."""
    start = len(text)
    for piece in reversed(list(PIECE.finditer(text))):
        is_text = piece["text"] and not re.search(r"[=<>]|(?<!\^)(?<!\^-)\d", piece["text"])
        if is_text or (piece["word"] and not text.startswith(r"\text", start)):
            start = piece.start()
        elif not piece["power"] and not piece["sign"]:
            break
    return start


def unit_of(phrase: str, wrapped: bool, spaced: bool) -> Unit | None:
    """Return the unit of a phrase such as `cm^2`, `km/h` or `red apples`, or None."""
    factors = _factors(phrase)
    if not factors:
        return None
    names = [name for name, _ in factors]
    known = all(name in UNITS or name in SYMBOLS for name in names)
    if any(name.lower().strip(".") in NO_NOUNS for name in re.findall(r"[A-Za-z.'-]+", phrase)):
        return None
    if wrapped:
        return _unit(factors)
    if known:
        # Without \text, the m of 5m is a variable. The m of 5 m may be a unit.
        single = any(len(name) == 1 for name in names)
        return None if single and not spaced else _unit(factors)
    last_word = re.findall(r"[A-Za-z]+", phrase)[-1]
    return _unit(factors) if spaced and _is_noun(last_word) else None


def _is_noun(word: str) -> bool:
    r"""Return whether a word without `\text` is a noun rather than a product of variables."""
    return word in NOUNS or (len(word) >= 4 and bool(re.search("[aeiou]", word)))


class _Phrase:
    """A parser of the words of a unit. It reads one word at a time."""

    def __init__(self):
        self.factors: list[tuple[str, int]] = []  # names and powers
        self.nouns: list[str] = []  # words that make one unit together
        self.sign = 1  # -1 after "per"
        self.prefix = 1  # of "square" and "cubic"
        self.expects_unit = True  # at the start, and after "per" and "square"
        self.readable = True

    def raise_last(self, power: int) -> None:
        """Raise the last unit to a power."""
        if not self.factors or self.nouns:
            self.readable = False
            return
        name, before = self.factors[-1]
        self.factors[-1] = (name, before * power)

    def read(self, word: str) -> None:
        """Add a word."""
        name = _canonical(word)
        expects_unit = self.expects_unit
        self.expects_unit = name == "per" or name in PREFIXES
        if name == "in" and not expects_unit:  # 12 apples in total
            return
        if name in MEASURES and self.factors and not self.nouns:
            return
        if name in PREFIXES:
            self.prefix = PREFIXES[name]
        elif name in SUFFIXES:
            self.raise_last(SUFFIXES[name])
        elif name == "per":
            self.sign = -1
        elif name in _COMPOUNDS:
            self.factors += [(_COMPOUNDS[name], 1), ("hour", -1)]
        elif name in UNITS or name in SYMBOLS:
            self.factors.append((name, self.sign * self.prefix))
            self.prefix = 1
        elif name not in FILLERS:
            self.nouns.append(name)

    def all_factors(self) -> list[tuple[str, int]]:
        """Return the names and powers, or an empty list if the phrase is not a unit."""
        if not self.readable or (self.prefix > 1 and not self.nouns):
            return []
        if not self.nouns:
            return self.factors
        shape = "square " if self.prefix == 2 else ""
        return [*self.factors, (shape + " ".join(self.nouns), self.sign)]


def _factors(phrase: str) -> list[tuple[str, int]]:
    """Return the names and powers of a phrase. A noun phrase is one name."""
    reader = _Phrase()
    for match in WORD.finditer(MARKUP.sub(" ", phrase)):
        if match["over"]:
            reader.sign = -1
            reader.expects_unit = True
        elif match["power"]:
            reader.raise_last(int(match["power"]))
        else:
            reader.read(match["name"])
    return reader.all_factors()


def _canonical(word: str) -> str:
    """Return the name of a unit in lower case and in the singular. Keep symbols such as Hz."""
    word = word.strip(".'-")
    if word in SYMBOLS:
        return word
    lower = word.lower()
    for name in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if name in UNITS:
            return name
    return lower.removesuffix("s") if len(lower) > 3 else lower


def _unit(factors: list[tuple[str, int]]) -> Unit:
    powers: dict[str, int] = {}
    size = Fraction(1)
    for name, power in factors:
        dimension, factor = UNITS.get(name, (name, Fraction(1)))
        base, exponent = _POWERS.get(dimension, (dimension, 1))
        powers[base] = powers.get(base, 0) + power * exponent
        size *= factor**power
    return Unit(frozenset((name, power) for name, power in powers.items() if power), size)


def same_dimension(a: Unit, b: Unit) -> bool:
    """Return whether two units have the same dimension. A degree may be a temperature."""
    if a.powers == b.powers:
        return True
    names = {name for name, _ in a.powers | b.powers}
    return len(names) == 2 and "angle" in names and bool(names & {"celsius", "fahrenheit"})
