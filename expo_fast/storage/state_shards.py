"""The optimizer's state of a distributed run, through torch.distributed.checkpoint (DCP).

Every rank writes its parts of the tensors to a safetensors file of its own, which contains the
places of the parts. DCP reads such files, and a file of complete tensors, into tensors with any
other division, so that a run resumes on another number of ranks. No file is a pickle.
"""

# pyright: reportPrivateImportUsage=false
# (torch documents these names but does not export them)

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from expo_fast.storage.files import reading


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write this rank's parts of sharded tensors (DTensor). All ranks have to call it.

    Raise OSError if the disk does not take those of one rank.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        with _quiet():
            dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:  # no Exception, and of all ranks
        rank, (cause, _) = next(iter(error.failures.items()))
        kind = OSError if isinstance(cause, OSError) else RuntimeError
        raise kind(f"rank {rank} could not write its state to {folder}: {cause}") from error


def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill sharded tensors (DTensor) from the files of a folder. All ranks have to call it.

    Raise ValueError if the files lack one of the tensors, or have another shape of it.
    """
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    with reading(folder), _quiet():
        dcp.load(dict(tensors), storage_reader=reader)


def read_complete(folder: Path) -> dict[str, Tensor]:
    """Return the complete tensors of a folder in which several ranks wrote their parts."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors: dict[str, Tensor] = {}
    with reading(folder), _quiet():
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            tensors[name] = torch.empty(stored.size, dtype=stored.properties.dtype)  # pyright: ignore
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the warnings and log lines of DCP, which say nothing to a user of a run."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
