"""A common spelling for equal answers: Unicode, spaces, LaTeX styles, signs, prose around them.

`tidy` applies a table of substitutions, each linear in the length of the text. It keeps what
distinguishes answers: brackets, order, words and units.
"""
# ruff: noqa: RUF001  (the characters that look like others are intended)

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache

from expo_fast.answers.number_words import digits_for_words

SYMBOLS = {
    "−": "-",
    "–": "-",
    "—": "-",
    "×": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∗": "*",
    "⁄": "/",
    "∕": "/",
    "π": r"\pi ",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≡": r"\equiv ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∖": r"\setminus ",
    "∅": r"\emptyset ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "ℝ": r"\mathbb{R} ",
    "…": r"\ldots ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "′": "'",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "¢": r"\text{ cents }",
    "℃": r"^\circ \text{C}",
    "℉": r"^\circ \text{F}",
    "€": r"\text{ euros }",
    "£": r"\text{ pounds sterling }",
    "¥": r"\text{ yen }",
    "，": ",",
    "；": ";",
    "：": ":",
    "。": ".",
}
_GREEK_LETTERS = "αβγδεζηθικλμνξρστυφχψωΓΔΘΛΞΣΦΨΩ"
_GREEK_NAMES = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
)
# The names of Unicode are not those of LaTeX: GREEK SMALL LETTER LAMDA.
GREEK = {
    letter: rf"\{name} " for letter, name in zip(_GREEK_LETTERS, _GREEK_NAMES.split(), strict=True)
}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")


def spell(char: str) -> str:
    """Return a Unicode character as LaTeX: a digit of any script, a vulgar fraction or a sign."""
    if char in SYMBOLS:
        return SYMBOLS[char]
    kind, *codes = unicodedata.decomposition(char).split() or [""]
    if kind == "<fraction>":
        characters = [chr(int(code, 16)) for code in codes]
        numerator, denominator = "".join(characters).split("\N{FRACTION SLASH}")
        return rf"\frac{{{numerator}}}{{{denominator}}}"
    match unicodedata.category(char):
        case "Nd":
            return str(unicodedata.decimal(char))
        case "Zs":
            return " "
        case "Cf":  # zero-width and bidirectional controls
            return ""
    if kind in ("<wide>", "<font>", "<small>"):  # full width, mathematical bold, small forms
        return "".join(map(spell, unicodedata.normalize("NFKC", char)))
    return GREEK.get(char, char)


def _power(match: re.Match[str]) -> str:
    return f"^{{{match[0].translate(SUPERSCRIPTS)}}}"


def _index(match: re.Match[str]) -> str:
    return f"_{{{match[0].translate(SUBSCRIPTS)}}}"


def _overlined(match: re.Match[str]) -> str:
    digits = match[0].replace("\u0305", "")
    return rf"\overline{{{digits}}}"


def _root(match: re.Match[str]) -> str:
    degree = {"√": "", "∛": "[3]", "∜": "[4]"}[match[1]]
    return rf"\sqrt{degree}{{{match[2] or match[3]}}}"


def _font(match: re.Match[str]) -> str:
    r"""Return the content of a font command, in `\text{}` if it contains words."""
    content = match[1]
    if re.search(r"[A-Za-z]{2}|[A-Za-z]\.", content):
        return rf"\text{{{content}}}"
    return f" {content} "


def _joined(match: re.Match[str]) -> str:
    return match[0].replace(" ", "")


Replacement = str | Callable[[re.Match[str]], str]


def _table(*rows: tuple[str, Replacement]) -> list[tuple[re.Pattern[str], Replacement]]:
    return [(re.compile(pattern), replacement) for pattern, replacement in rows]


# Substitutions for texts beyond ASCII. They run before `spell` replaces single characters.
UNICODE = _table(
    (r"[⁰¹²³⁴-⁹⁺⁻ⁿ]+", _power),
    (r"[₀-₉]+", _index),
    (r"((?:\d\u0305)+)", _overlined),
    (r"([√∛∜])\s*(?:(\d+|[a-z])|\{([^{}]*)\}|(?=\())", _root),
)

