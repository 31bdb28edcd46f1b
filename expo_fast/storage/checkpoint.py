"""Atomic, verified checkpoints, and the lock of a run directory.

    RUN/.lock                                     locked by the only trainer of this run
    RUN/base/                                     the base of LoRA adapters, if PEFT needs a copy
    RUN/checkpoints/step-N/                       a Hugging Face model folder, or a LoRA adapter
    RUN/checkpoints/step-N/trainer_state/         state.safetensors, state.json for an exact resume;
                                                  with several ranks a file of each in place of
                                                  state.safetensors
    RUN/checkpoints/step-N/MANIFEST.json          bytes and sha256 of every other file

A checkpoint is written as `.tmp-step-N-PID`, synced file by file, and renamed. A folder `step-N`
therefore never holds a partial checkpoint. The manifest detects later damage, because safetensors
loads a flipped bit without an error. No file is a pickle, so loading a checkpoint runs no code from
it.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from expo_fast.storage.files import in_bytes, obey_umask, space_in_words
from expo_fast.storage.finite import first_non_finite
from expo_fast.storage.hf_files import read_tensor_file
from expo_fast.storage.state_shards import read_complete

MANIFEST = "MANIFEST.json"
STATE_FOLDER = "trainer_state"
STATE_TENSORS = "state.safetensors"
STATE_VALUES = "state.json"
FORMAT_VERSION = 2  # of trainer_state; version 1 did not record its version


def save(
    run_dir: Path,
    step: int,
    write_model: Callable[[Path], None],  # writes the model's files into a folder
    tensors: dict[str, Tensor],
    values: dict[str, Any],  # JSON values
    *,
    keep: int,  # number of newest checkpoints to keep
    shards: Path | None = None,  # folder with the files of `tensors`, if ranks wrote them
    keep_steps: Collection[int] = (),  # steps whose checkpoints are kept as well
) -> Path:
    """Write RUN/checkpoints/step-N durably, then remove all but the `keep` newest checkpoints.

    An existing undamaged step-N is not written again. A damaged one is renamed first. The caller
    must hold `run_lock`.

    Raise OSError if the disk is full or fails. Older checkpoints are then unchanged, and no
    partial checkpoint is left.
    """
    assert keep >= 1, keep
    folder = run_dir / "checkpoints"
    final = folder / f"step-{step}"
    if final.exists():
        reason = fault(final)
        if reason is None:
            return final
        _set_aside(final, reason)
    temporary = folder / f".tmp-step-{step}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        _check_space(folder, tensors)
        temporary.mkdir()
        write_model(temporary)
        _write_state(temporary / STATE_FOLDER, tensors, values, shards)
        _write_manifest(temporary, step)
        _sync_tree(temporary)
        temporary.rename(final)
        _sync(folder)
        _sync(run_dir)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_disk_error(error):
            raise OSError(
                f"checkpoint {final} could not be written ({error}; {space_in_words(run_dir)}): "
                "older checkpoints are unchanged"
            ) from error
        raise
    _prune(folder, keep, kept={final, *(folder / f"step-{each}" for each in keep_steps)})
    return final


def complete_steps(run_dir: Path) -> list[int]:
    """Return the steps of the checkpoints whose files have the right sizes, in order."""
    found = _checkpoints(run_dir / "checkpoints")
    return [_step_of(path) for path in found if fault(path, contents=False) is None]


def newest(run_dir: Path) -> Path | None:
    """Return the undamaged checkpoint with the highest step, or None if there is none.

    All its files are hashed. A warning names each damaged checkpoint that is skipped, and the
    damage.
    """
    return next(_undamaged(run_dir), None)


def newest_to_resume(run_dir: Path) -> Path | None:
    """Return the newest checkpoint that is undamaged and has finite values, None if there is none.

    A warning names each checkpoint that is skipped.
    """
    for path in _undamaged(run_dir):
        reason = _non_finite(path)
        if reason is None:
            return path
        warnings.warn(f"skipped the checkpoint {path}: {reason}", stacklevel=2)
    return None


def newest_values(run_dir: Path) -> dict[str, Any] | None:
    """Return the JSON values of the newest checkpoint whose file of them is undamaged.

    Other files are not read. Return None if there is no such checkpoint.
    """
    name = f"{STATE_FOLDER}/{STATE_VALUES}"
    for path in reversed(_checkpoints(run_dir / "checkpoints")):
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            if _sha256(path / name) == manifest["files"][name]["sha256"]:
                return json.loads((path / name).read_bytes())
        except (OSError, ValueError, LookupError, TypeError):  # damaged: look at the one before
            continue
    return None


def _undamaged(run_dir: Path) -> Iterator[Path]:
    """Yield the undamaged checkpoints, the newest first. Warn of each that is damaged."""
    for path in reversed(_checkpoints(run_dir / "checkpoints")):
        reason = fault(path)
        if reason is None:
            yield path
        else:
            warnings.warn(f"skipped the damaged checkpoint {path}: {reason}", stacklevel=3)


def checked(path: Path) -> Path:
    """Return the path of a checkpoint after hashing all its files.

    Raise FileNotFoundError if there is no such folder. Raise ValueError if any of its files has
    changed since it was saved, or if a value is not finite.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    check_kind(path)
    reason = fault(path)
    if reason is not None:
        raise ValueError(f"checkpoint {path} is damaged: {reason}; resume from another one")
    reason = _non_finite(path)
    if reason is not None:
        raise ValueError(f"checkpoint {path} cannot be resumed: {reason}; resume from another one")
    return path


