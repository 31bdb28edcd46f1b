"""Read the decoder's shape from a Hugging Face config, and refuse unsupported configs."""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

from expo_fast.modeling.architectures import ARCHITECTURES, Architecture, Norms
from expo_fast.storage.stored_config import config_fields

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
LAYER_TYPES = ("full_attention", "sliding_attention")  # the order of RoPE's sets of frequencies
SIMILAR = 0.55  # of names, by difflib: gemma2 and gemma3_text are similar, gpt2 is like none

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
    rotary_dim: int  # the first dimensions of a head, which RoPE rotates; the others pass
    norms: Norms
    norm_eps: float
    norm_offset: float
    activation: str  # of ACTIVATIONS
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: Literal["no", "head", "all heads"]
    tied: bool  # the head is the embedding
    context: int  # tokens
    windows: tuple[int | None, ...]  # per layer; None: all earlier tokens are visible
    rope: tuple[int | None, ...]  # per layer, the set of RoPE's frequencies; None: a NoPE layer
    rope_sets: tuple[str | None, ...]  # the layer types that have a set; (None,): one for all
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    fused_storage: bool  # files have qkv_proj and gate_up_proj


def read_shape(config: Any) -> Shape:
    """Return the shape of a transformers config or a `StoredConfig`.

    Raise ValueError if the config is unsupported or inconsistent.
    """
    check_config(config_fields(config))
    architecture = ARCHITECTURES[config.model_type]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    scales = architecture.scales(config)
    attention_bias = getattr(config, "attention_bias", False)
    shape = Shape(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=head_dim,
        rotary_dim=_rotary_dim(config, architecture, head_dim),
        norms=architecture.norms,
        norm_eps=config.rms_norm_eps,
        norm_offset=architecture.norm_offset,
        activation=_activation(config, architecture),
        qkv_bias=_flag(architecture.qkv_bias, attention_bias),
        out_bias=_flag(architecture.out_bias, attention_bias),
        mlp_bias=_flag(architecture.mlp_bias, getattr(config, "mlp_bias", False)),
        qk_norm=architecture.qk_norm,
        tied=config.tie_word_embeddings,
        context=_context(config, architecture),
        windows=_windows(config, architecture),
        rope=_rope_layers(config, architecture),
        rope_sets=LAYER_TYPES if architecture.rope_by_layer_type else (None,),
        attention_scale=head_dim**-0.5 if scales.attention is None else scales.attention,
        embedding_scale=scales.embedding,
        residual_scale=scales.residual,
        logit_scale=scales.logit,
        fused_storage=architecture.fused_storage,
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
            f"model_type {kind!r} is not supported{_nearest(values)}: expo_fast runs "
            f"{', '.join(ARCHITECTURES)} (SmolLM2 is of model_type llama)"
        )
    for key in SIZES:
        size = values.get(key)
        if size is None:  # transformers may have a default
            continue
        if type(size) is not int or size < 1:
            raise ValueError(f"{key} is {size!r}, need a positive integer")
    for key in ARCHITECTURES[kind].refused:
        if values.get(key):
            raise ValueError(f"{key} is {values[key]!r}, which is not supported: it must be unset")


def _nearest(values: Mapping[str, Any]) -> str:
    """Return what runs in place of an unsupported architecture, as a part of a sentence."""
    text_config = values.get("text_config")
    if isinstance(text_config, Mapping) and text_config.get("model_type") in ARCHITECTURES:
        return f", only its text model, {text_config['model_type']}, saved without the rest"
    near = get_close_matches(str(values.get("model_type")), ARCHITECTURES, n=1, cutoff=SIMILAR)
    return f", the nearest that runs is {near[0]}" if near else ""


def _check_shape(shape: Shape) -> None:
    if shape.rotary_dim % 2 or shape.head_dim % 2:
        dim = shape.head_dim if shape.head_dim % 2 else shape.rotary_dim
        raise ValueError(f"head_dim is {dim}, need an even number for RoPE")
    if not 0 < shape.rotary_dim <= shape.head_dim:
        raise ValueError(
            f"partial_rotary_factor rotates {shape.rotary_dim} of {shape.head_dim} dimensions, "
            "need a number above 0 and at most 1"
        )
    if shape.heads % shape.kv_heads:
        raise ValueError(
            f"num_key_value_heads is {shape.kv_heads}, need a divisor of the {shape.heads} heads"
        )
    if not shape.norm_eps >= 0:
        raise ValueError(f"rms_norm_eps is {shape.norm_eps}, need a number >= 0")
    for window in shape.windows:
        if window is not None and window < 1:
            raise ValueError(f"sliding_window is {window}, need at least one token")
    for scale in (shape.attention_scale, shape.logit_scale):
        if not 0 < scale < float("inf"):
            raise ValueError(f"the config scales scores or logits by {scale}, need a number > 0")


def _flag(flag: Literal["no", "yes", "config"], of_config: bool) -> bool:
    return flag == "yes" or (flag == "config" and of_config)


def _activation(config: Any, architecture: Architecture) -> str:
    name = getattr(config, architecture.activation)
    if name not in ACTIVATIONS:
        needed = " or ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"{architecture.activation} {name!r} is not supported, need {needed}")
    return name


def _rotary_dim(config: Any, architecture: Architecture, head_dim: int) -> int:
    if not architecture.partial_rope:
        return head_dim
    return int(head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))


def _context(config: Any, architecture: Architecture) -> int:
    """Return the length of the context in tokens.

    LongRoPE of Phi-3 takes other frequencies for all tokens of a sequence that is longer than
    `original_max_position_embeddings`, and Ministral 3 scales later queries. Both would make
    log-probs of sampling and of training differ.
    """
    context = config.max_position_embeddings
    if not architecture.original_context:
        return context
    original = config.rope_parameters.get("original_max_position_embeddings")
    changes = (
        config.rope_parameters["rope_type"] == "longrope"
        or config.rope_parameters.get("llama_4_scaling_beta")
    )  # fmt: skip
    return min(context, original) if original and changes else context


def _windows(config: Any, architecture: Architecture) -> tuple[int | None, ...]:
    if architecture.windows == "none":
        return (None,) * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    slides = [False] * config.num_hidden_layers
    if architecture.windows == "all layers":
        slides = [True] * config.num_hidden_layers
    elif architecture.windows == "config":
        slides = [kind == "sliding_attention" for kind in config.layer_types]
    return tuple(window if sliding else None for sliding in slides)


def _rope_layers(config: Any, architecture: Architecture) -> tuple[int | None, ...]:
    if architecture.rope_by_layer_type:
        return tuple(LAYER_TYPES.index(kind) for kind in config.layer_types)
    flags = None
    if architecture.nope == "config":
        flags = getattr(config, "no_rope_layers", None)  # 1 for a layer with RoPE
    if flags is None:
        flags = [True] * config.num_hidden_layers
    return tuple(0 if flag else None for flag in flags)
