"""GGUF files: llama.cpp's names, layout and tokenizer turned into Hugging Face's.

transformers reads the config and builds the tokenizer. What it gets wrong of the latter is mended
here: it knows no `smollm` pre-tokenizer (so "a  1" and "\\n\\n1" are cut where the model never saw
a cut), and it gives Qwen's and Llama 3's vocabularies no normalizer and no `ignore_merges`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expo_fast.storage.files import reading

if TYPE_CHECKING:
    from gguf import GGUFReader

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral and SmolLM2 are written as llama

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# How Qwen2 and Llama 3 cut text; they differ in how many digits go together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_gguf(path: Path) -> tuple[Any, Iterator[tuple[str, Tensor, Path]], Any]:
    """(config, (Hugging Face name, fp32 tensor, path) one at a time, tokenizer).

    ValueError: no GGUF file, a damaged one, an architecture, a RoPE scaling or a pre-tokenizer that
    is not ours.
    """
    from transformers import AutoConfig

    reader = _open(path)
    kind = _field(reader, "general.architecture")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{path}: GGUF architecture {kind!r} is not supported, need {', '.join(ARCHITECTURES)}"
        )
    _refuse_rope_scaling(path, reader, kind)
    with reading(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.name_or_path = ""  # transformers puts the model's title there
    if head_dim := _field(reader, f"{kind}.attention.key_length"):
        config.head_dim = head_dim
    return config, _tensors(path, reader, config, kind), _tokenizer(path, reader, config)


def _open(path: Path) -> "GGUFReader":
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
    with reading(f"{path} is damaged or cut short"):
        return GGUFReader(path)


def _field(reader: "GGUFReader", name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _refuse_rope_scaling(path: Path, reader: "GGUFReader", kind: str) -> None:
    """GGUF keeps Llama 3's scaling as ready factors, and transformers' reading drops every kind."""
    scaling = _field(reader, f"{kind}.rope.scaling.type")
    factors = any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)
    if factors or scaling not in (None, "none"):
        raise ValueError(
            f"{path}: RoPE scaling ({scaling or 'rope_freqs.weight'}) cannot be read from GGUF, "
            "load the model's safetensors folder instead"
        )


def _tensors(
    path: Path, reader: "GGUFReader", config: Any, kind: str
) -> Iterator[tuple[str, Tensor, Path]]:
    from gguf.quants import dequantize

    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for stored in reader.tensors:
        with reading(f"{path}: {stored.name}"):
            tensor = torch.tensor(dequantize(stored.data, stored.tensor_type))
            rotated = re.search(r"\.attn_([qk])\.", stored.name)
            if rotated and kind == "llama":
                tensor = halve_pairs(tensor, heads[rotated[1]])
        yield hugging_face_name(stored.name), tensor, path


def halve_pairs(rows: Tensor, heads: int) -> Tensor:
    """(heads * Dh, ...) with RoPE's two coordinates side by side -> in the halves of each head."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown ones stay."""
    parts = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if parts is None or parts[2] not in NAMES:
        return name
    layer = "" if parts[1] is None else f"model.layers.{parts[1]}."
    return f"{layer}{NAMES[parts[2]]}.{parts[3]}"


def _tokenizer(path: Path, reader: "GGUFReader", config: Any) -> Any:
    from transformers import AutoTokenizer

    with reading(path):
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if _field(reader, "tokenizer.ggml.model") == "gpt2":
        try:
            mend_splitting(tokenizer.backend_tokenizer, _field(reader, "tokenizer.ggml.pre"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def mend_splitting(backend: Any, pre: str | None) -> None:
    """Make a byte-level tokenizer cut text before its merges as `tokenizer.ggml.pre` says."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    ByteLevel = pre_tokenizers.ByteLevel
    if pre == "gpt-2":
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
        return
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, ByteLevel(add_prefix_space=False)])
        return
    if pre not in ("qwen2", "llama-bpe"):
        raise ValueError(
            f"its pre-tokenizer {pre!r} is not supported (need gpt-2, smollm, qwen2 or llama-bpe), "
            "load the model's safetensors folder instead"
        )
    words = Regex(WORDS.replace("DIGITS", "" if pre == "qwen2" else "{1,3}"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    else:
        backend.model.ignore_merges = True
