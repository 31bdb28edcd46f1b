"""What each part of the Triton ops should take on an H200, written down before it is measured.

    python -m benchmarks.floors                 # a Markdown table, 16384 rows
    python -m benchmarks.floors --rows 4096

floor: the longer of FLOPs at RATE and bytes at BANDWIDTH, each input read and each output written
once. expected: what the shipped tiles, counted, leave of it. A program's tile takes its products at
MAIN_LOOP of the SM's rate, then FILL until the next tile's loads arrive, then its epilogue: an
element is EXP clocks of the SM's 16 exponentials a clock, or ISSUE of its 128 fp32 instructions a
clock if that is longer, and E goes through shared memory at 128 bytes a clock. `benchmarks.parts`
prints what it measures beside both, so a gap says which of these is wrong.
"""

import argparse
from dataclasses import dataclass
from math import ceil

from benchmarks.cases import SHAPES
from expo_fast.kernels.logprob import GEMM

RATE = 790e12  # FLOP/s of torch.mm, bf16, on random data
BANDWIDTH = 4.3e12  # bytes/s of a copy, read and written
SMS, CLOCK = 132, 1.75e9
CUBLAS = 0.97  # of RATE, at shapes that are not square
MAIN_LOOP, FILL = 0.88, 0.3e-6  # of the SM's share of RATE; seconds
EXP, ISSUE = 1 / 16, 8 / 128  # clocks of an SM for an element of a tile
STREAM = 0.9  # of BANDWIDTH, of a kernel that reads or writes rows


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes, and the seconds expected of the part that we ship."""

    flops: float
    bytes: float
    expected: float

    @property
    def floor(self) -> float:
        return max(self.flops / RATE, self.bytes / BANDWIDTH)


def works(n: int, v: int, d: int) -> dict[str, Work]:
    """Of N rows, V columns and depth D; named as `benchmarks.parts` names them."""
    gemm, operands, logits = 2.0 * n * v * d, 2.0 * (n + v) * d, float(n * v)
    gradients = 4.0 * (n + v) * d
    stored = fused(n, v, d, store=True)
    wide = product(gemm, operands + 4 * logits)
    passes = row_pass(4 * logits)
    into = {"d_hidden": product(gemm, 2 * logits + 2 * v * d + 4 * n * d)}
    into["d_weight"] = product(gemm, 2 * logits + 2 * n * d + 4 * v * d)
    return {
        "GEMM logits, bf16": product(gemm, operands + 2 * logits),
        "GEMM E @ weight, fp32": into["d_hidden"],
        "GEMM E.T @ hidden, fp32": into["d_weight"],
        "... added to what is there": product(gemm, 2 * logits + 2 * n * d + 8 * v * d),
        "dz from E": row_pass(4 * logits),
        "dz recomputed": stored,
        "row kernels, forward": both(wide, passes, bytes=operands),
        "row kernels, one pass": both(
            wide, passes, row_pass(6 * logits), *into.values(), bytes=operands + gradients
        ),
        "fused forward": fused(n, v, d, store=False),
        "fused forward with E": stored,
        "forward and backward with E": both(
            stored, *into.values(), bytes=operands + gradients + 6 * logits
        ),
    }


def product(flops: float, moved: float) -> Work:
    """By cuBLAS."""
    return Work(flops, moved, max(flops / RATE / CUBLAS, moved / BANDWIDTH / STREAM))


def row_pass(moved: float) -> Work:
    return Work(0.0, moved, moved / BANDWIDTH / STREAM)


def fused(n: int, v: int, d: int, *, store: bool) -> Work:
    """Products and epilogue in one persistent kernel, a program an SM."""
    elements = GEMM.BN * GEMM.BV
    tiles = ceil(ceil(n / GEMM.BN) * ceil(v / GEMM.BV) / SMS)  # of the busiest SM
    epilogue = elements * max(EXP, ISSUE) / CLOCK + store * 2 * elements / 128 / CLOCK
    products = 2 * elements * d / (RATE / SMS) / MAIN_LOOP
    # the weight is read again for each GROUP of row tiles
    moved = 2.0 * d * (n + v * ceil(n / GEMM.BN / GEMM.GROUP)) + 2.0 * n * v * store
    seconds = max(tiles * (products + FILL + epilogue), moved / BANDWIDTH / STREAM)
    return Work(2.0 * n * v * d, 2.0 * (n + v) * d + 2.0 * n * v * store, seconds)


def both(*parts: Work, bytes: float) -> Work:
    """One after the other; bytes: the least for all of them, were the rest kept on the chip."""
    return Work(sum(p.flops for p in parts), bytes, sum(p.expected for p in parts))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    given = parser.parse_args()
    for model in given.models:
        v, d = SHAPES[model]
        print(f"\n{model}, {given.rows} rows, V {v}, D {d}\n")
        print("| part | TFLOP | GB | floor, ms | expected, ms | of the floor's rate |")
        print("|---|--:|--:|--:|--:|--:|")
        for name, work in works(given.rows, v, d).items():
            ms = f"{work.floor * 1e3:.2f} | {work.expected * 1e3:.2f}"
            share = f"{work.floor / work.expected:.0%}"
            print(f"| {name} | {work.flops / 1e12:.2f} | {work.bytes / 1e9:.2f} | {ms} | {share} |")


if __name__ == "__main__":
    main()
