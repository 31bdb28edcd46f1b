"""What each part of the Triton ops should take on a GPU, written down before it is measured.

    python -m benchmarks.floors                              # a Markdown table, 16384 rows
    python -m benchmarks.floors --card "H100 datasheet" --rows 4096
    python -m benchmarks.floors --ceilings FILE --card NAME  # of a card that was measured

FILE holds JSON, as `benchmarks/lease.sh check` writes it: by the card's name the TFLOP/s of a bf16
product and the GB/s of a copy, read and written.

floor: the longer of the FLOPs and the bytes at these ceilings, each input read and each output
written once. expected: what the shipped tiles, counted, leave of it. A program's tile takes its
products at MAIN_LOOP of the SM's rate, then FILL until the next tile's loads arrive, then its
epilogue: an element is EXP clocks of the SM's 16 exponentials a clock, or ISSUE of its 128 fp32
instructions a clock if that is longer, and E goes through shared memory at 128 bytes a clock.
`benchmarks.parts` prints what it measures beside both, so a gap says which of these is wrong.
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

# By the vendor's datasheets: dense bf16 and memory. No kernel reaches either.
DATASHEETS = {
    "H200 datasheet": Ceilings(flops=989e12, bytes=4.8e12),
    "H100 datasheet": Ceilings(flops=989e12, bytes=3.35e12),
}
SMS, CLOCK = 132, 1.75e9
CUBLAS = 0.97  # of the FLOP/s, at shapes that are not square
MAIN_LOOP, FILL = 0.88, 0.3e-6  # of the SM's share of the FLOP/s; seconds
EXP, ISSUE = 1 / 16, 8 / 128  # clocks of an SM for an element of a tile
STREAM = 0.9  # of the bytes/s, of a kernel that reads or writes rows


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes, and the seconds expected of the part that we ship."""

    flops: float
    bytes: float
    expected: float
    best: Ceilings

    @property
    def floor(self) -> float:
        return max(self.flops / self.best.flops, self.bytes / self.best.bytes)


def works(n: int, v: int, d: int, best: Ceilings) -> dict[str, Work]:
    """Of N rows, V columns and depth D; named as `benchmarks.parts` names them."""
    gemm, operands, logits = 2.0 * n * v * d, 2.0 * (n + v) * d, float(n * v)
    gradients = 4.0 * (n + v) * d
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
    """By cuBLAS."""
    seconds = max(flops / best.flops / CUBLAS, moved / best.bytes / STREAM)
    return Work(flops, moved, seconds, best)


def row_pass(moved: float, best: Ceilings) -> Work:
    return Work(0.0, moved, moved / best.bytes / STREAM, best)


def fused(n: int, v: int, d: int, best: Ceilings, *, store: bool) -> Work:
    """Products and epilogue in one persistent kernel, a program an SM."""
    tile = VARIANTS[BY_CARD["default"]]
    elements = tile.BN * tile.BV
    tiles = ceil(ceil(n / tile.BN) * ceil(v / tile.BV) / SMS)  # of the busiest SM
    epilogue = elements * max(EXP, ISSUE) / CLOCK + store * 2 * elements / 128 / CLOCK
    products = 2 * elements * d / (best.flops / SMS) / MAIN_LOOP
    # the weight is read again for each GROUP of row tiles
    moved = 2.0 * d * (n + v * ceil(n / tile.BN / tile.GROUP)) + 2.0 * n * v * store
    seconds = max(tiles * (products + FILL + epilogue), moved / best.bytes / STREAM)
    return Work(2.0 * n * v * d, 2.0 * (n + v) * d + 2.0 * n * v * store, seconds, best)


def together(*parts: Work, bytes: float) -> Work:
    """One after the other; bytes: the least for all of them, were the rest kept on the chip."""
    return Work(sum(p.flops for p in parts), bytes, sum(p.expected for p in parts), parts[0].best)


def read(file: Path) -> dict[str, Ceilings]:
    """Ceilings by card, from JSON that `write` made."""
    return {
        card: Ceilings(flops=x["gemm_tflops"] * 1e12, bytes=x["copy_gb_s"] * 1e9)
        for card, x in json.loads(file.read_text()).items()
    }


def write(file: Path, measured: Mapping[str, Ceilings]) -> None:
    """Save ceilings by card."""
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
            ms = f"{work.floor * 1e3:.2f} | {work.expected * 1e3:.2f}"
            share = f"{work.floor / work.expected:.0%}"
            print(f"| {name} | {work.flops / 1e12:.2f} | {work.bytes / 1e9:.2f} | {ms} | {share} |")


if __name__ == "__main__":
    main()