def check_kind(folder: Path) -> None:
    """Raise ValueError for a folder that is no checkpoint."""
    if (folder / "checkpoints").is_dir():
        raise ValueError(f"{folder} is a run directory: name one of its checkpoints")
    if not (folder / MANIFEST).exists():
        raise ValueError(f"{folder} is no complete checkpoint: it has no {MANIFEST}")


def fault(path: Path, *, contents: bool = True) -> str | None:
    """Return the damage of a checkpoint in words, or None if it is complete and unchanged.

    contents: whether to hash the files. If False, only their sizes are compared.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if path.name != f"step-{manifest['step']}":
            return f"{MANIFEST} belongs to step {manifest['step']}"
        unlisted = _unlisted(path, manifest["files"])
        if unlisted is not None:
            return f"{MANIFEST} does not list {unlisted}"
        for name, record in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != record["bytes"]:
                return f"{name} has {size} bytes, not {record['bytes']}"
            if contents and _sha256(path / name) != record["sha256"]:
                return f"{name} has changed since it was saved (another sha256)"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({error})"
    return None


def _unlisted(path: Path, listed: Mapping[str, Any]) -> str | None:
    """Return a file that a resume reads and the manifest does not list, None if there is none."""
    values = f"{STATE_FOLDER}/{STATE_VALUES}"
    if values not in listed:
        return values
    for file in _files(path):
        name = file.relative_to(path).as_posix()
        is_read = file.suffix in (".safetensors", ".json", ".jinja", ".model")
        if is_read and name not in listed and name != MANIFEST:
            return name
    return None


def _non_finite(path: Path) -> str | None:
    """Return which weight or moment of an undamaged checkpoint is not finite, None if all are."""
    files = [*path.glob("*.safetensors"), *(path / STATE_FOLDER).glob("*.safetensors")]
    for file in sorted(files):
        if file.exists():
            named = ((stored.key, stored.tensor) for stored in read_tensor_file(file))
            name = first_non_finite(named)
            if name is not None:
                return f"{file.name} has values of {name} that are not finite"
    return None


def set_aside_after(run_dir: Path, step: int) -> None:
    """Rename the checkpoints of later steps, because a run resumed at `step` may differ."""
    for path in _checkpoints(run_dir / "checkpoints"):
        if _step_of(path) > step:
            _set_aside(path, f"the run was resumed at step {step}")


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Create a run directory if necessary and lock it for this process.

    The lock is released at the end of the block, or when the process dies. Raise OSError if another
    process holds the lock. The message has the id of that process.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise OSError(
                f"{run_dir} is in use by process {holder}; "
                "wait for it to end, or choose another output directory"
            ) from error
        # A forked child shares the lock. Without this, the workers of a killed trainer would keep
        # the run locked.
        os.register_at_fork(after_in_child=file.close)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in order of their steps."""
    found = []
    for path in folder.glob("step-*"):
        step = path.name.removeprefix("step-")
        if step.isdecimal() and path.is_dir():
            found.append(path)
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _set_aside(path: Path, reason: str) -> None:
    number = 0
    while (renamed := path.with_name(f"{path.name}.bad-{number}")).exists():
        number += 1
    path.rename(renamed)
    warnings.warn(f"checkpoint {path} is now {renamed.name}: {reason}", stacklevel=3)


