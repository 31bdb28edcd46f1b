"""Causal attention inside each segment of a pack, and from a segment to its ancestors.

A pack is a row of N tokens cut into segments. A segment may continue another one, its parent: the
samples of a group continue their question, the questions of a batch continue the worked examples.
What segments share is then computed once, forward and backward, and every segment still attends to
exactly the tokens that it would see if its whole sequence stood alone.
"""

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """What attention needs to know of the layer that calls it."""

    index: int
    scale: float  # 1 / sqrt(head_dim)
    window: int | None  # a token sees this many tokens, itself included; None: all before it


class PackedAttention:
    """Attention of one packed forward; called once a layer.

    cu_seqlens: (S+1,) int32, the segments' borders in the pack.
    parents: (S,) the segment that each one continues, an earlier one, or -1. None: every segment
    stands alone.
    """

    def __init__(self, cu_seqlens: Tensor, parents: Tensor | None = None):
        self.borders = cu_seqlens.tolist()
        self.cu_seqlens = cu_seqlens
        self.chains = _chains(len(self.borders) - 1, parents)

    def __call__(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (N, H, Dh), k and v (N, Hkv, Dh) -> (N, H, Dh)."""
        if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
            return self._varlen(layer, q, k, v)
        # split, not slices: the gradient of each slice would be a zeroed tensor of the whole pack
        lengths = [b - a for a, b in pairwise(self.borders)]
        queries, keys, values = (x.split(lengths) for x in (q, k, v))
        return torch.cat(
            [
                causal_attention(
                    layer,
                    queries[chain[-1]],
                    torch.cat([keys[s] for s in chain]),
                    torch.cat([values[s] for s in chain]),
                )
                for chain in self.chains
            ]
        )

    def _varlen(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = self._keys
        lengths = (self.cu_seqlens, keys.cu_seqlens, keys.max_queries, keys.max_keys)
        return varlen_attention(layer, q, k[keys.rows], v[keys.rows], *lengths)

    @cached_property
    def _keys(self) -> "_Keys":
        spans = [[range(*self.borders[a : a + 2]) for a in chain] for chain in self.chains]
        lengths = [sum(map(len, chain)) for chain in spans]
        device = self.cu_seqlens.device
        return _Keys(
            rows=torch.tensor([t for chain in spans for r in chain for t in r], device=device),
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
            max_queries=max(b - a for a, b in pairwise(self.borders)),
            max_keys=max(lengths),
        )


@dataclass(frozen=True)
class _Keys:
    rows: Tensor  # (Nk,) the pack's tokens that each segment attends to, segment after segment
    cu_seqlens: Tensor  # (S+1,) int32, borders of the segments in `rows`
    max_queries: int
    max_keys: int


def varlen_attention(
    layer: Layer,
    q: Tensor,  # (Nq, H, Dh) 16-bit, on a GPU
    k: Tensor,  # (Nk, Hkv, Dh)
    v: Tensor,  # (Nk, Hkv, Dh)
    cu_queries: Tensor,  # (S+1,) int32
    cu_keys: Tensor,  # (S+1,) int32
    max_queries: int,
    max_keys: int,
) -> Tensor:  # (Nq, H, Dh)
    """flash-attn where installed, else torch's varlen_attn; a sequence's last query sees its last
    key."""
    lengths = (cu_queries, cu_keys, max_queries, max_keys)
    left = -1 if layer.window is None else layer.window - 1
    if _has_flash_attn():
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        exact = torch.are_deterministic_algorithms_enabled()
        window = (left, 0 if layer.window else -1)
        return flash_attn_varlen_func(
            *(q, k, v, *lengths),
            softmax_scale=layer.scale,
            causal=True,
            window_size=window,
            deterministic=exact,
        )
    from torch.nn.attention.varlen import varlen_attn

    group = q.shape[1] // k.shape[1]  # torch 2.11 has no enable_gqa
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    out = varlen_attn(q, k, v, *lengths, scale=layer.scale, window_size=(left, 0))
    assert isinstance(out, Tensor)
    return out


@cache
def _has_flash_attn() -> bool:
    return find_spec("flash_attn") is not None


def causal_attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One sequence: q (Nq, H, Dh) are the last Nq of the Nk tokens of k and v (Nk, Hkv, Dh)."""
    whole = len(q) == len(k) and (layer.window is None or layer.window >= len(k))
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        attn_mask=None if whole else _mask(len(q), len(k), layer.window, q.device),
        is_causal=whole,
        scale=layer.scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


@lru_cache(maxsize=16)  # the layers of one forward ask for the same few
def _mask(n_queries: int, n_keys: int, window: int | None, device: torch.device) -> Tensor:
    """(n_queries, n_keys) bool, True where a query sees a key; the last query sees the last key."""
    mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=device)
    mask = mask.tril(n_keys - n_queries)
    return mask if window is None else mask.triu(n_keys - n_queries - window + 1)


def _chains(n_segments: int, parents: Tensor | None) -> list[list[int]]:
    """For each segment its ancestors from the root on, itself last."""
    chains: list[list[int]] = []
    for s, parent in enumerate([-1] * n_segments if parents is None else parents.tolist()):
        assert parent < s, f"segment {s} continues segment {parent}, which does not come before it"
        chains.append([*(chains[parent] if parent >= 0 else []), s])
    return chains
