"""Verdicts on boxed answers: spellings of right answers, wrong answers and attempts to cheat."""
# ruff: noqa: RUF001  (the characters that look like others are intended)

import time

import pytest

from expo_fast.answers import algebra, spelling
from expo_fast.answers.spelling import tidy
from expo_fast.data import answer_grading
from expo_fast.data.answer_grading import last_boxed, last_boxed_span
from expo_fast.data.grader_pool import GraderPool


def box(text):
    return rf"We get \boxed{{{text}}}."


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, timeout_s=10.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{12}", "12"),
        (r"\boxed {12}", "12"),
        ("\\boxed\n{ 12\n}", "12"),
        (r"first \boxed{3}, then \boxed{12}", "12"),
        (r"\boxed{\boxed{12}}", "12"),
        (r"\boxed{12}}", "12"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{x \} y}", r"x \} y"),
        (r"\boxed{12} or rather \boxed{}", ""),
        (r"\boxed{12} or rather \boxed{13", None),
        (r"\boxed{12", None),
        (r"\boxed{12\}", None),
        ("12", None),
        ("", None),
        (r"put it in \boxed form", None),
        (r"\boxed 6", "6"),
        (r"so $x = \boxed 6$.", "6"),
        (r"so $x = \boxed6.$", "6"),
        (r"so \(\boxed 16\) and $y = 5$", "16"),
        (r"\boxed -3.5, as asked", "-3.5"),
        (r"\boxed 1,200.", "1,200"),
        (r"\boxed 2/3 of it", "2/3"),
        (r"$\boxed \frac{1}{2}$", r"\frac{1}{2}"),
        (r"$\boxed\frac12\pi$", r"\frac12\pi"),
        (r"\boxed\sqrt{2}.", r"\sqrt{2}"),
        (r"$\boxed x$", "x"),
        (r"$\boxed\text{B}$", r"\text{B}"),
        (r"\boxed{5} or rather \boxed 6", "6"),
        (r"\boxed{5} as in a \boxed answer", "5"),
        (r"\boxed{5}, and no other \boxed", "5"),
        (r"\boxed 6\pi r", None),
        (r"\fbox{12}", "12"),
        (r"\fbox 12", "12"),
        (r"\framebox {12}", "12"),
        (r"\boxed{5} and then \fbox{12}", "12"),
        (r"\boxedfoo{12}", None),
        (r"<think>\boxed{12}</think> so \boxed{13}", "13"),
        (r"<think>\boxed{12}</think> no idea", None),
        (r"<think>a</think>\boxed{12}</think> hm", None),
        (r"\boxed{" + "1" * 1000 + "}", "1" * 1000),
        (r"\boxed{" + "1" * 1001 + "}", None),
        (r"\boxed{" + "{" * 32 + "}" * 33, "{" * 32 + "}" * 32),
        (r"\boxed{" + "{" * 33 + "}" * 34, None),
        (r"\boxed{" * 5000, None),
    ],
)
def test_the_last_box_is_found(text, content):
    assert last_boxed(text) == content


def test_the_span_is_that_of_the_last_box():
    text = r"\boxed{1} and \boxed {\frac{1}{2}} end"
    start, end = last_boxed_span(text) or (0, 0)
    assert text[start:end] == r"\boxed {\frac{1}{2}}"


def test_a_long_text_takes_linear_time():
    start = time.process_time()  # so that other processes do not count
    for text in (
        r"\boxed{" * 200_000,
        r"\boxed" + " " * 1_000_000,
        "{" * 1_000_000,
        "\\" * 1_000_001,
    ):
        assert last_boxed(text) is None
    assert time.process_time() - start < 2


