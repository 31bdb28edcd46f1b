"""llama.cpp, through llama-cpp-python, as a batched sampler of a model that transformers saved.

A prompt is computed once, and its samples share its cache (llama_memory_seq_cp). Each step is one
llama_decode over all sequences. Keys and values are in fp16, the default and the fastest choice.
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
    """A sampler. Raise ImportError where llama-cpp-python or gguf is not installed."""

    def __init__(self, folder: Path, threads: int):
        self.api: Any = import_module("llama_cpp")
        # C keeps no reference to the callback, so this object does.
        self.no_log = self.api.llama_log_callback(lambda *_: None)
        self.api.llama_log_set(self.no_log, ctypes.c_void_p(0))
        self.api.llama_backend_init()
        self.threads = threads
        path = folder / "bf16.gguf"
        write_gguf(folder, path)
        params = self.api.llama_model_default_params()
        self.model = self.api.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        vocabulary = self.api.llama_model_get_vocab(self.model)
        self.vocabulary = self.api.llama_vocab_n_tokens(vocabulary)

    def __call__(self, prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        n = len(prompts) * samples
        prompt_tokens = sum(map(len, prompts))
        self.context = self._context(n, len(prompts[0]) + new_tokens, prompt_tokens)
        self.batch = self.api.llama_batch_init(max(n, prompt_tokens), 0, 1)
        try:
            return self._sample(prompts, samples, new_tokens)
        finally:
            self.api.llama_batch_free(self.batch)
            self.api.llama_free(self.context)

    def _context(self, n: int, length: int, prompt_tokens: int) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx = n * -(-length // 256) * 256  # llama.cpp pads each sequence to 256 tokens
        params.n_seq_max = n
        params.n_batch = max(n, prompt_tokens)
        params.n_threads = self.threads
        params.n_threads_batch = self.threads
        params.kv_unified = False
        params.no_perf = True
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError(f"llama.cpp has no context for {n} sequences of {length} tokens")
        return context

    def _sample(self, prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        n = len(prompts) * samples
        i = 0
        for p, prompt in enumerate(prompts):
            for position, token in enumerate(prompt):
                is_last = position == len(prompt) - 1
                self._put(i, token, position, sequence=p * samples, wants_logits=is_last)
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
                position = len(prompts[s // samples]) + len(drawn) - 1
                self._put(s, token, position, sequence=s, wants_logits=True)
            drawn.append(_draw(self._step(n)))
        return np.stack(drawn, 1).tolist()

    def _put(self, i: int, token: int, position: int, *, sequence: int, wants_logits: bool) -> None:
        """Write a token to place i of the batch."""
        batch = self.batch
        batch.token[i] = token
        batch.pos[i] = position
        batch.logits[i] = wants_logits
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence

    def _step(self, rows: int) -> np.ndarray:
        """Run the batch. Return the logits (rows, V) of the tokens whose logits flag is set."""
        status = self.api.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {self.batch.n_tokens} tokens")
        found = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, (rows, self.vocabulary))


def _draw(logits: np.ndarray) -> np.ndarray:
    """Draw a token for each row. For many rows this is faster than llama.cpp's own samplers."""
    probabilities = torch.from_numpy(logits).softmax(-1)
    return torch.multinomial(probabilities, 1).squeeze(1).numpy()


def write_gguf(folder: Path, path: Path) -> None:
    """Write the model with matrices in bf16, norms in fp32 and no tokenizer."""
    import gguf

    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    kv_heads = config["num_key_value_heads"]
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
    """Return the rows in the order of llama.cpp, whose RoPE rotates pairs of neighbouring features.

    The RoPE of transformers rotates pairs of a feature in the first half and one in the second.
    """
    halves = weight.view(heads, 2, -1, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


def _add(writer: Any, gguf: Any, name: str, tensor: torch.Tensor) -> None:
    if tensor.ndim == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    raw = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
