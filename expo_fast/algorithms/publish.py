"""Upload of a trained model to the Hugging Face hub, with its model card."""

from expo_fast.algorithms.resume import identity
from expo_fast.algorithms.saved_model import base_of_adapters
from expo_fast.algorithms.trainer import Trainer
from expo_fast.reporting.model_card import CardFacts, model_card
from expo_fast.reporting.run_log import RunLog
from expo_fast.storage import checkpoint, hub
from expo_fast.weights import name_base


def push_model(trainer: Trainer, log: RunLog) -> None:
    """Upload the newest checkpoint of the run to `config.push_to_hub`.

    A failure is logged and ends no run: the checkpoint stays in the run directory.
    """
    config = trainer.config
    target = config.push_to_hub
    if target is None:
        return
    folder = checkpoint.newest(config.run_dir)
    if folder is None:
        log.note(f"nothing was uploaded to {target}: the run has no checkpoint")
        return
    is_adapter = config.lora_rank > 0
    base = base_of_adapters(config) if is_adapter else name_base(config.model)
    facts = CardFacts(
        title=hub.name_of(target),
        base=base.name,
        is_adapter=is_adapter,
        step=int(folder.name.removeprefix("step-")),
        hashes=identity(trainer),
    )
    try:
        where = hub.push(folder, model_card(config.run_dir, facts), target)
    except Exception as error:  # of the network; huggingface_hub raises many kinds
        log.note(f"warning: {folder} was not uploaded to {target}: {error}")
        return
    log.note(f"uploaded {folder.name}: {where}")
