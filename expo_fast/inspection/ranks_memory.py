"""Estimate the memory of one rank of a distributed run, by the number of ranks.

With P parameters, N of which are trained, in W bytes each (2 in bf16), K ranks and T terms of the
loss with gradient sums of their own (2 for expo-grpo and expert-grpo, else 1), a rank has at least

    --shard optimizer   W P           + (4 + 8 + 4 T) N / K   all weights; masters, moments, sums
    --shard model       W times the parameters of the root unit and of two layers while it trains
                        and, with --gather layers, while it samples; with --gather weights W P then
                                                              + (4 + 8 + 4 T) N / K

To this come the buffer of one reduction, (4 + 4 / K) bytes for each parameter of the largest unit,
and what does not depend on K: activations of a pack, the key-value cache and libraries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from expo_fast.config import Train
from expo_fast.generate import CUDA_KV_FRACTION
from expo_fast.inspection.machine import GB, available_memory
from expo_fast.inspection.memory import (
    FP32_BYTES,
    MOMENTS,
    MOST_OF_MEMORY,
    MemoryEstimate,
    n_gradient_terms,
    uses_cuda,
)
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.sharding import GatherKind

SHOWN_RANKS = (2, 4, 8)
MOST_BESIDE_CACHE = MOST_OF_MEMORY - CUDA_KV_FRACTION  # of a rank's memory: weights and state
GATHERS_OF_A_PASS = {"optimizer": 0, "model": 2}  # of the weights: forward and backward


@dataclass(frozen=True)
class Gather:
    """What a rank gathers to sample, and what it was chosen by."""

    kind: GatherKind
    needed: int
    """Bytes of all weights in the dtype of sampling, of a frozen reference, and of the rank's part
    of the state."""
    available: int
    """Bytes of the memory of the rank."""

    def __str__(self) -> str:
        shown = f"{self.needed / GB:.2f} GB of {self.available / GB:.2f} GB"
        if self.kind == "weights":
            return f"sampling gathers all weights: with the state of a rank they take {shown}"
        return (
            f"sampling gathers layer by layer, which is slow: all weights with the state of a rank "
            f"would take {shown}"
        )


def choose_gather(config: Train, model: Decoder, n_ranks: int, available: int) -> Gather:
    """Return what a rank gathers to sample, by `config.gather`.

    model: may be on the meta device.
    available: memory of the rank in bytes. With "auto", all weights are gathered if they leave
    enough of it for the key-value cache and for libraries.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    itemsize = getattr(torch, config.dtype).itemsize
    state = (1 + MOMENTS + n_gradient_terms(config)) * FP32_BYTES * total // n_ranks
    weights = itemsize * total
    reference = weights if config.needs_frozen_reference else 0
    needed = weights + reference + state
    kind: GatherKind = "layers" if needed > MOST_BESIDE_CACHE * available else "weights"
    if config.gather != "auto":
        kind = config.gather
    return Gather(kind, needed, available)


def memory_of_rank(device: str, n_local_ranks: int) -> int:
    """Return the bytes of memory of a rank. On a CPU, those of the machine are divided.

    n_local_ranks: number of ranks of this machine.
    """
    available = available_memory(device)
    return available if device == "cuda" else available // n_local_ranks


def rank_bytes(
    config: Train,
    model: Decoder,
    estimate: MemoryEstimate,
    n_ranks: int,
    gather: GatherKind = "weights",
) -> int:
    """Return the peak of one rank.

    model: may be on the meta device.
    estimate: that of the same run in one process.
    gather: what a rank gathers to sample, with --shard model.
    """
    terms = n_gradient_terms(config)
    n_trained = estimate.gradients // (FP32_BYTES * terms)
    itemsize = getattr(torch, config.dtype).itemsize
    layers = sum(p.numel() for p in model.model.layers.parameters())
    layer = layers // len(model.model.layers)
    root = sum(p.numel() for p in model.parameters()) - layers
    sharded = (1 + MOMENTS + terms) * FP32_BYTES * n_trained // n_ranks
    unit = n_trained // len(model.model.layers) if config.lora_rank else max(root, layer)
    buffer = (FP32_BYTES + FP32_BYTES / n_ranks) * unit
    fixed = sharded + estimate.runtime
    training_weights = estimate.weights
    if config.shard == "model":
        training_weights -= (layers - 2 * layer) * itemsize
    training = training_weights + buffer + estimate.activations + estimate.head
    sampling_weights = estimate.weights if gather == "weights" else training_weights
    sampling = sampling_weights + estimate.kv_cache
    return round(fixed + max(training, sampling))


def ranks_lines(config: Train, model_config: Any, estimate: MemoryEstimate) -> Iterator[str]:
    """Yield a line with the peak of a rank for some numbers of ranks."""
    with torch.device("meta"):
        model = Decoder(model_config)
    device = "cuda" if uses_cuda(config) else "cpu"
    peaks = []
    for n_ranks in SHOWN_RANKS:
        available = memory_of_rank(device, n_ranks)
        gather = choose_gather(config, model, n_ranks, available).kind
        by_layer = config.shard == "model" and gather == "layers"
        kind = gather if by_layer else "weights"
        peak = rank_bytes(config, model, estimate, n_ranks, kind)
        peaks.append(f"{peak / GB:.2f} GB with {n_ranks}{' (--gather layers)' if by_layer else ''}")
    yield f"peak of a rank of torchrun (--shard {config.shard}): {', '.join(peaks)}"


def sent_bytes(config: Train, model: Decoder, n_ranks: int) -> int:
    """Return the bytes that a rank sends for one forward and backward pass and one update.

    Of a tensor that is reduced or gathered, a rank sends all parts but its own.
    """
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    itemsize = getattr(torch, config.dtype).itemsize
    gathers = 1 + GATHERS_OF_A_PASS[config.shard]
    return sum(trained) * (FP32_BYTES + gathers * itemsize) * (n_ranks - 1) // n_ranks
