"""Triton: what a draw needs to know of the logits, in one pass over them.

    top_j = max_i z_i / T        total_j = sum_i exp(z_i / T - top_j)        i in block j of a row

4 bytes a logit, where PyTorch's division, maximum, difference, exp and sums move 32: at batch 256
and 151936 columns 36 us for 290 at 4.3 TB/s. The rest of a draw looks at V / BLOCK + BLOCK numbers.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (of Triton's functions, which it takes for Python's)

import torch
import triton
import triton.language as tl
from torch import Tensor

from expo_fast.kernels.rowwise import LOG2_E, launch_device

TOGETHER = 8  # blocks of a program


@triton.jit
def block_sums(
    z, temperature, top, total,  # (B, V) fp32, (B,), (B, blocks) out twice
    V, BLOCKS, BLOCK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """A NaN makes its block's total NaN; a block of -inf has total 0."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    column = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    t = tl.load(temperature + row)
    logit = tl.load(z + row * V + column, column < V, -float("inf"))
    u = tl.div_rn(logit, tl.where(t == 0, 1.0, t))  # as PyTorch divides: / is 2 ulp off on a GPU
    highest = tl.max(u, 1)
    anchor = tl.where(highest == -float("inf"), 0.0, highest)
    at, inside = row * BLOCKS + block, block < BLOCKS
    tl.store(top + at, highest, inside)
    tl.store(total + at, tl.sum(tl.exp2((u - anchor[:, None]) * LOG2_E), 1), inside)


def blocks_of(logits: Tensor, temperature: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """top and total, (B, ceil(V / size)) fp32 each; temperature (B,) fp32, 0 counts as 1."""
    (n, v), count = logits.shape, triton.cdiv(logits.shape[1], size)
    top, total = torch.empty(2, n, count, device=logits.device)
    with launch_device(logits):
        block_sums[(n, triton.cdiv(count, TOGETHER))](
            logits.contiguous(), temperature, top, total, v, count, size, TOGETHER
        )
    return top, total
