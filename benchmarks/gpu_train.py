"""A few ExP-GRPO steps on a GPU, of random weights: seconds by phase, MFU, memory, kernels.

The whole loop runs: prompts, paged sampling, rewards, explanations, diagnostics, packed forward and
backward, optimizer. Random weights neither answer nor explain, so a reward is the parity of the
tokens' sum, and all explanations of a question are taken as right.
"""

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu_decode import MODELS, TINY, Sizes, random_model
from expo_fast.algorithms import grpo
from expo_fast.algorithms.explanations import Explanations
from expo_fast.algorithms.trainer import Trainer, make_trainer
from expo_fast.config import Train
from expo_fast.data.problems import Problem, load_problems
from expo_fast.data.prompts import Prompter
from expo_fast.generate import Completion, Request
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.packing import Sample
from expo_fast.reporting.timing import Phases
from expo_fast.reward import score_answers

SHAPES = {"smollm2-135m": Sizes(30, 576, 1536, 9, 3, 49152), **MODELS}
STEPS = 4  # the first, which compiles and captures, is not counted; the last is profiled
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
# At 1.5B the backward needs 128 kB a token and layer: 59 GB for 16384 tokens, beside 34 GB of
# parameters and optimizer. 80 GB do not hold both.
PACK_TOKENS = {"qwen2.5-1.5b": 8192}
SMOKE = replace(  # on a CPU
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
KINDS = {  # what a kernel does, by its name
    "attention": r"flash|fmha|attention|attend_items|add_slots",  # of CUTLASS, too: so first
    "products": r"gemm|gemv|nvjet|cutlass|xmma|splitk|softmax_sums|logit_gradients",
    "decoding": r"append_tokens|place_heads|add_norm_rows|swiglu_elements|rotation_rows",
}


def accept_all(
    questions: Sequence[Problem], completions: Sequence[Completion], *_: Any, **__: Any
) -> Explanations:
    """Stand for `accept_explanations`: random weights explain nothing right, so accept all."""
    per_question = len(completions) // len(questions)
    found = Explanations(n_questions=len(questions), n_sampled=len(completions))
    for i, question in enumerate(questions):
        own = completions[i * per_question : (i + 1) * per_question]
        found.accepted[question.id] = [tuple(completion.token_ids) for completion in own]
    return found


@dataclass
class Count:
    """FLOPs of products with weights, and tokens, of a trainer's steps."""

    model: Decoder
    flops: float = 0.0
    sampled: int = 0  # tokens
    learnt: int = 0  # tokens with a loss
    body: int = field(init=False)
    head: int = field(init=False)

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
            passes = 3 if torch.is_grad_enabled() else 1  # a backward is two forwards
            self.flops += 2 * self.body * len(tokens) * passes
            return hidden(tokens, positions, cu_seqlens, parents)

        def watched_sample(requests: Sequence[Request]) -> list[Completion]:
            done = sample(requests)
            new = sum(len(completion.token_ids) for completion in done)
            prompts = sum(len(prompt) for prompt in {tuple(r.prompt_ids) for r in requests})
            self.sampled += new
            self.flops += 2 * self.body * (prompts + new) + 2 * self.head * new
            return done

        self.model.hidden = watched_hidden
        generator.sample = watched_sample

    def counted(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        """Return `policy_backward` or `sft_backward` with its tokens and FLOPs counted."""

        def watched_backward(model: Decoder, samples: Sequence[Sample], *more: Any, **named: Any):
            rows = sum(len(sample.completion_ids) for sample in samples)
            self.learnt += rows
            self.flops += 3 * 2 * self.head * rows
            return backward(model, samples, *more, **named)

        return watched_backward


@contextmanager
def lenient_and_counted(count: Count) -> Iterator[None]:
    """Meanwhile all explanations are accepted, and the losses of `grpo` are counted."""
    with (
        patch.object(grpo, "accept_explanations", accept_all),
        patch.object(grpo, "policy_backward", count.counted(grpo.policy_backward)),
        patch.object(grpo, "sft_backward", count.counted(grpo.sft_backward)),
    ):
        yield


def parity(
    _: object, texts: Sequence[str], completions: Sequence[Completion]
) -> list[float | None]:
    return [float(sum(c.token_ids) % 2) for c in completions]


def letters() -> Any:
    """Return a tokenizer of bytes, which needs no file."""
    named = ["<pad>", "<|im_end|>", "<|im_start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(named)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build(name: str, device: str) -> Trainer:
    gpu = device != "cpu"
    model = random_model(SHAPES[name] if gpu else TINY, device)
    config = replace(LOAD if gpu else SMOKE, device=device)
    if gpu:
        config = replace(config, pack_tokens=PACK_TOKENS.get(name, LOAD.pack_tokens))
    problems = load_problems("builtin:arithmetic-2:train", limit=STEPS * config.prompts_per_step)
    prompter = Prompter(letters())
    return make_trainer(config, model, None, prompter, problems, parity, score_answers)


def measure(name: str, device: str, flops: float) -> Iterator[dict[str, Any]]:
    """Yield plain data of some steps, and again with what a profile of one more step adds.

    flops: a second, of the device's products.

    Raise RuntimeError where a step learns nothing.
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
    steady = STEPS - 2
    total = sum(seconds[1:])
    phases = {key for key in rows[-1] if key.startswith("time/")}
    found: dict[str, Any] = {
        "model": name,
        "seconds": seconds,
        "phases": {
            key.removeprefix("time/"): statistics.fmean(row[key] for row in rows[1:])
            for key in sorted(phases)
        },
        "sampled": count.sampled / steady,
        "learnt": count.learnt / steady,
        "tokens/s": (count.sampled + count.learnt) / total,
        "flops": count.flops / steady,
        "mfu": count.flops / total / flops,
        "logp_gap/mean": rows[-1]["logp_gap/mean"],
    }
    if device != "cpu":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    yield found
    if device != "cpu":
        found |= profiled(trainer, count, total / steady)
    show(found)
    yield found


def require_learning(step: int, row: Mapping[str, Any]) -> None:
    """RuntimeError unless the step had something to learn and learnt it."""
    if not row["grad_norm"] > 0 or not row["exp/accepted"]:
        raise RuntimeError(f"step {step + 1} learnt nothing: {row}")


def run_step(trainer: Trainer, step: int, count: Count) -> dict[str, Any]:
    """Run a step and return its metrics, seconds by phase included."""
    phases = Phases()
    with lenient_and_counted(count):
        metrics, _ = grpo.run_step(trainer, step, phases)
    return {**metrics, **phases.seconds()}


def profiled(trainer: Trainer, count: Count, seconds: float) -> dict[str, Any]:
    """Of the last step: seconds of each kind of kernel, and of the longest others.

    seconds: of an ordinary step. The host is slower while it is watched, and stops when buffers of
    events are full, so what is idle is told from those.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run_step(trainer, STEPS - 1, count)
        torch.cuda.synchronize()
    # `profiler.events()` takes a minute for half a million kernels
    raw: Any = profiler.profiler
    events = [e for e in raw.kineto_results.events() if "CUDA" in str(e.device_type())]
    kernels = [(e.name(), e.duration_ns() / 1e9) for e in events]
    return {"launches": len(kernels)} | shares(kernels, seconds)


def shares(kernels: Iterable[tuple[str, float]], wall: float) -> dict[str, Any]:
    """kernels: (name, seconds). `idle` is what no kernel takes of a step's wall time."""
    by_kind: defaultdict[str, float] = defaultdict(float)
    others: defaultdict[str, float] = defaultdict(float)
    for name, seconds in kernels:
        kind = next((k for k, names in KINDS.items() if re.search(names, name, re.I)), "others")
        by_kind[kind] += seconds
        if kind == "others":
            others[name[:80]] += seconds
    by_kind["idle"] = max(0.0, wall - sum(by_kind.values()))
    outside = by_kind["others"] + by_kind["idle"]
    return {
        "kernels": dict(by_kind),
        "outside": outside / wall,
        "others": dict(sorted(others.items(), key=lambda item: -item[1])[:12]),
    }


def show(found: Mapping[str, Any]) -> None:
    print(f"\ntraining, {found['model']}: {statistics.fmean(found['seconds'][1:]):.3f} s a step")
    print(*(f"    {name:20s}{s:9.3f} s" for name, s in found["phases"].items()), sep="\n")
    numbers = f"{found['tokens/s']:.0f} tokens/s, MFU {found['mfu']:.1%}"
    if "kernels" in found:
        print(f"    {numbers}, peak {found['peak_bytes'] / 1e9:.1f} GB; in the profiled step:")
        print(*(f"    {name:20s}{s:9.3f} s" for name, s in found["kernels"].items()), sep="\n")
        print(f"    outside products, attention and decoding: {found['outside']:.0%}; longest:")
        print(*(f"        {s:.4f} s  {name}" for name, s in found["others"].items()), sep="\n")
    else:
        print(f"    {numbers}")
