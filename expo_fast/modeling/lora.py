"""LoRA (arXiv:2106.09685) through PEFT: a projection computes W x + s B A x, with s = alpha / r.

W (out, in) is frozen. A (r, in) starts random and B (out, r) starts at zero, so the initial policy
is the base model. A and B have the model's dtype. For bf16 the Optimizer keeps fp32 masters.

PEFT wraps the projections for training. Sampling runs on a merged copy: a plain model that holds
W + s B A. Saved adapters are merged into their base without PEFT.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expo_fast.modeling.decoder import Decoder, plain_decoder
from expo_fast.storage.fused_adapters import join_config, join_factors, split_adapter
from expo_fast.storage.fused_projections import joined_name
from expo_fast.storage.hf_files import write_tokenizer
from expo_fast.storage.lora_files import (
    PROJECTIONS,
    TENSORS,
    Adapter,
    LoraFactors,
    read_adapter,
    write_adapter_tensors,
)

NAME = "default"  # PEFT's name for the only adapter


@dataclass(frozen=True)
class _MergedWeight:
    """A weight of the merged copy, and the PEFT layer that it is computed from."""

    layer: Any
    weight: nn.Parameter


@dataclass(frozen=True)
class MergedCopy:
    """A plain model whose weights contain the adapters of another model. See `merged_copy`."""

    model: Decoder
    merged: tuple[_MergedWeight, ...]

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge again, in place, after A and B have changed.

        Only one projection at a time is in memory in fp32.
        """
        for each in self.merged:
            layer = each.layer
            base = layer.base_layer.weight
            scale = layer.scaling[NAME]
            _merge(base, _factors(layer), scale, out=each.weight)


