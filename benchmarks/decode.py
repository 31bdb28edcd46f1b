"""Time the generator against other samplers, in interleaved rounds of one process.

    python -m benchmarks.decode                       SmolLM2-135M, 8 prompts x 8 samples
    python -m benchmarks.decode --peers llama.cpp     only these peers, where they are installed

All samplers get the same requests. Each one draws at temperature 1 without truncation, ignores EOS
and uses as many threads as torch. Before a sampler is timed, its tokens are checked: their mean
log-prob under a full forward of the model must be the one that sampling gives. The command prints a
table and then one JSON object.

The limit is a sum over the prefill and all decode steps. Each of them takes the longer of two
times: its FLOPs at the rate of torch.mm, and its bytes at the rate of a copy. Both rates are
measured in the same run. A step reads every weight once and all cached keys and values, those of a
prompt once for all of its samples.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import (
    Ceilings,
    Stopwatch,
    WrongResult,
    brief,
    ceilings,
    reason,
    run_rounds,
)
from benchmarks.samplers import OURS, PEERS, SAMPLERS, Load, Sampler, Subject, requests
from benchmarks.summary import default_device, machine, ms
from expo_fast.generate import Generator
from expo_fast.modeling.decoder import Decoder
from expo_fast.ops import linear_logprob
from expo_fast.weights import load_model, save_model

SIGMAS = 5  # standard errors by which a sampler's mean log-prob may differ from ours
SEQUENCES = 32  # the least number of sequences that our mean is estimated from
# The largest mean difference in nats, in bf16, between our log-probs and those of a full forward.
GAP = 0.05


@torch.no_grad()
def completion_logps(
    model: Decoder, prompts: list[list[int]], completions: list[list[int]]
) -> list[Tensor]:
    """Return the log-probs (T,) of each completion's tokens, by a full forward."""
    found = []
    samples = len(completions) // len(prompts)
    for i, ids in enumerate(completions):
        prompt = prompts[i // samples]
        tokens = torch.tensor([*prompt, *ids], device=model.device)
        positions = torch.arange(len(tokens), device=model.device)
        borders = torch.tensor([0, len(tokens)], dtype=torch.int32, device=model.device)
        hidden = model.hidden(tokens, positions, borders)
        rows = hidden[len(prompt) - 1 : -1]
        targets = tokens[len(prompt) :]
        result = linear_logprob(rows, model.head_weight, targets)
        found.append(result.logp.cpu())
    return found


@dataclass(frozen=True)
class Truth:
    """Statistics of the mean log-probs of correctly sampled sequences."""

    mean: float
    stdev: float
    n: int


def truth(subject: Subject) -> Truth:
    """Return the statistics of tokens that our generator samples.

    Raise WrongResult if its log-probs differ from those of a full forward.
    """
    load = subject.load
    prompts = load.ids(subject.model.shape.vocabulary)
    samples = max(load.samples, -(-SEQUENCES // load.prompts))
    done = Generator(subject.model).sample(requests(prompts, samples, load.new_tokens))
    exact = completion_logps(subject.model, prompts, [c.token_ids for c in done])
    gaps = [(c.logp - logp).abs() for c, logp in zip(done, exact, strict=True)]
    gap = float(torch.cat(gaps).mean())
    if not gap < GAP:
        raise WrongResult(
            f"our log-probs differ from those of a full forward by {gap:.4f} nats on average: "
            f"at most {GAP} is allowed"
        )
    means = [float(x.mean()) for x in exact]
    return Truth(statistics.fmean(means), statistics.stdev(means), len(means))


def judge(subject: Subject, completions: list[list[int]], truth: Truth) -> float:
    """Return the mean log-prob of the tokens.

    Raise WrongResult if the completions are not those that were requested, or if correct sampling
    would not give this mean.
    """
    load = subject.load
    n = len(completions)
    lengths = {len(ids) for ids in completions}
    if n != load.prompts * load.samples or lengths != {load.new_tokens}:
        raise WrongResult(f"got {n} completions of {sorted(lengths)} tokens for {load}")
    prompts = load.ids(subject.model.shape.vocabulary)
    logps = completion_logps(subject.model, prompts, completions)
    mean = float(torch.cat(logps).mean())
    allowed = SIGMAS * truth.stdev * (1 / truth.n + 1 / n) ** 0.5
    if abs(mean - truth.mean) > allowed:
        raise WrongResult(
            f"the mean log-prob is {mean:.3f} and ours is {truth.mean:.3f}: they may differ by "
            f"{allowed:.3f} at most"
        )
    return mean


def limit(model: Decoder, load: Load, best: Ceilings) -> float:
    """Return the seconds of the limit that the module's docstring defines."""
    shape = model.shape
    body = sum(p.numel() for p in model.model.layers.parameters())
    head = shape.vocabulary * shape.hidden
    rows = load.prompts * load.samples
    layers = len(shape.windows)
    itemsize = model.dtype.itemsize
    cache_bytes = 2 * layers * shape.kv_heads * shape.head_dim * itemsize  # of one cached token
    weight_bytes = (body + head) * itemsize

    def attention(n: float) -> float:
        """Return the FLOPs of one token that attends to n tokens."""
        return 4 * n * layers * shape.heads * shape.head_dim

    def seconds(flops: float, moved: float) -> float:
        return max(flops / best.flops, moved / best.bytes)

    prompt_tokens = load.prompts * load.prompt_tokens
    flops = prompt_tokens * (2 * body + attention(load.prompt_tokens / 2))
    flops += 2 * load.prompts * head
    total = seconds(flops, weight_bytes + prompt_tokens * cache_bytes)
    for own in range(1, load.new_tokens):
        flops = rows * (2 * (body + head) + attention(load.prompt_tokens + own))
        cached_tokens = prompt_tokens + rows * own
        total += seconds(flops, weight_bytes + cached_tokens * cache_bytes)
    return total


@dataclass
class Comparison:
    """The samplers of a load, and their times."""

    subject: Subject
    samplers: dict[str, Sampler]
    left_out: dict[str, str]
    mean_logp: dict[str, float]
    first_token: float  # seconds until every sequence has its first token
    ceilings: Ceilings

    def __post_init__(self):
        self.stopwatch = Stopwatch(self.subject.device)
        self.seconds: dict[str, list[float]] = {}
        self.extra_bytes: dict[str, list[int]] = {}

    def run_round(self, without: str = "") -> None:
        """Time every sampler once, except the one to leave out."""
        for name in self.samplers:
            if name != without:
                self.stopwatch.start()
                self.run(name)
                self.stop(name)

    def run(self, name: str) -> None:
        """Run a sampler once."""
        load = self.subject.load
        prompts = load.ids(self.subject.model.shape.vocabulary)
        self.samplers[name](prompts, load.samples, load.new_tokens)

    def stop(self, name: str) -> None:
        """Keep the time and the memory of what ran since the stopwatch started."""
        seconds, extra = self.stopwatch.stop()
        self.seconds.setdefault(name, []).append(seconds)
        self.extra_bytes.setdefault(name, []).append(max(0, extra))

    def result(self) -> dict[str, Any]:
        """Return the results as plain data, for JSON."""
        load = self.subject.load
        least = limit(self.subject.model, load, self.ceilings)
        ours = statistics.median(self.seconds[OURS])
        contestants = {}
        for name, seconds in self.seconds.items():
            median = statistics.median(seconds)
            contestants[name] = {
                "median_s": median,
                "seconds": seconds,
                "tokens_per_second": load.tokens / median,
                "times_ours": median / ours,
                "of_limit": least / median,
                "extra_bytes": statistics.median(self.extra_bytes[name]),
                "mean_logp": self.mean_logp[name],
            }
        return {
            "load": vars(load) | {"tokens": load.tokens},
            "device": self.subject.device,
            "threads": torch.get_num_threads(),
            "ceilings": vars(self.ceilings),
            "limit_seconds": least,
            "first_token_seconds": self.first_token,
            "contestants": contestants,
            "left_out": self.left_out,
        }


def warm_up(subject: Subject, names: Collection[str], best: Ceilings) -> Comparison:
    """Run and check each of these `SAMPLERS` once.

    A peer that fails is left out of the comparison. Raise what ours raises, such as WrongResult.
    """
    load = subject.load
    generator = Generator(subject.model)
    prompts = load.ids(subject.model.shape.vocabulary)
    expected = truth(subject)
    began = time.perf_counter()
    generator.sample(requests(prompts, load.samples, 1))
    comparison = Comparison(
        subject=subject,
        samplers={},
        left_out={},
        mean_logp={},
        first_token=time.perf_counter() - began,
        ceilings=best,
    )
    for name in SAMPLERS:
        if name not in names:
            continue
        try:
            sampler = SAMPLERS[name](subject)
            completions = sampler(prompts, load.samples, load.new_tokens)
            comparison.mean_logp[name] = judge(subject, completions, expected)
            comparison.samplers[name] = sampler
        except Exception as e:  # a peer may not be installed
            if name not in PEERS:
                raise
            comparison.left_out[name] = reason(e)
    return comparison


def show(model: str, result: dict[str, Any]) -> None:
    """Print a table of the results."""
    best = result["ceilings"]
    load = Load(**{name: result["load"][name] for name in vars(Load())})
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
        print(f"{name:30s} left out: {brief(why)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as in expo_fast.train")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[*PEERS])
    for name, value in vars(Load()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args(argv)
    load = Load(**{name: getattr(a, name) for name in vars(Load())})
    with tempfile.TemporaryDirectory() as folder:
        subject = make_subject(a.model, load, Path(folder))
        names = [name for name in SAMPLERS if name not in PEERS or name in a.peers]
        comparison = warm_up(subject, names, ceilings(subject.device))
        run_rounds(comparison.run_round, a.repeats)
    result = comparison.result()
    show(a.model, result)
    print(json.dumps({"machine": machine(), "model": a.model, **result}))


def make_subject(model: str, load: Load, folder: Path) -> Subject:
    """Load a model and save it to a folder, from which peers load it."""
    device = default_device()
    loaded, tokenizer = load_model(model, dtype=torch.bfloat16, device=device)
    save_model(loaded, tokenizer, folder)
    return Subject(loaded, folder, load, device)


if __name__ == "__main__":
    main()
