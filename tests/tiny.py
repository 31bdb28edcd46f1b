"""Tiny configs, models and a tokenizer, built in memory and equal in every run."""

import string
from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from expo_fast.modeling.decoder import Decoder
from expo_fast.storage.fused_projections import join_projections

SPECIAL = ("<pad>", "<|im_end|>", "<|im_start|>", "<unk>")  # ids 0 to 3
WORDS = ("\\boxed{", "answer", "The ", " is ")  # tokens of several letters, for stop strings
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
YARN_FOR_SOME = {
    "full_attention": YARN_ROPE,
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
LONG_ROPE = {  # of Phi-4-mini: three quarters of a head's 8 dimensions are rotated
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.2, 1.5],
    "long_factor": [1.0, 4.0, 9.0],
}
LONG_CONTEXT = {"original_max_position_embeddings": 128}
LATER_QUERIES = YARN_ROPE | {
    "original_max_position_embeddings": 128,
    "factor": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}

STRAY_BIASES = {"attention_bias": True, "mlp_bias": True}  # keys that only other architectures read

# each architecture, and each flag in at least one variant
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16, "num_key_value_heads": 6}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR_ROPE, "num_key_value_heads": 1}),
    "llama-stray": ("llama", {"sliding_window": 5, "layer_types": ["sliding_attention"] * 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral-stray": ("mistral", {"sliding_window": None} | STRAY_BIASES),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-stray": ("qwen2", STRAY_BIASES),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-stray": ("qwen3", {"head_dim": 16, "mlp_bias": True}),
    "smollm3": ("smollm3", {"tie_word_embeddings": True}),
    "smollm3-windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [0, 1, 1, 0]},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "layer_types": MIXED_LAYERS,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-biases": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 9,
            "attention_bias": True,
            "rope_parameters": TWO_ROPES,
        },
    ),
    "phi3": ("phi3", {"num_key_value_heads": 3}),
    "phi3-window": ("phi3", {"sliding_window": 7, "tie_word_embeddings": True}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONG_ROPE, **LONG_CONTEXT}),
    "olmo2": ("olmo2", {}),
    "olmo2-biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 6}),
    "olmo3": (
        "olmo3",
        {"sliding_window": 6, "layer_types": MIXED_LAYERS, "rope_parameters": YARN_FOR_SOME},
    ),
    "granite": ("granite", {"tie_word_embeddings": True, **MULTIPLIERS}),
    "granite-biases": (
        "granite",
        {"attention_bias": True, "mlp_bias": True, **MULTIPLIERS, "logits_scaling": 0.7},
    ),
    "ministral": ("ministral", {"sliding_window": 7, "layer_types": MIXED_LAYERS, "head_dim": 16}),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": LATER_QUERIES}),
}


def tiny_config(kind: str = "llama", **overrides: Any) -> Any:
    """Return a transformers config of one of `VARIANTS`: D 48, 4 layers, `tiny_tokenizer`'s V."""
    model_type, flags = VARIANTS[kind]
    sizes = {
        "vocab_size": len(tiny_vocabulary()),
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return AutoConfig.for_model(model_type, **(sizes | flags | overrides))


def tiny_model(
    kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Decoder:
    """Return a model whose parameters are all random: norms and biases too, so that all count."""
    model = Decoder(tiny_config(kind, **overrides))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean, std = (1.0, 0.3) if name.endswith("norm.weight") else (0.0, 0.15)
            p.copy_(mean + std * torch.randn(p.shape, generator=random))
    return model.to(dtype)


def transformers_copy(model: Decoder) -> Any:
    """Return transformers' model of the same config, with the same weights."""
    theirs = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    missing, unexpected = theirs.load_state_dict(stored_state(model), strict=False)
    assert missing == (["lm_head.weight"] if model.shape.tied else []), missing
    assert not unexpected, unexpected
    theirs.tie_weights()
    return theirs.to(model.dtype).eval()


def stored_state(model: Decoder) -> dict[str, Tensor]:
    """Return the parameters of a model under the names of a checkpoint."""
    state = model.state_dict()
    return join_projections(state) if model.shape.fused_storage else state


def tiny_tokenizer() -> Any:
    """Return a tokenizer of printable ASCII characters and `WORDS`, with a chat template."""
    vocabulary = tiny_vocabulary()
    merges = [(word[:end], word[end]) for word in WORDS for end in range(1, len(word))]
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_vocabulary() -> dict[str, int]:
    letters = string.digits + string.ascii_letters + string.punctuation + " \n"
    beginnings = [word[:end] for word in WORDS for end in range(2, len(word) + 1)]
    return {token: i for i, token in enumerate([*SPECIAL, *letters, *beginnings])}
