"""The samplers that benchmarks.decode compares: ours, and others as their users would run them.

Each draws at temperature 1, truncates nothing, ignores EOS and uses torch's threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from expo_fast.generate import Generator, Request
from expo_fast.modeling.decoder import Decoder

OURS = "expo_fast"

Sampler = Callable[[list[list[int]], int, int], list[list[int]]]  # prompts, samples, new tokens


@dataclass(frozen=True)
class Load:
    """Prompts of one length, with samples of one length for each."""

    prompts: int = 8
    samples: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 128

    def __str__(self) -> str:
        return (
            f"{self.prompts} prompts of {self.prompt_tokens} x {self.samples} samples of "
            f"{self.new_tokens} tokens"
        )

    @property
    def tokens(self) -> int:
        return self.prompts * self.samples * self.new_tokens

    def ids(self, vocabulary: int) -> list[list[int]]:
        random = torch.Generator().manual_seed(0)
        size = (self.prompts, self.prompt_tokens)
        return torch.randint(3, vocabulary, size, generator=random).tolist()


@dataclass(frozen=True)
class Subject:
    model: Decoder
    folder: Path  # holds the same model in the format of transformers
    load: Load
    device: str


def ours(subject: Subject, **options: Any) -> Sampler:
    generator = Generator(subject.model, **options)

    def run(prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        return [c.token_ids for c in generator.sample(requests(prompts, samples, new_tokens))]

    return run


def requests(prompts: list[list[int]], samples: int, new_tokens: int) -> list[Request]:
    return [
        Request(prompt, new_tokens, seed=i * samples + j, stop_ids=())
        for i, prompt in enumerate(prompts)
        for j in range(samples)
    ]


def transformers_generate(subject: Subject, cache: str | None) -> Sampler:
    from transformers import GenerationConfig

    model = _transformers(subject)

    def run(prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=subject.device).repeat_interleave(samples, 0)
        config = GenerationConfig(**_plain(new_tokens), cache_implementation=cache)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return out[:, ids.shape[1] :].tolist()

    return run


def transformers_continuous(subject: Subject) -> Sampler:
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = _transformers(subject)

    def run(prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        n = len(prompts) * samples
        options: dict[str, Any] = {}
        if subject.device == "cpu":  # where it cannot determine these by itself
            pages = -(-(len(prompts[0]) + new_tokens) // 32) + 1
            options = {"page_size": 32, "num_blocks": n * pages, "max_batch_tokens": max(512, n)}
        config = GenerationConfig(**_plain(new_tokens), num_return_sequences=samples)
        out = model.generate_batch(
            prompts, config, continuous_batching_config=ContinuousBatchingConfig(**options)
        )
        return [done.generated_tokens for done in out.values()]

    return run


def _transformers(subject: Subject) -> Any:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        subject.folder, dtype=subject.model.dtype, attn_implementation="sdpa"
    )
    return model.to(subject.device).eval()


def _plain(new_tokens: int) -> dict[str, Any]:
    """Return options without truncation and without an end: no token has id -1."""
    ends = {"max_new_tokens": new_tokens, "eos_token_id": -1, "pad_token_id": 0}
    return ends | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def llama_cpp(subject: Subject) -> Sampler:
    from benchmarks.llama import Llama

    return Llama(subject.folder, torch.get_num_threads())


def vllm(subject: Subject) -> Sampler:
    """Run vLLM in this process, on all of its cores."""
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    load = subject.load
    engine = LLM(
        str(subject.folder),
        dtype="bfloat16",
        max_model_len=load.prompt_tokens + load.new_tokens,
        max_num_seqs=load.prompts * load.samples,
        skip_tokenizer_init=True,
    )

    def run(prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        engine.reset_prefix_cache()  # else it would hold the prompts of the last lap
        given = SamplingParams(n=samples, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        done = engine.generate(asked, given, use_tqdm=False)
        return [list(output.token_ids) for each in done for output in each.outputs]

    return run


PEERS: dict[str, Callable[[Subject], Sampler]] = {
    "transformers generate": partial(transformers_generate, cache=None),
    "... static cache": partial(transformers_generate, cache="static"),
    "transformers generate_batch": transformers_continuous,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
}
SAMPLERS = {
    OURS: ours,
    "... batch_invariant": partial(ours, batch_invariant=True),
} | PEERS
