"""The exchange of Python values between ranks, most often by one collective.

`torch.distributed.all_gather_object` needs two: for the sizes and for the values.
"""

import pickle
from typing import Any

import torch
from torch import Tensor

FIRST_BYTES = 4096  # of the first collective; longer values need a second one
LENGTH_BYTES = 8


def gather_values(value: Any, size: int, group: Any) -> list[Any]:
    """Return the values of all ranks, in the order of the ranks.

    group: a process group of `size` ranks on the CPU. Raise RuntimeError if a rank ended or does
    not answer in time.
    """
    data = pickle.dumps(value)
    message = len(data).to_bytes(LENGTH_BYTES, "little") + data
    first = gather_bytes(message[:FIRST_BYTES], FIRST_BYTES, size, group)
    lengths = [int.from_bytes(part[:LENGTH_BYTES], "little") for part in first]
    n_rest = LENGTH_BYTES + max(lengths) - FIRST_BYTES
    rest = [b""] * size
    if n_rest > 0:
        rest = gather_bytes(message[FIRST_BYTES:], n_rest, size, group)
    values = []
    for part, more, length in zip(first, rest, lengths, strict=True):
        complete = part[LENGTH_BYTES:] + more
        values.append(pickle.loads(complete[:length]))
    return values


def gather_bytes(data: bytes, n_bytes: int, size: int, group: Any) -> list[bytes]:
    """Return the bytes of all ranks, padded to `n_bytes`."""
    own = torch.frombuffer(bytearray(data.ljust(n_bytes, b"\0")), dtype=torch.uint8)
    parts: list[Tensor] = [torch.empty_like(own) for _ in range(size)]
    group.allgather([parts], [own]).wait()
    return [part.numpy().tobytes() for part in parts]
