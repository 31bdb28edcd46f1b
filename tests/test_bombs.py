"""Answers that are too large to compute are undecided at once, and ordinary ones are not."""

import time
from pathlib import Path

import pytest

from benchmarks.grader_bombs import KINDS, MARKER, bombs
from expo_fast.answers.magnitude import is_too_large
from expo_fast.answers.spelling import tidy
from expo_fast.data import answer_grading, grader_pool
from expo_fast.data.answer_grading import reason_against_reference
from expo_fast.data.grader_pool import GraderPool, comparison_of, reason_without_worker
from expo_fast.data.problems import Problem, load_problems
from expo_fast.data.workers import Worker
from expo_fast.reward import boxed_answer_reward
from jobs import write_rows

# Kinds that the rules decide, or that a worker judges within its limit of time.
NOT_TOO_LARGE = {
    "tower of braces": "wrong",  # the rules know that a plain tower is not 7
    "long number": None,
    "long decimal": None,
    "long sum": None,
    "integral": None,
    "limit": None,
    "logarithms": None,
    "power in a residue": None,
    "call of a system": None,
    "call in a text": "wrong",
    "attributes": None,
    "code in a matrix": "wrong",
}

ORDINARY = [
    "7", "1,000,000", "0.5", "1E+10", "6.02e23", r"6.02 \cdot 10^{23}", "10^{100}", "2^{2019}",
    "-3^{1000}", r"\frac{2^{2020}-1}{3}", r"1-\left(\frac{5}{6}\right)^{2020}", "2019!",
    r"\frac{2020!}{1010!\,1010!}", r"\binom{2020}{1010}", r"\binom{10^9}{2}", "100!+99!",
    "x^{2020}", "2^43^45^2", "(1-i)^{2009}", "(x+1)^{100}", "(x+y+z)^{10}",
    "(x+1)^2(x-1)^2", "x^{10^{10}}", "n!", "(n+1)!",
    r"\frac{n(n+1)}{2}", "2^{n}", "2^{2^{n}}", "e^{e^{x}}", "e^{-x^2}", r"e^{i\pi}",
    r"\sum_{k=1}^{2020} k^2", r"\sum_{n=1}^{\infty} \frac{1}{n^2}", r"\prod_{k=1}^{100} k",
    r"\int_0^{\infty} e^{-x} dx", r"\lim_{n\to\infty} \left(1+\frac1n\right)^n",
    "1.05^{30}", r"1000(1+\frac{0.05}{12})^{360}", "3^{2019/2020}", r"3^{\frac{2019}{2020}}",
    r"\sqrt[2020]{2}", r"\sqrt{10^{10}}", r"\log_2 3", r"\log_{10}(10^{100})", "a_{10^9}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{10}", r"\begin{pmatrix}1000000\\0\end{pmatrix}",
    "(1,2,3)", r"\{10^{10},10^{20}\}", r"[0,10^{10})", r"x \le 10^{50}", "12:30", "50%",
    r"90^\circ", r"101_2", r"3 \times 10^8 \text{ m/s}", r"\text{(A) } 2^{10}", "0^0", "0^{-1}",
    r"1\frac{1}{2}", r"0.\overline{3}", r"\sqrt{2+\sqrt{2+\sqrt{2}}}", "((((((1+x))))))",
    "", "(", ")", "^", "!", "_", "{", "}", r"\frac", r"\sqrt[", r"\sum_", r"\begin", r"\end", "9^",
    "^9", "1e", r"\binom{5}", r"\frac{1}{0}", "(-8)^{1/3}", "/", "1/", r"\Gamma(5)",
]  # fmt: skip


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_answers_are_not_too_large(text):
    assert not is_too_large(tidy(text))
    assert not is_too_large(text)


@pytest.mark.parametrize("kind", KINDS)
def test_bombs_are_decided_without_a_worker(kind):
    job = comparison_of("7", rf"\boxed{{{KINDS[kind](2)}}}")
    assert reason_without_worker(job) == NOT_TOO_LARGE.get(kind, "too_large")


def test_a_thousand_bombs_of_one_kind_take_no_time():
    texts = [rf"\boxed{{|x| + {9 + i}^{{9^{{9^{{9}}}}}}}}" for i in range(1000)]
    start = time.process_time()
    with GraderPool() as pool:
        grades = pool.grade(["7"] * 1000, texts)
        assert not pool._pool
    assert {each.reason for each in grades} == {"too_large"}
    assert {each.verdict for each in grades} == {None}
    assert time.process_time() - start < 5  # 0.5 s


@pytest.mark.slow
def test_reasons_of_verdicts(monkeypatch):
    golds = ["1/2", "|x|+1", "|x|+1", "7", "7", "|x|", "7", ""]
    boxes = ["0.5", "1+|x|", "|x|+2", "", "8", r"|x|\&\&", "|x|+9^{9^{9^9}}", "1"]
    texts = [rf"\boxed{{{box}}}" for box in boxes]
    expected = ["exact", "symbolic", "wrong", "no_answer", "wrong", "unparsable", "too_large"]
    with GraderPool(workers=1, timeout_s=10.0) as pool:
        grades = pool.grade(golds, texts)
        assert [each.reason for each in grades] == [*expected, "no_reference"]
        assert [each.verdict for each in grades] == [1, 1, 0, 0, 0, 0, None, None]
        # Only a worker can end at a limit.
        monkeypatch.setattr(grader_pool, "is_too_large", lambda text: False)
        grades = pool.grade(["|x|"], [r"\boxed{|1E+100000000|}"], timeout_s=0.1)
        assert grades[0].reason == "timeout"
    with GraderPool(workers=1, timeout_s=60.0, memory_bytes=64 << 20) as pool:
        grades = pool.grade(["|x|"], [r"\boxed{|2^{2^{40}}|}"])
        assert grades[0].reason == "memory"
        assert pool._pool == []


