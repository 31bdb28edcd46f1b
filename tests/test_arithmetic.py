"""Properties of the built-in generator of problems: arithmetic, English, levels and splits."""

import operator
import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from expo_fast.data import arithmetic

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
WORDS = {"half": 2, "twice": 2, "a third": 3, "three times": 3, "a quarter": 4, "four times": 4}
WORDS |= {"a fifth": 5, "50%": 2, "25%": 4, "20%": 5, "10%": 10}  # 25% is 1/4
NUMBER = re.compile("|".join(WORDS) + r"|\d+")
ANSWERS = {  # of each template, as functions of the numbers in the order of its question
    1: (
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a + b,
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a - b,
    ),
    2: (
        lambda m, n, a: m * n + a,
        lambda m, n, a: m * n - a,
        lambda m, n, a: m * n + a,
        lambda m, n, a: m * n - a,
        lambda m, n, a: m * n + a,
        lambda n, m, a: m * n + a,
        lambda m, n, a: m * n - a,
        lambda a, f: a + f * a,
    ),
    3: (
        lambda m, n, a, b: m * n - a + b,
        lambda a, m, n, b: a + m * n - b,
        lambda n, m, a, b: m * n + a - b,
        lambda m, n, a, b: m * n - a + b,
        lambda m, n, a, b: m * n - a + b,
        lambda t, m, n, a: t - m * n - a,
        lambda m, n, a, b: m * n - a + b,
        lambda a, f, b: a + f * a - b,
    ),
    4: (
        lambda m, n, a, b, k: (m * n + a - b) / k,
        lambda m, n, k, j, a: m * n + k * j - a,
        lambda t, m, n, k, j: t - m * n - k * j,
        lambda n, m, a, b, k: (m * n - a + b) / k,
        lambda t, n, m, a, k: (t - m * n - a) / k,
        lambda m, n, a, k, j: m * n + a - k * j,
        lambda m, n, a, b, k: (m * n - a + b) / k,
    ),
    5: (
        lambda m, n, d, a, b: m * n - m * n / d - b - (a + m * n / d),
        lambda t, p, d, m, n: t * (1 - Fraction(1, p)) * (1 - Fraction(1, d)) + m * n,
        lambda m, n, d, f: m * n * (1 - Fraction(1, d)) * (1 + f),
        lambda m, n, p, d: m * n * ((1 - Fraction(1, p)) * (1 - Fraction(1, d)) - Fraction(1, p)),
        lambda t, m, n, k, j, p: t - (m * n + k * j) * (1 - Fraction(1, p)),
        lambda m, n, d, a, b: m * n * (1 - Fraction(2, d)) - a - b,
        lambda a, f, b, d: (a + f * a + f * a - b) * (1 + Fraction(1, d)),
    ),
}
N = 2000  # problems of each level


@pytest.fixture(scope="module")
def generated() -> dict[int, list[arithmetic.WordProblem]]:
    return {v: [arithmetic.word_problem(v, i) for i in range(N)] for v in arithmetic.LEVELS}


@pytest.fixture(scope="module")
def every_problem(generated) -> list[arithmetic.WordProblem]:
    return [problem for problems in generated.values() for problem in problems]


def test_the_global_random_state_is_neither_read_nor_changed():
    random.seed(0)
    before = random.getstate()
    one = arithmetic.word_problem(5, 0)
    assert random.getstate() == before
    random.seed(1)
    assert arithmetic.word_problem(5, 0) == one


def test_splits_share_no_question_for_any_seeds():
    train, evaluation = (
        {
            arithmetic.word_problem(level, i, split=split, seed=seed).question
            for level in (1, 2)
            for seed in range(4)
            for i in range(500)
        }
        for split in arithmetic.SPLITS
    )
    assert not train & evaluation
    assert {arithmetic.split_of(q) for q in evaluation} == {"eval"}