RIGHT = [
    # numbers
    ("8", "08"), ("8", "8.0"), ("0", "-0"), ("0.25", ".25"), ("8", "+8"), ("8", "8."), ("8", "$8$"),
    ("2500", "2{,}500"), ("2500", r"2\,500"), ("2500", "2,500"), ("1234567", r"1,\! 234,\! 567"),
    ("2500.75", r"\$2,500.75"), ("8", r"\text{8}"), ("8", r"\mathbf{8}"),
    ("2500", r"2 500\text{ km}"), ("3/4", r"\frac{3}{4}"), ("3/4", r"\frac34"),
    ("3/4", r"\dfrac3{4}"), ("3/4", "0.75"), ("3/4", "6/8"), ("-3/4", r"-\tfrac{3}{4}"),
    ("11/4", r"2\frac{3}{4}"), ("2.75", r"2\frac34"), ("11/4", "2 3/4"), ("2/3", "0.6666667"),
    ("2/3", "0.666666"), ("3.14159265", "3.141593"), (r"\frac{\sqrt{4}}{4}", "0.5"),
    ("1000", "10^3"), ("81", "3^4"), ("24", "4!"), ("0.25", r"25\%"), ("25", r"25\%"),
    ("12", "12%"),
    # units and degrees
    ("12", r"12\text{ kg}"), ("12", r"12\mbox{ m}^3"), ("45", r"45^\circ"),
    ("12", r"12 \text{ dollars}"),
    # Unicode
    ("3/4", "¾"), ("7/4", "1¾"), ("-6", "−6"), (r"3\pi", "3π"), (r"\sqrt{15}", "√15"),
    ("x^3", "x³"), ("x^{-12}", "x⁻¹²"), (r"\infty", "∞"), ("8", "８"), ("8", "٨"), ("8", "𝟖"),
    ("2500", "2\u00a0500"), ("8", "8\u200b"), ("8", "\u202e8"), ("12", "3×4"), ("4", "12÷3"),
    ("45", "45°"), (r"x \le 3", "x≤3"),
    # structures
    (r"\{3,5\}", r"\{5,3\}"), (r"\{3,5\}", "5, 3"), (r"\{3,5\}", r"\{3,5,5\}"),
    (r"\emptyset", r"\{\}"), ("3,-3", r"\pm 3"), (r"(3,5)\cup(8,9)", r"(8,9)\cup(3,5)"),
    ("(3,5)", r"\left(3,5\right)"), (r"(-\infty,3]", r"x \le 3"), (r"x \le 3", r"(-\infty,3]"),
    (r"\begin{pmatrix}3\\5\end{pmatrix}", r"\begin{bmatrix}3\\ 5\end{bmatrix}"),
    (r"\begin{pmatrix}3/4\\5\end{pmatrix}", r"\begin{pmatrix}0.75\\5\end{pmatrix}"),
    ("y=3x-2", "3x-2"), ("x+y=4", "y=4-x"), ("x=8", "8"), ("8", "x = 8"), ("8", "5+3=8"),
    (r"\frac13", r"\frac{2}{6}=\frac13"),
    # algebra and words
    ("x^2-9", "(x-3)(x+3)"), (r"3\sqrt2", r"\sqrt{18}"), ("0", r"\sin(\pi)"),
    (r"\text{Sunday}", "sunday"), ("No Solution", "no solution"), ("(C)", "C"),
    ("C", r"\text{(C)}"),
    # references may have boxes and dollars too, and equal texts are equal answers
    (r"\boxed{8}", "8"), ("$8$", "8"), ("9^{9^{9^{9}}}", "9^{9^{9^{9}}}"),
    (r"2 \text{ or } 3", r"2 \text{ or } 3"),
]  # fmt: skip

WRONG = [
    # several answers, or an answer and its denial
    ("8", r"8 \text{ or } 9"), ("8", "8 or 9"), ("8", "7,8,9"), ("8", r"\text{8 or 9}"),
    ("8", "8=9"), ("8", "9=8"), ("8", "x=9=8"), ("8", r"8 \neq 9"), ("8", "8 < 9"), ("8", r"\pm 8"),
    ("8", r"8 \text{ no, } 9"), ("8", "eight 8"), ("8", ""), ("8", r"\text{}"), ("8", "$"),
    ("8", "-8"), ("8", "88"), ("8", "x8"), ("8", "8x"),
    # digits that are not one number
    ("12", "1,2"), ("12", "1 2"), ("3", "1 2"), ("1.2", "1,2"), ("123", "1,2,3"), ("11/2", "1 1/2"),
    ("3/4", r"1\frac34"),
    # near misses
    ("1", "1.001"), ("1000.01", "1000.02"), ("1000001", "1000000.5"), ("1/3", "0.33"),
    ("10^{20}", "10^{20}+1"), ("0", "10^{-20}"), ("0", "0.00000001"), ("0.0000012", "0.000001"),
    (r"\pi", r"\frac{22}{7}"), ("1/1999!", "1/2001!"), ("2^{-90}", "2^{-91}"), ("0.1", "10"),
    ("0.3", r"0.\overline{3}"), ("123_4", "123_5"), (r"\infty", r"-\infty"),
    (r"\frac{4}{0}", r"\frac{7}{0}"),
    # structures
    ("[2,5)", "(2,5)"), ("[2,5)", "[2,5]"), ("[2,5]", "[5,2]"), ("(3,5)", "(5,3)"),
    ("(3,5)", r"\{3,5\}"), (r"\{3,5\}", "(3,5)"), (r"\{3,5\}", r"\{3\}"),
    (r"\{3,5\}", r"\{3,5,7\}"), ("x=3", "y=3"), ("3=3", "4=4"),
    (r"\begin{pmatrix}3\\5\end{pmatrix}", r"\begin{pmatrix}5\\3\end{pmatrix}"),
    (r"\begin{pmatrix}3\\5\end{pmatrix}", r"\begin{pmatrix}3&5\end{pmatrix}"), ("x+y=4", "x+y=5"),
    ("10:00", "2:00"), (r"3:4:5:\ldots", r"3:9:25:\ldots"),
    # algebra and words
    ("x+1", "y+1"), (r"5\sqrt3", "5"), ("1-1/e", "1+1/e"), ("a-b", "b-a"),
    (r"\frac{a}{b}", r"\frac{b}{a}"), ("x_3", "x_4"), ("4+5i", "4-5i"), ("Sunday", "Monday"),
    ("listen", "silent"), (r"\text{even}", r"\text{odd}"), ("1", "True"),
    # the last number of text that cannot be parsed is not the answer (here it is 4)
    ("7", r"10^{10^7} \bmod 7"), ("7", r"10^{10^7} \bmod 7 \text{ is } 7"),
    ("7", r"10^{10^7} \bmod \frac{7}{1}"),
]  # fmt: skip