LATEX = _table(
    # Remove spacing and delimiters, which have no meaning. Keep `\\`, which ends rows of a matrix.
    (r"(?<=\d)(?:,\\!|\{,\}) *(?=\d{3}(?!\d))", ""),
    (r"\\!\s*|(?<!\\)\\[()\[\]]|\$\$", ""),
    (r"\\pounds(?![A-Za-z])", r"\\text{ pounds sterling }"),
    (r"US ?\\?\$|\\\$|\$(?=\s*[\d.])(?![^$]*\$)", " USD "),  # currency, not a delimiter
    (r"\$", ""),
    (r"\{,\}", ","),
    (r"(?<!\\)(?:\\[,;:> ]|\\q?quad\b|\\(?:hspace|vspace|phantom)\{[^{}]*\})|[~\s\x00-\x1f]", " "),
    (r"\\(?:left|right)\s*\.", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])", " "),
    # Use one command for each meaning.
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
    (r"(?<![A-Za-z\\])C ?\( ?(\d+) ?, ?(\d+) ?\)", r"\\binom{\1}{\2}"),
    (r"(?:\{ ?\})?(?<![\w}])_ ?\{? ?(\d+) ?\}? ?C ?_ ?\{? ?(\d+) ?\}?", r"\\binom{\1}{\2}"),
    (r"\{ ?(\d+) ?\\choose ?(\d+) ?\}|(\d+) ?\\choose ?(\d+)", r"\\binom{\1\3}{\2\4}"),
    (r"\\(?:leq?(?:slant)?|leqq)(?![A-Za-z])|<=|=<", r"\\le "),
    (r"\\(?:geq?(?:slant)?|geqq)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\neq?(?![A-Za-z])|\\not ?=|(?<![\w)}])!=", r"\\ne "),  # 5!=120 is an equation
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\lbrace(?![A-Za-z])", r"\\{"),
    (r"\\rbrace(?![A-Za-z])", r"\\}"),
    (r"\\(?:varnothing|emptyset)(?![A-Za-z])|\\\{ ?\\\}", r"\\emptyset "),
    (r"\\c?dots(?![A-Za-z])|\\ldots(?![A-Za-z])|\.\.\.+", r"\\ldots "),
    (r"(?:\{\})?\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])", r"^\\circ "),
    (r"\\%", "%"),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"\*\*(?=[\w({\-])(?<=[\w)}]\*\*)", "^"),
    (r"\\(?:mathbb|mathbf|bf|Bbb) ?\{? ?R ?\}?(?![A-Za-z])", r"\\mathbb{R} "),
    # Write words in any font as \text{}.
    (
        r"\\(?:text(?:normal|rm|bf|it|sf|tt)?|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname|bm"
        r"|boldsymbol|emph) ?\{([^{}]*)\}",
        _font,
    ),
    (r"\\text ?\{ ?\(? ?mod(?:ulo)? ?\)? ?\}", " mod "),
    (r"\\lg(?![A-Za-z])", r"\\log_{10} "),
    # Write plain names of functions and constants as commands.
    (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])(?:infinity|infty|inf)(?![A-Za-z])", r"\\infty "),
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup "),
    # Join groups of digits: 2 500 is 2500, while 4{5} is a product.
    (r" +", " "),
    (r"(?<![\d.])\d{1,3}(?: \d{3})+(?!\d)", _joined),
)

