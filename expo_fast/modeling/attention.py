"""Causal attention over a pack of segments.

A pack is a row of N tokens that is divided into segments. A segment may continue an earlier one,
its parent: the samples of a group continue their question, and the questions of a batch continue
the worked examples. Shared tokens are computed once, forward and backward. The chain of a segment
is the list of its ancestors, from the root on, followed by the segment itself. A segment attends to
the tokens of its chain, so the result is that of separate sequences.
"""

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from itertools import chain as chained
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from expo_fast.kernels import fused
from expo_fast.op_backends import native_layer


@dataclass(frozen=True)
class Layer:
    """The layer's properties that attention depends on."""

    index: int
    scale: float  # of the scores, 1 / sqrt(head_dim) for most models
    window: int | None  # number of visible tokens, including the token itself; None: all


@dataclass(frozen=True)
class _VisibleKeys:
    """The keys that each segment of a pack attends to, in segment order."""

    copies: fused.Copies | None  # of the pack's tokens; None if no key is shared
    cu_seqlens: Tensor  # (S+1,) int32, the boundaries of the segments in the keys
    max_length: int


class PackedAttention:
    """The attention of one packed forward pass. It is called once per layer.

    cu_seqlens: (S+1,) int32, the boundaries of the segments in the pack.
    parents: (S,) int, the index of each segment's parent, or -1 if it has none. None: no segment
    has a parent.
    device: device of the pack's tokens. None: the device of cu_seqlens.

    The host reads cu_seqlens and parents, which is a sync if they are on a GPU.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        parents: Tensor | None = None,
        device: torch.device | None = None,
    ):
        self.boundaries = cu_seqlens.tolist()
        self.cu_seqlens = _sent(cu_seqlens, device or cu_seqlens.device)
        self.segment_lengths = [b - a for a, b in pairwise(self.boundaries)]
        self.chains = _chains(len(self.segment_lengths), parents)

    def __call__(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q (N, H, Dh), k and v (N, Hkv, Dh) to (N, H, Dh)."""
        if self.boundaries[0] != 0 or self.boundaries[-1] != len(q):
            raise ValueError(
                f"cu_seqlens are from {self.boundaries[0]} to {self.boundaries[-1]}: they must "
                f"cover the pack's {len(q)} tokens"
            )
        if varlen_runs(q.device, q.dtype, q.shape[-1]):
            return self._varlen(layer, q, k, v)
        if native_layer.runs(q, k, v):
            return self._tree(layer, q, k, v)
        # split instead of slices: the gradient of a slice is a zeroed tensor of the pack's size
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

    def _tree(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = min(layer.window, len(q)) if layer.window else 0
        tree = (self._boundaries_on_cpu, self._parents_on_cpu)
        out, _ = native_layer.tree_attention(q, k, v, *tree, window, layer.scale)
        return out

    @cached_property
    def _boundaries_on_cpu(self) -> Tensor:
        return torch.tensor(self.boundaries, dtype=torch.int32, device="cpu")

    @cached_property
    def _parents_on_cpu(self) -> Tensor:
        """(S,) int32, the last of each segment's ancestors, or -1."""
        parents = [chain[-2] if len(chain) > 1 else -1 for chain in self.chains]
        return torch.tensor(parents, dtype=torch.int32, device="cpu")

    def _varlen(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = self._visible_keys
        if visible.copies is not None:
            k, v = copy_keys(k, v, visible.copies)
        return varlen_attention(
            layer,
            q,
            k,
            v,
            cu_queries=self.cu_seqlens,
            cu_keys=visible.cu_seqlens,
            max_queries=self.max_length,
            max_keys=visible.max_length,
        )

    @cached_property
    def max_length(self) -> int:
        return max(self.segment_lengths)

    @cached_property
    def _visible_keys(self) -> _VisibleKeys:
        if all(len(chain) == 1 for chain in self.chains):
            return _VisibleKeys(None, self.cu_seqlens, self.max_length)
        copies, boundaries = copy_chains(self.boundaries, self.chains, self.cu_seqlens)
        max_length = int(boundaries.diff().max())
        return _VisibleKeys(copies, _sent(boundaries, self.cu_seqlens.device), max_length)


def copy_chains(
    boundaries: list[int], chains: list[list[int]], cu_seqlens: Tensor
) -> tuple[fused.Copies, Tensor]:
    """Plan the copies of keys that make each chain contiguous.

    Return the copies, on the device of cu_seqlens, and the (S+1,) boundaries of the chains in the
    copied rows.
    """
    n_segments = len(chains)
    begins = torch.tensor(boundaries)
    lengths = begins.diff()
    segments = torch.arange(n_segments)
    copied = torch.tensor(list(chained.from_iterable(chains)))  # (P,) the segment of each copy
    copied_lengths = lengths[copied]
    ends = _from_zero(copied_lengths)
    copy_begins = ends[:-1]
    shift = begins[copied] - copy_begins
    rows = torch.arange(int(ends[-1])) + shift.repeat_interleave(copied_lengths)
    chain_sizes = torch.tensor([len(chain) for chain in chains])
    by_segment = copied.argsort(stable=True)
    device = cu_seqlens.device
    copies = fused.Copies(
        rows=_sent(rows, device),
        segments=_sent(segments.repeat_interleave(lengths), device),
        cu_seqlens=cu_seqlens,
        first=_sent(_from_zero(copied.bincount(minlength=n_segments)), device),
        begins=_sent(copy_begins[by_segment], device),
    )
    return copies, ends[_from_zero(chain_sizes)]


def _from_zero(lengths: Tensor) -> Tensor:
    """Return the cumulative boundaries of parts with these lengths, starting from 0."""
    return F.pad(lengths.cumsum(0), (1, 0))


def _sent(indices: Tensor, device: torch.device) -> Tensor:
    """Return the indices as int32 on a device, without a host sync."""
    indices = indices.int()
    if indices.is_cpu and device.type == "cuda":
        indices = indices.pin_memory()
    return indices.to(device, non_blocking=True)


def copy_keys(k: Tensor, v: Tensor, copies: fused.Copies) -> tuple[Tensor, Tensor]:
    """Return the copied rows of k and v, both (N, Hkv, Dh)."""
    if fused.runs(k, v):
        return fused.copy_keys(k, v, copies)
    return k[copies.rows], v[copies.rows]


def varlen_runs(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether flash attention runs: 16-bit tensors on an Ampere or later GPU."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    major, _ = torch.cuda.get_device_capability(device)
    return major >= 8 and head_dim % 8 == 0 and head_dim <= 256


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

    The last query of a sequence sees its last key. The kernel is flash-attn's if that is installed,
    else the one in torch. `torch.nn.attention.varlen_attn` calls the same operator, but from a
    custom operator in Python, which takes the host 0.15 ms more per call.
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
    out, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_queries,
        cu_keys,
        max_queries,
        max_keys,
        0.0,  # dropout
        layer.window is None,  # causal; a window is causal because it ends at the token
        False,  # no debug mask
        scale=layer.scale,
        window_size_left=left,
        window_size_right=0,
    )
    return out


@cache
def _has_flash_attn() -> bool:
    return find_spec("flash_attn") is not None


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
        mask = causal_mask(n_queries, n_keys, layer.window, q.device)
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
def causal_mask(n_queries: int, n_keys: int, window: int | None, device: torch.device) -> Tensor:
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
    """Return the chain of each segment: its ancestors from the root on, and the segment itself."""
    if parents is None:
        return [[segment] for segment in range(n_segments)]
    chains: list[list[int]] = []
    for s, parent in enumerate(parents.tolist()):
        assert parent < s, f"segment {s} continues segment {parent}, which does not come before it"
        ancestors = chains[parent] if parent >= 0 else []
        chains.append([*ancestors, s])
    return chains
