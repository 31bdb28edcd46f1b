"""A forward pass of a plain model with one launch between two GEMMs, for prompts and new tokens.

It computes `Decoder.run` with joined projections. Its kernels round where the model rounds. The
host launches 11 operators for each layer, and `Decoder.run` some 40.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expo_fast.inference.joined_weights import JoinedLayer, JoinedWeights
from expo_fast.kernels import decode
from expo_fast.kernels import layer as layer_kernels
from expo_fast.modeling.attention import Layer
from expo_fast.modeling.decoder import Block, Decoder
from expo_fast.modeling.modules import RMSNorm

Attended = Callable[[Layer, Tensor], Tensor]  # the attention of (N, H, Dh) queries over the cache


@dataclass(frozen=True)
class FusedForward:
    """The forward pass of N tokens, whose keys and values are written to the cache.

    attend: the attention of a layer, called after the layer's keys and values are in the cache.
    """

    model: Decoder
    joined: JoinedWeights
    cache: decode.Paged
    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64
    tables: Tensor  # (N, P) int32, the page table of each token's sequence
    attend: Attended

    def hidden(self) -> Tensor:
        """Return the (N, D) hidden states after the last norm."""
        model = self.model
        body = model.model
        rotation = layer_kernels.rotation(
            self.positions,
            model.inv_freq[0],  # `joined_weights.supports` allows one set
            model.rope_scales[0],
            model.dtype,
        )
        x = body.embed_tokens(self.tokens)
        delta = None
        for block, projections in zip(body.layers, self.joined.layers, strict=True):
            assert isinstance(block, Block)
            x, delta = self._block(block, projections, x, delta, rotation)
        norm = body.norm
        _, normed = layer_kernels.add_norm(x, delta, norm.weight, norm.eps)
        return normed

    def _block(
        self,
        block: Block,
        joined: JoinedLayer,
        x: Tensor,
        delta: Tensor | None,
        rotation: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Run a block on x + delta. Return (x', delta'), whose sum is the block's output.

        The next norm computes the sum, because it adds and normalizes in one launch.
        """
        n = len(x)
        attention = block.self_attn
        norm = _norm(block, block.norms.before_attention)
        x, h = layer_kernels.add_norm(x, delta, norm.weight, norm.eps)
        q, k, v = (part.unflatten(1, (-1, attention.head_dim)) for part in joined.qkv(h))
        q = layer_kernels.place(
            self.cache,
            attention.layer.index,
            q,
            k,
            v,
            norms=_head_norms(attention.q_norm, attention.k_norm),
            rotation=None if attention.rope is None else rotation,
            tables=self.tables,
            positions=self.positions,
        )
        mixed = self.attend(attention.layer, q)
        delta = attention.o_proj(mixed.view(n, -1))
        norm = _norm(block, block.norms.before_mlp)
        x, h = layer_kernels.add_norm(x, delta, norm.weight, norm.eps)
        gate, up = joined.gate_up(h)
        return x, block.mlp.down_proj(layer_kernels.swiglu(gate, up))


def _norm(block: Block, name: str | None) -> RMSNorm:
    assert name is not None
    norm = getattr(block, name)
    assert isinstance(norm, RMSNorm)
    return norm


def _head_norms(q_norm: torch.nn.Module, k_norm: torch.nn.Module) -> layer_kernels.HeadNorms | None:
    """Return the norms of queries and keys, if the model has them."""
    if isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm):
        return layer_kernels.HeadNorms(q=q_norm.weight, k=k_norm.weight, eps=q_norm.eps)
    return None
