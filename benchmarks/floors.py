"""Forecast the time of each part of the Triton ops on a GPU, before it is measured.

    python -m benchmarks.floors                              # a Markdown table, 16384 rows
    python -m benchmarks.floors --card "H100 datasheet" --rows 4096
    python -m benchmarks.floors --ceilings FILE --card NAME  # for a card that was measured

FILE is JSON that `benchmarks/lease.sh check` writes. It contains, by the name of the card, the
TFLOP/s of a bf16 product and the GB/s of a copy, read and written.

"floor" is the longer of two times at these rates: that of the FLOPs, and that of the bytes if each
input is read and each output is written once. "expected" models the tiles that we ship. A program
computes the products of a tile at MAIN_LOOP of the SM's rate. It then waits FILL seconds until the
loads of the next tile arrive, and computes its epilogue. An element of the epilogue takes EXP
clocks, at 16 exponentials a clock, or ISSUE clocks, at 128 fp32 instructions a clock, whichever is
longer. E passes through shared memory at 128 bytes a clock. `benchmarks.parts` prints measured
times next to both figures, so that a difference shows which assumption is wrong.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from benchmarks.cases import SHAPES
from benchmarks.measure import Ceilings
from expo_fast.kernels.logprob import BY_CARD, VARIANTS

# Rates of the vendor's datasheets: dense bf16 products, and memory. No kernel reaches them.
DATASHEETS = {
    "H200 datasheet": Ceilings(flops=989e12, bytes=4.8e12),
    "H100 datasheet": Ceilings(flops=989e12, bytes=3.35e12),
}
SMS = 132
CLOCK = 1.75e9  # Hz
CUBLAS = 0.97  # share of the FLOP/s that cuBLAS reaches at shapes that are not square
MAIN_LOOP = 0.88  # share of an SM's FLOP/s that our main loop reaches
FILL = 0.3e-6  # seconds
EXP = 1 / 16  # clocks of an SM for the exponential of an element
ISSUE = 8 / 128  # clocks of an SM for the fp32 instructions of an element
STREAM = 0.9  # share of the bytes/s that a kernel over rows reaches


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of a part, and the seconds that we expect of our implementation."""

    flops: float
    bytes: float
    expected: float
    best: Ceilings

    @property
    def floor(self) -> float:
        """Return the seconds that no implementation can beat."""
        return max(self.flops / self.best.flops, self.bytes / self.best.bytes)


def works(n: int, v: int, d: int, best: Ceilings) -> dict[str, Work]:
    """Return the parts for N rows, V columns and depth D, by the names of `benchmarks.parts`."""
    gemm = 2.0 * n * v * d  # FLOPs
    operands = 2.0 * (n + v) * d  # bytes of hidden and weight in bf16
    gradients = 4.0 * (n + v) * d  # bytes of their gradients in fp32
    logits = float(n * v)
    stored = fused(n, v, d, best, store=True)
    wide = product(gemm, operands + 4 * logits, best)
    passes = row_pass(4 * logits, best)
    into_hidden = product(gemm, 2 * logits + 2 * v * d + 4 * n * d, best)
    into_weight = product(gemm, 2 * logits + 2 * n * d + 4 * v * d, best)
    return {
        "GEMM logits, bf16": product(gemm, operands + 2 * logits, best),
        "GEMM logits, fp32": wide,
        "GEMM E @ weight, bf16": product(gemm, 2 * logits + 2 * v * d + 2 * n * d, best),
        "GEMM E @ weight, fp32": into_hidden,
        "GEMM E.T @ hidden, bf16": product(gemm, 2 * logits + 2 * n * d + 2 * v * d, best),
        "GEMM E.T @ hidden, fp32": into_weight,
        "... added to what is there": product(gemm, 2 * logits + 2 * n * d + 8 * v * d, best),
        "dz from E": row_pass(4 * logits, best),
        "dz recomputed": stored,
        "row kernels, forward": together(wide, passes, bytes=operands),
        "row kernels, one pass": together(
            wide,
            passes,
            row_pass(6 * logits, best),
            into_hidden,
            into_weight,
            bytes=operands + gradients,
        ),
        "fused forward": fused(n, v, d, best, store=False),
        "fused forward with E": stored,
        "forward and backward with E": together(
            stored, into_hidden, into_weight, bytes=operands + gradients + 6 * logits
        ),
    }


