"""The files of a Hugging Face model folder: config, tensors and tokenizer. Never a pickle.

What is damaged, or none of ours, is refused in one sentence that names the file.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from expo_fast.storage.files import reading

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PT = {"format": "pt"}  # transformers refuses a file that does not say so
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


def read_config(folder: Path, check: Callable[[dict[str, Any]], None]) -> Any:
    """Return the transformers config of a model folder.

    check: raises ValueError for values of config.json that the caller does not support. It is
    called before transformers, which may not know the architecture either.
    """
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")
    values = read_json(file)
    with reading(file):
        check(values)
        if "quantization_config" in values:
            raise ValueError("quantized weights are not supported, load the original model")
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def read_generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.exists():
        return None
    read_json(file)
    with reading(file):
        return GenerationConfig.from_pretrained(folder)


def read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are the former
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, need a JSON object")
    return values


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor, Path]]:
    """(key, tensor on the CPU, its file), views of the mapped files, shard by shard."""
    for file in _tensor_files(folder):
        yield from tensors_of(file)


def tensors_of(file: Path) -> Iterator[tuple[str, Tensor, Path]]:
    """What `read_tensors` gives, of one .safetensors file."""
    from safetensors import safe_open

    file.open("rb").close()  # safetensors calls a file that it may not read absent
    with reading(f"{file} is damaged or cut short"), safe_open(file, framework="pt") as shard:
        for key in shard.keys():  # noqa: SIM118, no dict
            yield key, shard.get_tensor(key), file


def _tensor_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        pickles = next(folder.glob("*.bin"), None)
        because = f"{pickles.name} is a pickle, which may run code: convert it" if pickles else ""
        raise FileNotFoundError(
            f"{folder} has no {SINGLE} and no {INDEX}" + (f" ({because})" if because else "")
        )
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:  # the name, not what it resolves to: the hub's cache is made of links
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} points to {name!r}, need a .safetensors file beside it")
        if not (folder / name).exists():
            raise FileNotFoundError(f"{index} points to {name}, which is not there")
    return [folder / name for name in names]


def read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    present = [n for n in (*TOKENIZER_FILES, *TOKENIZER_EXTRAS) if (folder / n).exists()]
    if not set(TOKENIZER_FILES).intersection(present):
        return None
    for name in present:
        if name.endswith(".json"):
            read_json(folder / name)
    # transformers 5 rebuilds some classes from the vocabulary alone and so loses, for one, the
    # Digits step of SmolLM2's tokenizer.json; this class takes that file as it is.
    kind = PreTrainedTokenizerFast if "tokenizer.json" in present else AutoTokenizer
    with reading(f"{folder}: tokenizer ({', '.join(present)})"):
        return kind.from_pretrained(folder)


def write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    from safetensors.torch import save_file

    shards = _shards(tensors, shard_bytes)
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file({key: t.detach().contiguous() for key, t in shard.items()}, folder / name, PT)
    for stale in folder.glob("model*.safetensors"):  # a reader would prefer them
        if stale.name not in names:
            stale.unlink()
    if len(shards) == 1:
        (folder / INDEX).unlink(missing_ok=True)
        return
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: dict[str, Tensor], shard_bytes: int) -> list[dict[str, Tensor]]:
    """In order, each of at most shard_bytes unless a single tensor is larger."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
    return shards
