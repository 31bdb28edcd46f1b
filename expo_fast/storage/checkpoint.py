"""Checkpoints that are whole or absent, and the lock of their run directory.

    RUN/.lock                                     held by the one trainer of this run
    RUN/checkpoints/step-N/                       a Hugging Face model folder, and
    RUN/checkpoints/step-N/trainer_state/         state.safetensors, state.json: an exact resume
    RUN/checkpoints/step-N/MANIFEST.json          bytes and sha256 of every other file

A checkpoint is written as `.tmp-step-N-PID`, made durable file by file, and renamed: step-N never
holds half of anything. The manifest is there for what happens later: safetensors loads a flipped
bit without a word. No pickle, so that loading a checkpoint runs no code of its author.
"""

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

MANIFEST = "MANIFEST.json"


def save(
    run_dir: Path,
    step: int,
    write_model: Callable[[Path], None],  # writes the Hugging Face files into a folder
    tensors: dict[str, Tensor],
    values: dict[str, Any],  # JSON: tuples come back as lists, keys as strings
    *,
    keep: int,  # newest checkpoints that stay
) -> Path:
    """Write RUN/checkpoints/step-N durably, then remove all but the `keep` newest.

    A sound step-N is kept as it is; a damaged one is set aside. Raises OSError, with older
    checkpoints untouched and nothing half-written, where the disk is full or fails.
    The caller holds `run_lock`.
    """
    assert keep >= 1, keep
    folder = run_dir / "checkpoints"
    final = folder / f"step-{step}"
    if final.exists():
        reason = fault(final)
        if reason is None:
            return final
        _set_aside(final, reason)
    aside = folder / f".tmp-step-{step}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        _check_space(folder, tensors)
        aside.mkdir()
        write_model(aside)
        _write_state(aside / "trainer_state", tensors, values)
        _write_manifest(aside, step)
        _sync_tree(aside)
        aside.rename(final)
        _sync(folder)
        _sync(run_dir)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if _is_disk_error(error):
            raise OSError(
                f"checkpoint {final} could not be written ({error}); "
                "make room or repair the disk, then resume: older checkpoints are untouched"
            ) from error
        raise
    _prune(folder, keep, fresh=final)
    return final


def newest(run_dir: Path) -> Path | None:
    """The checkpoint of the highest step that is whole to the bit, or None.

    Each damaged one that is passed over is named in a warning, with what is wrong with it.
    """
    for path in reversed(_checkpoints(run_dir / "checkpoints")):
        reason = fault(path)
        if reason is None:
            return path
        warnings.warn(f"checkpoint {path} is passed over: {reason}", stacklevel=2)
    return None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and values that `save` was given.

    Raises FileNotFoundError where there is no such folder, ValueError where a file of it, the
    model's included, is not what was saved.
    """
    from safetensors.torch import load_file

    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    reason = fault(path)
    if reason is not None:
        raise ValueError(f"checkpoint {path} is damaged: {reason}; resume from another one")
    state = path / "trainer_state"
    return load_file(state / "state.safetensors"), json.loads((state / "state.json").read_text())


def fault(path: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, None where it is whole. `contents=False`: sizes only."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files = {name: (row["bytes"], row["sha256"]) for name, row in manifest["files"].items()}
        if path.name != f"step-{manifest['step']}":
            return f"{MANIFEST} is that of step {manifest['step']}"
        for name, (size, sha256) in files.items():
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes, not {size}"
            if contents and _sha256(path / name) != sha256:
                return f"{name} has another sha256 than when it was saved"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except OSError as error:
        return f"it cannot be read ({error})"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable ({error})"
    return None


def set_aside_after(run_dir: Path, step: int) -> None:
    """Rename checkpoints of steps beyond `step`: a run resumed there takes another course."""
    for path in _checkpoints(run_dir / "checkpoints"):
        if _step_of(path) > step:
            _set_aside(path, f"the run was resumed at step {step}")


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold a run directory, made where missing, for this process; its death frees it.

    Raises OSError naming the process that holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise OSError(
                f"{run_dir} is in use by process {file.read().strip() or 'unknown'}; "
                "wait for it to end, or choose another output directory"
            ) from error
        # a forked child shares the lock: it would outlive a killed trainer by its workers
        os.register_at_fork(after_in_child=file.close)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _checkpoints(folder: Path) -> list[Path]:  # by rising step
    found = [p for p in folder.glob("step-*") if p.name[5:].isdecimal() and p.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _set_aside(path: Path, reason: str) -> None:
    bad = next(p for k in range(1000) if not (p := path.with_name(f"{path.name}.bad-{k}")).exists())
    path.rename(bad)
    warnings.warn(f"checkpoint {path} is now {bad.name}: {reason}", stacklevel=3)


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(".tmp-step-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            shutil.rmtree(path)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _check_space(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse before the first byte. The model's files add half of the moments' size at most."""
    needed = int(1.6 * sum(t.nbytes for t in tensors.values()))
    if earlier := _checkpoints(folder):
        files = (p for p in earlier[-1].rglob("*") if p.is_file())
        needed = max(needed, int(1.1 * sum(p.stat().st_size for p in files)))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{free / 1e9:.2f} GB are free, about {needed / 1e9:.2f} GB are needed")


def _write_state(folder: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(
        {name: t.detach().contiguous() for name, t in tensors.items()}, folder / "state.safetensors"
    )
    (folder / "state.json").write_text(json.dumps(values))


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": _sha256(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    text = json.dumps({"step": step, "files": files}, separators=(",", ":"))
    (folder / MANIFEST).write_text(text)


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
    from safetensors import SafetensorError  # how it reports a full disk

    return isinstance(error, OSError) or (
        isinstance(error, SafetensorError) and "os error" in str(error)
    )


def _prune(folder: Path, keep: int, *, fresh: Path) -> None:
    whole = [p for p in _checkpoints(folder) if fault(p, contents=False) is None]
    for path in whole[:-keep]:
        if path == fresh:
            continue
        doomed = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            path.rename(doomed)  # so that a kill amid the removal leaves no half checkpoint
            shutil.rmtree(doomed)
        except OSError as error:
            warnings.warn(f"old checkpoint {path} could not be removed ({error})", stacklevel=3)
