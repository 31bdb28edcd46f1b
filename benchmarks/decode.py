"""Times the generator against other samplers: interleaved laps in one process, same requests.

    python -m benchmarks.decode                       SmolLM2-135M, 8 prompts x 8 samples
    python -m benchmarks.decode --peers llama.cpp     only these peers, where they are installed

Every sampler draws at temperature 1, truncates nothing, ignores EOS and uses torch's threads.
Before a sampler is timed its tokens are checked: their mean log-prob under a full forward of the
model must be what sampling gives. Prints a table, then one JSON object.

The limit is, for the prompts and for each decode step, the longer of two times: its FLOPs at the
rate of torch.mm and its bytes at the rate of a copy, both measured in the same run. A step reads
every weight once, and the keys and values in the cache, those of a prompt once for all its samples.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Ceilings, Stopwatch, Wrong, brief, ceilings, reason
from benchmarks.samplers import OURS, PEERS, SAMPLERS, Load, Sampler, Subject, requests
from benchmarks.summary import default_device, machine, ms
from expo_fast.generate import Generator
from expo_fast.modeling.decoder import Decoder
from expo_fast.ops import linear_logprob
from expo_fast.weights import load_model, save_model

SIGMAS = 5  # by which a sampler's mean log-prob may differ from ours
SEQUENCES = 32  # that our mean is estimated from at least
GAP = 0.05  # nats, mean difference between our generator's log-probs and a full forward's in bf16


@torch.no_grad()
def logps(model: Decoder, prompts: list[list[int]], completions: list[list[int]]) -> list[Tensor]:
    """Return the log-probs (T,) of each completion's tokens, by a full forward."""
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


@dataclass(frozen=True)
class Truth:
    """Statistics of the mean log-probs of correctly sampled sequences."""

    mean: float
    stdev: float
    n: int


def truth(subject: Subject) -> Truth:
    """Return those of our own tokens. Raise Wrong if our log-probs differ from a full forward's."""
    load = subject.load
    prompts = load.ids(subject.model.shape.vocabulary)
    asked = requests(prompts, max(load.samples, -(-SEQUENCES // load.prompts)), load.new_tokens)
    done = Generator(subject.model).sample(asked)
    exact = logps(subject.model, prompts, [c.token_ids for c in done])
    pairs = zip(done, exact, strict=True)
    gap = float(torch.cat([(c.logp - logp).abs() for c, logp in pairs]).mean())
    if not gap < GAP:
        raise Wrong(f"our log-probs are {gap:.4f} nats off a full forward's on average")
    means = [float(x.mean()) for x in exact]
    return Truth(statistics.fmean(means), statistics.stdev(means), len(means))


def judge(subject: Subject, completions: list[list[int]], truth: Truth) -> float:
    """Return the mean log-prob of the tokens. Raise Wrong where sampling would not give it."""
    load = subject.load
    lengths = {len(ids) for ids in completions}
    if len(completions) != load.prompts * load.samples or lengths != {load.new_tokens}:
        raise Wrong(f"{len(completions)} completions of {sorted(lengths)} tokens for {load}")
    prompts = load.ids(subject.model.shape.vocabulary)
    mean = float(torch.cat(logps(subject.model, prompts, completions)).mean())
    allowed = SIGMAS * truth.stdev * (1 / truth.n + 1 / len(completions)) ** 0.5
    if abs(mean - truth.mean) > allowed:
        raise Wrong(f"mean log-prob {mean:.3f}, ours {truth.mean:.3f}: more than {allowed:.3f} off")
    return mean


def limit(model: Decoder, load: Load, best: Ceilings) -> float:
    """Return the seconds that no sampler of this model can beat by much; see the module."""
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
        """Return the results as plain data, for JSON."""
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
    """Run and check each sampler once. Raise what ours raises, or Wrong if its tokens are."""
    load, generator = subject.load, Generator(subject.model)
    prompts = load.ids(subject.model.shape.vocabulary)
    expected = truth(subject)
    began = time.perf_counter()
    generator.sample(requests(prompts, load.samples, 1))
    race = Race(subject, {}, {}, {}, time.perf_counter() - began, ceilings(subject.device))
    for name in [name for name in SAMPLERS if name not in PEERS or name in peers]:
        try:
            sampler = SAMPLERS[name](subject)
            completions = sampler(prompts, load.samples, load.new_tokens)
            race.mean_logp[name] = judge(subject, completions, expected)
            race.samplers[name] = sampler
        except Exception as e:  # a peer may not be installed
            if name not in PEERS:
                raise
            race.left_out[name] = reason(e)
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
        print(f"{name:30s} left out: {brief(why)}")


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
