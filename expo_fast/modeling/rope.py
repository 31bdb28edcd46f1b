"""Rotary position embedding (RoPE, arXiv:2104.09864)."""

from typing import Any

import torch
from torch import Tensor

from expo_fast.kernels import fused
from expo_fast.storage.files import reading

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_frequencies(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Return the (Dh/2,) fp32 angles per token in radians, and YaRN's scale of cos and sin.

    config: a transformers config. Raise ValueError for an unsupported type of RoPE, and for
    parameters that do not give Dh/2 finite frequencies.
    """
    parameters = config.rope_parameters
    rope_type = parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type {rope_type!r} is not supported, need {', '.join(ROPE_TYPES)}")
    n = head_dim // 2
    with reading(f"rope_parameters {parameters}"):
        frequencies, scale = _frequencies(config, head_dim)
        finite = (frequencies * scale).isfinite().all()
        usable = len(frequencies) == n and finite
    if not usable:
        raise ValueError(f"rope_parameters {parameters} do not give {n} finite frequencies")
    return frequencies, scale


def _frequencies(config: Any, head_dim: int) -> tuple[Tensor, float]:
    parameters = config.rope_parameters
    cpu = torch.device("cpu")
    if parameters["rope_type"] == "default":
        with cpu:  # because the default device may be meta
            places = torch.arange(0, head_dim, 2, dtype=torch.float32)
        exponents = places / head_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    initialize = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    with cpu:
        return initialize(config, cpu)


def rotate_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (N, H, Dh) and keys (N, Hkv, Dh) by their positions, as `rotate` does."""
    if fused.runs(q, k, cos, sin):
        return fused.rotate(q, k, cos, sin)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (N, heads, Dh) queries or keys by their positions.

    Coordinate i of the first half of a head is rotated with coordinate i of the second half.
    cos, sin: (N, 1, Dh/2).
    """
    first, second = x.chunk(2, -1)
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    return torch.cat((rotated_first, rotated_second), -1)
