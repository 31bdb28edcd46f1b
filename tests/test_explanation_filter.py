"""Which texts of explanations are accepted for training."""

import pytest

from expo_fast.algorithms.explanation_filter import (
    before_claim,
    copies_answer,
    leaks,
    masked,
    miscalculates,
    names_another_answer,
    repeats_answer,
    states_answer_first,
)


@pytest.mark.parametrize(
    "text",
    [
        "The given answer is 5.",
        "As stated, it is 5.",
        "We are told that the answer is 5.",
        "Working backwards from 5 we get 3.",
        "To match the correct answer we add 2.",
        "The answer has been provided, so 5.",
        "Since the known answer is 5",
        "So (The answer is 5.) we add 2.",
        "According to the answer given, 5.",
        "The answer to this problem was given to us.",
    ],
)
def test_a_text_that_mentions_a_given_answer_leaks(text: str):
    assert leaks(text)


@pytest.mark.parametrize(
    "text",
    [
        r"First 7000 + 319 = 7319. The answer is \boxed{7319}.",
        "She was given 3 apples and bought 4 more, so she has 3 + 4 = 7.",
        "The answer is \\boxed{7}.",
        "The final price is 7 dollars.",
        "Therefore, the final answer is \\boxed{5}.",
        "There are 12 apples, as given in the problem.",
        "She needs to reach the correct total.",
        "The correct answer is B.",
    ],
)
def test_a_text_of_reasoning_does_not_leak(text: str):
    assert not leaks(text)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("The answer is 27 because 3 * 9 is 27.", True),
        ("27", True),
        ("\\boxed{27}", True),
        ("3 * 9 = 27.", False),  # the result of an equation is derived
        ("There are 3 boxes of 9 pens, which makes 27 pens.", False),
        ("In 127 days and 27.5 hours", False),
        ("It is $27.00 for all of it.", True),
    ],
)
def test_an_answer_stated_before_any_reasoning_is_found(text: str, first: bool):
    assert states_answer_first(text, "27", "3 boxes hold 9 pens each. How many pens?") is first


@pytest.mark.parametrize(
    ("text", "answer", "is_copied"),
    [
        (r"3 + 4 is a sum. \boxed{7}", "7", True),
        (r"3 + 4 = 17. \boxed{7}", "7", True),
        (r"3 + 4 = 7.5. \boxed{7}", "7", True),
        (r"3 + 4 = 7. \boxed{7}", "7", False),
        (r"3 + 4 = \boxed{7}", "7", False),
        (r"$3 + 4 = $ \boxed{7}", "7", False),
        (r"Half of it. \boxed{\frac{1}{2}}", r"\frac{1}{2}", False),  # has many spellings
        (r"3 * 400 = $1,200 in all. \boxed{1200}", "1200", False),
        (r"3 * 400 = 1{,}200 in all. \boxed{1,200}", "1200", False),
        (r"3 * 400 is 12,000. \boxed{1200}", "1200", True),
        (r"3 * 400 is 1,2000. \boxed{1200}", "1200", True),
        (r"5 / 2 = 2.50 dollars. \boxed{2.5}", "2.5", False),
        (r"7.00 is left. \boxed{7}", "7", False),
        ("3 - 10 = \N{MINUS SIGN}7, so \\boxed{-7}", "-7", False),
        (r"He pays 18 dollars. \boxed{$18.00}", "$18.00", False),
        ("He has 9.\nThe answer is 7.\nThe answer is \\boxed{7}.", "7", True),
        (r"The final answer is: $7$. So \boxed{7}", "7", True),
        (r"The answer is 3 + 4 = 7. So \boxed{7}", "7", False),
        (r"The answer is 7.50. So \boxed{7}", "7", True),
        ("He has 7.\nThe answer is \\boxed{7}.", "7", False),
        ("The answer is easy to find.\n3 + 4 makes 7. \\boxed{7}", "7", False),
    ],
)
def test_an_answer_that_no_equation_derives_is_a_copy(text: str, answer: str, is_copied: bool):
    assert copies_answer(text, answer) is is_copied


@pytest.mark.parametrize(
    ("text", "false"),
    [
        ("6 * 4 = 24 and 24 - 5 = 19.", False),
        ("6 * 4 = 26 pens.", True),
        ("6*4=26", True),
        ("First 24 - 5 = 19, then 19 + 2 = 20.", True),
        ("$12 + $3.50 = $15.50", False),
        ("$1,200 + 300 = 1,600", True),
        ("2 / 3 = 0.67", False),
        ("2 / 3 = 0.7", False),
        ("2 / 3 = 0.6", True),
        ("7 / 2 = 3", True),
        ("7 \u00f7 2 = 3.5 and 3 \u00d7 4 = 12 and 3 x 4 = 12", False),
        ("3 \u00d7 4 = 13", True),
        ("5 / 0 = 5", True),
        ("3 - 5 = -2", False),  # a negative result is not judged
        ("2 + 3 * 4 = 14", False),  # a longer expression is not judged
        ("3 + 4 = 7 + 1 = 8", False),
        ("x1 + 2 = 9, version 1.2 + 2 = 9", True),  # the second is an equation of numbers
        ("5 * 4 = 20%", False),
        (r"20 / 100 = 20\%", False),
        (r"3 \times 4 = 12, 3 \cdot 4 = 12 and 7 \div 2 = 3.5", False),
        ("3 \u00b7 4 = 13", True),
        (r"3 \times 4 = 13", True),
        (r"7\div2=3", True),
        ("9 \u2212 5 = 4", False),
        ("9 \u2212 5 = 3", True),
        # a part of a longer expression is not judged, for any sign before or behind it
        ("12 \u00d7 5 + 3 = 63 and 12\u00d75+3=63 and 10 \u00f7 2 + 3 = 8", False),
        (r"12 \times 5 + 3 = 63 and 2 \cdot 3 + 4 = 10", False),
        ("2^3 + 4 = 12 and 2 ^ 3 + 4 = 12", False),
        ("10 \u2212 2 + 3 = 11", False),
        (r"5 + 5 = 2 \times 5 and 5 + 4 = 3^2 and 5 + 4 = 3 ^ {2}", False),
        (r"7 / 2 = 3 \frac{1}{2}", False),
        ("6 * (2 + 3) = 30 and 5 + 5 = 2 * (2 + 3)", False),
        (r"2 + 2 = 5 \text{ apples}", True),
        ("no equation at all", False),
    ],
)
def test_false_equations_are_found(text: str, false: bool):
    assert miscalculates(text) is false