def _remove_stale(folder: Path) -> None:
    """Remove unfinished checkpoints. They are of processes that died, because we hold the lock.

    Another process may have their process id now.
    """
    for path in folder.glob(".tmp-step-*"):
        shutil.rmtree(path)


def _check_space(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise OSError if the disk has too little free space. Call it before writing.

    The model's files take at most half the size of AdamW's moments.
    """
    state_bytes = sum(tensor.nbytes for tensor in tensors.values())
    needed = int(1.6 * state_bytes)
    earlier = _checkpoints(folder)
    if earlier:
        last = sum(path.stat().st_size for path in _files(earlier[-1]))
        needed = max(needed, int(1.1 * last))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no space left, it needs about {in_bytes(needed)}")


def _write_state(
    folder: Path,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    shards: Path | None,
) -> None:
    if shards is not None:
        shards.rename(folder)
    else:
        from safetensors.torch import save_file

        folder.mkdir()
        contiguous = {}
        for name, tensor in tensors.items():
            contiguous[name] = tensor.detach().contiguous()
        save_file(contiguous, folder / STATE_TENSORS)
        obey_umask(folder / STATE_TENSORS)
    assert "format_version" not in values
    versioned = {"format_version": FORMAT_VERSION, **values}
    (folder / STATE_VALUES).write_text(json.dumps(versioned))


def read_values(path: Path) -> dict[str, Any]:
    """Load the JSON values of a checkpoint. Raise ValueError if its format is newer."""
    folder = path / STATE_FOLDER
    values = json.loads((folder / STATE_VALUES).read_text())
    version = values.pop("format_version", 1)
    if version not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"checkpoint {path} has format version {version}, this expo_fast reads versions up to "
            f"{FORMAT_VERSION}: resume it with the expo_fast that wrote it, or a newer one"
        )
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load the complete tensors of a checkpoint, on the CPU."""
    folder = path / STATE_FOLDER
    if not (folder / STATE_TENSORS).exists():  # the ranks of a distributed run wrote their parts
        return read_complete(folder)
    from safetensors.torch import load_file

    return load_file(folder / STATE_TENSORS)


def _write_manifest(folder: Path, step: int) -> None:
    files = {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        size = path.stat().st_size
        files[name] = {"bytes": size, "sha256": _sha256(path)}
    manifest = {"step": step, "files": files}
    text = json.dumps(manifest, separators=(",", ":"))
    (folder / MANIFEST).write_text(text)


def _files(folder: Path) -> list[Path]:
    """Return all files of a folder and its subfolders, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Origin:
    """The checkpoint at which a run began that continues another run."""

    path: str  # absolute
    step: int
    manifest: str  # the SHA-256 of its manifest, which has the hashes of all files

    @classmethod
    def at(cls, path: Path, step: int) -> "Origin":
        return cls(str(path.resolve()), step, _sha256(path / MANIFEST))

    def is_at(self, path: Path) -> bool:
        """Return whether this is the checkpoint at `path`, or was, if that was deleted."""
        manifest = path / MANIFEST
        if manifest.exists():
            return self.manifest == _sha256(manifest)
        return self.path == str(path.resolve())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_error(error: BaseException) -> bool:
    """Return whether an error is that of a disk.

    safetensors raises SafetensorError for a full disk, and tokenizers a plain Exception. Both end
    with the text of Rust's error.
    """
    from safetensors import SafetensorError

    if isinstance(error, SafetensorError) or type(error) is Exception:
        return "os error" in str(error)
    return isinstance(error, OSError)


def _prune(folder: Path, keep: int, *, kept: Collection[Path]) -> None:
    """Remove all but the `keep` newest complete checkpoints and those in `kept`.

    The checkpoint that was just written is in `kept`, because it is not always among the newest. A
    run whose checkpoints all have flipped bits starts again, and its old checkpoints have later
    steps and the right sizes.
    """
    complete = []
    for path in _checkpoints(folder):
        if fault(path, contents=False) is None:
            complete.append(path)
    for path in complete[:-keep]:
        if path in kept:
            continue
        doomed = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            path.rename(doomed)  # a process killed during the removal leaves no partial checkpoint
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.warn(f"old checkpoint {path} could not be removed ({error})", stacklevel=3)
