"""Time a few ExP-GRPO steps of random weights on a GPU: seconds by phase, MFU, memory, kernels.

The complete loop runs: prompts, paged sampling, rewards, explanations, diagnostics, packed forward
and backward, optimizer. A model of random weights answers and explains nothing. Therefore the
reward is the parity of the sum of a completion's tokens, and all explanations are accepted.
"""

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu_decode import MODELS, TINY, Sizes, random_model
from expo_fast.algorithms import explanations, grpo
from expo_fast.algorithms.explanations import ExplanationCounts, Positives
from expo_fast.algorithms.trainer import Trainer, make_trainer
from expo_fast.config import Train
from expo_fast.data.problems import Problem, load_problems
from expo_fast.data.prompts import Prompter
from expo_fast.generate import Completion, Request
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.layout import Layout
from expo_fast.modeling.packing import Sample
from expo_fast.reporting.timing import Phases
from expo_fast.reward import score_answers

SHAPES = {"smollm2-135m": Sizes(30, 576, 1536, 9, 3, 49152), **MODELS}
STEPS = 4  # the first one compiles and captures, and is not counted; the last one is profiled
LOAD = Train(
    steps=STEPS,
    shots=0,
    prompts_per_step=16,
    num_generations=8,
    explanations_per_question=8,
    max_completion_length=256,
    pack_tokens=16384,
    learning_rate=1e-6,
)
# The largest powers of two that 80 GB hold. Fewer packs keep the host less busy. At 1.5B the
# backward needs 128 kB per token and layer, which is 59 GB for 16384 tokens, and parameters and
# optimizer take 34 GB.
PACK_TOKENS = {"smollm2-135m": 65536, "qwen2.5-0.5b": 32768, "qwen2.5-1.5b": 8192}
SMOKE = replace(  # for a CPU
    LOAD,
    prompts_per_step=2,
    num_generations=2,
    explanations_per_question=2,
    max_completion_length=8,
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KINDS = {  # the kind of a kernel, by a pattern of its name; the first match counts
    # Names of attention kernels contain "cutlass" too, so attention comes before products.
    "attention": r"flash|fmha|attention|attend_items|add_slots",
    "products": r"gemm|gemv|nvjet|cutlass|xmma|splitk|softmax_sums|logit_gradients",
    "decoding": r"append_tokens|place_heads|add_norm_rows|swiglu_elements|rotation_rows"
    r"|block_sums|draw_tokens|record_tokens|draw_allowed",
}


def accept_all(
    questions: Sequence[Problem], completions: Sequence[Completion], *_: Any, **__: Any
) -> Positives:
    """Replace `accept_explanations` and accept everything: random weights explain nothing."""
    per_question = len(completions) // len(questions)
    found = Positives(counts=ExplanationCounts(n_sampled=len(completions)))
    for i, question in enumerate(questions):
        first = i * per_question
        own = completions[first : first + per_question]
        found.texts[question.id] = [tuple(completion.token_ids) for completion in own]
    return found


@dataclass
class Count:
    """Counts the tokens of training steps, and the FLOPs of products with weights."""

    model: Decoder
    flops: float = 0.0
    sampled: int = 0  # sampled tokens
    learnt: int = 0  # tokens with a loss
    body: int = field(init=False)  # parameters of the layers
    head: int = field(init=False)  # parameters of the LM head

    def __post_init__(self):
        self.body = sum(p.numel() for p in self.model.model.layers.parameters())
        self.head = self.model.shape.vocabulary * self.model.shape.hidden

    def watch(self, generator: Any) -> None:
        """Count what the model and the generator compute from now on."""
        hidden = self.model.hidden
        sample = generator.sample

        def watched_hidden(
            tokens: Tensor, positions: Tensor, cu_seqlens: Tensor, parents: Tensor | None = None
        ) -> Tensor:
            passes = 3 if torch.is_grad_enabled() else 1  # a backward counts as two forwards
            self.flops += 2 * self.body * len(tokens) * passes
            return hidden(tokens, positions, cu_seqlens, parents)

        def watched_sample(requests: Sequence[Request]) -> list[Completion]:
            done = sample(requests)
            new = sum(len(completion.token_ids) for completion in done)
            unique_prompts = {tuple(request.prompt_ids) for request in requests}
            prompts = sum(len(prompt) for prompt in unique_prompts)
            self.sampled += new
            self.flops += 2 * self.body * (prompts + new) + 2 * self.head * new
            return done

        self.model.hidden = watched_hidden
        generator.sample = watched_sample

    def counted(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """Return `policy_backward` or `sft_backward` with its tokens and FLOPs counted."""

        def watched_backward(layout: Layout, samples: Sequence[Sample], *more: Any, **named: Any):
            rows = sum(len(sample.completion_ids) for sample in samples)
            self.learnt += rows
            self.flops += 3 * 2 * self.head * rows
            return backward(layout, samples, *more, **named)

        return watched_backward


@contextmanager
def lenient_and_counted(count: Count) -> Iterator[None]:
    """Inside this context, accept all explanations and count the tokens of the losses of `grpo`."""
    with (
        patch.object(explanations, "accept_explanations", accept_all),
        patch.object(grpo, "policy_backward", count.counted(grpo.policy_backward)),
        patch.object(grpo, "sft_backward", count.counted(grpo.sft_backward)),
    ):
        yield


def parity(
    _: object, texts: Sequence[str], completions: Sequence[Completion]
) -> list[float | None]:
    """Return the reward of each completion: the parity of the sum of its tokens."""
    return [float(sum(c.token_ids) % 2) for c in completions]


def byte_tokenizer() -> Any:
    """Return a tokenizer of bytes, which needs no file."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<|im_end|>", "<|im_start|>", *letters]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build(name: str, device: str) -> Trainer:
    """Return a trainer of a random model: a tiny one on a CPU."""
    gpu = device != "cpu"
    model = random_model(SHAPES[name] if gpu else TINY, device)
    config = replace(LOAD if gpu else SMOKE, device=device)
    if gpu:
        config = replace(config, pack_tokens=PACK_TOKENS.get(name, LOAD.pack_tokens))
    problems = load_problems("builtin:arithmetic-2:train", limit=STEPS * config.prompts_per_step)
    prompter = Prompter(byte_tokenizer())
    return make_trainer(config, model, None, prompter, problems, parity, score_answers)


def measure(name: str, device: str, flops: float) -> Iterator[dict[str, Any]]:
    """Yield plain data of some steps, and then the same data with a profile of one more step.

    flops: the FLOP/s of products on the device.

    Raise RuntimeError if a step learns nothing.
    """
    trainer = build(name, device)
    rows: list[dict[str, Any]] = []
    seconds: list[float] = []
    count = Count(trainer.model)
    count.watch(trainer.generator)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for step in range(STEPS - 1):
        if step == 1:
            count.flops, count.sampled, count.learnt = 0.0, 0, 0
        began = time.perf_counter()
        row = run_step(trainer, step, count)
        seconds.append(time.perf_counter() - began)
        rows.append(row)
        require_learning(step, row)
    counted_steps = STEPS - 2
    total = sum(seconds[1:])
    phases = {key for key in rows[-1] if key.startswith("time/")}
    found: dict[str, Any] = {
        "model": name,
        "seconds": seconds,
        "phases": {
            key.removeprefix("time/"): statistics.fmean(row[key] for row in rows[1:])
            for key in sorted(phases)
        },
        "sampled": count.sampled / counted_steps,
        "learnt": count.learnt / counted_steps,
        "tokens/s": (count.sampled + count.learnt) / total,
        "flops": count.flops / counted_steps,
        "mfu": count.flops / total / flops,
        "logp_gap/mean": rows[-1]["logp_gap/mean"],
    }
    if device != "cpu":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    yield found
    if device != "cpu":
        found |= profiled(trainer, count, total / counted_steps)
    show(found)
    yield found


def require_learning(step: int, row: Mapping[str, Any]) -> None:
    """Raise RuntimeError if the step accepted no explanation or had no gradient."""
    if not row["grad_norm"] > 0 or not row["exp/accepted"]:
        raise RuntimeError(f"step {step + 1} learnt nothing. Its metrics are {row}")


def run_step(
    trainer: Trainer, step: int, count: Count, phases: Phases | None = None
) -> dict[str, Any]:
    """Run a step. Return its metrics, which include the seconds of each phase."""
    if phases is None:
        phases = Phases()
    with lenient_and_counted(count):
        metrics, _ = grpo.run_step(trainer, step, phases)
    return {**metrics, **phases.seconds()}


def profiled(trainer: Trainer, count: Count, seconds: float) -> dict[str, Any]:
    """Profile the last step. Return the seconds of each kind of kernel, and of the longest others.

    seconds: the time of an ordinary step, from which the idle time follows. The profiled step takes
    longer: the profiler slows down the host, and stops it when buffers of events are full.
    """
    runs = kernel_runs(partial(run_step, trainer, STEPS - 1, count))
    kernels = [(run.name, run.seconds) for run in runs]
    return {"launches": len(kernels)} | shares(kernels, seconds)


@dataclass(frozen=True)
class KernelRun:
    """One run of a kernel, or a copy, on the device."""

    begin: float  # seconds, of a clock with any start
    seconds: float
    name: str


def kernel_runs(work: Callable[[], object]) -> list[KernelRun]:
    """Return the kernels of the work, in the order in which they began."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    # `profiler.events()` would take a minute for half a million kernels.
    raw: Any = profiler.profiler
    events = [e for e in raw.kineto_results.events() if "CUDA" in str(e.device_type())]
    runs = [KernelRun(e.start_ns() / 1e9, e.duration_ns() / 1e9, e.name()) for e in events]
    return sorted(runs, key=lambda run: run.begin)


def shares(kernels: Iterable[tuple[str, float]], wall: float) -> dict[str, Any]:
    """Sum the times of kernels by their kind.

    kernels: names and seconds.
    wall: the seconds of a step. "idle" is the part of it in which no kernel runs.
    """
    by_kind: defaultdict[str, float] = defaultdict(float)
    others: defaultdict[str, float] = defaultdict(float)
    for name, seconds in kernels:
        kind = kind_of(name)
        by_kind[kind] += seconds
        if kind == "others":
            others[name[:80]] += seconds
    by_kind["idle"] = max(0.0, wall - sum(by_kind.values()))
    outside = by_kind["others"] + by_kind["idle"]
    longest = sorted(others.items(), key=lambda item: -item[1])[:12]
    return {
        "kernels": dict(by_kind),
        "outside": outside / wall,
        "others": dict(longest),
    }


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel by its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return kind
    return "others"


def show(found: Mapping[str, Any]) -> None:
    """Print the figures of `measure`."""
    seconds = statistics.fmean(found["seconds"][1:])
    print(f"\ntraining, {found['model']}: {seconds:.3f} s a step")
    print(*(f"    {name:20s}{s:9.3f} s" for name, s in found["phases"].items()), sep="\n")
    numbers = f"{found['tokens/s']:.0f} tokens/s, MFU {found['mfu']:.1%}"
    if "kernels" in found:
        print(f"    {numbers}, peak {found['peak_bytes'] / 1e9:.1f} GB; in the profiled step:")
        print(*(f"    {name:20s}{s:9.3f} s" for name, s in found["kernels"].items()), sep="\n")
        print(f"    outside products, attention and decoding: {found['outside']:.0%}; longest:")
        print(*(f"        {s:.4f} s  {name}" for name, s in found["others"].items()), sep="\n")
    else:
        print(f"    {numbers}")
