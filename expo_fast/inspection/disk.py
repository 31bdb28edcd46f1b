"""Estimate the disk space of a run's checkpoints before it starts."""

import shutil
from collections.abc import Iterator

from torch import Tensor

from expo_fast.algorithms.trainer import Trainer
from expo_fast.inspection.memory import FP32_BYTES, MOMENTS
from expo_fast.storage.files import existing_folder, in_bytes


def checkpoint_bytes(trainer: Trainer) -> int:
    """Return the bytes of the tensors of one checkpoint.

    It holds the trained weights (without adapters: all of the model), the fp32 masters of bf16
    weights, and the moments.
    """
    parameters = list(trainer.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    saved = trained if trainer.config.lora_rank else parameters
    total = 0
    for parameter in saved:
        total += itemsize(trainer, parameter) * parameter.numel()
    for parameter in trained:
        n_states = MOMENTS + (itemsize(trainer, parameter) < FP32_BYTES)
        total += n_states * FP32_BYTES * parameter.numel()
    return total


def itemsize(trainer: Trainer, parameter: Tensor) -> int:
    """Return the bytes of an element that is saved. Sharded weights are fp32 in memory."""
    if parameter.requires_grad and trainer.layout.rounded_to is not None:
        return trainer.layout.rounded_to.itemsize
    return parameter.element_size()


def disk_lines(trainer: Trainer) -> Iterator[str]:
    """Yield the disk space that a run needs and, if it is too much, advice."""
    config = trainer.config
    if config.checkpoint_every == 0:
        yield "disk: no checkpoint is saved"
        return
    each = checkpoint_bytes(trainer)
    # A checkpoint is complete before an older one is removed.
    count = config.keep_checkpoints + config.keep_best + 1
    needed = count * each
    free = shutil.disk_usage(existing_folder(config.run_dir)).free
    yield (
        f"disk: {in_bytes(needed)} for {count} checkpoints of {in_bytes(each)} (newest, best, and "
        f"the one being written); {in_bytes(free)} are free"
    )
    if needed > free:
        yield (
            "this may not fit: lower --keep-checkpoints or --keep-best, or name another "
            "--output-dir"
        )
