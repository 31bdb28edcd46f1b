"""The samplers that benchmarks.decode compares: ours, and others in the way their users run them.

Each one draws at temperature 1 without truncation, ignores EOS and uses as many threads as torch.
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

# Takes prompts, samples for each prompt, and new tokens for each sample. Returns completions.
Sampler = Callable[[list[list[int]], int, int], list[list[int]]]


@dataclass(frozen=True)
class Load:
    """What to sample: prompts of equal length, and samples of equal length for each prompt."""

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
        """Return the number of new tokens."""
        return self.prompts * self.samples * self.new_tokens

    def ids(self, vocabulary: int) -> list[list[int]]:
        """Return prompts of random tokens."""
        random = torch.Generator().manual_seed(0)
        size = (self.prompts, self.prompt_tokens)
        return torch.randint(3, vocabulary, size, generator=random).tolist()


@dataclass(frozen=True)
class Subject:
    """The model, load and device of a comparison."""

    model: Decoder
    folder: Path  # contains the same model in the format of transformers
    load: Load
    device: str


def ours(subject: Subject, **options: Any) -> Sampler:
    """Return our generator as a sampler."""
    generator = Generator(subject.model, **options)

    def run(prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        completions = generator.sample(requests(prompts, samples, new_tokens))
        return [completion.token_ids for completion in completions]

    return run


def requests(prompts: list[list[int]], samples: int, new_tokens: int) -> list[Request]:
    """Return requests with a seed for each sample, in the order of the prompts."""
    return [
        Request(prompt, new_tokens, seed=i * samples + j, stop_ids=())
        for i, prompt in enumerate(prompts)
        for j in range(samples)
    ]


def transformers_generate(subject: Subject, cache: str | None) -> Sampler:
    """Return `generate` of transformers with a cache implementation."""
    from transformers import GenerationConfig

    model = _transformers(subject)

    def run(prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts, device=subject.device).repeat_interleave(samples, 0)
        config = GenerationConfig(**_plain(new_tokens), cache_implementation=cache)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return out[:, ids.shape[1] :].tolist()

    return run


def transformers_continuous(subject: Subject) -> Sampler:
    """Return `generate_batch` of transformers, its continuous batching."""
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = _transformers(subject)

    def run(prompts: list[list[int]], samples: int, new_tokens: int) -> list[list[int]]:
        n = len(prompts) * samples
        options: dict[str, Any] = {}
        if subject.device == "cpu":  # there it cannot determine these by itself
            pages = -(-(len(prompts[0]) + new_tokens) // 32) + 1
            options = {"page_size": 32, "num_blocks": n * pages, "max_batch_tokens": max(512, n)}
        # Some versions ignore num_return_sequences.
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        out = model.generate_batch(
            repeated,
            GenerationConfig(**_plain(new_tokens)),
            continuous_batching_config=ContinuousBatchingConfig(**options),
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
    """Return options without truncation and without an EOS token: no token has id -1."""
    return {
        "max_new_tokens": new_tokens,
        "eos_token_id": -1,
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }


def llama_cpp(subject: Subject) -> Sampler:
    """Return llama.cpp as a sampler."""
    from benchmarks.llama import Llama

    return Llama(subject.folder, torch.get_num_threads())


def vllm(subject: Subject) -> Sampler:
    """Return vLLM, run in this process and on all of its cores, as a sampler."""
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
        engine.reset_prefix_cache()  # otherwise it contains the prompts of the last round
        params = SamplingParams(n=samples, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = engine.generate(inputs, params, use_tqdm=False)
        return [list(output.token_ids) for result in results for output in result.outputs]

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
