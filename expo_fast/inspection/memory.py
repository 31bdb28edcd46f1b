"""Estimate the peak memory of a training run before it starts.

Sizes of weights, optimizer state, gradients and cache follow from the configuration. Activations
are counted: a forward pass of the run's first and largest pack is traced with fake tensors, which
have shapes and no memory, and the tensors that autograd would keep are summed. Completions are
assumed to reach the length limit, and every attempt to have a gradient. A run with shorter texts
needs less.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from expo_fast.algorithms.explanations import explanation_requests
from expo_fast.algorithms.rollout import attempt_requests
from expo_fast.algorithms.trainer import questions_of_step
from expo_fast.algorithms.training_data import load_training_data, texts_trained_on
from expo_fast.config import Train
from expo_fast.data.problems import Problem
from expo_fast.data.prompts import Prompter
from expo_fast.generate import CUDA_MAX_ROWS, MAX_ROWS, default_kv_cache_bytes
from expo_fast.inference.cpu_engine import NativeEngine
from expo_fast.inference.requests import Request
from expo_fast.inference.scheduler import Scheduler
from expo_fast.inference.stop_rules import StopRules
from expo_fast.inspection.machine import GB, available_memory
from expo_fast.kernels.integers import ceil_div
from expo_fast.modeling import attention
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import attach
from expo_fast.modeling.packing import Pack, Sample, pack
from expo_fast.modeling.shape import Shape, read_shape
from expo_fast.op_backends.cpu import KEPT_BYTES, SPAN
from expo_fast.weights import load_structure

FP32_BYTES = 4
MOST_OF_MEMORY = 0.9  # the system needs the rest
MOMENTS = 2  # AdamW's m and v
# Memory of the allocator by kept memory: it cannot use all gaps between tensors, and the backward
# pass adds temporary tensors (measured: python -m benchmarks.memory).
ALLOCATOR = 1.1
# Libraries that are imported on first use, the tokenizer and the threads: measured on Linux with a
# model of two layers (python -m benchmarks.memory).
RUNTIME_BYTES = 270 << 20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each part of a run at its largest."""

    weights: int
    """The model, and the frozen reference or the merged copy if the run has one."""
    optimizer: int
    """fp32 master weights of bf16 parameters, and the moments of AdamW."""
    gradients: int
    """fp32 sums, twice for a loss of two terms."""
    activations: int
    """What autograd keeps of the largest pack for the backward pass."""
    head: int
    """The gradient of the LM head and of the embedding."""
    kv_cache: int
    runtime: int = RUNTIME_BYTES

    @property
    def state(self) -> int:
        """What is in memory at all times."""
        return self.weights + self.optimizer + self.gradients + self.runtime

    @property
    def training(self) -> int:
        """The peak of forward and backward passes."""
        return self.state + self.activations + self.head

    @property
    def sampling(self) -> int:
        """The peak of sampling."""
        return self.state + self.kv_cache

    @property
    def peak(self) -> int:
        return max(self.training, self.sampling)


def memory_lines(config: Train, estimate: MemoryEstimate) -> Iterator[str]:
    """Yield the lines of a table of the parts, the peak and, if it does not fit, advice."""
    device = config.device
    if device == "auto":
        device = "cuda" if uses_cuda(config) else "cpu"
    available = available_memory(device)
    yield "memory, at most, if every text reaches the length limit"
    for name, size in asdict(estimate).items():
        yield f"{name.replace('_', ' '):<14} {size / GB:8.2f} GB"
    yield f"{'peak':<14} {estimate.peak / GB:8.2f} GB of {available / GB:.1f} GB"
    if estimate.peak > MOST_OF_MEMORY * available:
        yield advice(config, estimate)