def test_the_time_limit_is_shorter_while_many_answers_end_at_it(monkeypatch):
    monkeypatch.setattr(grader_pool, "is_too_large", lambda text: False)
    limits = []
    assign = Worker.assign

    def spy(worker, job, timeout_s, cpu_s):
        limits.append(cpu_s)
        assign(worker, job, timeout_s, cpu_s)

    monkeypatch.setattr(Worker, "assign", spy)
    with GraderPool(workers=2, timeout_s=0.08) as pool:
        hangs = [rf"\boxed{{|1E+{10**8 + i}|}}" for i in range(20)]
        assert {grade.reason for grade in pool.grade(["|x|"] * 20, hangs)} == {"timeout"}
        assert limits[:4] == [0.08] * 4
        assert limits[6:] == [0.01] * 14
        fine = [rf"\boxed{{|x| + {i}}}" for i in range(18)]
        pool.verdicts(["|x|+7"] * 18, fine, timeout_s=80.0)
        assert limits[20] == 10.0  # 80 / 8
        assert limits[-1] == 80.0


def test_a_worker_has_no_environment_and_gains_no_privileges(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "sk-123")
    with GraderPool(workers=1, timeout_s=10.0) as pool:
        assert pool.verdicts(["|x|+1"], [r"\boxed{1+|x|}"]) == [1.0]
        folder = Path(f"/proc/{pool._pool[0].pid}")
        environment = (folder / "environ").read_bytes().decode()
        names = {line.partition("=")[0] for line in environment.split("\0") if line}
        assert names <= {"PYTHONPATH", "PYTHONHASHSEED", "LD_LIBRARY_PATH"}
        assert "NoNewPrivs:\t1" in (folder / "status").read_text()
        nursery = pool._nursery
        assert nursery is not None
        # A killed worker costs a fork, not the start of a program.
        first = nursery.process.pid
        pool._pool[0].end()
        pool._pool.clear()
        assert pool.verdicts(["|x|+2"], [r"\boxed{2+|x|}"]) == [1.0]
        assert pool._nursery is nursery and nursery.process.pid == first


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("9^{9^{9^9}}", "a power in it is too large"),
        ("(10^{10})!", "a factorial in it is too large"),
        (r"\boxed{}", "its last box is empty"),
        (r"so \boxed{7", "its last box is empty, not closed"),
        (r"\frac{1}{", "its braces are not balanced"),
        ("7}", "its braces are not balanced"),
        ("x" * 2000, "it has 2000 characters, need at most 1000"),
        ("$", "nothing is left of it"),
    ],
)
def test_an_answer_that_judges_nothing_is_refused_by_its_line(answer, reason, tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"problem": "1 + 1?", "answer": "2"}, {"problem": "?", "answer": answer}]
    write_rows(file, rows)
    with pytest.raises(ValueError, match=r"data\.jsonl:2: no attempt can be judged") as error:
        load_problems(str(file))
    assert reason in str(error.value)
    assert len(load_problems(str(file), answers=False)) == 2


@pytest.mark.parametrize("answer", [*ORDINARY[:40], "2019!!", "(x-1)^{2007}", r"\{1, 2\}", "{}^3"])
def test_an_ordinary_answer_is_no_fault_of_the_data(answer):
    assert reason_against_reference(answer) is None


def test_the_built_in_reward_has_reasons():
    texts = [r"\boxed{2}", r"\boxed{3}", "none"]
    rewards = boxed_answer_reward([Problem("a", "1 + 1?", "2")] * 3, texts, [])
    assert rewards == [1.0, 0.0, 0.0]
    assert rewards.log.reasons == ["exact", "wrong", "no_answer"]


@pytest.mark.faults
def test_a_thousand_bombs_of_all_kinds(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fine = [rf"\boxed{{{i} + |1+x^{i % 7}|}}" for i in range(100)]
    golds = [rf"|x^{i % 7}+1| + {i}" for i in range(100)]
    with GraderPool() as pool:
        assert pool.verdicts(golds, fine) == [1.0] * 100
        start = time.monotonic()
        grades = pool.grade(["7"] * 1000, bombs(1000))
        assert time.monotonic() - start < 150
        assert all(each.verdict in (0.0, None) for each in grades)
        assert list(tmp_path.glob(f"{MARKER}*")) == []
        assert pool.verdicts(golds, fine) == [1.0] * 100


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("7", r"\sqrt[0.001]{10}"),
        ("7", r"\sqrt[0.5]{10^{200}}"),
        ("7", "(a+b)^{200!-199!}"),
        ("1", r"1 \approx \frac{1}{1" + "0" * 400 + "}"),
        ("x", r"x = 1 \approx \frac{1}{1" + "0" * 400 + "}"),
    ],
)
def test_numbers_beyond_fp64_raise_nothing(reference, answer):
    is_too_large(tidy(answer))
    answer_grading.decide(tidy(reference), tidy(answer))


def test_a_fault_of_the_rules_leaves_an_answer_undecided(monkeypatch):
    def fails(reference, answer):
        raise ArithmeticError("a fault")

    monkeypatch.setattr(answer_grading, "decide", fails)
    with pytest.warns(UserWarning, match="rules of the grader failed on .*'2'.*a fault"):
        (grade,) = GraderPool(workers=1).grade(["1"], [r"\boxed{2}"])
    assert (grade.reason, grade.verdict) == ("crash", None)
