"""1,000 answers that no process should compute: the seconds, the memory, and the speed afterwards.

    python -m benchmarks.grader_bombs [N]

N (1,000) answers of 40 kinds are judged in one call: towers of powers, factorials, huge sums,
nested brackets, long numbers, texts that look like code. Before and after, 200 ordinary answers are
judged that need math-verify. Prints one line of JSON.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from expo_fast.data.grader_pool import GraderPool

N_ORDINARY = 200
MARKER = Path("marker-of-run-code")

# Each makes a different answer from a number i >= 0. None of them is 7.
KINDS: dict[str, Callable[[int], str]] = {
    "tower of braces": lambda i: rf"{9 + i}^{{9^{{9^{{9}}}}}}",
    "tower without braces": lambda i: rf"{9 + i}^9^9^9",
    "tower of stars": lambda i: rf"{9 + i}**9**9**9",
    "tower in a fraction": lambda i: rf"\frac{{5^{{(5^{{(5^{{{5 + i}}})}})}}-5}}{{16}}",
    "tower minus a number": lambda i: rf"5^{{5^{{5^{{5^{5}}}}}}}-{4 + i}",
    "tower in bars": lambda i: rf"|2^{{2^{{{40 + i}}}}}|",
    "tower in a function": lambda i: rf"\tan(10^{{10^{{{10 + i}}}}})",
    "tower under a root": lambda i: rf"\sqrt{{3^{{10^{{{9 + i}}}}}}}",
    "tower of a variable": lambda i: rf"x^{{x^{{x^{{x^{{x^{{x^{{x+{i}}}}}}}}}}}}}",
    "power of a decimal": lambda i: rf"1.0000001^{{10^{{{10 + i}}}}} + |x|",
    "power of a fraction": lambda i: rf"\left(1+\frac{{1}}{{10^9}}\right)^{{10^{{{9 + i}}}}}",
    "power in a residue": lambda i: rf"10^{{10^{{{7 + i}}}}} \bmod 7",
    "power of ten": lambda i: rf"10^{{10^{{{8 + i}}}}} + |x|",
    "small base": lambda i: rf"|1E+{10**9 + i}|",
    "small e": lambda i: rf"|x| + 1e{10**9 + i}",
    "factorial": lambda i: rf"{10**8 - 1 - i}! + |x|",
    "factorials of factorials": lambda i: rf"|(({100 + i}!)!)!|",
    "factorial of a power": lambda i: rf"(10^{{{10 + i}}})! + |x|",
    "two signs of a factorial": lambda i: rf"{30 + i}!! + |x|",
    "binomial": lambda i: rf"\binom{{10^9}}{{5\cdot 10^8 + {i}}}",
    "sum": lambda i: rf"\sum_{{i=1}}^{{10^{{{12 + i}}}}} i^i",
    "product": lambda i: rf"\prod_{{i={1 + i}}}^{{10^9}} i",
    "polynomial": lambda i: rf"(x+y+z)^{{{3000 + i}}}",
    "binomial power": lambda i: rf"(1+x)^{{{99999 + i}}}",
    "power of a matrix": lambda i: (
        rf"\begin{{pmatrix}}1&2\\3&4\end{{pmatrix}}^{{{10**9 + i}}} + |x|"
    ),
    "greatest common divisor": lambda i: rf"\gcd(10^{{10^7}},6^{{10^{{{7 + i}}}}})",
    "round brackets": lambda i: "(" * (100 + i) + "|x|" + ")" * (100 + i),
    "unclosed brackets": lambda i: "(" * (200 + i) + "|x|",
    "fractions": lambda i: r"\frac{1}{" * 25 + rf"|x|+{i}" + "}" * 25,
    "roots": lambda i: r"\sqrt{" * 25 + rf"|x|+{i}" + "}" * 25,
    "long number": lambda i: "4" * (700 + i) + " + |x|",
    "long decimal": lambda i: "0." + "3" * (700 + i) + " + |x|",
    "long sum": lambda i: "|x|+" + "1+" * (200 + i) + "1",
    "integral": lambda i: rf"\int_0^\infty \frac{{\sin(x^x)}}{{\Gamma(x+{i})}}\,dx",
    "limit": lambda i: rf"\lim_{{x\to0}}\frac{{\sin(x^{{x^x}})}}{{x^{{{100 + i}}}}}",
    "logarithms": lambda i: r"\log_2(" * 12 + rf"|x|+{i}" + ")" * 12,
    "call of a system": lambda i: rf"__import__('os').system('touch {MARKER}{i}')",
    "call in a text": lambda i: rf"\text{{exec(open('{MARKER}{i}', 'w'))}} + |x|",
    "attributes": lambda i: rf"().__class__.__base__.__subclasses__()[{i}]",
    "code in a matrix": lambda i: rf"\begin{{pmatrix}}[open('{MARKER}{i}','w')]\\2\end{{pmatrix}}",
}


def bombs(n: int) -> list[str]:
    """Return n completions. Each kind comes in turn."""
    makers = list(KINDS.values())
    return [rf"\boxed{{{makers[i % len(makers)](i // len(makers))}}}" for i in range(n)]


def ordinary(letter: str) -> tuple[list[str], list[str]]:
    """Return references and right completions that need math-verify."""
    answers = [rf"|{letter}^{{{i % 7}}}+1| + {i}" for i in range(N_ORDINARY)]
    texts = [rf"\boxed{{{i} + |1+{letter}^{{{i % 7}}}|}}" for i in range(N_ORDINARY)]
    return answers, texts


def timed(
    pool: GraderPool, answers: list[str], texts: list[str]
) -> tuple[float, list[float | None]]:
    """Return the seconds and the verdicts of one call."""
    start = time.perf_counter()
    verdicts = pool.verdicts(answers, texts)
    return time.perf_counter() - start, verdicts


def peak_of_children() -> float:
    """Return the largest resident memory in MB that a descendant of this process has had."""
    import resource

    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with GraderPool() as pool:
        pool.verdicts(["|x|"], [r"\boxed{|y|}"])  # starts the workers
        before, verdicts = timed(pool, *ordinary("x"))
        assert verdicts == [1.0] * N_ORDINARY
        seconds, verdicts = timed(pool, ["7"] * n, bombs(n))
        after, right = timed(pool, *ordinary("y"))
    result = {
        "bombs": n,
        "kinds": len(KINDS),
        "seconds": round(seconds, 2),
        "verdicts": {str(k): v for k, v in sorted(Counter(map(str, verdicts)).items())},
        "ordinary_per_s_before": round(N_ORDINARY / before, 1),
        "ordinary_per_s_after": round(N_ORDINARY / after, 1),
        "right_after": right.count(1.0),
        "code_run": len(list(MARKER.parent.glob(f"{MARKER.name}*"))),
        "peak_mb_of_workers": round(peak_of_children()),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
