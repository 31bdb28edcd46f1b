"""Times the generator against other samplers: interleaved laps, in one process, same requests.

    python -m benchmarks.decode                       SmolLM2-135M, 8 prompts x 8 samples
    python -m benchmarks.decode --peers llama.cpp     some of the peers, those that are installed

Every sampler draws at temperature 1, truncates nothing, ignores EOS and uses torch's threads.
Before it is timed its tokens are judged: their mean log-prob under a full forward of the model must
be what sampling gives. Prints a table, and one JSON object last.

Limit: for the prompts and for each decode step the longer of its FLOPs at the rate of torch.mm and
its bytes at the rate of a copy, both measured in the same run. A step reads every weight once, and
keys and values of what is in the cache, a prompt's once for all its samples.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Stopwatch, Wrong, gemm_rate
from benchmarks.summary import default_device, machine, ms
from expo_fast.generate import Completion, Generator, Request
from expo_fast.model import Decoder
from expo_fast.ops import linear_logprob
from expo_fast.weights import load_model, save_model

OURS = "expo_fast"
SIGMAS = 5  # by which a sampler's mean log-prob may be off ours
GAP = 0.05  # nats, mean, between our generator's log-probs and a full forward's, in bf16

Sampler = Callable[[list[list[int]], int, int], list[list[int]]]  # prompts, samples, new tokens


@dataclass(frozen=True)
class Load:
    """P prompts, G samples of each, all of the same lengths."""

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
    folder: Path  # the same model as transformers saves it
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
        if subject.device == "cpu":  # it cannot find these out by itself there
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
    """No end, for no token has id -1; no truncation."""
    ends = {"max_new_tokens": new_tokens, "eos_token_id": -1, "pad_token_id": 0}
    return ends | {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def llama_cpp(subject: Subject) -> Sampler:
    from benchmarks.llama import Llama

    return Llama(subject.folder, torch.get_num_threads())


def vllm(subject: Subject) -> Sampler:
    """In this process, on all its cores."""
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
        engine.reset_prefix_cache()  # or the prompts of the last lap would be there
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


@torch.no_grad()
def logps(model: Decoder, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """(T,) log-probs of each completion's tokens, by a full forward."""
    found = []
    samples = len(completions) // len(prompts)
    for i, ids in enumerate(completions):
        prompt = prompts[i // samples]
        whole = torch.tensor([*prompt, *ids], device=model.device)
        borders = torch.tensor([0, len(whole)], dtype=torch.int32, device=model.device)
        hidden = model.hidden(whole, torch.arange(len(whole), device=model.device), borders)
        rows, targets = hidden[len(prompt) - 1 : -1], whole[len(prompt) :]
        found.append(linear_logprob(rows, model.head_weight, targets).logp.cpu())
    return found


def judge(subject: Subject, completions: list[list[int]], truth: tuple[float, float]) -> float:
    """Mean log-prob of the tokens. Raises Wrong where sampling would not give it.

    truth: mean log-prob of our tokens, and its standard error over the sequences.
    """
    load = subject.load
    lengths = {len(ids) for ids in completions}
    if len(completions) != load.prompts * load.samples or lengths != {load.new_tokens}:
        raise Wrong(f"{len(completions)} completions of {sorted(lengths)} tokens for {load}")
    prompts = load.ids(subject.model.shape.vocabulary)
    mean = float(torch.cat(logps(subject.model, prompts, completions)).mean())
    off, allowed = abs(mean - truth[0]), SIGMAS * 2**0.5 * truth[1]
    if off > allowed:
        raise Wrong(f"mean log-prob {mean:.4f}, {off:.4f} off ours: more than {allowed:.4f}")
    return mean


def truth(subject: Subject, done: list[Completion]) -> tuple[float, float]:
    """Of our own tokens; raises Wrong where our log-probs are not those of a full forward."""
    prompts = subject.load.ids(subject.model.shape.vocabulary)
    exact = logps(subject.model, prompts, [c.token_ids for c in done])
    pairs = zip(done, exact, strict=True)
    gap = float(torch.cat([(c.logp - logp).abs() for c, logp in pairs]).mean())
    if not gap < GAP:
        raise Wrong(f"our log-probs are {gap:.4f} nats off a full forward's on average")
    means = [float(x.mean()) for x in exact]
    return statistics.fmean(means), statistics.stdev(means) / len(means) ** 0.5


@dataclass(frozen=True)
class Ceilings:
    flops: float  # a second, of torch.mm in bf16
    bytes: float  # a second, read and written by a copy


def ceilings(device: str) -> Ceilings:
    room = torch.empty(
        (4 << 30) if device != "cpu" else (256 << 20), dtype=torch.int8, device=device
    )
    twin, stopwatch, seconds = room.clone(), Stopwatch(device), []
    for _ in range(5):
        stopwatch.start()
        twin.copy_(room)
        seconds.append(stopwatch.stop()[0])
    return Ceilings(gemm_rate(device), 2 * room.nbytes / min(seconds))


def limit(model: Decoder, load: Load, best: Ceilings) -> float:
    """Seconds that no sampler of this model can beat by much; see the top."""
    shape = model.shape
    body = sum(p.numel() for p in model.model.layers.parameters())
    head = shape.vocabulary * shape.hidden
    rows = load.prompts * load.samples
    per_token = 2 * len(shape.windows) * shape.kv_heads * shape.head_dim * model.dtype.itemsize

    def attention(n: float) -> float:  # FLOPs of one token that sees n
        return 4 * n * len(shape.windows) * shape.heads * shape.head_dim

    def seconds(flops: float, moved: float) -> float:
        return max(flops / best.flops, moved / best.bytes)

    weights = (body + head) * model.dtype.itemsize
    prompts = load.prompts * load.prompt_tokens
    flops = prompts * (2 * body + attention(load.prompt_tokens / 2)) + 2 * load.prompts * head
    total = seconds(flops, weights + prompts * per_token)
    for own in range(1, load.new_tokens):
        flops = rows * (2 * (body + head) + attention(load.prompt_tokens + own))
        total += seconds(flops, weights + (prompts + rows * own) * per_token)
    return total


@dataclass
class Race:
    subject: Subject
    samplers: dict[str, Sampler]
    left_out: dict[str, str]
    mean_logp: dict[str, float]
    first_token: float  # seconds to the first tokens of all
    ceilings: Ceilings

    def __post_init__(self):
        self.stopwatch = Stopwatch(self.subject.device)
        self.seconds: dict[str, list[float]] = {}
        self.extra_bytes: dict[str, list[int]] = {}

    def lap(self, besides: str = "") -> None:
        for name in self.samplers:
            if name != besides:
                self.stopwatch.start()
                self.work(name)
                self.stop(name)

    def work(self, name: str) -> None:
        load = self.subject.load
        prompts = load.ids(self.subject.model.shape.vocabulary)
        self.samplers[name](prompts, load.samples, load.new_tokens)

    def stop(self, name: str) -> None:
        seconds, extra = self.stopwatch.stop()
        self.seconds.setdefault(name, []).append(seconds)
        self.extra_bytes.setdefault(name, []).append(max(0, extra))

    def result(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        s, load = self.subject, self.subject.load
        least = limit(s.model, load, self.ceilings)
        mine = statistics.median(self.seconds[OURS])
        return {
            "load": vars(load) | {"tokens": load.tokens},
            "device": s.device,
            "threads": torch.get_num_threads(),
            "ceilings": vars(self.ceilings),
            "limit_seconds": least,
            "first_token_seconds": self.first_token,
            "contestants": {
                name: {
                    "median_s": (median := statistics.median(seconds)),
                    "seconds": seconds,
                    "tokens_per_second": load.tokens / median,
                    "times_ours": median / mine,
                    "of_limit": least / median,
                    "extra_bytes": statistics.median(self.extra_bytes[name]),
                    "mean_logp": self.mean_logp[name],
                }
                for name, seconds in self.seconds.items()
            },
            "left_out": self.left_out,
        }


def warm_up(subject: Subject, peers: Sequence[str]) -> Race:
    """Runs and judges each sampler once. Raises Wrong if ours is off, and whatever it raises."""
    load, generator = subject.load, Generator(subject.model)
    prompts = load.ids(subject.model.shape.vocabulary)
    expected = truth(subject, generator.sample(requests(prompts, load.samples, load.new_tokens)))
    began = time.perf_counter()
    generator.sample(requests(prompts, load.samples, 1))
    race = Race(subject, {}, {}, {}, time.perf_counter() - began, ceilings(subject.device))
    for name in [name for name in SAMPLERS if name not in PEERS or name in peers]:
        try:
            sampler = SAMPLERS[name](subject)
            completions = sampler(prompts, load.samples, load.new_tokens)
            race.mean_logp[name] = judge(subject, completions, expected)
            race.samplers[name] = sampler
        except Exception as e:  # of a peer, which may not be installed
            if name not in PEERS:
                raise
            race.left_out[name] = f"{type(e).__name__}: {e}".strip().splitlines()[0]
    return race


def show(model: str, result: dict[str, Any]) -> None:
    best, load = result["ceilings"], Load(**{k: result["load"][k] for k in vars(Load())})
    print(f"\n{model}, {load}, bf16, {result['device']}, {result['threads']} threads")
    print(
        f"torch.mm {best['flops'] / 1e9:.0f} GFLOP/s, copy {best['bytes'] / 1e9:.1f} GB/s; limit "
        f"{ms(result['limit_seconds'])} ms, first tokens after {ms(result['first_token_seconds'])}"
    )
    head = f"{'median ms':>10s}{'spread':>16s}{'tokens/s':>10s}{'x ours':>8s}{'of limit':>9s}"
    print(f"{'':30s}{head}{'extra MB':>9s}{'mean logp':>10s}")
    for name, c in result["contestants"].items():
        spread = f"{ms(min(c['seconds']))}-{ms(max(c['seconds']))}"
        print(
            f"{name:30s}{ms(c['median_s']):>10s}{spread:>16s}{c['tokens_per_second']:10.0f}"
            f"{c['times_ours']:8.2f}{c['of_limit']:9.0%}{c['extra_bytes'] / 1e6:9.0f}"
            f"{c['mean_logp']:10.3f}"
        )
    for name, why in result["left_out"].items():
        print(f"{name:30s} left out: {why}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as of expo_fast.train")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS])
    for name, value in vars(Load()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args(argv)
    load = Load(**{name: getattr(a, name) for name in vars(Load())})
    with tempfile.TemporaryDirectory() as folder:
        race = warm_up(subject(a.model, load, Path(folder)), a.peers)
        for _ in range(a.repeats):
            race.lap()
    show(a.model, race.result())
    print(json.dumps({"machine": machine(), "model": a.model, **race.result()}))


def subject(model: str, load: Load, folder: Path) -> Subject:
    device = default_device()
    loaded, tokenizer = load_model(model, dtype=torch.bfloat16, device=device)
    save_model(loaded, tokenizer, folder)
    return Subject(loaded, folder, load, device)


if __name__ == "__main__":
    main()
