"""One decoder for Llama, Mistral, Qwen2/2.5, Qwen3, SmolLM2 and SmolLM3.

They differ by a handful of flags (`Shape`). Parameters are `nn.Linear`s under Hugging Face names:
a checkpoint of either side is one of the other, and PEFT finds its projections. Training and
sampling run the same code and differ in the attention that is passed in: over a pack
(`PackedAttention`) or over the generator's key-value cache.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expo_fast.modeling.attention import Layer, PackedAttention
from expo_fast.storage.files import reading

Exact = Callable[["Decoder", Tensor, Tensor, Tensor, Tensor | None], Tensor]  # as `hidden`
Attend = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]  # q, k, v (N, heads, Dh) -> (N, H, Dh)

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # SmolLM2 is a llama
# Those whose config may ask for it; transformers ignores the same key in the config of another.
ATTENTION_BIAS = ("llama", "qwen3", "smollm3")
MLP_BIAS = ("llama", "smollm3")
LAYER_TYPES = ("qwen2", "qwen3", "smollm3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
SIZES += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")


@dataclass(frozen=True)
class Shape:
    """What our decoder reads of a Hugging Face config."""

    vocabulary: int  # V
    hidden: int  # D
    intermediate: int
    heads: int  # H
    kv_heads: int
    head_dim: int  # Dh
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    context: int  # tokens
    windows: tuple[int | None, ...]  # one a layer: None sees everything before
    rope: tuple[bool, ...]  # one a layer: False is a NoPE layer (SmolLM3)


def read_shape(config: Any) -> Shape:
    """Shape of a transformers config; ValueError where it is none of ours, or makes no sense."""
    check_config(vars(config) | {"model_type": config.model_type})
    kind = config.model_type
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported, need 'silu'")
    n_layers, heads = config.num_hidden_layers, config.num_attention_heads
    bias = kind in ATTENTION_BIAS and config.attention_bias
    rope = getattr(config, "no_rope_layers", None) if kind == "smollm3" else None
    shape = Shape(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        norm_eps=config.rms_norm_eps,
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
        mlp_bias=kind in MLP_BIAS and config.mlp_bias,
        qk_norm=kind == "qwen3",
        tied=config.tie_word_embeddings,
        context=config.max_position_embeddings,
        windows=_windows(config, n_layers),
        rope=tuple(map(bool, rope)) if rope is not None else (True,) * n_layers,
    )
    _check_shape(shape)
    return shape


def check_config(values: Mapping[str, Any]) -> None:
    """Raise ValueError for an unsupported architecture, or a size that is no positive integer.

    values: the fields of a Hugging Face config, as config.json or a transformers config has them.
    """
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type {kind!r} is not supported, expo_fast runs {', '.join(ARCHITECTURES)} "
            "(SmolLM2 counts as llama)"
        )
    for key in SIZES:
        size = values.get(key)  # None: transformers decides whether there is a default
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"{key} is {size!r}, need a positive integer")


def _check_shape(shape: Shape) -> None:
    if shape.head_dim % 2:
        raise ValueError(f"head_dim is {shape.head_dim}, RoPE needs an even one")
    if shape.heads % shape.kv_heads:
        raise ValueError(
            f"num_key_value_heads is {shape.kv_heads}, need a divisor of the {shape.heads} heads"
        )
    if not shape.norm_eps >= 0:
        raise ValueError(f"rms_norm_eps is {shape.norm_eps}, need a number >= 0")
    for window in shape.windows:
        if window is not None and window < 1:
            raise ValueError(f"sliding_window is {window}, need at least one token")


def _windows(config: Any, n_layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":  # all layers alike, and no switch
        return (window,) * n_layers
    if config.model_type not in LAYER_TYPES:
        return (None,) * n_layers
    types = config.layer_types
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def rope_frequencies(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """(Dh/2,) fp32 radians a token, and the factor on cos and sin that YaRN asks for."""
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(
            f"rope_type {rope['rope_type']!r} is not supported, need {', '.join(ROPE_TYPES)}"
        )
    with reading(f"rope_parameters {rope}"):
        frequencies, scale = _rope(config, head_dim)
        usable = len(frequencies) == head_dim // 2 and (frequencies * scale).isfinite().all()
    if not usable:
        raise ValueError(f"rope_parameters {rope} give no {head_dim // 2} finite frequencies")
    return frequencies, scale


def _rope(config: Any, head_dim: int) -> tuple[Tensor, float]:
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    with torch.device("cpu"):  # it makes helper tensors on the default device, even on meta
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape, index: int):
        super().__init__()
        D, H, Hkv, Dh = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim
        self.q_proj = nn.Linear(D, H * Dh, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(D, Hkv * Dh, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(D, Hkv * Dh, bias=shape.qkv_bias)
        self.o_proj = nn.Linear(H * Dh, D, bias=shape.out_bias)
        self.q_norm = RMSNorm(Dh, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(Dh, shape.norm_eps) if shape.qk_norm else nn.Identity()
        self.rope = shape.rope[index]
        self.head_dim = Dh
        self.layer = Layer(index, Dh**-0.5, shape.windows[index])

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        heads = (len(x), -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads))
        k = self.k_norm(self.k_proj(x).view(heads))
        v = self.v_proj(x).view(heads)
        if self.rope:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return self.o_proj(attend(self.layer, q, k, v).reshape(len(x), -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves paired (arXiv:2104.09864); x (N, heads, Dh)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class MLP(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        D, M, bias = shape.hidden, shape.intermediate, shape.mlp_bias
        self.gate_proj = nn.Linear(D, M, bias=bias)
        self.up_proj = nn.Linear(D, M, bias=bias)
        self.down_proj = nn.Linear(M, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape, index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape, index)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.norm_eps)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, i) for i in range(len(shape.windows)))
        self.norm = RMSNorm(shape.hidden, shape.norm_eps)


class _WithGradientOf(torch.autograd.Function):
    """The value of `exact` with the gradient of `rounded`, which differ by rounding."""

    @staticmethod
    def forward(ctx: Any, rounded: Tensor, exact: Tensor) -> Tensor:
        return exact

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class Decoder(nn.Module):
    """A causal language model up to its last norm; the head is `head_weight`, left to the ops.

    config: the transformers config it was read from, kept for saving.
    checkpointing: recompute each layer in the backward pass instead of keeping its activations.
    exact: computes what `hidden` returns, where that must not depend, to the bit, on how tokens are
    packed; gradients stay PyTorch's.
    """

    inv_freq: Tensor
    exact: "Exact | None" = None

    def __init__(self, config: Any, *, checkpointing: bool = False):
        super().__init__()
        self.config = config
        self.generation_config: Any = None  # where the checkpoint has one
        self.shape = read_shape(config)
        self.checkpointing = checkpointing
        self.model = Body(self.shape)
        if not self.shape.tied:
            self.lm_head = nn.Linear(self.shape.hidden, self.shape.vocabulary, bias=False)
        inv_freq, self.rope_scale = rope_frequencies(config, self.shape.head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.shape.tied else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Token ids that end a completion, as the checkpoint says: () where it names none."""
        for config in (self.generation_config, self.config):
            ids = getattr(config, "eos_token_id", None)
            if ids not in (None, [], ()):
                return tuple(ids) if isinstance(ids, list | tuple) else (ids,)
        return ()

    def settle_eos(self, tokenizer: Any) -> None:
        """Where the checkpoint names no end, take the tokenizer's: without one no sample stops.

        ValueError where an end is no token of the model's.
        """
        if not self.eos_ids and tokenizer is not None:
            self.config.eos_token_id = tokenizer.eos_token_id
        for token in self.eos_ids:
            if type(token) is not int or not 0 <= token < self.shape.vocabulary:
                raise ValueError(
                    f"eos_token_id is {token!r}, need an integer in [0, {self.shape.vocabulary}): "
                    "set it in generation_config.json or config.json"
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Decoder":
        """`.to`, `.bfloat16` and such leave the frequencies in fp32: bf16 is off by up to 1/512 of
        the angle, about a radian after 500 tokens."""
        inv_freq = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = inv_freq.to(self.inv_freq.device)
        return self

    def hidden(
        self,
        tokens: Tensor,  # (N,) int
        positions: Tensor,  # (N,) int, each token's place in its own sequence
        cu_seqlens: Tensor,  # (S+1,) int32
        parents: Tensor | None = None,  # (S,) int, see `PackedAttention`
    ) -> Tensor:  # (N, D), after the final norm
        """Packed forward: each segment sees itself and, where it has parents, those."""
        if self.exact is None:
            return self.run(tokens, positions, PackedAttention(cu_seqlens, parents))
        exact = self.exact(self, tokens, positions, cu_seqlens, parents)
        if not torch.is_grad_enabled():
            return exact
        rounded = self.run(tokens, positions, PackedAttention(cu_seqlens, parents))
        return _WithGradientOf.apply(rounded, exact)  # pyright: ignore[reportReturnType]

    def run(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(N,) tokens -> (N, D), with any attention."""
        x = self.model.embed_tokens(tokens)
        rotation = self.rotation(positions)
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotation, attend, use_reentrant=False)
                assert isinstance(x, Tensor)
            else:
                x = layer(x, rotation, attend)
        return self.model.norm(x)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (N, 1, Dh/2) in the model's dtype; the angles themselves need fp32."""
        angles = positions[:, None].float() * self.inv_freq
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        return cos[:, None].to(self.dtype), sin[:, None].to(self.dtype)
