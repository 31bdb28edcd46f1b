"""Complete texts as models may write them: nested, broken, in Unicode, very large, hostile."""
# ruff: noqa: RUF001  (the characters that look like others are intended)

import random
import time

import pytest

from expo_fast.data.answer_grading import decide, last_boxed, tidy
from expo_fast.data.grader_pool import GraderPool


@pytest.fixture(scope="module")
def pool():
    with GraderPool(workers=2, timeout_s=2.0) as pool:
        yield pool


DEEP = "{" * 30 + "41" + "}" * 30
TOWER = "9^{9^{9^{9}}}"

# (reference, completion, whether it is right)
COMPLETIONS: list[tuple[str, str, bool]] = [
    # which box counts
    ("41", r"First \boxed{7}. No, wait: \boxed{41}.", True),
    ("7", r"First \boxed{7}. No, wait: \boxed{41}.", False),
    ("41", r"\boxed{\boxed{41}}", True),
    ("41", r"\boxed{\text{the answer is } \boxed{41}}", True),
    ("41", r"\boxed{41} and so on \boxed{", False),
    ("41", r"\boxed{41} \boxed{}", False),
    ("41", r"The answer is 41.", False),
    ("41", r"", False),
    ("41", r"\boxed{}", False),
    ("41", r"\boxed{ }", False),
    ("41", r"<think>\boxed{41}</think> Hm, \boxed{14}.", False),
    ("41", r"<think>\boxed{14}</think> Hm, \boxed{41}.", True),
    ("41", r"<think>so \boxed{41}", True),
    ("41", r"$\boxed 41$", True),
    ("41", r"\fbox{41}", True),
    ("41", "\\boxed{\n  41\n}", True),
    ("41", r"**Answer:** $\boxed{41}$ 😀", True),
    ("41", r"\[\boxed{41}\]", True),
    ("41", r"\boxed{41}\boxed{41}", True),
    ("41", r"\begin{align*} x &= 40 + 1 \\ &= \boxed{41} \end{align*}", True),
    ("41", "boxed{41}", False),
    ("41", r"\box{41}", False),
    ("41", r"\boxed{41", False),
    ("41", r"\boxed{41}}", True),
    ("41", r"\boxed{{41}", False),
    ("41", r"\boxed{41\}", False),
    ("41", r"\boxed{}41}", False),
    ("41", rf"\boxed{{{DEEP}}}", True),
    ("41", r"\boxed{" * 3000, False),
    ("41", r"\boxed{" * 3000 + "41" + "}" * 3000, True),
    ("41", "x" * 500_000 + r"\boxed{41}", True),
    ("41", r"\boxed{41}" + " and" * 200_000, True),
    # prose and decoration in the box
    ("41", r"\boxed{x = 41}", True),
    ("41", r"\boxed{\text{Answer: } 41}", True),
    ("41", r"\boxed{\text{The final answer is: } $41$}", True),
    ("41", r"\boxed{\mathbf{41}}", True),
    ("41", r"\boxed{\textbf{41}}", True),
    ("41", r"\boxed{\displaystyle{41}}", True),
    ("41", r"\boxed{~41~}", True),
    ("41", r"\boxed{\,41\;}", True),
    ("41", r"\boxed{`41`}", True),
    ("41", r"\boxed{**41**}", True),
    ("41", r'\boxed{"41"}', True),
    ("41", r"\boxed{41.}", True),
    ("41", r"\boxed{41 \\ }", True),
    ("41", r"\boxed{= 41}", True),
    ("41", r"\boxed{41 \text{ plus one}}", False),
    ("41", r"\boxed{41 \text{ if } x = 1}", False),
    ("41", r"\boxed{\text{not } 41}", False),
    ("41", r"\boxed{41 \text{ or } 42}", False),
    ("41", r"\boxed{41, 42}", False),
    ("41", r"\boxed{41; 42}", False),
    ("41", r"\boxed{41 = 42}", False),
    ("41", r"\boxed{42 = 41}", False),
    ("41", r"\boxed{41 \ne 42}", False),
    ("41", r"\boxed{\{41, 42, 43\}}", False),
    ("41", r"\boxed{40 < 41 < 42}", False),
    ("41", r"\boxed{?}", False),
    ("41", r"\boxed{I do not know}", False),
    ("41", r"\boxed{41?}", False),
    ("41", r"\boxed{4 1}", False),
    ("41", r"\boxed{4.1}", False),
    ("41", r"\boxed{-41}", False),
    ("41", r"\boxed{141}", False),
    ("41", r"\boxed{4}", False),
    ("41", r"\boxed{41\cdot10^{1}}", False),
    ("41", r"\boxed{41/1}", True),
    ("41", r"\boxed{041}", True),
    ("41", r"\boxed{+41}", True),
    ("41", r"\boxed{41.000}", True),
    # Unicode
    ("-41", r"\boxed{−41}", True),
    ("-41", r"\boxed{–41}", True),
    ("-41", r"\boxed{﹣41}", True),
    ("-41", r"\boxed{－４１}", True),
    ("41", r"\boxed{−41}", False),
    ("41", r"\boxed{４１}", True),
    ("41", r"\boxed{𝟒𝟏}", True),
    ("41", "\\boxed{41\u200b}", True),
    ("41", "\\boxed{\u202e14}", False),
    ("41", "\\boxed{\u202e41}", True),
    ("(4,1)", r"\boxed{（4，1）}", True),
    ("12", r"\boxed{3 × 4}", True),
    ("3", r"\boxed{12 ÷ 4}", True),
    (r"2\sqrt{5}", r"\boxed{2√5}", True),
    (r"2\sqrt{5}", r"\boxed{√20}", True),
    (r"\sqrt[3]{5}", r"\boxed{∛5}", True),
    (r"4\pi", r"\boxed{4π}", True),
    ("x^2+x^{-1}", r"\boxed{x² + x⁻¹}", True),
    ("a_1+a_2", r"\boxed{a₁ + a₂}", True),
    (r"\frac34", r"\boxed{¾}", True),
    (r"\frac34", r"\boxed{3⁄4}", True),
    (r"x \le 3", r"\boxed{x ≤ 3}", True),
    (r"x \ge 3", r"\boxed{x ≤ 3}", False),
    (r"(-\infty, 3)", r"\boxed{(−∞, 3)}", True),
    (r"\theta", r"\boxed{θ}", True),
    (r"[1,2]\cup[3,4]", r"\boxed{[1,2] ∪ [3,4]}", True),
    (r"\emptyset", r"\boxed{∅}", True),
    ("30", r"\boxed{30°}", True),
    ("30", r"\boxed{€30}", True),
    ("41", r"\boxed{四十一}", False),
    ("41", "\\boxed{41\ud800}", False),
    # code, which is never run
    ("41", r"\boxed{__import__('os').system('echo 41')}", False),
    ("41", r"\boxed{eval('40+1')}", False),
    ("41", r"\boxed{exec('x=41')}", False),
    ("41", r"\boxed{lambda: 41}", False),
    ("41", r"\boxed{[x for x in [41]][0]}", False),
    ("41", r"\boxed{os.abort()}", False),
    ("41", r"\boxed{().__class__.__mro__}", False),
    ("41", r"\boxed{\text{__import__('os')}}", False),
    ("41", r"\boxed{\input{/etc/passwd}}", False),
    ("41", r"\boxed{\write18{touch x}}", False),
    ("41", r"\boxed{True}", False),
    ("1", r"\boxed{True}", False),
    ("41", r"\boxed{nan}", False),
    ("41", r"\boxed{inf}", False),
    ("41", r"\boxed{None}", False),
    # numbers that are too large to compute
    ("41", rf"\boxed{{{TOWER}}}", False),
    ("41", r"\boxed{9**9**9**9}", False),
    ("41", r"\boxed{10^{10^{10}}}", False),
    ("41", r"\boxed{1e1000000000}", False),
    ("41", r"\boxed{1E+1000000000}", False),
    ("41", r"\boxed{99999999!}", False),
    ("41", r"\boxed{((100!)!)!}", False),
    (TOWER, rf"\boxed{{{TOWER}}}", True),
    (TOWER, r"\boxed{41}", False),
    ("10^{100}", r"\boxed{10^{100}}", True),
    ("10^{100}", r"\boxed{10^{101}}", False),
    ("2^{100}", r"\boxed{1267650600228229401496703205376}", True),
    ("2^{100}", r"\boxed{1267650600228229401496703205377}", False),
    ("41", r"\boxed{" + "4" * 900 + "}", False),
    ("41", r"\boxed{" + "41" * 600 + "}", False),
    ("41", r"\boxed{0." + "4" * 900 + "}", False),
    # expressions that are too large or nested too deeply
    ("41", r"\boxed{" + "(" * 400 + "41" + ")" * 400 + "}", False),
    ("41", r"\boxed{" + "-" * 900 + "41}", True),
    ("-41", r"\boxed{" + "-" * 901 + "41}", True),
    ("41", r"\boxed{" + "1+" * 40 + "1}", True),
    ("41", r"\boxed{" + r"\frac{" * 30 + "1" + "}{2}" * 30 + "}", False),
    ("41", r"\boxed{" + "4 " * 400 + "}", False),
    ("41", r"\boxed{" + "4," * 400 + "}", False),
    ("41", r"\boxed{" + "x" * 900 + "}", False),
    ("41", r"\boxed{" + r"\text{" * 30 + "41" + "}" * 30 + "}", False),
    ("41", r"\boxed{(x+y+z)^{3000}}", False),
    ("41", r"\boxed{" + "\\" * 900 + "}", False),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("gold", "completion", "right"), COMPLETIONS)
