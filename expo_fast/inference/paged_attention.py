"""PyTorch attention over a paged key-value cache, for prompts and for new tokens."""

from functools import cached_property

import torch
from torch import Tensor

from expo_fast.inference.engine import Tokens, cpu_int64
from expo_fast.inference.kv_pages import pages_for
from expo_fast.modeling.attention import Layer, causal_attention, varlen_attention


class PagedAttention:
    """The attention of one forward pass over the pages. It is called once per layer.

    slab: (layers, 2, pages, page, Hkv, Dh), keys and values.
    """

    def __init__(self, slab: Tensor, tokens: Tokens):
        self.slab = slab
        self.page = slab.shape[3]
        self.lengths = tokens.lengths
        self.tokens = tokens

    @cached_property
    def positions(self) -> list[int]:
        return self.tokens.positions.tolist()

    @cached_property
    def tables(self) -> Tensor:
        return self.tokens.tables.long().to(self.slab.device)

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """The page and the offset of each token's key and value, (N,) each."""
        positions = self.tokens.positions
        column = positions // self.page
        pages = self.tokens.tables.gather(1, column[:, None]).squeeze(1).long()
        offsets = positions % self.page
        return pages.to(self.slab.device), offsets.to(self.slab.device)

    def __call__(self, layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v (N, Hkv, Dh) to the cache. Return the (N, H, Dh) attention of q."""
        keys, values = self.slab[layer.index]
        keys[self.places] = k
        values[self.places] = v
        return self.attend(layer, q)

    def attend(self, layer: Layer, q: Tensor) -> Tensor:
        """Return the (N, H, Dh) attention of q, whose own keys and values are in the cache."""
        keys, values = self.slab[layer.index]
        if len(self.lengths) == len(q):
            return self._one_token_each(layer, q, keys, values)
        return self._several_tokens(layer, q, keys, values)

    def _several_tokens(self, layer: Layer, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend sequence by sequence."""
        out = []
        end = 0
        for length in self.lengths:
            start = end
            end += length
            n_seen = self.positions[end - 1] + 1
            n_pages = pages_for(n_seen, self.page)
            pages = self.tables[end - 1, :n_pages]
            own_keys = keys[pages].flatten(0, 1)[:n_seen]
            own_values = values[pages].flatten(0, 1)[:n_seen]
            attended = causal_attention(layer, q[start:end], own_keys, own_values)
            out.append(attended)
        return torch.cat(out)

    def _one_token_each(self, layer: Layer, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend with one token per sequence. Attention scores and weights are at least fp32."""
        n, _, head_dim = q.shape
        wide = torch.promote_types(q.dtype, torch.float32)
        width = max(self.positions) // self.page + 1
        tables = self.tables[:, :width]
        k = keys[tables].flatten(1, 2)  # (N, width * page, Hkv, Dh)
        v = values[tables].flatten(1, 2)
        k = k.transpose(1, 2).to(wide)
        v = v.transpose(1, 2).to(wide)
        last = torch.tensor(self.positions, device=q.device)[:, None]
        position = torch.arange(width * self.page, device=q.device)
        seen = position <= last
        if layer.window is not None:
            seen &= position > last - layer.window
        # Unwritten memory may contain NaN, and 0 * NaN is NaN.
        hidden = ~seen
        v = v.masked_fill(hidden[:, None, :, None], 0)
        kv_heads = k.shape[1]
        grouped = q.to(wide).view(n, kv_heads, -1, head_dim)
        scores = layer.scale * grouped @ k.transpose(2, 3)
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        out = scores.softmax(-1) @ v
        return out.view(q.shape).to(q.dtype)


class VarlenPagedAttention(PagedAttention):
    """PagedAttention with one varlen call per layer for all prompts. 16-bit on a GPU only."""

    def __init__(self, slab: Tensor, tokens: Tokens):
        super().__init__(slab, tokens)
        query_borders = cpu_int64([0, *tokens.lengths]).cumsum(0)
        last = query_borders[1:] - 1
        n_seen = tokens.positions[last] + 1
        key_borders = torch.cat([n_seen.new_zeros(1), n_seen.cumsum(0)])
        n_keys = int(key_borders[-1])
        device = slab.device
        self.query_borders = query_borders.to(device, torch.int32)
        self.key_borders = key_borders.to(device, torch.int32)
        self.max_queries = max(tokens.lengths)
        self.max_keys = int(n_seen.max())
        # The page and offset of every key, sequence after sequence. They are computed on the GPU,
        # because there are many more keys than sequences.
        sequences = torch.arange(len(n_seen), device=device)
        sequence = sequences.repeat_interleave(n_seen.to(device), output_size=n_keys)
        position = torch.arange(n_keys, device=device) - self.key_borders[sequence]
        tables = tokens.tables[last].to(device)
        pages = tables[sequence, position // self.page].long()
        self.visible = (pages, position % self.page)

    def _several_tokens(self, layer: Layer, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return varlen_attention(
            layer,
            q,
            keys[self.visible],
            values[self.visible],
            self.query_borders,
            self.key_borders,
            self.max_queries,
            self.max_keys,
        )
