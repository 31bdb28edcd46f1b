"""Arithmetic word problems with worked solutions: seeded, unlimited, of levels 1 to 5.

Level 1 is one sum or difference. Level 2 is a product and one of those. Level 3 is a product, a
difference and a sum. Level 4 adds a division or a second product. Level 5 takes five or six steps
with fractions, percentages and comparisons.

Every number, given or computed, is an integer of at least 2, so plurals are always right. The
answer is never a number of the question, so copying one is never right.

A hash of a problem's text decides its split. So train and eval share no problem under any seeds.
"""

import hashlib
import operator
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from expo_fast.data.arithmetic_templates import TEMPLATES

SPLITS = ("train", "eval")
LEVELS = (1, 2, 3, 4, 5)
DEFAULT_COUNT = 1000  # problems of one load
EVAL_SHARE = 1 / 8  # of all texts
LARGEST = 300  # of the computed numbers, so that a small model has a chance

# Where the letters of a template are drawn from.
RANGES = {
    "a": range(2, 21),  # terms
    "b": range(2, 21),
    "c": range(2, 21),
    "j": range(2, 10),  # factors
    "k": range(2, 10),
    "m": range(2, 10),
    "n": range(2, 10),
    "t": range(20, 101),  # a total to subtract from
    "f": range(2, 5),  # {times} as many
    "d": range(2, 6),  # {fraction} of them, 1/d
    "p": (2, 4, 5, 10),  # {percent}% of them, {part}, 1/p
}
TIMES = {2: "twice", 3: "three times", 4: "four times"}
PARTS = {
    2: "half",
    3: "a third",
    4: "a quarter",
    5: "a fifth",
    10: "a tenth",
}

WOMEN = "Anna Clara Emma Grace Hannah Julia Laura Maria Nina Olivia Priya Rosa Sara Yuki Zoe Leila"
MEN = "Adam Ben Carlos David Felix Henry Ivan Jack Kofi Leo Marco Noah Omar Peter Ravi Tom"
ITEMS = (
    "beads books buttons candles cards coins crayons erasers marbles pencils pens postcards "
    "ribbons shells stamps stickers toys tiles"
)
FOODS = "apples bananas carrots cookies muffins oranges pancakes pears plums sandwiches tomatoes"
FRUITS = "apples apricots cherries figs lemons mangoes oranges peaches pears plums"
BOXES = {
    "bags": "bag",
    "baskets": "basket",
    "boxes": "box",
    "crates": "crate",
    "packs": "pack",
}

EQUATION = re.compile(r"\[(\w) ([-+*/]) (\w) = (\w)\]")
OPERATIONS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}


Numbers = dict[str, int]  # by the letter of a template


class WordProblem(NamedTuple):
    """A generated problem."""

    question: str
    answer: int
    solution: str  # one step per line, the last "The answer is \boxed{N}."


class Equation(NamedTuple):
    """One computation of a template, in letters."""

    left: str
    sign: str
    right: str
    result: str


class Template(NamedTuple):
    """A parsed template. `question` and `solution` have format fields."""

    question: str
    solution: str
    equations: tuple[Equation, ...]  # in the order of computation
    drawn: tuple[str, ...]  # the letters that no equation computes

    @property
    def answer(self) -> str:
        """The letter of the answer."""
        return self.equations[-1].result


@cache
def templates(level: int) -> tuple[Template, ...]:
    """Return the parsed templates of a level."""
    texts = TEMPLATES[level].strip().split("\n\n")
    return tuple(map(_parse, texts))


def _parse(text: str) -> Template:
    found = EQUATION.findall(text)
    equations = tuple(Equation(*letters) for letters in found)
    operands: set[str] = set()
    for equation in equations:
        operands |= {equation.left, equation.right}
    computed = {equation.result for equation in equations}
    with_fields = EQUATION.sub(r"{\1} \2 {\3} = {\4}", text)
    question, steps = with_fields.split("\n", 1)
    # a format string, in which braces are doubled
    ending = "\nThe answer is \\boxed{{{" + equations[-1].result + "}}}."
    return Template(
        question=question,
        solution=steps + ending,
        equations=equations,
        drawn=tuple(sorted(operands - computed)),
    )


