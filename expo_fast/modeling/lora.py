"""LoRA (arXiv:2106.09685) through PEFT: a projection computes W x + s B A x, where s = alpha / r.

W (out, in) is frozen, A (r, in) starts random and B (out, r) at zero, so that the policy starts as
the base. A and B have the model's dtype: the Optimizer keeps fp32 masters of bf16 ones. PEFT wraps
the projections; folders in its layout are read here, so that loading one, which merges the adapter
into its base, needs no PEFT. Sampling runs on a twin of plain modules that holds W + s B A.
"""

import copy
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expo_fast.modeling.decoder import Decoder
from expo_fast.storage.files import reading
from expo_fast.storage.hf_files import INDEX, PT, SINGLE, read_json, tensors_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAME = "default"  # PEFT's name of the one adapter
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the module's own name

# Keys of adapter_config.json that are read here, and those that change nothing of what a trained
# adapter computes. Any other key, a newer PEFT's too, must be unset.
READ = {"base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules", "use_rslora"}
IDLE = {"auto_mapping", "ensure_weight_tying", "inference_mode", "lora_dropout", "megatron_core"}
IDLE |= {"layers_pattern", "peft_version", "qalora_group_size", "runtime_config", "task_type"}
IDLE |= {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}  # for the start alone
ALLOWED = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # the others change W as well
    "revision": ("main",),
}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as it lies on disk."""

    folder: Path
    base: str  # a folder, an id of the hub, or the default model's name
    rank: int
    scale: float  # of B A
    targets: str | list[str]  # as PEFT reads it: a regular expression, or ends of names
    pairs: dict[str, tuple[Tensor, Tensor]]  # projection's name -> A (r, in), B (out, r)


@dataclass(frozen=True)
class Twin:
    """See `sampling_twin`."""

    model: Decoder
    merged: tuple[tuple[Any, nn.Parameter], ...]  # (PEFT's layer, the twin's weight)

    @torch.no_grad()
    def refresh(self) -> None:
        """Merge anew, in place, after A and B have changed. Holds one projection in fp32."""
        for layer, weight in self.merged:
            _merge(layer.base_layer.weight, *_pair(layer), layer.scaling[NAME], out=weight)


def attach(model: Decoder, *, rank: int, alpha: float, seed: int) -> None:
    """Adapt all projections of all layers, in place, and freeze everything else.

    A is drawn from `seed` alone, in fp32 and then rounded, and no global random state moves.
    ValueError: a rank that is no integer from 1 to the smallest side of a projection, an alpha
    that is no positive number, a model that has adapters.
    """
    if is_attached(model):
        raise ValueError("the model has adapters already: load it anew to attach others")
    most = min(min(layer.weight.shape) for layer in _projections(model).values())
    if type(rank) is not int or not 1 <= rank <= most:
        raise ValueError(f"rank is {rank!r}, need an integer from 1 to {most}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}, need a positive number")
    from peft import LoraConfig, inject_adapter_in_model

    scale: Any = alpha  # PEFT says int, and takes both
    config = LoraConfig(
        r=rank, lora_alpha=scale, target_modules=[*PROJECTIONS], task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
        inject_adapter_in_model(config, model, NAME)


def is_attached(model: Decoder) -> bool:
    return bool(_layers(model))


@contextmanager
def switched_off(model: Decoder) -> Iterator[None]:
    """The model computes what its base computes, bit for bit, and trains nothing, until the end."""
    layers = [layer for layer in _layers(model).values() if not layer.disable_adapters]
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, before in trained:  # PEFT has made all of the adapters trainable
            parameter.requires_grad_(before)


def sampling_twin(model: Decoder) -> Twin:
    """A plain decoder that computes what the adapted model does: sampling's engines know no PEFT.

    It holds merged copies of the adapted weights, which `refresh` brings up to date, and the very
    parameters of `model` for all else. ValueError where the model has no adapters.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError("the model has no adapters: it is its own sampling twin")
    with torch.device("meta"):
        plain = Decoder(model.config)
    plain.requires_grad_(False)
    state = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters()}
    merged = [(layer, f"{name}.weight") for name, layer in layers.items()]
    for _, key in merged:
        state[key] = nn.Parameter(torch.empty_like(state[key]), requires_grad=False)
    plain.load_state_dict({key: state[key] for key in plain.state_dict()}, assign=True)
    plain.inv_freq, plain.generation_config = model.inv_freq, model.generation_config
    twin = Twin(plain, tuple((layer, plain.get_parameter(key)) for layer, key in merged))
    twin.refresh()
    return twin