# A person would judge these differently. They are mostly right answers in rare forms, and offer no
# way to gain a reward without an honest answer. An upgrade of math-verify may change them.
DEVIATIONS = [
    (r"\frac{\pi}{2}", r"90^\circ", 0.0),  # only a reference in degrees is converted
    ("1.5", "1,5", 0.0),  # a comma separates items or thousands
    ("(3,5)", "3,5", 1.0),  # a list without brackets takes the reference's
    (r"\frac{0}{0}", r"\frac{0}{0}", 1.0),  # the same text is the same answer
]


@pytest.mark.parametrize(("gold", "text"), RIGHT)
def test_right_answers_have_verdict_1(pool, gold, text):
    assert pool.verdicts([gold], [box(text)]) == [1.0]


@pytest.mark.parametrize(("gold", "text"), WRONG)
def test_wrong_answers_have_verdict_0(pool, gold, text):
    assert pool.verdicts([gold], [box(text)]) == [0.0]


@pytest.mark.parametrize(("gold", "text", "verdict"), DEVIATIONS)
def test_known_deviations_have_not_changed(pool, gold, text, verdict):
    assert pool.verdicts([gold], [box(text)]) == [verdict]


@pytest.mark.parametrize(
    "attack",
    [
        "__import__('os').system('touch MARK')",
        "[__import__('os').system('touch MARK')]",
        "open('MARK','w').write('8')",
        r"open('MARK','w') or 3\pi",
        r"\text{open('MARK','w')}",
        "exec(\"open('MARK','w')\")",
        "eval(\"open('MARK','w')\")",
        "sympify(\"open('MARK','w')\")",
        r"Matrix([open('MARK','w')])",
        r"\begin{pmatrix}open('MARK','w')\\3\end{pmatrix}",
        r"\operatorname{exec}(open('MARK','w'))",
        "lambda: open('MARK','w')",
        "().__class__.__base__.__subclasses__()",
        "setattr(__import__('sys').modules['__main__'],'judge',lambda *a: True)",
        "exit()",
        "raise SystemExit",
        "{0.__class__} %s %n",
        "8\x00",
        "\x1b[2J9",
        "\ud800",
    ],
)
@pytest.mark.parametrize("gold", ["8", r"3\pi", r"\begin{pmatrix}1\\3\end{pmatrix}"])
def test_text_of_answers_is_never_executed(pool, monkeypatch, tmp_path, attack, gold):
    monkeypatch.chdir(tmp_path)
    mark = tmp_path / "mark"
    attack = attack.replace("MARK", str(mark))
    with_nul = attack.startswith("8")  # a NUL counts as a space
    assert pool.verdicts([gold], [box(attack)]) == [1.0 if with_nul and gold == "8" else 0.0]
    pool.verdicts([attack], [box(gold)])
    assert not mark.exists()
    assert pool.verdicts(["x+1", "x+1"], [box("x+2"), box("1+x")]) == [0.0, 1.0]


def test_a_value_is_not_rounded_to_a_fraction_far_from_it():
    assert answer_grading.decide("1", tidy(r"1 \approx \frac{1}{1000}")) is False
    close = tidy(r"\frac{1}{3} \approx \frac{33}{100}")
    assert answer_grading.decide(r"\frac{1}{3}", close) is True


@pytest.mark.parametrize(
    ("number", "verdict"), [("3.14", True), (r"\frac{22}{7}", True), ("4", False)]
)
def test_pi_is_a_number_and_no_name_of_one(number, verdict):
    assert answer_grading.decide(r"\pi", tidy(rf"\pi \approx {number}")) is verdict


def test_greek_letters_are_commands_that_the_parser_knows():
    assert {command.strip(" \\") for command in spelling.GREEK.values()} <= algebra.GREEK