def test_messy_completions_are_judged(pool, gold, completion, right):
    start = time.monotonic()
    verdict = pool.verdicts([gold], [completion])[0]
    assert time.monotonic() - start < 30  # includes the start of a worker on a busy machine
    assert bool(verdict) is right


@pytest.mark.slow
def test_few_hostile_texts_are_undecided(pool):
    golds = [gold for gold, _, _ in COMPLETIONS]
    texts = [completion for _, completion, _ in COMPLETIONS]
    verdicts = pool.verdicts(golds, texts)
    assert verdicts.count(None) <= 0.03 * len(verdicts)


_COMMANDS = (
    r"\frac \sqrt \pi \cdot \text{ \text{cm} \pm \le \cup \infty \{ \} \begin{pmatrix} \\ "
    r"\end{pmatrix} \left( \right) \binom \pmod \overline \log_ \sin ^\circ \in {}^{ _{"
)
_WORDS = "or and cm hours PM twelve million not percent"
PIECES = [
    *"0123456789xyabei+-*/^_(){}[]|!,;:.=<>~ '\"$%&\\",
    *_COMMANDS.split(),
    *(f" {word} " for word in _WORDS.split()),
]


@pytest.mark.slow
def test_random_texts_take_little_time_and_raise_no_error():
    draw = random.Random(0)
    slowest = 0.0
    for _ in range(3000):
        gold = tidy("".join(draw.choices(PIECES, k=draw.randint(1, 40))))
        box = tidy("".join(draw.choices(PIECES, k=draw.randint(1, 40))))
        start = time.process_time()
        decide(gold, box)
        assert decide(box, box) or not box
        slowest = max(slowest, time.process_time() - start)
    assert slowest < 1.0