@pytest.mark.parametrize(
    ("text", "answer", "another"),
    [
        (r"15 + 8 = 23. The answer is 25. The answer is \boxed{23}.", "23", True),
        (r"The answer is 23. The answer is \boxed{23}.", "23", False),
        (r"So the final answer is $1,200. \boxed{1200}", "1200", False),
        (r"So the final answer is $1,200. \boxed{200}", "200", True),
        (r"The answer is \textbf{2}. \boxed{22}", "22", True),
        (r"Answer: \boxed{4}, or rather \boxed{8}", "8", True),
        ("The answer is 18 - 10 = 8.", "8", False),
        ("The answer is 2*4 = 8.", "8", False),
        (r"The answer is 2 \times 4 = 8.", "8", False),
        (r"The answer is 2\cdot4 = 8.", "8", False),
        ("The answer is 18 \u2212 10 = 8.", "8", False),
        (r"The answer is 25\% of 32, which is 8.", "8", False),
        (r"The answer is 2\frac{1}{2} more than 5.5.", "8", False),
        ("The answer is 25% of 32, which is 8.", "8", False),
        ("The answer is 3.5, not 3.", "3", True),
        ("The answer is 3.5.", "3.5", False),
        ("The answer is -6.", "6", False),  # a dash is a minus too
        ("The answer is\n5 more.", "8", False),
        ("The answer is Sunday, day 7.", "Sunday", False),
        ("The answer is 7.", "Sunday", False),
    ],
)
def test_an_earlier_different_answer_is_found(text: str, answer: str, another: bool):
    assert names_another_answer(text, answer) is another


@pytest.mark.parametrize(
    ("text", "answer", "before"),
    [
        ("8 + 13 = 21.\n\nThe answer is 21.", "21", "8 + 13 = 21."),
        ("8 + 13 = 21, so the answer is 21. More text.", "21", "8 + 13 = 21"),
        ("1. Add.\n2. 8 + 13 = 21.\n3. So the answer is 21", "21", "1. Add.\n2. 8 + 13 = 21."),
        ("x = 3.5. So the answer is 3.5 m.", "3.5", "x = 3.5."),
        ("2 + 5 = 7. Felix's answer is 7.", "7", "2 + 5 = 7."),
        ("2 + 5 = 7. The answer is 7. The answer is 7.", "7", "2 + 5 = 7."),
        ("2 + 5 = 7. The answer is 8. The answer is 7.", "7", "2 + 5 = 7. The answer is 8."),
        ("2 + 5 = 7. That is all. ", "7", "2 + 5 = 7. That is all."),
        ("The answer is 7", "7", ""),
        ("Let it be x. The answer is x+1.", "x+1", "Let it be x. The answer is x+1."),
    ],
)
def test_the_text_before_the_claimed_answer_is_returned(text: str, answer: str, before: str):
    assert before_claim(text, answer) == before


def test_a_repeated_answer_is_found():
    assert repeats_answer(r"It is \boxed{7}. Yes, \boxed{7}")
    assert repeats_answer(r"The answer is 7. The answer is \boxed{7}.")
    assert not repeats_answer(r"To answer, add: 3 + 4 = 7. The answer is \boxed{7}.")


def test_an_answer_stated_first_may_be_a_number_with_commas_or_a_word():
    assert states_answer_first("1,200 it is", "1200", "How many?")
    assert not states_answer_first("1,200 of them", "200", "How many?")
    assert states_answer_first("Sunday, since it is late", "Sunday", "Which day?")
    assert not states_answer_first("Sundays are late", "Sunday", "Which day?")


@pytest.mark.parametrize(
    ("text", "answer", "hidden"),
    [
        ("4 * 6 = 24, so 24 pens.", "24", "4 * 6 = ?, so ? pens."),
        ("1,200 or 1200.0 but not 12000", "1200", "? or ? but not 12000"),
        ("nothing of it", "24", "nothing of it"),
        ("Sunday after Sundays", "Sunday", "? after Sundays"),
    ],
)
def test_an_answer_is_masked_in_any_spelling(text: str, answer: str, hidden: str):
    assert masked(text, answer) == hidden


def test_an_answer_that_is_in_the_question_may_be_stated_first():
    question = "Tom has 5 apples and gives 0 away. How many has he?"
    assert not states_answer_first(
        "Tom has 5 apples and gives 0 away, so 5 - 0 = 5.", "5", question
    )
    assert states_answer_first("The answer is 5 because he keeps all.", "5", question)
