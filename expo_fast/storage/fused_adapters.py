"""LoRA adapters of joined projections, see `fused_projections`.

PEFT adapts the modules of transformers, so a file has one A and one B for each joined projection.
Adapters of rank r of n parts are one adapter of rank n r: A holds the rows of all parts, and B is
block-diagonal. s B A is the same, because rank and alpha grow by the same factor.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expo_fast.storage.fused_projections import PARTS, joined_name, parts_of
from expo_fast.storage.lora_files import Adapter, LoraFactors


def join_factors(factors: dict[str, LoraFactors]) -> dict[str, LoraFactors]:
    """Return LoRA factors by the names of the modules of transformers."""
    by_module: dict[str, list[LoraFactors]] = {}
    for name, part in factors.items():
        by_module.setdefault(joined_name(name), []).append(part)
    joined = {}
    for module, parts in by_module.items():
        A = torch.cat([part.A.detach() for part in parts])
        B = torch.block_diag(*[part.B.detach() for part in parts])
        joined[module] = LoraFactors(A, B)
    return joined


def join_config(config: Any) -> None:
    """Let a LoraConfig of PEFT name joined projections, with their ranks, in place."""
    config.target_modules = {joined_name(name) for name in config.target_modules}
    for joined, parts in PARTS.items():
        config.rank_pattern[joined] = len(parts) * config.r
        config.alpha_pattern[joined] = len(parts) * config.lora_alpha


def split_adapter(adapter: Adapter, rows: dict[str, int]) -> Adapter:
    """Return the adapter with factors for each part of its joined projections.

    rows: the number of rows of each projection of the model.

    The parts of a block-diagonal B get their own rank. Those of any other B share A.
    """
    factors: dict[str, LoraFactors] = {}
    for name, joined in adapter.factors.items():
        parts = parts_of(name)
        if not parts or len(joined.B) != sum(rows.get(part, 0) for part in parts):
            factors[name] = joined
            continue
        sizes = [rows[part] for part in parts]
        factors |= zip(parts, _split(joined, sizes, adapter.rank), strict=True)
    return replace(adapter, factors=factors)


def _split(joined: LoraFactors, sizes: list[int], rank: int) -> list[LoraFactors]:
    B_parts = joined.B.split(sizes)
    if len(joined.A) == rank * len(sizes):
        A_parts = joined.A.split(rank)
        blocks = [B.split(rank, dim=1)[i] for i, B in enumerate(B_parts)]
        if torch.equal(torch.block_diag(*blocks), joined.B):
            return _factors(A_parts, blocks)
    return _factors([joined.A] * len(sizes), B_parts)


def _factors(A_parts: Any, B_parts: Any) -> list[LoraFactors]:
    pairs: list[tuple[Tensor, Tensor]] = list(zip(A_parts, B_parts, strict=True))
    return [LoraFactors(A.contiguous(), B.contiguous()) for A, B in pairs]
