"""Switches: environment variables that select a fallback for a path that a check found broken.

The process of an item applies them before the item runs. expo_fast itself does not read them.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partialmethod
from pathlib import Path

import torch
from torch import Tensor

from expo_fast.inference import cuda_engine, paged_attention
from expo_fast.kernels import fused
from expo_fast.modeling import attention
from expo_fast.modeling.attention import Layer, causal_attention

ROWS = "LEASE_ROWS"
NO_GRAPHS = "LEASE_NO_GRAPHS"
TORCH_ENGINE = "LEASE_TORCH_ENGINE"
SDPA = "LEASE_SDPA"
PLAIN_LAYER = "LEASE_PLAIN_LAYER"
MEANING = {
    ROWS: "row kernels instead of the fused head",
    NO_GRAPHS: "no CUDA graphs",
    TORCH_ENGINE: "the torch engine instead of Triton's",
    SDPA: "SDPA for each sequence instead of varlen attention",
    PLAIN_LAYER: "plain PyTorch between the products of a training layer",
}
FILE = "switches.env"


def wanted(environment: Mapping[str, str]) -> list[str]:
    """Return the switches that are on."""
    return [name for name in MEANING if environment.get(name, "") not in ("", "0")]


def save(folder: Path, names: Sequence[str]) -> None:
    """Write the switches to a file that `load` reads."""
    (folder / FILE).write_text("".join(f"{name}=1\n" for name in names))


def load(folders: Sequence[Path]) -> list[str]:
    """Return the switches from the first folder that contains a file of switches."""
    for folder in folders:
        file = folder / FILE
        if file.exists():
            pairs = [line.split("=") for line in file.read_text().split()]
            return wanted({name: value for name, value in pairs})
    return []


def apply() -> None:
    """Apply the switches of the environment to this process."""
    on = wanted(os.environ)
    if ROWS in on:
        from expo_fast.kernels import logprob

        logprob.supports = lambda head: False
    if NO_GRAPHS in on:
        engine = cuda_engine.CudaEngine
        engine.__init__ = partialmethod(engine.__init__, graphs=False)  # pyright: ignore
    if TORCH_ENGINE in on:
        cuda_engine.supports = lambda model: False
    if SDPA in on:
        attention.varlen_attention = each_sequence
        paged_attention.varlen_attention = each_sequence
    if PLAIN_LAYER in on:
        fused.runs = lambda *tensors: False


def each_sequence(
    layer: Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_queries: int,
    max_keys: int,
) -> Tensor:
    """Compute `attention.varlen_attention` with one call for each sequence."""
    queries = q.split(cu_queries.diff().tolist())
    keys = k.split(cu_keys.diff().tolist())
    values = v.split(cu_keys.diff().tolist())
    sequences = zip(queries, keys, values, strict=True)
    return torch.cat([causal_attention(layer, *sequence) for sequence in sequences])
