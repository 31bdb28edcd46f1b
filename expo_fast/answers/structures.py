"""Parts of an answer: items of a list, brackets, sides of a relation, rows of a matrix."""

import re
from dataclasses import dataclass

from expo_fast.answers.number_words import digits_for_words
from expo_fast.answers.numbers import plain_number
from expo_fast.answers.spelling import strip_edges

MAX_ITEMS = 64

# A unit of text: a command, an escaped character or a character.
_PIECE = re.compile(r"\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING = frozenset([*"([{", r"\{", r"\langle", r"\lceil", r"\lfloor", r"\begin"])
_CLOSING = frozenset([*")]}", r"\}", r"\rangle", r"\rceil", r"\rfloor", r"\end"])


def connective(words: str, *more: str) -> re.Pattern[str]:
    r"""Return a pattern of words between parts, in \text{} or not, and of `more` patterns."""
    bare = rf"(?<![A-Za-z\\])(?:{words})(?![A-Za-z])"
    return re.compile("|".join([rf"\\text ?\{{ ?,? ?(?:{words}) ?\}}", bare, *more]))


AND = connective("and|or")

Separated = tuple[list[str], list[str]]  # parts, and the separators between them


def split_top(text: str, separators: frozenset[str]) -> Separated:
    """Split a text at separators outside brackets. A pair of brackets may differ: [1, 2)."""
    parts: list[str] = []
    found: list[str] = []
    depth = 0
    start = 0
    for piece in _PIECE.finditer(text):
        token = piece[0]
        if token in _OPENING:
            depth += 1
        elif token in _CLOSING:
            depth -= 1
        elif depth == 0 and token in separators:
            parts.append(text[start : piece.start()].strip())
            found.append(token)
            start = piece.end()
    parts.append(text[start:].strip())
    return parts, found


# a system of equations
CASES = re.compile(
    r"(?:\\\{ ?)?\\begin ?\{(?P<kind>cases|aligned|array)\}(?: ?\{[clr| ]*\})?"
    r"(?P<content>.*=.*)\\end ?\{(?P=kind)\}",
    re.DOTALL,
)
COMMA = frozenset(",")
SEMICOLON = frozenset(";")
LOOSE_COMMA = ", "
_LOOSE = "\0"  # stands for a comma and a blank
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
NO_ITEM = re.compile(r",0\d")  # items do not begin with 0: (1,000) is no point


def list_items(text: str, in_brackets: bool = False) -> list[str]:
    """Return the items of a list without its brackets: `1, 2 and 3`. Another text is one item.

    If some commas are followed by blanks or there is a connective, a comma in a number such as
    1,000 is part of the number. Without them, 1,100 is a number, but (1,100) has two items.
    """
    if not in_brackets or NO_ITEM.search(text):
        named = labelled(text)
        if plain_number(named.value) and "," not in named.label:  # 1,000 or x = 1,000
            return [text]
    system = CASES.fullmatch(text)
    if system:
        text = system["content"].replace(r"\\", ",").replace("&", " ")
    text = AND.sub(LOOSE_COMMA, text)
    for parts in (split_top(text, SEMICOLON)[0], _split_at_commas(text)):
        items = [digits_for_words(strip_edges(part)) for part in parts]
        items = [item for item in items if item]
        if len(items) > 1:
            return items
    return [strip_edges(text)]


def _split_at_commas(text: str) -> list[str]:
    """Split at the commas outside brackets that are not in numbers such as 1,000."""
    loose, _ = split_top(text.replace(LOOSE_COMMA, _LOOSE), frozenset(_LOOSE))
    parts = [part.replace(_LOOSE, LOOSE_COMMA) for part in loose]
    has_others = any(split_top(THOUSANDS.sub("0", part), COMMA)[1] for part in parts)
    return split_top(text, COMMA)[0] if has_others or len(parts) == 1 else parts


_BRACKET_START = re.compile(r"\(|\[|\\\{|\\langle(?![A-Za-z])")
_BRACKET_END = re.compile(r"(?:\)|\]|\\\}|\\rangle)$")


@dataclass(frozen=True)
class Bracketed:
    """A text in one pair of brackets: the brackets and the content."""

    opening: str
    content: str
    closing: str

    @property
    def is_round(self) -> bool:
        """Whether the brackets are `(` and `)`."""
        return self.opening == "(" and self.closing == ")"

    @property
    def is_set(self) -> bool:
        r"""Whether the brackets are `\{` and `\}`."""
        return self.opening == r"\{" and self.closing == r"\}"


def bracketed(text: str) -> Bracketed | None:
    """Return the parts of `(1, 2]` or `\\{3\\}`.

    Return None for a text without brackets, and for several pairs: `(x+1)(x+2)`.
    """
    start = _BRACKET_START.match(text)
    end = _BRACKET_END.search(text)
    if start is None or end is None or end.start() < start.end():
        return None
    depth = 0
    for piece in _PIECE.finditer(text):
        depth += (piece[0] in _OPENING) - (piece[0] in _CLOSING)
        if depth == 0 and piece.end() < len(text):
            return None
    if depth:
        return None
    opening = "(" if start[0] == r"\langle" else start[0]
    closing = ")" if end[0] == r"\rangle" else end[0]
    return Bracketed(opening, text[start.end() : end.start()].strip(), closing)


RELATIONS = frozenset(["=", "<", ">", r"\le", r"\ge", r"\ne", r"\approx", r"\equiv", r"\in"])
ORDERS = frozenset(["<", ">", r"\le", r"\ge", r"\ne"])

# A name before `=` or `\in`: x, x_1, f(x), AB, |AB|, \angle ABC, (x, y), \text{Area}.
LABEL = re.compile(
    r"(?:\\(?:text|vec|overline|overrightarrow|hat|bar|mathbf) ?\{ ?[A-Za-z .']+\}"
    r"|\\frac ?\{ ?[A-Z]+ ?\} ?\{ ?[A-Z]+ ?\}|\\Delta ?[A-Za-z]"
    r"|\\(?:angle|triangle) ?[A-Z]+|\|?[A-Z]{2,4}\|?"
    r"|\(? ?(?:[A-Za-z]|\\[A-Za-z]+)'?(?:_ ?(?:\{[^{}]*\}|\w))?'?"
    r"(?:\^ ?\{? ?-1 ?\}?)?(?: ?\( ?[A-Za-z](?: ?, ?[A-Za-z])* ?\))?"
    r"(?: ?[,:] ?[A-Za-z](?:_ ?(?:\{[^{}]*\}|\w))?)* ?\)?)"
)
FUNCTION = re.compile(r"(?:y|[A-Za-z]'?(?:\^ ?\{? ?-1 ?\}?)? ?\( ?[A-Za-z] ?\))")


@dataclass(frozen=True)
class Labelled:
    """A value and its name, which is "" if it has none."""

    label: str
    value: str


def labelled(text: str) -> Labelled:
    """Return the name and value of `x = 3`, `f(x) = 2x` or `D = (0, 1)`.

    For another text, the label is "".
    """
    parts, signs = split_top(text, RELATIONS)
    if not signs or signs[0] not in ("=", r"\in", r"\approx"):
        return Labelled("", text)
    label = parts[0].replace(" ", "").replace("{", "").replace("}", "")
    if LABEL.fullmatch(parts[0]) and label != r"\pi":  # a number, as in \pi \approx 3.14
        start = text.index(signs[0]) + len(signs[0])
        return Labelled(label, text[start:].strip())
    if signs == ["="] and re.fullmatch(r"[A-Za-z]", parts[1]):  # 3 = x
        return Labelled(parts[1], parts[0])
    return Labelled("", text)


MATRIX = re.compile(
    r"[(\[]? ?\\begin ?\{(?P<kind>[pbBvV]?matrix|smallmatrix|array)\}(?: ?\{[clr| ]*\})?"
    r"(?P<content>.*)\\end ?\{(?P=kind)\} ?[)\]]?",
    re.DOTALL,
)


def matrix_rows(text: str) -> tuple[str, list[list[str]]] | None:
    """Return the kind of a matrix and its rows of cells, or None for another text.

    The kind is "matrix", or the name of the environment for a determinant or a norm.
    """
    match = MATRIX.fullmatch(text)
    if match is None or r"\begin" in match["content"] or "=" in match["content"]:
        return None
    kind = match["kind"] if match["kind"].startswith(("v", "V")) else "matrix"
    rows = []
    for row in re.split(r"\\\\(?:\[[^\]]*\])?", match["content"]):
        if row.strip() and row.strip() != r"\hline":
            rows.append([strip_edges(cell.strip()) for cell in row.split("&")])
    return kind, rows


def expand_signs(text: str) -> list[str]:
    r"""Return `1 \pm 2` as `1 + 2` and `1 - 2`. Return another text as one item."""
    if r"\pm" not in text and r"\mp" not in text:
        return [text]
    upper = text.replace(r"\pm", "+").replace(r"\mp", "-")
    lower = text.replace(r"\pm", "-").replace(r"\mp", "+")
    return [upper, lower]


def same_label(a: str, b: str) -> bool:
    """Return whether two names are equal, or both name a function: y, f(x)."""
    return a == b or bool(FUNCTION.fullmatch(a) and FUNCTION.fullmatch(b))