def word_problem(
    level: int,
    index: int,
    *,
    split: str = "train",
    seed: int = 0,
) -> WordProblem:
    """Return problem `index` of an endless sequence.

    The same arguments always give the same problem. Raises ValueError for an unknown level or
    split.
    """
    if level not in LEVELS or split not in SPLITS:
        known = f"levels {LEVELS[0]}-{LEVELS[-1]} and splits {', '.join(SPLITS)}"
        raise ValueError(f"builtin:arithmetic has {known}, not level {level} of split {split!r}")
    rng = random.Random(f"{seed}/{split}/{level}/{index}")
    while True:
        problem = _draw(level, rng)
        if split_of(problem.question) == split:
            return problem


def rows(
    split: str,
    levels: Sequence[int],  # taken in turns; all if empty
    count: int | None,  # None: DEFAULT_COUNT
    seed: int,
) -> Iterator[dict[str, object]]:
    """Yield `count` problems as data rows."""
    chosen = sorted(set(levels)) or LEVELS
    for number in range(count or DEFAULT_COUNT):
        index, turn = divmod(number, len(chosen))
        level = chosen[turn]
        problem = word_problem(level, index, split=split, seed=seed)
        yield {
            "id": f"arithmetic/{split}/seed-{seed}/level-{level}/{index}",
            "problem": problem.question,
            "answer": problem.answer,
            "solution": problem.solution,
            "level": level,
        }


def split_of(question: str) -> str:
    """Return the split that a hash of the question puts it into."""
    digest = hashlib.sha256(question.encode()).digest()
    share = int.from_bytes(digest[:8]) / 2**64  # in [0, 1)
    return "eval" if share < EVAL_SHARE else "train"


def _draw(level: int, rng: random.Random) -> WordProblem:
    template = rng.choice(templates(level))
    words = _draw_words(rng)
    while True:
        drawn: Numbers = {}
        for letter in template.drawn:
            drawn[letter] = rng.choice(RANGES[letter])
        numbers = _compute(template, drawn)
        if numbers is None:
            continue
        fields = words | numbers | _in_words(numbers)
        question = template.question.format_map(fields)
        answer = numbers[template.answer]
        if str(answer) not in re.findall(r"\d+", question):
            solution = template.solution.format_map(fields)
            return WordProblem(question, answer, solution)


def _compute(template: Template, drawn: Numbers) -> Numbers | None:
    """Return all numbers of a template, or None if one is not an integer from 2 to LARGEST."""
    numbers = dict(drawn)
    for left, sign, right, result in template.equations:
        a = numbers[left]
        b = numbers[right]
        if sign == "/" and a % b:
            return None
        value = OPERATIONS[sign](a, b)
        if not 2 <= value <= LARGEST:
            return None
        numbers[result] = value
    return numbers


def _draw_words(rng: random.Random) -> dict[str, str]:
    """Draw the words of a template: three people, the pronouns of the first, and things."""
    women = WOMEN.split()
    first, second, third = rng.sample(women + MEN.split(), 3)
    if first in women:
        he, his, him = "she", "her", "her"
    else:
        he, his, him = "he", "his", "him"
    boxes, box = rng.choice(list(BOXES.items()))
    return {
        "A": first,
        "B": second,
        "C": third,
        "he": he,
        "him": him,
        "He": he.title(),
        "His": his.title(),
        "boxes": boxes,
        "box": box,
        "items": rng.choice(ITEMS.split()),
        "foods": rng.choice(FOODS.split()),
        "fruits": rng.choice(FRUITS.split()),
    }


def _in_words(numbers: Numbers) -> dict[str, object]:
    """Return the words for the numbers that a template names in words."""
    words: dict[str, object] = {}
    if "f" in numbers:
        words["times"] = TIMES[numbers["f"]]
    if "d" in numbers:
        words["fraction"] = PARTS[numbers["d"]]
    if "p" in numbers:
        words["part"] = PARTS[numbers["p"]]
        words["percent"] = 100 // numbers["p"]
    return words
