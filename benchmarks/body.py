"""Time the forward and backward of a model's layers beside transformers, in interleaved rounds.

    python -m benchmarks.body                       8 questions of 80 tokens, 4 completions each
    python -m benchmarks.body --common 206 --questions 4 --group 8       two worked examples

All contestants compute the same hidden states and the same gradients, without the LM head. Prompts
and completions are random tokens of equal lengths, so transformers needs no padding. "expo_fast"
computes shared prefixes once; "... each sequence apart" computes every token of every sequence;
"... its linear maps alone" runs the products of "expo_fast" without attention, norms and
activations. The errors are relative to the norm of what the model computes in fp64 from the same
weights.

"of limit" is the time of the counted products at the highest rate of `torch.mm`, in bf16 or fp32,
divided by the time.
"""

import argparse
import json
import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Ceilings, Stopwatch, ceilings, run_rounds
from benchmarks.step import fp32_rate
from benchmarks.summary import default_device, machine
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.modules import Linear
from expo_fast.modeling.packing import Pack, Sample, pack
from expo_fast.weights import load_model, save_model

OURS = "expo_fast"
APART = "... each sequence apart"
PRODUCTS = "... its linear maps alone"
THEIRS = "transformers, SDPA"


@dataclass(frozen=True)
class Job:
    """The sizes of a batch, in tokens."""

    common: int  # prefix that all prompts share, such as worked examples
    own: int  # the rest of a prompt
    new: int  # of a completion
    questions: int
    group: int  # completions of a question
    micro_batch: int  # sequences in a forward pass of transformers

    def samples(self, vocabulary: int) -> list[Sample]:
        """Return the samples, grouped by question."""
        random = torch.Generator().manual_seed(0)

        def tokens(n: int) -> tuple[int, ...]:
            return tuple(torch.randint(3, vocabulary, (n,), generator=random).tolist())

        prefix = tokens(self.common)
        samples = []
        for _ in range(self.questions):
            prompt = prefix + tokens(self.own)
            for _ in range(self.group):
                samples.append(Sample(prompt, tokens(self.new)))
        return samples

    def upstream(self, width: int) -> Tensor:
        """Return the gradients of hidden states, (sequences, new, width) fp32."""
        random = torch.Generator().manual_seed(1)
        return torch.randn(self.questions * self.group, self.new, width, generator=random)


def shared(samples: Sequence[Sample]) -> Pack:
    """Return one pack in which shared prefixes are stored once."""
    (given,) = pack(samples, 1 << 30)
    return given


def apart(samples: Sequence[Sample]) -> Pack:
    """Return one pack in which each sample is a segment of its own. All have the same length."""
    packs = [shared([sample]) for sample in samples]
    length = len(packs[0].tokens)
    n = len(samples)
    return replace(
        shared(samples),
        tokens=torch.cat([each.tokens for each in packs]),
        positions=torch.cat([each.positions for each in packs]),
        cu_seqlens=torch.arange(n + 1, dtype=torch.int32) * length,
        parents=torch.full((n,), -1),
        rows=torch.cat([each.rows + i * length for i, each in enumerate(packs)]),
        members=tuple(range(n)),
    )


def ours(model: Decoder, job: Job, given: Pack) -> None:
    """Run forward and backward of a pack, which adds to the gradients of the weights."""
    hidden = model.hidden(given.tokens, given.positions, given.cu_seqlens, given.parents)
    grads = job.upstream(hidden.shape[1]).to(hidden)
    order = torch.tensor(given.members, device=hidden.device)
    hidden[given.rows].backward(grads[order].flatten(0, 1))


def products(maps: Sequence[Linear], n: int) -> None:
    """Run forward and backward of linear maps of n tokens, which adds to the weights' gradients."""
    values: dict[int, Tensor] = {}
    for each in maps:
        for width in (each.in_features, each.out_features):
            if width not in values:
                values[width] = torch.ones(
                    n, width, dtype=each.weight.dtype, device=each.weight.device
                )
        x = values[each.in_features].detach().requires_grad_()
        each(x).backward(values[each.out_features])


