"""llama.cpp, by llama-cpp-python, as a batched sampler of a folder that transformers saved.

A prompt is computed once and its cache shared by its samples (llama_memory_seq_cp); then one
llama_decode a step over all sequences. Keys and values are kept in fp16, its default and fastest.
"""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def sampler(folder: Path, threads: int) -> Callable[[list[list[int]], int, int], list[list[int]]]:
    """Raises ImportError where llama-cpp-python or gguf is not installed."""
    import llama_cpp as api  # pyright: ignore[reportMissingImports]

    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    path = folder / "bf16.gguf"
    write_gguf(folder, path)
    model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def run(prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        n, context = len(prompts) * samples, _context(api, model, prompts, samples, new_tokens)
        batch = api.llama_batch_init(max(n, sum(map(len, prompts))), 0, 1)
        try:
            return _sample(api, context, batch, vocabulary, prompts, samples, new_tokens)
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)

    def _context(api: Any, model: Any, prompts: list, samples: int, new_tokens: int) -> Any:
        given, n = api.llama_context_default_params(), len(prompts) * samples
        given.n_ctx = n * -(-(len(prompts[0]) + new_tokens) // 256) * 256  # it pads a sequence's
        given.n_seq_max, given.n_batch = n, max(n, sum(map(len, prompts)))
        given.n_threads = given.n_threads_batch = threads
        given.kv_unified, given.no_perf = False, True
        context = api.llama_init_from_model(model, given)
        if not context:
            raise RuntimeError("llama.cpp gives no context of that size")
        run.quiet = quiet  # pyright: ignore[reportFunctionMemberAccess]  (C holds it)
        return context

    return run


def _sample(
    api: Any,
    context: Any,
    batch: Any,
    vocabulary: int,
    prompts: list[list[int]],
    samples: int,
    new_tokens: int,
) -> list[list[int]]:
    random, n = np.random.default_rng(0), len(prompts) * samples

    def put(i: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence

    def step(rows: int) -> np.ndarray:
        """(rows, V) logits of the tokens for which they are wanted."""
        if api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(api.llama_get_logits(context), (rows, vocabulary))

    i = 0
    for p, prompt in enumerate(prompts):
        for position, token in enumerate(prompt):
            put(i, token, position, p * samples, position == len(prompt) - 1)
            i += 1
    batch.n_tokens = i
    logits = np.repeat(step(len(prompts)), samples, 0)
    memory = api.llama_get_memory(context)
    for s in range(n):
        if s % samples:
            api.llama_memory_seq_cp(memory, s - s % samples, s, -1, -1)
    drawn = [_draw(logits, random)]
    batch.n_tokens = n
    while len(drawn) < new_tokens:
        for s, token in enumerate(drawn[-1]):
            put(s, token, len(prompts[s // samples]) + len(drawn) - 1, s, True)
        drawn.append(_draw(step(n), random))
    return np.stack(drawn, 1).tolist()


def _draw(logits: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A token a row; faster than llama.cpp's own samplers at so many rows."""
    weights = torch.from_numpy(logits).softmax(-1)
    return torch.multinomial(weights, 1).squeeze(1).numpy()


def write_gguf(folder: Path, path: Path) -> None:
    """Matrices in bf16, norms in fp32, and no words: it is asked for ids alone."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    with safe_open(folder / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(key)
            if key.endswith("q_proj.weight") or key.endswith("k_proj.weight"):
                tensor = _interleaved(tensor, heads if "q_proj" in key else kv_heads)
            _add(writer, gguf, _name(key), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(key: str) -> str:
    base = key.removesuffix(".weight").removeprefix("model.")
    ends = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    if base in ends:
        return f"{ends[base]}.weight"
    _, layer, part = base.split(".", 2)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Its RoPE turns neighbours where transformers' turns halves."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add(writer: Any, gguf: Any, name: str, tensor: torch.Tensor) -> None:
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    raw = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