def save_adapter(model: Decoder, tokenizer: Any, path: str | Path, base: str) -> None:
    """Write a folder that PEFT loads; base: where it will find the base model.

    The tensors keep their dtype; tokenizer may be None. ValueError where there are no adapters.
    """
    from safetensors.torch import save_file

    layers = _layers(model)
    if not layers:
        raise ValueError(f"{path}: the model has no adapters, save it with save_model")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    attached: Any = model.peft_config
    config = copy.copy(attached[NAME])
    config.base_model_name_or_path = base
    config.inference_mode = True  # as PEFT saves it
    config.target_modules = sorted(config.target_modules)  # a set's order changes with each process
    config.save_pretrained(str(path))
    tensors = {
        f"{PREFIX}{name}.lora_{side}.weight": weight.detach().contiguous()
        for name, layer in layers.items()
        for side, weight in zip("AB", _pair(layer), strict=True)
    }
    save_file(tensors, path / TENSORS, PT)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


@torch.no_grad()
def load_adapter(model: Decoder, path: str | Path) -> None:
    """Put saved tensors into the model's adapters, to the bit.

    ValueError or OSError, with nothing changed, where the folder is none of `read_adapter`, or is
    of another rank, scale, dtype or set of projections.
    """
    adapter, layers = read_adapter(Path(path)), _layers(model)
    _check_targets(adapter, model)
    if layers.keys() != adapter.pairs.keys():
        raise ValueError(
            f"{path} adapts {len(adapter.pairs)} projections, the model has adapters on "
            f"{len(layers)} of them"
        )
    for name, layer in layers.items():
        if adapter.rank != layer.r[NAME] or adapter.scale != layer.scaling[NAME]:
            raise ValueError(
                f"{path} has rank {adapter.rank} and scale {adapter.scale}, the model's adapters "
                f"have {layer.r[NAME]} and {layer.scaling[NAME]}"
            )
        for saved, ours in zip(adapter.pairs[name], _pair(layer), strict=True):
            if saved.dtype != ours.dtype:
                raise ValueError(f"{path}: {name} is {saved.dtype}, the model has {ours.dtype}")
    for name, layer in layers.items():
        for saved, ours in zip(adapter.pairs[name], _pair(layer), strict=True):
            ours.copy_(saved)


def holds_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    whole = (path / SINGLE).exists() or (path / INDEX).exists()
    return (path / CONFIG).exists() and not whole


def read_adapter(folder: Path) -> Adapter:
    """The LoRA adapter of a PEFT folder, its tensors on the CPU, as they are.

    ValueError or OSError, one sentence: damaged files, pickles, another kind of adapter, options
    that change what it computes in a way that is not known here, tensors that are no pairs.
    """
    file = folder / CONFIG
    if not file.exists():
        raise FileNotFoundError(f"{folder} is no adapter folder: it has no {CONFIG}")
    values = read_json(file)
    if values.get("peft_type") != "LORA":
        raise ValueError(
            f"{file}: peft_type {values.get('peft_type')!r} is not supported, need 'LORA'"
        )
    for key, value in values.items():
        if value and key not in READ | IDLE and value not in ALLOWED.get(key, ()):
            raise ValueError(f"{file}: {key} {value!r} is not supported, need plain LoRA")
    base: Any = values.get("base_model_name_or_path")
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: base_model_name_or_path is {base!r}, need a folder or a hub id")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{file}: r is {rank!r}, need a positive integer")
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise ValueError(f"{file}: lora_alpha is {alpha!r}, need a finite number")
    targets, pairs = _read_targets(file, values.get("target_modules")), _read_pairs(folder, rank)
    scale = alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)  # arXiv:2312.03732
    return Adapter(folder, base, rank, scale, targets, pairs)