def theirs(model: torch.nn.Module, job: Job, samples: Sequence[Sample], device: str) -> None:
    """Run forward and backward of transformers' layers in micro-batches."""
    ids = torch.tensor([[*s.prompt_ids, *s.completion_ids[:-1]] for s in samples], device=device)
    upstream = None
    for first in range(0, len(ids), job.micro_batch):
        batch = slice(first, first + job.micro_batch)
        hidden = model(input_ids=ids[batch], use_cache=False).last_hidden_state[:, -job.new :]
        if upstream is None:
            upstream = job.upstream(hidden.shape[2]).to(hidden)
        hidden.backward(upstream[batch])


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Take the gradients of the layers' weights and of the last norm from a model."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None and "embed" not in name and "lm_head" not in name:
            found[name.removeprefix("model.")] = p.grad.double().cpu()
        p.grad = None
    return found


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the norm of the difference of all gradients, relative to the norm of the truth."""
    difference = sum(float((found[name] - exact).square().sum()) for name, exact in truth.items())
    return (difference / sum(float(exact.square().sum()) for exact in truth.values())) ** 0.5


@dataclass(frozen=True)
class Models:
    """A model, and the layers of the same one in transformers."""

    ours: Decoder
    theirs: Any


def load(name: str, device: str) -> Models:
    """Load a model as in expo_fast.train, and load it into transformers."""
    model, tokenizer = load_model(name, dtype=torch.bfloat16, device=device)
    with TemporaryDirectory() as folder:
        save_model(model, tokenizer, folder)
        return Models(model, load_theirs(Path(folder), device))


def load_theirs(folder: Path, device: str) -> Any:
    """Load the layers of a saved model into transformers."""
    from transformers import AutoModelForCausalLM

    causal: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return causal.model.to(device).train()


def highest_rate(device: str, best: Ceilings) -> float:
    """Return the FLOP/s of torch.mm: on a CPU, the higher rate of bf16 and fp32."""
    return max(best.flops, fp32_rate()) if device == "cpu" else best.flops


def compare(
    models: Models,
    job: Job,
    rate: float,
    repeats: int,
    without: Collection[str] = (),
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Time the contestants. Return plain data.

    rate: in FLOP/s, for the limit that the module's docstring defines.
    without: names of contestants to leave out.
    seconds: see `run_rounds`.
    """
    model = models.ours
    device = str(model.device)
    samples = job.samples(model.shape.vocabulary)
    packs = packs_of(samples, model.device)
    maps = [module for module in model.model.layers.modules() if isinstance(module, Linear)]
    runs: dict[str, Callable[[], None]] = {
        OURS: partial(ours, model, job, packs[OURS]),
        APART: partial(ours, model, job, packs[APART]),
        PRODUCTS: partial(products, maps, len(packs[OURS].tokens)),
        THEIRS: partial(theirs, models.theirs, job, samples, device),
    }
    times: dict[str, list[float]] = {name: [] for name in runs if name not in without}
    stopwatch = Stopwatch(device)

    def run_round() -> None:
        for name, all_times in times.items():
            stopwatch.start()
            runs[name]()
            all_times.append(stopwatch.stop()[0])
            owner = models.theirs if name == THEIRS else model
            owner.zero_grad()

    run_round()
    for all_times in times.values():
        all_times.clear()  # the first round warms up
    run_rounds(run_round, repeats, seconds)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    all_tokens = len(packs[APART].tokens)
    shared_tokens = len(packs[OURS].tokens)
    counts = {OURS: shared_tokens, APART: all_tokens, PRODUCTS: shared_tokens, THEIRS: all_tokens}
    found = {}
    for name, all_times in times.items():
        median = statistics.median(all_times)
        found[name] = {
            "median_s": median,
            "seconds": all_times,
            "tokens": counts[name],
            "of limit": 6 * layers * counts[name] / rate / median,
        }
    return {"job": asdict(job), "rate": rate, "contestants": found}


def packs_of(samples: Sequence[Sample], device: torch.device) -> dict[str, Pack]:
    """Return the packs of the contestants that run our model."""
    return {OURS: shared(samples).to(device), APART: apart(samples).to(device)}


def errors(
    model: Decoder, peer: Any, job: Job, samples: Sequence[Sample], packs: dict[str, Pack]
) -> dict[str, float]:
    """Return the errors of the contestants' gradients, with the model in fp64 as the truth."""
    found = {}
    for contestant, given in packs.items():
        ours(model, job, given)
        found[contestant] = gradients(model)
    device = str(model.device)
    theirs(peer, job, samples, device)
    found[THEIRS] = gradients(peer)
    theirs(peer.double(), job, samples, device)
    truth = gradients(peer)
    return {contestant: error(grads, truth) for contestant, grads in found.items()}


def show(model: str, result: dict[str, Any]) -> None:
    """Print a table of the contestants."""
    contestants = result["contestants"]
    least = contestants[OURS]["median_s"]
    print(f"\n{model}, {result['job']}, {result['rate'] / 1e9:.0f} GFLOP/s")
    print(f"{'':28s}{'seconds':>9s}{'x ours':>8s}{'tokens':>8s}{'of limit':>10s}{'error':>10s}")
    for name, row in contestants.items():
        wrong = f"{row['error']:10.1e}" if "error" in row else ""
        times = row["median_s"] / least
        line = f"{name:28s}{row['median_s']:9.3f}{times:8.2f}{row['tokens']:8d}"
        print(f"{line}{row['of limit']:10.0%}{wrong}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="as in expo_fast.train")
    defaults = Job(common=0, own=80, new=64, questions=8, group=4, micro_batch=8)
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="compare gradients with fp64")
    given = parser.parse_args()
    job = Job(**{name: getattr(given, name) for name in asdict(defaults)})
    device = default_device()
    models = load(given.model, device)
    rate = highest_rate(device, ceilings(device))
    result = compare(models, job, rate, given.repeats)
    if given.check:
        samples = job.samples(models.ours.shape.vocabulary)
        packs = packs_of(samples, models.ours.device)
        found = errors(models.ours, models.theirs, job, samples, packs)
        for contestant, how in found.items():
            result["contestants"][contestant]["error"] = how
    show(given.model, result)
    print(json.dumps({"model": given.model} | result | machine()))


if __name__ == "__main__":
    main()