def attach(model: Decoder, *, rank: int, alpha: float, seed: int) -> None:
    """Add adapters to all projections of all layers, in place, and freeze everything else.

    A depends only on `seed`. It is drawn in fp32 and then rounded. Global random states do not
    change.

    Raise ValueError if the rank is not an integer from 1 to the smallest side of a projection, if
    alpha is not a positive number, or if the model already has adapters.
    """
    if is_attached(model):
        raise ValueError("the model has adapters already: load it again to attach others")
    sides = [min(layer.weight.shape) for layer in _projections(model).values()]
    largest = min(sides)
    if type(rank) is not int or not 1 <= rank <= largest:
        raise ValueError(f"rank is {rank!r}, need an integer from 1 to {largest}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}, need a positive number")
    from peft import LoraConfig, inject_adapter_in_model

    any_alpha: Any = alpha  # PEFT annotates int, and accepts both
    config = LoraConfig(
        r=rank,
        lora_alpha=any_alpha,
        target_modules=list(PROJECTIONS),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs
        inject_adapter_in_model(config, model, NAME)


def is_attached(model: Decoder) -> bool:
    """Return whether the model has adapters."""
    return bool(_adapted_layers(model))


@contextmanager
def switched_off(model: Decoder) -> Iterator[None]:
    """Switch the adapters off until the end of the block.

    The model is then bit-identical to the base model, and no parameter requires a gradient.
    """
    adapted = _adapted_layers(model).values()
    layers = [layer for layer in adapted if not layer.disable_adapters]
    flags = []
    for layer in layers:
        for parameter in layer.parameters():
            flags.append((parameter, parameter.requires_grad))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, requires_grad in flags:  # PEFT has made all adapters trainable
            parameter.requires_grad_(requires_grad)


def merged_copy(model: Decoder) -> MergedCopy:
    """Return a plain decoder that computes the same function as the adapted model.

    It is needed for sampling, because the fast decode engines do not support PEFT. The copy has its
    own merged weights, which `refresh` updates, and shares all other parameters with `model`.

    Raise ValueError if the model has no adapters.
    """
    layers = _adapted_layers(model)
    if not layers:
        raise ValueError("the model has no adapters: sample from the model itself")
    weights = base_tensors(model)
    for name in layers:
        key = f"{name}.weight"
        weights[key] = torch.empty_like(weights[key])
    plain = plain_decoder(model, weights, trainable=False)
    merged = []
    for name, layer in layers.items():
        merged.append(_MergedWeight(layer, plain.get_parameter(f"{name}.weight")))
    result = MergedCopy(plain, tuple(merged))
    result.refresh()
    return result


def save_adapter(
    model: Decoder,
    tokenizer: Any,
    path: str | Path,
    base: str,
    *,
    revision: str | None = None,
    wheel: str | None = None,
) -> None:
    """Write the adapter to a folder that PEFT loads. The tensors keep their dtype.

    tokenizer: None writes no tokenizer.
    base, revision, wheel: the base model, see `BaseModel`.

    Raise ValueError if the model has no adapters.
    """
    layers = _adapted_layers(model)
    if not layers:
        raise ValueError(f"{path}: the model has no adapters, save it with save_model")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    configs: Any = model.peft_config
    config = copy.copy(configs[NAME])
    config.base_model_name_or_path = base
    config.revision = revision
    config.inference_mode = True  # as in PEFT's own files
    factors = {name: _factors(layer) for name, layer in layers.items()}
    if model.shape.fused_storage:
        config = copy.deepcopy(config)
        join_config(config)
        factors = join_factors(factors)
    config.target_modules = sorted(config.target_modules)  # PEFT has a set, which has no order
    config.save_pretrained(str(path))
    write_adapter_tensors(path, factors, wheel)
    if tokenizer is not None:
        write_tokenizer(path, tokenizer)


def base_tensors(model: Decoder) -> dict[str, Tensor]:
    """Return the parameters of the base model by their Hugging Face names."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            tensors[name.replace(".base_layer.", ".")] = parameter
    return tensors


@torch.no_grad()
def load_adapter(model: Decoder, path: str | Path) -> None:
    """Copy saved tensors into the model's adapters, without rounding.

    Raise ValueError if the adapter has another rank, scale, dtype or set of projections, and what
    `read_adapter` raises. The model is then unchanged.
    """
    adapter = fit_adapter(read_adapter(Path(path)), model)
    layers = _adapted_layers(model)
    _check_same_kind(adapter, layers, path)
    for name, layer in layers.items():
        saved = adapter.factors[name]
        current = _factors(layer)
        current.A.copy_(saved.A)
        current.B.copy_(saved.B)


def _check_same_kind(adapter: Adapter, layers: dict[str, Any], path: str | Path) -> None:
    if layers.keys() != adapter.factors.keys():
        raise ValueError(
            f"{path} adapts {len(adapter.factors)} projections, the model has adapters on "
            f"{len(layers)} of them"
        )
    for name, layer in layers.items():
        rank = layer.r[NAME]
        scale = layer.scaling[NAME]
        if adapter.rank != rank or adapter.scale != scale:
            raise ValueError(
                f"{path} has rank {adapter.rank} and scale {adapter.scale}, the model's adapters "
                f"have {rank} and {scale}"
            )
        current = _factors(layer)
        if len(adapter.factors[name].A) != rank:  # of a joined projection
            raise ValueError(f"{path}: A of {name} is shared with other projections")
        _check_same_dtype(adapter.factors[name].A, current.A, f"{path}: {name}")
        _check_same_dtype(adapter.factors[name].B, current.B, f"{path}: {name}")


def _check_same_dtype(saved: Tensor, current: Tensor, name: str) -> None:
    if saved.dtype != current.dtype:
        raise ValueError(f"{name} is {saved.dtype}, the model has {current.dtype}")


@torch.no_grad()
def merge(model: Decoder, adapter: Adapter) -> None:
    """Set W to W + s B A in a plain model, in place. Each weight is rounded once.

    Raise ValueError if the adapter does not fit the model, or if a merged weight is not finite.
    """
    adapter = fit_adapter(adapter, model)
    for name, layer in _projections(model).items():
        if name not in adapter.factors:
            continue
        weight = layer.weight
        _merge(weight, adapter.factors[name], adapter.scale, out=weight)
        if not weight.isfinite().all():
            raise ValueError(f"{adapter.folder}: merging it into {name} gives non-finite weights")


def _merge(W: Tensor, factors: LoraFactors, scale: float, *, out: Tensor) -> None:
    """Write W + s B A to `out`, (out, in).

    The sum is computed in fp32, or in fp64 if W is fp64, and rounded once.
    """
    dtype = torch.promote_types(W.dtype, torch.float32)
    total = W.to(dtype, copy=True)
    A = factors.A.to(total.device, dtype)
    B = factors.B.to(total.device, dtype)
    out.copy_(total.addmm_(B, A, alpha=scale))


def _adapted_layers(model: Decoder) -> dict[str, Any]:
    """Return PEFT's layers, by the names of the projections that they wrap."""
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            layers[name] = module
    return layers


def _projections(model: Decoder) -> dict[str, Any]:
    """Return the projections, or PEFT's layers that wrap them, by name."""
    projections = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            projections[name] = module
    return projections


def _factors(layer: Any) -> LoraFactors:
    A = layer.lora_A[NAME].weight
    B = layer.lora_B[NAME].weight
    return LoraFactors(A, B)


def fit_adapter(adapter: Adapter, model: Decoder) -> Adapter:
    """Return the adapter with factors for the projections of the model.

    Raise ValueError unless it has tensors for exactly the projections that it names.
    """
    projections = _projections(model)
    stored_name = str
    if model.shape.fused_storage:
        stored_name = joined_name
        rows = {name: layer.out_features for name, layer in projections.items()}
        adapter = split_adapter(adapter, rows)
    for name, factors in adapter.factors.items():
        if name not in projections:
            raise ValueError(f"{adapter.folder}: it adapts {name}, which the model lacks")
        layer = projections[name]
        needed = (layer.out_features, layer.in_features)
        given = (len(factors.B), factors.A.shape[1])
        if given != needed:
            raise ValueError(
                f"{adapter.folder}: B A of {name} has shape {given}, the model needs {needed}"
            )
    named = {name for name in projections if adapter.targets_projection(stored_name(name))}
    for name in sorted(named ^ adapter.factors.keys()):
        states, holds = ("names", "lacks") if name in named else ("does not name", "has")
        raise ValueError(
            f"{adapter.folder}: target_modules {adapter.targets!r} {states} {name}, of which "
            f"{TENSORS} {holds} the tensors"
        )
    if not named:
        raise ValueError(f"{adapter.folder}: no projection is one of {adapter.targets!r}")
    return adapter
