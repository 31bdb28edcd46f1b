"""Read the decoder's shape from a Hugging Face config, and refuse unsupported configs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # SmolLM2 uses llama

# Architectures whose config may have this flag. transformers ignores it in other configs.
WITH_ATTENTION_BIAS = ("llama", "qwen3", "smollm3")
WITH_MLP_BIAS = ("llama", "smollm3")
WITH_LAYER_TYPES = ("qwen2", "qwen3", "smollm3")

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True)
class Shape:
    """The values of a Hugging Face config that the decoder needs."""

    vocabulary: int  # V
    hidden: int  # D
    intermediate: int
    heads: int  # H
    kv_heads: int  # Hkv
    head_dim: int  # Dh
    norm_eps: float
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool  # the head is the embedding
    context: int  # tokens
    windows: tuple[int | None, ...]  # per layer; None: all earlier tokens are visible
    rope: tuple[bool, ...]  # per layer; False: a NoPE layer (SmolLM3)


def read_shape(config: Any) -> Shape:
    """Return the shape of a transformers config.

    Raise ValueError if the config is unsupported or inconsistent.
    """
    check_config(vars(config) | {"model_type": config.model_type})
    kind = config.model_type
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act {config.hidden_act!r} is not supported, need 'silu'")
    heads = config.num_attention_heads
    bias = kind in WITH_ATTENTION_BIAS and config.attention_bias
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
        mlp_bias=kind in WITH_MLP_BIAS and config.mlp_bias,
        qk_norm=kind == "qwen3",
        tied=config.tie_word_embeddings,
        context=config.max_position_embeddings,
        windows=_windows(config),
        rope=_rope_layers(config),
    )
    _check_shape(shape)
    return shape


def check_config(values: Mapping[str, Any]) -> None:
    """Raise ValueError for an unsupported architecture or a size that is not a positive integer.

    values: the fields of a Hugging Face config, from config.json or from a transformers config.
    """
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type {kind!r} is not supported, expo_fast runs {', '.join(ARCHITECTURES)} "
            "(SmolLM2 is of model_type llama)"
        )
    for key in SIZES:
        size = values.get(key)
        if size is None:  # transformers may have a default
            continue
        if type(size) is not int or size < 1:
            raise ValueError(f"{key} is {size!r}, need a positive integer")


def _check_shape(shape: Shape) -> None:
    if shape.head_dim % 2:
        raise ValueError(f"head_dim is {shape.head_dim}, need an even number for RoPE")
    if shape.heads % shape.kv_heads:
        raise ValueError(
            f"num_key_value_heads is {shape.kv_heads}, need a divisor of the {shape.heads} heads"
        )
    if not shape.norm_eps >= 0:
        raise ValueError(f"rms_norm_eps is {shape.norm_eps}, need a number >= 0")
    for window in shape.windows:
        if window is not None and window < 1:
            raise ValueError(f"sliding_window is {window}, need at least one token")


def _windows(config: Any) -> tuple[int | None, ...]:
    n_layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral":  # one window for all layers
        return (window,) * n_layers
    if config.model_type not in WITH_LAYER_TYPES:
        return (None,) * n_layers
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    return tuple(window if sliding else None for sliding in slides)


def _rope_layers(config: Any) -> tuple[bool, ...]:
    flags = None
    if config.model_type == "smollm3":
        flags = getattr(config, "no_rope_layers", None)  # 1 for a layer with RoPE
    if flags is None:
        return (True,) * config.num_hidden_layers
    return tuple(map(bool, flags))
