"""Causal attention over a pack of segments.

A pack is a row of N tokens that is divided into segments. A segment may continue an earlier one,
its parent: the samples of a group continue their question, and the questions of a batch continue
the worked examples. Shared tokens are computed once, forward and backward. Every segment attends to
exactly the tokens that it would see if its complete sequence stood alone.
"""

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """What attention needs to know about the layer that calls it."""

    index: int
    scale: float  # 1 / sqrt(head_dim)
    window: int | None  # number of visible tokens, including the token itself; None: all


@dataclass(frozen=True)
class _VisibleKeys:
    """The keys of a pack, repeated for each segment that attends to them."""

    rows: Tensor  # (Nk,) the tokens of the pack that each segment attends to, in segment order
    cu_seqlens: Tensor  # (S+1,) int32, the boundaries of the segments in `rows`
    max_length: int


class PackedAttention:
    """The attention of one packed forward. It is called once per layer.

    cu_seqlens: (S+1,) int32, the boundaries of the segments in the pack.
    parents: (S,) the earlier segment that each segment continues, or -1. None: no segment continues
    another one.
    """

    def __init__(self, cu_seqlens: Tensor, parents: Tensor | None = None):
        self.cu_seqlens = cu_seqlens
        self.boundaries = cu_seqlens.tolist()
        self.segment_lengths = [b - a for a, b in pairwise(self.boundaries)]
        self.chains = _chains(len(self.segment_lengths), parents)

    def __call__(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q (N, H, Dh), k and v (N, Hkv, Dh) to (N, H, Dh)."""
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return self._varlen(layer, q, k, v)
        # split and not slices: the gradient of a slice is a zeroed tensor as large as the pack
        queries = q.split(self.segment_lengths)
        keys = k.split(self.segment_lengths)
        values = v.split(self.segment_lengths)
        outputs = []
        for segment, chain in enumerate(self.chains):
            chain_keys = torch.cat([keys[s] for s in chain])
            chain_values = torch.cat([values[s] for s in chain])
            out = causal_attention(layer, queries[segment], chain_keys, chain_values)
            outputs.append(out)
        return torch.cat(outputs)

    def _varlen(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = self._visible_keys
        return varlen_attention(
            layer,
            q,
            k[visible.rows],
            v[visible.rows],
            cu_queries=self.cu_seqlens,
            cu_keys=visible.cu_seqlens,
            max_queries=max(self.segment_lengths),
            max_keys=visible.max_length,
        )

    @cached_property
    def _visible_keys(self) -> _VisibleKeys:
        rows: list[int] = []
        n_keys: list[int] = []
        for chain in self.chains:
            before = len(rows)
            for segment in chain:
                start = self.boundaries[segment]
                rows.extend(range(start, self.boundaries[segment + 1]))
            n_keys.append(len(rows) - before)
        device = self.cu_seqlens.device
        boundaries = [0, *accumulate(n_keys)]
        return _VisibleKeys(
            rows=torch.tensor(rows, device=device),
            cu_seqlens=torch.tensor(boundaries, dtype=torch.int32, device=device),
            max_length=max(n_keys),
        )


def varlen_attention(
    layer: Layer,
    q: Tensor,  # (Nq, H, Dh) 16-bit, on a GPU
    k: Tensor,  # (Nk, Hkv, Dh)
    v: Tensor,  # (Nk, Hkv, Dh)
    cu_queries: Tensor,  # (S+1,) int32
    cu_keys: Tensor,  # (S+1,) int32
    max_queries: int,
    max_keys: int,
) -> Tensor:
    """Return the (Nq, H, Dh) causal attention of packed sequences.

    The last query of a sequence sees its last key. Runs flash-attn if it is installed, else
    torch's varlen_attn.
    """
    left = -1 if layer.window is None else layer.window - 1
    if _has_flash_attn():
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        return flash_attn_varlen_func(
            q,
            k,
            v,
            cu_queries,
            cu_keys,
            max_queries,
            max_keys,
            softmax_scale=layer.scale,
            causal=True,
            window_size=(left, 0 if layer.window else -1),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        cu_queries,
        cu_keys,
        max_queries,
        max_keys,
        scale=layer.scale,
        window_size=(left, 0),
        **_grouped_queries(),
    )
    assert isinstance(out, Tensor)
    return out


@cache
def _has_flash_attn() -> bool:
    return find_spec("flash_attn") is not None


@cache
def _grouped_queries() -> dict[str, Any]:
    """Return what allows fewer key heads than query heads: torch 2.11 does not ask for it."""
    from torch.nn.attention.varlen import varlen_attn

    asked = "enable_gqa" in signature(varlen_attn).parameters
    return {"enable_gqa": True} if asked else {}


def causal_attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the (Nq, H, Dh) causal attention of one sequence.

    q: (Nq, H, Dh), the queries of the last Nq tokens.
    k, v: (Nk, Hkv, Dh), of all Nk tokens.
    """
    n_queries = len(q)
    n_keys = len(k)
    sees_all = layer.window is None or layer.window >= n_keys
    plain = n_queries == n_keys and sees_all
    mask = None
    if not plain:
        mask = _mask(n_queries, n_keys, layer.window, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=plain,
        scale=layer.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


@lru_cache(maxsize=16)  # the layers of one forward need the same few masks
def _mask(n_queries: int, n_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return (n_queries, n_keys) bool, True where a query sees a key.

    The last query sees the last key.
    """
    size = (n_queries, n_keys)
    everything = torch.ones(size, dtype=torch.bool, device=device)
    offset = n_keys - n_queries
    causal = everything.tril(offset)
    if window is None:
        return causal
    return causal.triu(offset - window + 1)


def _chains(n_segments: int, parents: Tensor | None) -> list[list[int]]:
    """Return for each segment its ancestors from the root on, followed by itself."""
    if parents is None:
        return [[segment] for segment in range(n_segments)]
    chains: list[list[int]] = []
    for s, parent in enumerate(parents.tolist()):
        assert parent < s, f"segment {s} continues segment {parent}, which does not come before it"
        ancestors = chains[parent] if parent >= 0 else []
        chains.append([*ancestors, s])
    return chains
