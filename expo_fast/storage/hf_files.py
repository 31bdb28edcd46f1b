"""Read and write Hugging Face model folders: config, tensors and tokenizer. Pickles are refused.

An error is one sentence that names the file.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from expo_fast.storage.files import obey_umask, reading
from expo_fast.storage.stored_config import StoredConfig, complete_config, is_explicit
from expo_fast.storage.text_models import has_text_model, text_key
from expo_fast.storage.transformers4 import config_for_both, tokenizer_config_for_both

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}  # transformers refuses a file without it
SHARD_BYTES = 5_000_000_000
FAST_TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (FAST_TOKENIZER, "tokenizer_config.json", "tokenizer.model", "vocab.json")
TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


# Raises ValueError for values of config.json that the caller does not support.
CheckConfig = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, on the CPU."""

    key: str  # its Hugging Face name
    tensor: Tensor
    file: Path


@dataclass(frozen=True)
class StoredModel:
    """The content of a model folder or file."""

    config: Any  # a transformers config, or a `StoredConfig`
    tensors: Iterator[StoredTensor]  # reads each tensor when it is reached
    tokenizer: Any  # None if there is none
    generation_config: Any = None  # None if there is none


def read_model(folder: Path, check: CheckConfig) -> StoredModel:
    """Read a model folder. The tensors are views of the mapped files.

    check: called with the values of config.json, as in `read_config`.
    Raise FileNotFoundError or ValueError for missing or damaged files.
    """
    return StoredModel(
        config=read_config(folder, check),
        tensors=_tensors_of_text(folder),
        tokenizer=read_tokenizer(folder),
        generation_config=_read_generation_config(folder),
    )


def read_config(folder: Path, check: CheckConfig) -> Any:
    """Return the config of a model folder. Of a model with images, the text model's.

    It is a transformers config, or a `StoredConfig` that makes one when it is needed.

    check: called with the values of config.json. It runs before transformers, because transformers
    may not support the architecture.
    """
    file = folder / "config.json"
    if not file.exists():
        advice = ""
        if (folder / "checkpoints").is_dir():
            advice = "; it is a run directory: name one of its checkpoints"
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json{advice}")
    values = read_json(file)
    with reading(file):
        has_images = has_text_model(values)
        check(values["text_config"] if has_images else values)
        if "quantization_config" in values:
            raise ValueError("quantized weights are not supported, load the original model")
        if is_explicit(values):
            return StoredConfig(folder, values)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config.text_config if has_images else config


def _tensors_of_text(folder: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a model folder. Of a model with images, those of its text model."""
    has_images = has_text_model(read_json(folder / "config.json"))
    for stored in read_tensors(folder):
        key = text_key(stored.key) if has_images else stored.key
        if key is not None:
            yield StoredTensor(key, stored.tensor, stored.file)


def _read_generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.exists():
        return None
    read_json(file)
    with reading(file):
        return GenerationConfig.from_pretrained(folder)


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object of a file. Raise ValueError if it holds anything else."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, need a JSON object")
    return values


def read_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a model folder, shard by shard, as views of the mapped files."""
    for file in _tensor_files(folder):
        yield from read_tensor_file(file)


def read_tensor_file(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of one .safetensors file, as views of the mapped file."""
    from safetensors import safe_open

    file.open("rb").close()  # safetensors reports a file without read permission as missing
    with reading(f"{file} is damaged or cut short"), safe_open(file, framework="pt") as shard:
        for key in shard.keys():  # noqa: SIM118, no dict
            yield StoredTensor(key, shard.get_tensor(key), file)


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        message = f"{folder} has no {SINGLE} and no {INDEX}"
        pickled = next(folder.glob("*.bin"), None)
        if pickled:
            message += f" ({pickled.name} is a pickle, which may run code: convert it)"
        raise FileNotFoundError(message)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:  # check the name and not its target, because the hub's cache has links
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} points to {name!r}, need a .safetensors file in its folder")
        if not (folder / name).exists():
            raise FileNotFoundError(f"{index} points to {name}, which does not exist")
    return [folder / name for name in names]


def read_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, or None if it has none."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    candidates = (*TOKENIZER_FILES, *TOKENIZER_EXTRAS)
    present = [name for name in candidates if (folder / name).exists()]
    if not set(TOKENIZER_FILES).intersection(present):
        return None
    for name in present:
        if name.endswith(".json") and name != FAST_TOKENIZER:
            read_json(folder / name)
    # transformers 5 builds some tokenizer classes from the vocabulary alone. SmolLM2's tokenizer
    # then loses the Digits step of its tokenizer.json. PreTrainedTokenizerFast loads that file.
    is_fast = FAST_TOKENIZER in present
    kind = PreTrainedTokenizerFast if is_fast else AutoTokenizer
    try:
        with reading(f"{folder}: tokenizer ({', '.join(present)})"):
            return kind.from_pretrained(folder)
    except ValueError:
        if is_fast:  # read only now, because it has megabytes; raises for a damaged file
            read_json(folder / FAST_TOKENIZER)
        raise


def write_model(
    folder: Path,
    config: Any,
    tensors: dict[str, Tensor],  # by Hugging Face name, all of one dtype
    tokenizer: Any,  # None: write none
    *,
    generation_config: Any = None,  # None: write none
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load, of transformers 4 and 5.

    The tensors keep their dtype, which is written to the folder's config. `config` is not changed.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(complete_config(config))
    config.dtype = next(iter(tensors.values())).dtype
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    _write_json(folder / "config.json", config_for_both(json.loads(config.to_json_string())))
    if generation_config is not None:  # save_pretrained refuses values of some checkpoints
        generation_config.to_json_file(folder / "generation_config.json")
    _write_tensors(tensors, folder, shard_bytes)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write the files of a tokenizer, for `AutoTokenizer` of transformers 4 and 5."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").exists():  # not so for a tokenizer in Python
        _write_json(file, tokenizer_config_for_both(read_json(file), tokenizer))


def _write_json(file: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a .safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        return tensors.metadata() or {}


def write_tensor_file(
    tensors: dict[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one .safetensors file. `metadata` is added to what transformers needs."""
    from safetensors.torch import save_file

    contiguous = {}
    for key, tensor in tensors.items():
        contiguous[key] = tensor.detach().contiguous()
    save_file(contiguous, file, METADATA | dict(metadata or {}))
    obey_umask(file)


def _write_tensors(
    tensors: dict[str, Tensor],
    folder: Path,
    shard_bytes: int,
) -> None:
    shards = _shards(tensors, shard_bytes)
    names = _shard_names(len(shards))
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        write_tensor_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    # A loader may prefer the weight files of an earlier save to the new ones.
    for stale in folder.glob("model*.safetensors"):
        if stale.name not in names:
            stale.unlink()
    if len(shards) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        return
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(folder / INDEX, index)


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """Split the tensors, in order, into shards of at most shard_bytes or of one larger tensor."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    return shards