@pytest.mark.parametrize(
    "unit",
    [
        "a", "a ", "1", "1 ", "1,", "1+", "x^2+", "(x+1)^{24}", "(x+1)", "(x+y)(", r"\frac1", "{",
        r"\text{a}", r"\text{", r"\text{cm}^2", " cm", "cm/", "a.", "'", r"\\", r"\ ", "$", "$x$",
        "=", "<x", "1<", r"\cup", r"[1,2]\cup", r"\pm1", r"\pm1,", "1_2", "_{", "^", "^{2", "|",
        r"\sqrt{999999937}+", r"\sqrt", r"\begin{pmatrix}", "&", "-", "9^{", "9!", "((", ":", "1:",
        "one ", "million ", "twenty-", "or", " or 1", " and ", "mod 7", r"\pmod 7", "%", "1e9",
        "x=1,", "f(x)=", r"\overline{1}", "0.", "**", "^\\circ", r"\log_2", "√", "¹", "½", "，",
    ],
)  # fmt: skip
def test_a_repeated_piece_costs_little_time(unit):
    text = unit * (1000 // len(unit))
    start = time.process_time()
    tidied = tidy(text)
    decide("41", tidied)
    decide(tidied, tidied + "1")
    last_boxed(r"\boxed " + unit * (20_000 // len(unit)))
    assert time.process_time() - start < 1.0
