"""One decoder for all architectures of the table in `architectures.py`.

They differ in the fields of `Shape`, which this file reads in place of their names. Parameters are
`nn.Linear`s under Hugging Face names: checkpoints are interchangeable with transformers, and PEFT
finds the projections. Training and sampling run the same code with different attention: over a pack
(`PackedAttention`), or over the generator's KV cache.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expo_fast.modeling.attention import Layer, PackedAttention
from expo_fast.modeling.modules import (
    Embedding,
    Head,
    Linear,
    RMSNorm,
    geglu_map,
    normed_maps,
    swiglu_map,
)
from expo_fast.modeling.rope import rope_frequencies, rotate_heads
from expo_fast.modeling.shape import Shape, read_shape
from expo_fast.storage.stored_config import complete_config

# (tokens, positions, cu_seqlens, parents) -> (N, D), like `Decoder.hidden`
Exact = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# (layer, q, k, v), with q (N, H, Dh), k and v (N, Hkv, Dh) -> (N, H, Dh)
Attend = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]
Rotation = tuple[Tensor, Tensor]  # cos and sin, (N, 1, R/2)


class Attention(nn.Module):
    """The projections, norms and RoPE of one layer's attention."""

    def __init__(self, shape: Shape, index: int):
        super().__init__()
        D = shape.hidden
        Dh = shape.head_dim
        q_size = shape.heads * Dh
        kv_size = shape.kv_heads * Dh
        self.q_proj = Linear(D, q_size, bias=shape.qkv_bias)
        self.k_proj = Linear(D, kv_size, bias=shape.qkv_bias)
        self.v_proj = Linear(D, kv_size, bias=shape.qkv_bias)
        self.o_proj = Linear(q_size, D, bias=shape.out_bias)
        self.q_norm = _qk_norm(shape, q_size)
        self.k_norm = _qk_norm(shape, kv_size)
        self.norms_all_heads = shape.qk_norm == "all heads"
        self.rope = shape.rope[index]
        self.head_dim = Dh
        self.layer = Layer(index, scale=shape.attention_scale, window=shape.windows[index])

    def forward(
        self,
        x: Tensor,
        norm: nn.Module | None,
        rotations: Sequence[Rotation],
        attend: Attend,
    ) -> Tensor:
        """Map (N, D) to (N, D). norm: of x, before the projections."""
        q, k, v = normed_maps(x, norm, [self.q_proj, self.k_proj, self.v_proj])
        q = self._normed_heads(q, self.q_norm)
        k = self._normed_heads(k, self.k_norm)
        v = v.view(len(x), -1, self.head_dim)
        if self.rope is not None:
            q, k = rotate_heads(q, k, *rotations[self.rope])
        attended = attend(self.layer, q, k, v)
        return self.o_proj(attended.reshape(len(x), -1))

    def _normed_heads(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Normalize (N, heads * Dh) queries or keys, and return them as (N, heads, Dh)."""
        heads = (len(x), -1, self.head_dim)
        if self.norms_all_heads:
            return norm(x).view(heads)
        return norm(x.view(heads))


def _qk_norm(shape: Shape, size: int) -> nn.Module:
    """Return the norm of queries or keys. size: that of all heads."""
    if shape.qk_norm == "no":
        return nn.Identity()
    if shape.qk_norm == "head":
        size = shape.head_dim
    return RMSNorm(size, shape.norm_eps, shape.norm_offset)


class MLP(nn.Module):
    """The gated feed-forward network of one layer (arXiv:2002.05202)."""

    def __init__(self, shape: Shape):
        super().__init__()
        D = shape.hidden
        M = shape.intermediate
        self.gate_proj = Linear(D, M, bias=shape.mlp_bias)
        self.up_proj = Linear(D, M, bias=shape.mlp_bias)
        self.down_proj = Linear(M, D, bias=shape.mlp_bias)
        self.gated_map = {"silu": swiglu_map, "gelu_pytorch_tanh": geglu_map}[shape.activation]

    def forward(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """Map (N, D) to (N, D). norm: of x, before the projections."""
        gate, up = normed_maps(x, norm, [self.gate_proj, self.up_proj])
        return self.gated_map(gate, up, self.down_proj)


class Block(nn.Module):
    """One layer: attention and MLP, each with its norms and a residual connection."""

    def __init__(self, shape: Shape, index: int):
        super().__init__()
        self.norms = shape.norms
        self.residual_scale = shape.residual_scale
        self._add_norm(shape, shape.norms.before_attention)
        self.self_attn = Attention(shape, index)
        self._add_norm(shape, shape.norms.after_attention)
        self._add_norm(shape, shape.norms.before_mlp)
        self.mlp = MLP(shape)
        self._add_norm(shape, shape.norms.after_mlp)

    def _add_norm(self, shape: Shape, name: str | None) -> None:
        if name is not None:
            self.add_module(name, RMSNorm(shape.hidden, shape.norm_eps, shape.norm_offset))

    def forward(self, x: Tensor, rotations: Sequence[Rotation], attend: Attend) -> Tensor:
        """Map (N, D) to (N, D)."""
        norms = self.norms
        h = self.self_attn(x, self._norm(norms.before_attention), rotations, attend)
        x = x + scaled(self._normed(norms.after_attention, h), self.residual_scale)
        h = self.mlp(x, self._norm(norms.before_mlp))
        return x + scaled(self._normed(norms.after_mlp, h), self.residual_scale)

    def _norm(self, name: str | None) -> nn.Module | None:
        return None if name is None else getattr(self, name)

    def _normed(self, name: str | None, x: Tensor) -> Tensor:
        """Apply the norm of that name; None: return x."""
        norm = self._norm(name)
        return x if norm is None else norm(x)


def scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


class Body(nn.Module):
    """Embedding, layers and final norm, under the names of a Hugging Face checkpoint."""

    def __init__(self, shape: Shape, layers: Iterable[int]):
        super().__init__()
        self.embed_tokens = Embedding(shape.vocabulary, shape.hidden)
        blocks = [Block(shape, index) for index in layers]
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(shape.hidden, shape.norm_eps, shape.norm_offset)


class _ExactValue(torch.autograd.Function):
    """Return the value of `exact` with the gradient of `approximate`.

    Both are the same function, computed with different rounding.
    """

    @staticmethod
    def forward(ctx: Any, approximate: Tensor, exact: Tensor) -> Tensor:
        return exact.clone()  # autograd would make a view of an input that is returned

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Decoder(nn.Module):
    """A causal language model up to its final norm. The ops apply the head, `head_weight`.

    config: a transformers config or a `StoredConfig`, kept for saving.
    checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    layers: the layers to make, by their index; None: all. One may be made several times.
    exact: if set, this function computes the values that `hidden` returns. They must be
    bit-identical for any packing of the tokens. Gradients are those of the PyTorch forward pass.
    gathers_by_layer: whether ranks gather the weights layer by layer for each forward pass without
    gradients. They have to make these passes together.
    lockstep: returns the context in which such passes run, see `sharding.Sharded.lockstep`.
    """

    inv_freq: Tensor  # (sets, R/2) fp32
    exact: Exact | None = None
    gathers_by_layer: bool = False
    lockstep: Callable[[], AbstractContextManager[None]] = nullcontext

    def __init__(
        self,
        config: Any,
        *,
        checkpointing: bool = False,
        layers: Sequence[int] | None = None,
    ):
        super().__init__()
        self.stored_config = config
        self.generation_config: Any = None  # set if the checkpoint has one
        self.shape = read_shape(config)
        self.checkpointing = checkpointing
        self.model = Body(self.shape, range(len(self.shape.windows)) if layers is None else layers)
        if not self.shape.tied:
            self.lm_head = Head(self.shape.hidden, self.shape.vocabulary, bias=False)
        rope = rope_frequencies(config, self.shape)
        self.rope_scales = rope.scales
        self.register_buffer("inv_freq", rope.inv_freq, persistent=False)

    @property
    def config(self) -> Any:
        """The transformers config. A `StoredConfig` is completed by the first access."""
        return complete_config(self.stored_config)

    @config.setter
    def config(self, value: Any) -> None:
        self.stored_config = value

    @property
    def head_weight(self) -> Tensor:
        """The (V, D) weight of the head. It is the embedding if the config ties both."""
        if self.shape.tied:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The token ids that end a completion, or () if the checkpoint names none."""
        for config in (self.generation_config, self.stored_config):
            ids = getattr(config, "eos_token_id", None)
            if ids in (None, [], ()):
                continue
            return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
        return ()

    def complete_eos(self, tokenizer: Any) -> None:
        """Take the end token from the tokenizer if the checkpoint names none, and check it.

        tokenizer: may be None. Without an end token, completions stop only at the length limit.
        Raise ValueError if an end token is not in the vocabulary.
        """
        if not self.eos_ids and tokenizer is not None:
            self.stored_config.eos_token_id = tokenizer.eos_token_id
        V = self.shape.vocabulary
        for token in self.eos_ids:
            if type(token) is not int or not 0 <= token < V:
                raise ValueError(
                    f"eos_token_id is {token!r}, need an integer in [0, {V}): "
                    "set it in generation_config.json or config.json"
                )

    def add_eos(self, ids: Sequence[int]) -> None:
        """Let the token ids end completions too, here and in what is saved."""
        ends = list(dict.fromkeys((*self.eos_ids, *ids)))
        self.stored_config.eos_token_id = ends
        if self.generation_config is not None:
            self.generation_config.eos_token_id = ends

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        """Apply `.to`, `.bfloat16` and similar methods, but keep the RoPE frequencies in fp32.

        In bf16 an angle would have a relative error of up to 1/512: about a radian after 500
        tokens.
        """
        inv_freq = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = inv_freq.to(self.inv_freq.device)
        return self

    def hidden(
        self,
        tokens: Tensor,  # (N,) int
        positions: Tensor,  # (N,) int, the index of each token in its own sequence
        cu_seqlens: Tensor,  # (S+1,) int32
        parents: Tensor | None = None,  # (S,) int, see `PackedAttention`
    ) -> Tensor:
        """Return the (N, D) hidden states of a pack, after the final norm.

        The logits are `hidden @ head_weight.T`. Granite divides its logits by `logits_scaling`, and
        here its hidden states, so that the ops and the engines need no factor of their own.

        A token attends to its own segment and to the ancestors of that segment. Keep cu_seqlens and
        parents on the CPU: on a GPU they cost a host sync.
        """
        if self.exact is None:
            attention = PackedAttention(cu_seqlens, parents, tokens.device)
            return self.run(tokens, positions, attention)
        exact = self.exact(tokens, positions, cu_seqlens, parents)
        if not torch.is_grad_enabled():
            return exact
        attention = PackedAttention(cu_seqlens, parents, tokens.device)
        approximate = self.run(tokens, positions, attention)
        return _ExactValue.apply(approximate, exact)  # pyright: ignore[reportReturnType]

    def run(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return the (N, D) hidden states of (N,) tokens, with any attention."""
        x = self.model.embed_tokens(tokens)
        if self.shape.embedding_scale != 1:
            x = x * self.embedding_scale
        rotations = self.rotations(positions)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotations, attend, use_reentrant=False)
                assert isinstance(x, Tensor)
            else:
                x = layer(x, rotations, attend)
        return scaled(self.model.norm(x), self.shape.logit_scale)

    @property
    def embedding_scale(self) -> Tensor:
        """The factor of embeddings, rounded to the model's dtype as in transformers. 0-dim."""
        return torch.tensor(self.shape.embedding_scale, dtype=self.dtype, device="cpu")

    def rotations(self, positions: Tensor) -> list[Rotation]:
        """Return RoPE's cos and sin for (N,) positions, by set of frequencies.

        cos and sin are (N, 1, R/2) each, in the model's dtype. Angles are computed in fp32.
        """
        rotations = []
        for inv_freq, scale in zip(self.inv_freq, self.rope_scales, strict=True):
            angles = positions[:, None].float() * inv_freq
            cos = angles.cos() * scale
            sin = angles.sin() * scale
            rotations.append((cos[:, None].to(self.dtype), sin[:, None].to(self.dtype)))
        return rotations


def plain_decoder(model: Decoder, weights: dict[str, Tensor], *, trainable: bool) -> Decoder:
    """Return a model like another one, but without its hooks and adapters, with these weights.

    weights: by parameter name. They are not copied.
    trainable: whether the weights require gradients; this is set on weights that are parameters.
    """
    with torch.device("meta"):
        plain = Decoder(model.stored_config)
    plain.requires_grad_(trainable)
    plain.load_state_dict(weights, assign=True)
    plain.inv_freq = model.inv_freq
    plain.generation_config = model.generation_config
    return plain