def test_every_equation_is_right_and_the_last_is_the_answer(generated):
    for level, problems in generated.items():
        for problem in problems:
            steps = EQUATION.findall(problem.solution)
            for a, sign, b, c in steps:
                assert SIGNS[sign](int(a), int(b)) == int(c), problem
            assert int(steps[-1][-1]) == problem.answer > 0
            assert problem.solution.endswith(f"\nThe answer is \\boxed{{{problem.answer}}}.")
            assert problem.solution.count("=") == len(steps), level


def test_every_operand_was_given_or_computed_before(every_problem):
    for problem in every_problem:
        known = set(numbers(problem.question))
        for a, _, b, c in EQUATION.findall(problem.solution):
            assert {int(a), int(b)} <= known, problem
            known.add(int(c))


def test_every_number_of_the_question_is_used(every_problem):
    for problem in every_problem:
        operands = {int(n) for a, _, b, _ in EQUATION.findall(problem.solution) for n in (a, b)}
        assert set(numbers(problem.question)) <= operands, problem


def test_each_level_has_its_operations(generated):
    def shapes(level):
        return {
            tuple(sign for _, sign, _, _ in EQUATION.findall(p.solution)) for p in generated[level]
        }

    assert shapes(1) == {("+",), ("-",)}
    assert shapes(2) == {("*", "+"), ("*", "-")}
    assert {"".join(sorted(s)) for s in shapes(3)} == {"*+-"}
    assert {"".join(sorted(s)) for s in shapes(4)} == {"*+-/", "**+-"}
    assert {len(s) for s in shapes(5)} == {5, 6}
    assert all("/" in s for s in shapes(5))


def test_numbers_of_the_low_levels_are_small(generated):
    def largest(level):
        return max(int(n) for p in generated[level] for n in re.findall(r"\d+", p.solution))

    assert [largest(level) <= bound for level, bound in ((1, 40), (2, 101), (3, 121))] == [True] * 3
    assert max(len(p.solution.split()) for p in generated[2]) <= 45


def test_questions_and_solutions_are_well_formed_sentences(every_problem):
    for problem in every_problem:
        text = f"{problem.question}\n{problem.solution}"
        assert not re.search(r"\b[01]\b(?!%)", text), text  # "1 apples"
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiouh]|  | \n|\[|None", text), text
        assert not re.search(r"[{}]", text.replace(f"{{{problem.answer}}}", "")), text
        assert re.fullmatch(r"([A-Z0-9][^.?]*[.] )*[A-Z][^.?]*\?", problem.question), text
        assert all(re.match(r"[A-Z0-9]", step) for step in problem.solution.split("\n")), text


def test_answers_equal_the_formula_of_each_template(generated):
    for level, problems in generated.items():
        seen = Counter()
        for problem in problems:
            which = next(i for i, t in enumerate(arithmetic.templates(level)) if fits(t, problem))
            assert ANSWERS[level][which](*numbers(problem.question)) == problem.answer, problem
            seen[which] += 1
        assert len(seen) == len(ANSWERS[level]) == len(arithmetic.templates(level)) >= 6
        assert min(seen.values()) > N / len(seen) / 2


def numbers(question: str) -> list[int]:
    return [WORDS[word] if word in WORDS else int(word) for word in NUMBER.findall(question)]


def fits(template: arithmetic.Template, problem: arithmetic.WordProblem) -> bool:
    pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(template.question))
    return re.fullmatch(pattern, problem.question) is not None


def test_problems_rarely_repeat(generated):
    for level, problems in generated.items():
        distinct = len({p.question for p in problems})
        assert distinct > (0.98 if level == 1 else 0.99) * N, level  # measured: 0.9895 at level 1


def test_answers_are_not_in_the_question_and_cannot_be_guessed(generated):
    """No number of the question is the answer, and no answer is too common."""
    for level, problems in generated.items():
        assert not any(str(p.answer) in re.findall(r"\d+", p.question) for p in problems)
        if level >= 2:
            assert Counter(p.answer for p in problems).most_common(1)[0][1] < 0.08 * N, level
