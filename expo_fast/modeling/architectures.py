"""The architectures that the decoder runs, as one table: a row per `model_type` of transformers.

A row holds the flags in which an architecture differs from Llama. `shape.py` reads the numbers of a
config by these flags, and `decoder.py` and the engines read the shape only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Norms:
    """The names of a layer's norms in a checkpoint; None: the layer has no norm at that place."""

    before_attention: str | None = None
    after_attention: str | None = None  # before the residual is added
    before_mlp: str | None = None
    after_mlp: str | None = None  # before the residual is added


BEFORE = Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
AFTER = Norms(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")
AROUND = Norms(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


@dataclass(frozen=True)
class Scales:
    """Factors that an architecture multiplies activations by. None: 1 / sqrt(head_dim)."""

    attention: float | None = None  # of attention scores
    embedding: float = 1.0
    residual: float = 1.0  # of the output of attention and MLP, before the residual is added
    logit: float = 1.0


def plain_scales(config: Any) -> Scales:
    return Scales()


def gemma_scales(config: Any) -> Scales:
    return Scales(
        attention=config.query_pre_attn_scalar**-0.5,
        embedding=config.hidden_size**0.5,
    )


def granite_scales(config: Any) -> Scales:
    return Scales(
        attention=config.attention_multiplier,
        embedding=config.embedding_multiplier,
        residual=config.residual_multiplier,
        logit=1 / config.logits_scaling,
    )


@dataclass(frozen=True)
class Architecture:
    """A row of `ARCHITECTURES`. A default is the value of Llama.

    "config" means that a field of the config decides: attention_bias, mlp_bias, no_rope_layers,
    layer_types. transformers ignores such a field in the config of any other architecture.
    """

    examples: str  # models, for the README
    norms: Norms = BEFORE
    norm_offset: float = 0.0  # a norm multiplies by offset + weight
    qk_norm: Literal["no", "head", "all heads"] = "no"  # over each head, or over all heads together
    qkv_bias: Literal["no", "yes", "config"] = "no"
    out_bias: Literal["no", "config"] = "no"
    mlp_bias: Literal["no", "config"] = "no"
    activation: str = "hidden_act"  # the field of the config that names it
    windows: Literal["none", "all layers", "config"] = "none"  # layers with a sliding window
    nope: Literal["no", "config"] = "no"  # layers without RoPE
    rope_by_layer_type: bool = False  # layers with a window have another RoPE
    partial_rope: bool = False  # `partial_rotary_factor` of a head's dimensions are rotated
    original_context: bool = False  # longer contexts need another RoPE or scale; they are refused
    scales: Callable[[Any], Scales] = plain_scales
    fused_storage: bool = False  # files have qkv_proj and gate_up_proj
    limits: str = ""  # what does not run, for the README
    refused: tuple[str, ...] = ()  # fields of the config that must be unset


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        examples="Llama 2, Llama 3.x, SmolLM2",
        qkv_bias="config",
        out_bias="config",
        mlp_bias="config",
    ),
    "mistral": Architecture(
        examples="Mistral 7B, Mistral Small, Ministral 8B", windows="all layers"
    ),
    "qwen2": Architecture(examples="Qwen2, Qwen2.5", qkv_bias="yes", windows="config"),
    "qwen3": Architecture(
        examples="Qwen3 (dense)",
        qk_norm="head",
        qkv_bias="config",
        out_bias="config",
        windows="config",
    ),
    "smollm3": Architecture(
        examples="SmolLM3",
        qkv_bias="config",
        out_bias="config",
        mlp_bias="config",
        windows="config",
        nope="config",
    ),
    "gemma3_text": Architecture(
        examples="Gemma 3",
        norms=AROUND,
        norm_offset=1.0,
        qk_norm="head",
        qkv_bias="config",
        out_bias="config",
        activation="hidden_activation",
        windows="config",
        rope_by_layer_type=True,
        scales=gemma_scales,
        refused=("final_logit_softcapping", "use_bidirectional_attention"),
        limits="the text model, without images",
    ),
    "phi3": Architecture(
        examples="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        windows="all layers",
        partial_rope=True,
        original_context=True,
        fused_storage=True,
        limits="with LongRoPE, contexts up to 4096 tokens",
    ),
    "olmo2": Architecture(
        examples="OLMo 2",
        norms=AFTER,
        qk_norm="all heads",
        qkv_bias="config",
        out_bias="config",
    ),
    "olmo3": Architecture(
        examples="OLMo 3",
        norms=AFTER,
        qk_norm="all heads",
        qkv_bias="config",
        out_bias="config",
        windows="config",
        rope_by_layer_type=True,
    ),
    "granite": Architecture(
        examples="Granite 3.x (dense)",
        qkv_bias="config",
        out_bias="config",
        mlp_bias="config",
        scales=granite_scales,
    ),
    "ministral": Architecture(examples="Ministral with windows", windows="config"),
    "ministral3": Architecture(
        examples="Ministral 3",
        windows="all layers",
        original_context=True,
        limits="the text model; contexts up to 16384 tokens",
    ),
}
