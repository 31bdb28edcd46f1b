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
        keys = part_keys(stored.key)
        if keys is None or not all(key in shapes for key in keys):
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
        by_key.setdefault(joined_key(key), []).append(tensor)
    return {
        key: parts[0] if len(parts) == 1 else torch.cat([part.detach() for part in parts])
        for key, parts in by_key.items()
    }


def part_keys(key: str) -> list[str] | None:
    """Return the names of the parts of a joined projection; None for any other tensor."""
    module, _, kind = key.rpartition(".")
    path, _, name = module.rpartition(".")
    if name not in PARTS:
        return None
    return [f"{path}.{part}.{kind}" for part in PARTS[name]]


def joined_key(key: str) -> str:
    """Return the name under which files hold a parameter: that of a joined projection, or key."""
    module, _, kind = key.rpartition(".")
    path, _, name = module.rpartition(".")
    for joined, parts in PARTS.items():
        if name in parts:
            return f"{path}.{joined}.{kind}"
    return key
