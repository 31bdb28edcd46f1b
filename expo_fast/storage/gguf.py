"""Read GGUF files: convert llama.cpp's names, layout and tokenizer to Hugging Face's.

transformers reads the config and builds the tokenizer. Two of its errors are corrected here. It has
no `smollm` pre-tokenizer, so it would split "a  1" and "\\n\\n1" unlike the model's training data.
It sets no normalizer and no `ignore_merges` for the vocabularies of Qwen and Llama 3.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expo_fast.storage.files import reading
from expo_fast.storage.hf_files import StoredModel, StoredTensor

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

# The regular expression with which Qwen2 and Llama 3 split text. They differ in DIGITS.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_gguf(path: Path) -> StoredModel:
    """Read a GGUF file. The tensors are dequantized to fp32, one at a time.

    Raise ValueError for a file that is damaged or not GGUF, and for an unsupported architecture,
    RoPE scaling or pre-tokenizer.
    """
    from transformers import AutoConfig

    reader = _open(path)
    architecture = _field(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: GGUF architecture {architecture!r} is not supported, "
            f"need {', '.join(ARCHITECTURES)}: load the model's safetensors folder instead"
        )
    _refuse_rope_scaling(path, reader, architecture)
    with reading(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    config.name_or_path = ""
    vars(config).pop("_model_name_or_path", None)  # transformers sets it to the model's title
    head_dim = _field(reader, f"{architecture}.attention.key_length")
    if head_dim:
        config.head_dim = head_dim
    return StoredModel(
        config=config,
        tensors=_tensors(path, reader, config, architecture),
        tokenizer=_tokenizer(path, reader, config),
    )


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


def _refuse_rope_scaling(path: Path, reader: "GGUFReader", architecture: str) -> None:
    """Raise ValueError for RoPE scaling.

    transformers ignores every kind of scaling in GGUF files, which store Llama 3's as factors.
    """
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    has_factors = any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)
    if has_factors or scaling not in (None, "none"):
        raise ValueError(
            f"{path}: RoPE scaling ({scaling or 'rope_freqs.weight'}) cannot be read from GGUF, "
            "load the model's safetensors folder instead"
        )


def _tensors(
    path: Path, reader: "GGUFReader", config: Any, architecture: str
) -> Iterator[StoredTensor]:
    from gguf.quants import dequantize

    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    for stored in reader.tensors:
        with reading(f"{path}: {stored.name}"):
            tensor = torch.tensor(dequantize(stored.data, stored.tensor_type))
            rotated = re.search(r"\.attn_([qk])\.", stored.name)
            if rotated and architecture == "llama":
                tensor = halve_pairs(tensor, heads[rotated[1]])
        yield StoredTensor(hugging_face_name(stored.name), tensor, path)


def halve_pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder (heads * Dh, ...) rows: RoPE's adjacent pairs become the two halves of each head."""
    pairs = rows.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def hugging_face_name(name: str) -> str:
    """Map a name: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    Unknown names are returned unchanged.
    """
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
            set_pre_tokenizer(tokenizer.backend_tokenizer, _field(reader, "tokenizer.ggml.pre"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def set_pre_tokenizer(backend: Any, pre: str | None) -> None:
    """Set the pre-tokenizer of a byte-level tokenizer to the one that `tokenizer.ggml.pre` names.

    Raise ValueError if it is not supported.
    """
    from tokenizers import Regex, normalizers, pre_tokenizers

    ByteLevel = pre_tokenizers.ByteLevel
    if pre == "gpt-2":
        backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
        return
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        return
    if pre not in ("qwen2", "llama-bpe"):
        raise ValueError(
            f"its pre-tokenizer {pre!r} is not supported (need gpt-2, smollm, qwen2 or llama-bpe), "
            "load the model's safetensors folder instead"
        )
    digits = "" if pre == "qwen2" else "{1,3}"
    words = Regex(WORDS.replace("DIGITS", digits))
    split = pre_tokenizers.Split(words, "isolated")
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    else:
        backend.model.ignore_merges = True