# A text that was escaped twice for JSON has every backslash twice.
ESCAPED_TWICE = re.compile(
    r"\\\\(?:[dtc]?frac|sqrt|pi|text|cdot|times|left|begin|infty|pm)(?![a-z])"
)
NEGATION = r"(?:not|no|nor|or|and|isn|never|wrong|than|if|but|maybe|except|unless|versus|vs)"
# Words before the only formula of a text: Thus $x = 3$
PROSE_BEFORE = re.compile(
    rf"(?!.*\b{NEGATION}\b.*\$)[A-Za-z][A-Za-z ,:']*(?=\$[^$]+\$[^$]*$|\\\(|\\\[)", re.IGNORECASE
)
PROSE_AFTER = re.compile(
    r"\$ is (?:the|my|our) (?:final )?(?:answer|solution|result)\.?$", re.IGNORECASE
)
LEAD_IN = re.compile(
    r"(?:\\text\{)?\s*(?:(?:so|thus|hence|therefore),?\s+)?(?:the )?(?:final )?"
    r"(?:answer|result|solution)(?:\s+is|:| =)\s*:?\s*\}?",
    re.IGNORECASE,
)
ABOUT = re.compile(
    r"(?:\\approx|\\text\{\s*(?:about|approximately|around|roughly)\s*\}|about|approximately)"
    r"(?![A-Za-z])\s*",
    re.IGNORECASE,
)
EDGES = re.compile(r"^(?:\\\\|[\s,;:=`]|\*\*)+|(?:\\\\|\\|[\s,;:`]|\*\*|(?<!\\ldots)\.)+$")
# 6th, 6^{th}, 6\text{th}
ORDINAL = re.compile(r"(\d+)(?: ?\^ ?)?[{ ]*(?:\\text ?\{ ?)?(?:st|nd|rd|th)[} ]*")
NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")  # a text that needs no change
WRAPPED = re.compile(r"\\text ?\{([^{}]*)\}")


@lru_cache(maxsize=4096)  # the samples of a group share their reference and many answers
def tidy(text: str) -> str:
    """Return an answer in the spelling that equal answers share."""
    if NUMBER.fullmatch(text):
        return text
    if not text.isascii():
        for pattern, replacement in UNICODE:
            text = pattern.sub(replacement, text)
        text = "".join(map(spell, text))
    text = unescaped(text.strip())
    before = PROSE_BEFORE.match(text)
    if before:
        text = PROSE_AFTER.sub("$", text[before.end() :])
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    text = strip_edges(text)
    text = LEAD_IN.sub("", text, count=1) if LEAD_IN.match(text) else text
    text = ABOUT.sub("", text, count=1) if ABOUT.match(text) else text
    text = strip_edges(text)
    ordinal = ORDINAL.fullmatch(text)
    if ordinal:
        return ordinal[1]
    wrapped = WRAPPED.fullmatch(text)
    if wrapped:
        text = strip_edges(wrapped[1])
    return digits_for_words(text)


def unescaped(text: str) -> str:
    """Return the text with single backslashes if they were doubled."""
    if ESCAPED_TWICE.search(text) and r"\begin" not in text.replace(r"\\begin", ""):
        return text.replace("\\\\", "\\")
    return text


def strip_edges(text: str) -> str:
    """Return the text without surrounding braces, quotes, full stops, commas and line ends."""
    for _ in range(4):
        before = text
        text = EDGES.sub("", text)
        if len(text) > 1 and text[0] == text[-1] == '"':
            text = text[1:-1]
        if text.startswith("{") and _closes_at_end(text):
            text = text[1:-1]
        if text == before:
            break
    return text


def _closes_at_end(text: str) -> bool:
    """Return whether the brace that opens the text is closed by its last character."""
    depth = 0
    escaped = False
    for place, char in enumerate(text):
        if escaped:
            escaped = False
            continue
        escaped = char == "\\"
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return place == len(text) - 1
    return False


# A space stays between letters or digits, and after a comma: 1, 234 is not 1,234.
LOOSE_SPACE = re.compile(r"(?<![0-9A-Za-z,]) | (?![0-9A-Za-z])")
BRACED = re.compile(r"([\^_]) ?\{ ?(-?\w) ?\}")


def squash(text: str) -> str:
    """Return a tidy text without the spaces and braces that LaTeX does not need."""
    return BRACED.sub(r"\1\2", LOOSE_SPACE.sub("", text))
