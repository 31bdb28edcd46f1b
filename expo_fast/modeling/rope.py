"""Rotary position embedding (RoPE, arXiv:2104.09864)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expo_fast.kernels import fused
from expo_fast.modeling.shape import Shape
from expo_fast.op_backends import native_layer
from expo_fast.storage.files import reading

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeSets:
    """The frequencies of each kind of layer, one row per set."""

    inv_freq: Tensor  # (sets, R/2) fp32, angles per token in radians
    scales: tuple[float, ...]  # of cos and sin, by YaRN and LongRoPE


def rope_frequencies(config: Any, shape: Shape) -> RopeSets:
    """Return the frequencies of RoPE for R = `shape.rotary_dim` dimensions of each head.

    config: a transformers config. LongRoPE has its short factors, see `Shape.context`.
    Raise ValueError for an unsupported type of RoPE, and for parameters that do not give R/2 finite
    frequencies.
    """
    rows = []
    scales = []
    for layer_type in shape.rope_sets:
        frequencies, scale = _checked_frequencies(config, shape.rotary_dim, layer_type)
        rows.append(frequencies)
        scales.append(scale)
    return RopeSets(torch.stack(rows), tuple(scales))


def _checked_frequencies(
    config: Any, rotary_dim: int, layer_type: str | None
) -> tuple[Tensor, float]:
    parameters = _parameters(config, layer_type)
    rope_type = parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type {rope_type!r} is not supported, need {', '.join(ROPE_TYPES)}")
    n = rotary_dim // 2
    with reading(f"rope_parameters {parameters}"):
        frequencies, scale = _frequencies(config, rotary_dim, layer_type)
        finite = (frequencies * scale).isfinite().all()
        usable = len(frequencies) == n and finite
    if not usable:
        raise ValueError(f"rope_parameters {parameters} do not give {n} finite frequencies")
    return frequencies, scale


def _parameters(config: Any, layer_type: str | None) -> dict[str, Any]:
    if layer_type is None:
        return config.rope_parameters
    return config.rope_parameters[layer_type]


def _frequencies(config: Any, rotary_dim: int, layer_type: str | None) -> tuple[Tensor, float]:
    parameters = _parameters(config, layer_type)
    cpu = torch.device("cpu")
    if parameters["rope_type"] == "default":
        with cpu:  # because the default device may be meta
            places = torch.arange(0, rotary_dim, 2, dtype=torch.float32)
        exponents = places / rotary_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    initialize = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    options = {} if layer_type is None else {"layer_type": layer_type}
    with cpu:
        return initialize(config, cpu, **options)


def rotate_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (N, H, Dh) and keys (N, Hkv, Dh) by their positions, as `rotate` does."""
    complete = 2 * cos.shape[-1] == q.shape[-1]
    if complete and fused.runs(q, k, cos, sin):
        return fused.rotate(q, k, cos, sin)
    if complete and len(cos) == len(q) and native_layer.runs(q, k, cos, sin):
        q = native_layer.rotate(q, cos, sin, inverse=False)
        return q, native_layer.rotate(k, cos, sin, inverse=False)
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of (N, heads, Dh) queries or keys by their positions.

    Coordinate i of the first R/2 dimensions is rotated with coordinate i of the next R/2.
    cos, sin: (N, 1, R/2).
    """
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    if rest.shape[-1] == 0:
        return torch.cat((rotated_first, rotated_second), -1)
    return torch.cat((rotated_first, rotated_second, rest), -1)