def product(flops: float, moved: float, best: Ceilings) -> Work:
    """Return a product that cuBLAS computes."""
    seconds = max(flops / best.flops / CUBLAS, moved / best.bytes / STREAM)
    return Work(flops, moved, seconds, best)


def row_pass(moved: float, best: Ceilings) -> Work:
    """Return a kernel over rows that reads and writes `moved` bytes."""
    return Work(0.0, moved, moved / best.bytes / STREAM, best)


def fused(n: int, v: int, d: int, best: Ceilings, *, store: bool) -> Work:
    """Return a persistent kernel of one program per SM, with products and epilogue."""
    tile = VARIANTS[BY_CARD["default"]]
    elements = tile.BN * tile.BV
    tiles = ceil(ceil(n / tile.BN) * ceil(v / tile.BV) / SMS)  # of the busiest SM
    epilogue = elements * max(EXP, ISSUE) / CLOCK + store * 2 * elements / 128 / CLOCK
    products = 2 * elements * d / (best.flops / SMS) / MAIN_LOOP
    compute_seconds = tiles * (products + FILL + epilogue)
    stored = 2.0 * n * v * store  # bytes
    weight_reads = ceil(n / tile.BN / tile.GROUP)  # one for each GROUP of row tiles
    moved = 2.0 * d * (n + v * weight_reads) + stored
    seconds = max(compute_seconds, moved / best.bytes / STREAM)
    least_moved = 2.0 * (n + v) * d + stored
    return Work(2.0 * n * v * d, least_moved, seconds, best)


def together(*parts: Work, bytes: float) -> Work:
    """Return parts that run one after the other.

    bytes: what they would move if all intermediate results stayed on the chip.
    """
    flops = sum(part.flops for part in parts)
    expected = sum(part.expected for part in parts)
    return Work(flops, bytes, expected, parts[0].best)


def read(file: Path) -> dict[str, Ceilings]:
    """Return the ceilings by card from a file that `write` saved."""
    found = {}
    for card, rates in json.loads(file.read_text()).items():
        found[card] = Ceilings(
            flops=rates["gemm_tflops"] * 1e12,
            bytes=rates["copy_gb_s"] * 1e9,
        )
    return found


def write(file: Path, measured: Mapping[str, Ceilings]) -> None:
    """Save the ceilings by card."""
    plain = {
        card: {"gemm_tflops": best.flops / 1e12, "copy_gb_s": best.bytes / 1e9}
        for card, best in measured.items()
    }
    file.write_text(json.dumps(plain, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--ceilings", type=Path, help="JSON of measured ceilings by card")
    parser.add_argument("--card", default="H200 datasheet")
    given = parser.parse_args()
    known = DATASHEETS | (read(given.ceilings) if given.ceilings else {})
    if given.card not in known:
        parser.error(f"--card {given.card!r}: must be one of {', '.join(known)}")
    best = known[given.card]
    print(f"{given.card}: {best.flops / 1e12:.0f} TFLOP/s, {best.bytes / 1e9:.0f} GB/s")
    for model in given.models:
        v, d = SHAPES[model]
        print(f"\n{model}, {given.rows} rows, V {v}, D {d}\n")
        print("| part | TFLOP | GB | floor, ms | expected, ms | of the floor's rate |")
        print("|---|--:|--:|--:|--:|--:|")
        for name, work in works(given.rows, v, d, best).items():
            cells = [
                name,
                f"{work.flops / 1e12:.2f}",
                f"{work.bytes / 1e9:.2f}",
                f"{work.floor * 1e3:.2f}",
                f"{work.expected * 1e3:.2f}",
                f"{work.floor / work.expected:.0%}",
            ]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