@torch.no_grad()
def merge(model: Decoder, adapter: Adapter) -> None:
    """W <- W + s B A in a plain model, in place, each weight rounded once.

    ValueError where the adapter does not fit the model, or a merged weight is not finite.
    """
    _check_targets(adapter, model)
    for name, layer in _projections(model).items():
        if name in adapter.pairs:
            _merge(layer.weight, *adapter.pairs[name], adapter.scale, out=layer.weight)
            if not layer.weight.isfinite().all():
                raise ValueError(f"{adapter.folder}: merged into {name} it gives no finite weights")


def _merge(W: Tensor, A: Tensor, B: Tensor, scale: float, *, out: Tensor) -> None:
    """out (out, in) <- W + s B A in fp32, or fp64 where W is that, rounded once."""
    dtype = torch.promote_types(W.dtype, torch.float32)
    whole = W.to(dtype, copy=True)
    A, B = (x.to(whole.device, dtype) for x in (A, B))
    out.copy_(whole.addmm_(B, A, alpha=scale))


def _layers(model: Decoder) -> dict[str, Any]:
    """PEFT's layers, by the names of the projections that they wrap."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def _projections(model: Decoder) -> dict[str, Any]:
    """The projections themselves, or PEFT's layers around them, by name."""
    named = model.named_modules()
    return {name: m for name, m in named if name.rpartition(".")[2] in PROJECTIONS}


def _pair(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.lora_A[NAME].weight, layer.lora_B[NAME].weight


def _read_targets(file: Path, targets: Any) -> str | list[str]:
    if isinstance(targets, str) and targets:
        with reading(f"{file}: target_modules {targets!r}"):
            re.compile(targets)
        return targets
    if not isinstance(targets, list) or not targets:
        raise ValueError(f"{file}: target_modules is {targets!r}, need names of projections")
    for target in targets:
        if not isinstance(target, str) or target.rpartition(".")[2] not in PROJECTIONS:
            raise ValueError(
                f"{file}: target_modules has {target!r}, expo_fast adapts {', '.join(PROJECTIONS)}"
            )
    return targets


def _read_pairs(folder: Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    file = folder / TENSORS
    if not file.exists():
        pickle = " (a .bin is a pickle, which may run code: convert it)"
        because = pickle if next(folder.glob("*.bin"), None) else ""
        raise FileNotFoundError(f"{folder} has no {TENSORS}{because}")
    sides: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for key, tensor, _ in tensors_of(file):
        parts = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if parts is None or parts[1].rpartition(".")[2] not in PROJECTIONS:
            raise ValueError(f"{file}: unexpected tensor {key}, need LoRA's A and B of projections")
        if tensor.ndim != 2 or tensor.shape[parts[2] == "B"] != rank:
            raise ValueError(f"{file}: {key} has shape {tuple(tensor.shape)}, the rank is {rank}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{file}: {key} holds values that are no finite floating point")
        sides[parts[2]][parts[1]] = tensor.clone()  # the file may change under a mapped one
    for name in sides["A"].keys() ^ sides["B"].keys():
        raise ValueError(f"{file} has A or B of {name} alone")
    return {name: (A, sides["B"][name]) for name, A in sides["A"].items()}


def _check_targets(adapter: Adapter, model: Decoder) -> None:
    """ValueError unless the adapter has tensors for those projections that its config names."""
    projections = _projections(model)
    for name, (A, B) in adapter.pairs.items():
        if name not in projections:
            raise ValueError(f"{adapter.folder}: it adapts {name}, which the model lacks")
        layer, shape = projections[name], (len(B), A.shape[1])
        if shape != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{adapter.folder}: A and B of {name} make {shape}, the model needs "
                f"{(layer.out_features, layer.in_features)}"
            )
    named = {name for name in projections if _is_target(adapter.targets, name)}
    for name in sorted(named ^ adapter.pairs.keys()):
        states, holds = ("names", "lacks") if name in named else ("does not name", "has")
        raise ValueError(
            f"{adapter.folder}: target_modules {adapter.targets!r} {states} {name}, of which "
            f"{TENSORS} {holds} the tensors"
        )
    if not named:
        raise ValueError(f"{adapter.folder}: no projection is one of {adapter.targets!r}")


def _is_target(targets: str | list[str], name: str) -> bool:
    """PEFT's reading of target_modules."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)
