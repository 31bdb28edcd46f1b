"""llama.cpp, by llama-cpp-python, as a batched sampler of a folder that transformers saved.

A prompt is computed once and its cache shared by its samples (llama_memory_seq_cp); then one
llama_decode a step over all sequences. Keys and values are kept in fp16, its default and fastest.
"""

import ctypes
import json
from importlib import import_module
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


class Llama:
    """Raises ImportError where llama-cpp-python or gguf is not installed."""

    def __init__(self, folder: Path, threads: int):
        self.api: Any = import_module("llama_cpp")
        self.quiet = self.api.llama_log_callback(lambda *_: None)  # C keeps no reference
        self.api.llama_log_set(self.quiet, ctypes.c_void_p(0))
        self.api.llama_backend_init()
        path, self.threads = folder / "bf16.gguf", threads
        write_gguf(folder, path)
        given = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(str(path).encode(), given)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocabulary = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))

    def __call__(self, prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        n = len(prompts) * samples
        self.context = self._context(n, len(prompts[0]) + new_tokens, sum(map(len, prompts)))
        self.batch = self.api.llama_batch_init(max(n, sum(map(len, prompts))), 0, 1)
        try:
            return self._sample(prompts, samples, new_tokens)
        finally:
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.context)

    def _context(self, n: int, length: int, n_prompts: int) -> Any:
        given = self.api.llama_context_default_params()
        given.n_ctx = n * -(-length // 256) * 256  # it pads each sequence's
        given.n_seq_max, given.n_batch = n, max(n, n_prompts)
        given.n_threads = given.n_threads_batch = self.threads
        given.kv_unified, given.no_perf = False, True
        context = self.api.llama_init_from_model(self.model, given)
        if not context:
            raise RuntimeError(f"llama.cpp gives no context for {n} sequences of {length} tokens")
        return context

    def _sample(self, prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        n, i = len(prompts) * samples, 0
        for p, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                self._put(i, token, position, p * samples, position == len(prompt) - 1)
                i += 1
        self.batch.n_tokens = i
        logits = np.repeat(self._step(len(prompts)), samples, 0)
        memory = self.api.llama_get_memory(self.context)
        for s in range(n):
            if s % samples:
                self.api.llama_memory_seq_cp(memory, s - s % samples, s, -1, -1)
        drawn = [_draw(logits)]
        self.batch.n_tokens = n
        while len(drawn) < new_tokens:
            for s, token in enumerate(drawn[-1]):
                self._put(s, token, len(prompts[s // samples]) + len(drawn) - 1, s, True)
            drawn.append(_draw(self._step(n)))
        return np.stack(drawn, 1).tolist()

    def _put(self, i: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch = self.batch
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence

    def _step(self, rows: int) -> np.ndarray:
        """(rows, V) logits of the tokens for which they are wanted."""
        if self.api.llama_decode(self.context, self.batch):
            raise RuntimeError("llama_decode failed")
        found = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (rows, self.vocabulary))


def _draw(logits: np.ndarray) -> np.ndarray:
    """Return a token a row; faster than llama.cpp's own samplers at so many rows."""
    return torch.multinomial(torch.from_numpy(logits).softmax(-1), 1).squeeze(1).numpy()


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