def advice(config: Train, estimate: MemoryEstimate) -> str:
    """Return what makes the largest part smaller."""
    if estimate.sampling > estimate.training:
        return (
            "this may not fit: sampling needs the most; lower --max-completion-length, or sample "
            "fewer completions at a time with --prompts-per-step"
        )
    if estimate.activations >= max(estimate.optimizer, estimate.gradients):
        halved = max(1, config.pack_tokens // 2)
        more = "" if config.gradient_checkpointing else ", or use --gradient-checkpointing"
        return (
            f"this may not fit: activations need the most; use --pack-tokens {halved}, which "
            f"changes no result{more}"
        )
    if not config.lora_rank:
        return "this may not fit: the optimizer needs the most; train adapters with --lora-rank 16"
    return "this may not fit: the weights need the most; use a smaller model"


def estimate_run(config: Train) -> MemoryEstimate:
    """Return the estimate of a run from its data and its model's files, without the weights.

    Raise the errors of `load_training_data` and `load_structure`.
    """
    data = load_training_data(config)
    model, tokenizer = load_structure(config.model)
    prompter = Prompter.of(config, tokenizer, data.shots, ends=model.eos_ids)
    return estimate_memory(config, model.stored_config, prompter, data.problems)


def estimate_memory(
    config: Train, model_config: Any, prompter: Prompter, problems: Sequence[Problem]
) -> MemoryEstimate:
    """Return the estimate of a run.

    model_config: the transformers config or `StoredConfig` of the model.
    problems: the training problems. The first batch of the run is taken from them.
    """
    dtype = getattr(torch, config.dtype)
    device = "cuda" if uses_cuda(config) else "cpu"
    with torch.device("meta"):
        model = Decoder(model_config).to(dtype)
        if config.lora_rank:
            attach(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    n_trained = sum(p.numel() for p in trained)
    masters = n_trained if dtype != torch.float32 else 0
    questions = questions_of_step(problems, 0, config.prompts_per_step, config.seed)
    packs = largest_packs(config, prompter, questions)
    activations = [activation_bytes(config, model_config, dtype, each) for each in packs]
    kind = {"trained": not config.lora_rank, "on_pairs": config.spec.trains_on_pairs}
    heads = [head_bytes(model.shape, dtype, each, **kind) for each in packs]
    return MemoryEstimate(
        weights=weight_bytes(config, model, dtype),
        optimizer=(MOMENTS * n_trained + masters) * FP32_BYTES,
        gradients=n_trained * FP32_BYTES * n_gradient_terms(config),
        activations=max(activations, default=0),
        head=max(heads, default=0),
        kv_cache=cache_bytes(config, model.shape, dtype, prompter, questions, device),
    )


def uses_cuda(config: Train) -> bool:
    """Return whether the run's model is on a GPU."""
    if config.device == "auto":
        return torch.cuda.is_available()
    return torch.device(config.device).type == "cuda"


def weight_bytes(config: Train, model: Decoder, dtype: torch.dtype) -> int:
    """Return the bytes of the model and its copies."""
    total = sum(p.numel() for p in model.parameters())
    projections = sum(p.numel() for p in projection_weights(model))
    copies = 0
    if config.lora_rank:
        copies = projections  # the merged copy to sample from shares everything else
    elif config.needs_frozen_reference:
        copies = total
    return (total + copies) * dtype.itemsize


def projection_weights(model: Decoder) -> Iterator[Tensor]:
    """Yield the matrices of all layers that LoRA adapts."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad is False:
            yield module.weight


def n_gradient_terms(config: Train) -> int:
    """Return how many terms of the loss have gradient sums of their own."""
    return 1 + (config.spec.policy_term and config.spec.exp_sft_term)


def largest_packs(config: Train, prompter: Prompter, questions: Sequence[Problem]) -> list[Pack]:
    """Return the largest pack of each term of the loss, for one update of the weights."""
    n_questions = ceil_div(len(questions), config.updates_per_batch)
    questions = questions[:n_questions]
    packs = []
    together = 2 if config.spec.trains_on_pairs else 1
    for samples in (policy_texts(config, prompter, questions), texts(config, prompter, questions)):
        candidates = list(pack(samples, config.pack_tokens, together=together))
        if candidates:
            packs.append(max(candidates, key=lambda each: len(each.tokens)))
    return packs


def policy_texts(config: Train, prompter: Prompter, questions: Sequence[Problem]) -> list[Sample]:
    """Return samples with the lengths of the policy term's attempts."""
    if not config.spec.policy_term:
        return []
    attempts = [(0,) * config.max_new_tokens] * config.group_size
    return samples_of(prompter, questions, lambda _: attempts)


def texts(config: Train, prompter: Prompter, questions: Sequence[Problem]) -> list[Sample]:
    """Return samples with the lengths of the SFT term's texts, or of the pairs."""
    spec = config.spec
    sampled = (0,) * config.max_new_tokens

    def of_question(question: Problem) -> list[tuple[int, ...]]:
        of_data = list(texts_trained_on(config, prompter, question))
        if spec.samples_pairs:
            chosen = of_data or [sampled]
            return [*chosen, sampled] * config.pairs_per_question
        if spec.sft_source == "explanations":
            kept = config.keep_explanations or config.explanations_per_question
            return [sampled] * kept
        return of_data

    return samples_of(prompter, questions, of_question)


def samples_of(prompter: Prompter, questions: Sequence[Problem], completions: Any) -> list[Sample]:
    samples = []
    for question in questions:
        prompt_ids = prompter.solve(question)
        for completion_ids in completions(question):
            samples.append(Sample(prompt_ids=prompt_ids, completion_ids=completion_ids))
    return samples


def activation_bytes(config: Train, model_config: Any, dtype: torch.dtype, given: Pack) -> int:
    """Return the bytes that autograd keeps of one forward pass of a pack.

    Layers of one kind keep the same, so one layer of each kind is traced, and two of it.
    """
    kinds: dict[tuple[int | None, int | None], int] = {}
    shape = read_shape(model_config)
    for kind in zip(shape.windows, shape.rope, strict=True):
        kinds[kind] = kinds.get(kind, 0) + 1
    total = 0
    base = None
    for kind, count in kinds.items():
        index = list(zip(shape.windows, shape.rope, strict=True)).index(kind)
        one = traced_bytes(config, model_config, dtype, given, [index])
        two = traced_bytes(config, model_config, dtype, given, [index, index])
        if base is None:
            base = 2 * one - two
        total += (two - one) * count
    if config.gradient_checkpointing:  # the backward pass recomputes one layer at a time
        total += traced_bytes(config, model_config, dtype, given, [0], checkpointing=False)
    return round(ALLOCATOR * ((base or 0) + total))


def traced_bytes(
    config: Train,
    model_config: Any,
    dtype: torch.dtype,
    given: Pack,
    layers: Sequence[int],
    *,
    checkpointing: bool | None = None,
) -> int:
    """Return the bytes that autograd keeps of a forward pass of some layers."""
    if checkpointing is None:
        checkpointing = config.gradient_checkpointing
    model = untouched_decoder(config, model_config, dtype, layers, checkpointing)
    attend = attention.PackedAttention(given.cu_seqlens, given.parents)
    kept: dict[int, Tensor] = {}  # by storage; the tensors are held, so that no id is used twice
    with fake_tensors() as mode:
        fake_weights = [mode.from_tensor(p) for p in model.parameters()]  # held, as `kept`
        # Operations in C++ save the fake weights, and autograd functions in Python the real ones.
        all_weights = [*fake_weights, *model.parameters()]
        weights = {weight.untyped_storage()._cdata for weight in all_weights}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in weights:
                kept[storage] = tensor
            return tensor

        n_tokens = len(given.tokens)
        tokens = torch.zeros(n_tokens, dtype=torch.int64)
        positions = torch.arange(n_tokens)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.run(tokens, positions, attend)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def untouched_decoder(
    config: Train,
    model_config: Any,
    dtype: torch.dtype,
    layers: Sequence[int],
    checkpointing: bool,
) -> Decoder:
    """Return a decoder of some layers. Its weights are reserved and never written."""
    with torch.device("meta"):
        model = Decoder(model_config, checkpointing=checkpointing, layers=layers).to(dtype)
    model = model.to_empty(device="cpu")
    if config.lora_rank:
        attach(model, rank=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    return model


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Compute with shapes only. Fake masks leave the cache of attention masks afterwards."""
    attention.causal_mask.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        attention.causal_mask.cache_clear()


def head_bytes(
    shape: Shape, dtype: torch.dtype, given: Pack, *, trained: bool, on_pairs: bool
) -> int:
    """Return the bytes of the head's gradients, its kept exponentials and the rows' hidden states.

    The gradients of more than SPAN rows are summed in fp32 and then rounded. A loss of
    pairs keeps the exponentials of all rows within a budget, other losses those of a span.
    """
    rows = len(given.rows)
    total = 2 * rows * shape.hidden * dtype.itemsize  # the rows and their gradient
    if dtype == torch.bfloat16:
        row_bytes = shape.vocabulary * dtype.itemsize
        budget = KEPT_BYTES if on_pairs else SPAN * row_bytes
        total += min(rows * row_bytes, budget)
    if not trained:
        return total
    each = dtype.itemsize
    if rows > SPAN and dtype != torch.float32:
        each += FP32_BYTES
    return total + shape.vocabulary * shape.hidden * each


def cache_bytes(
    config: Train,
    shape: Shape,
    dtype: torch.dtype,
    prompter: Prompter,
    questions: Sequence[Problem],
    device: str,
) -> int:
    """Return the size of the largest key-value cache of a step."""
    calls: list[list[Request]] = []
    if config.spec.samples_attempts:
        calls.append(attempt_requests(questions, prompter, config, step=0))
    if config.samples_explanations:
        calls.append(explanation_requests(questions, prompter, config, step=0))
    page = NativeEngine.page
    values = 2 * len(shape.windows) * shape.kv_heads * shape.head_dim  # keys and values of a token
    page_bytes = page * values * dtype.itemsize
    engine: Any = SimpleNamespace(page=page, page_bytes=lambda: page_bytes)
    largest = 0
    for requests in calls:
        scheduler = Scheduler(
            engine,
            dict(enumerate(requests)),
            StopRules((), None),
            max_rows=CUDA_MAX_ROWS if device == "cuda" else MAX_ROWS,
            kv_cache_bytes=default_kv_cache_bytes(torch.device(device)),
        )
        largest = max(largest, len(scheduler.pages) * page_bytes)
    return largest
