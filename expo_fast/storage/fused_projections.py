"""Projections that files of some architectures store joined: those of Phi-3.

`qkv_proj` holds the rows of q_proj, k_proj and v_proj, and `gate_up_proj` those of gate_proj and
up_proj. The decoder has a parameter for each, as in all other architectures: projections are split
when a file is read, and joined when it is written.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from expo_fast.storage.hf_files import StoredTensor

PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def split_projections(
    tensors: Iterable[StoredTensor], shapes: Mapping[str, torch.Size]
) -> Iterator[StoredTensor]:
    """Yield the tensors, with each joined projection as its parts. The parts are views.

    shapes: of the model's parameters, by name.
    Raise ValueError if a joined projection has another number of rows than its parts.
    """
    for stored in tensors:
        module, _, kind = stored.key.rpartition(".")
        keys = [f"{part}.{kind}" for part in parts_of(module)]
        if not keys or not all(key in shapes for key in keys):
            yield stored
            continue
        rows = [shapes[key][0] for key in keys]
        found = stored.tensor.shape
        if not found or found[0] != sum(rows):
            raise ValueError(
                f"{stored.file}: {stored.key} has shape {tuple(found)}, "
                f"the config needs {sum(rows)} rows"
            )
        for key, part in zip(keys, stored.tensor.split(rows), strict=True):
            yield StoredTensor(key, part, stored.file)


def join_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by name, with the parts of each joined projection as one tensor."""
    by_key: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        by_key.setdefault(f"{joined_name(module)}.{kind}", []).append(tensor)
    joined = {}
    for key, parts in by_key.items():
        joined[key] = parts[0] if len(parts) == 1 else torch.cat([p.detach() for p in parts])
    return joined


def parts_of(module: str) -> list[str]:
    """Return the names of the parts of a joined projection; [] for any other module."""
    path, dot, name = module.rpartition(".")
    return [f"{path}{dot}{part}" for part in PARTS.get(name, ())]


def joined_name(module: str) -> str:
    """Return the name of the joined projection that a projection is a part of, or `module`."""
    path, dot, name = module.rpartition(".")
    for joined, parts in PARTS.items():
        if name in parts:
            return f"{path}{dot}{joined}"
    return module
