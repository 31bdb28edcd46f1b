"""Checkpoints are complete or absent, even after kills, flipped bits and full disks."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from tiny import tiny_model, tiny_tokenizer

KEEP = 2


def state(step, elements=300):
    generator = torch.Generator().manual_seed(step)
    tensors = {
        "w.exp_avg": torch.randn(elements, generator=generator),
        "w.master": torch.randn(3, 5, generator=generator).T,  # not contiguous
        "rng": torch.randint(0, 256, (16,), dtype=torch.uint8, generator=generator),
        "count": torch.tensor(step),
    }
    return tensors, {"step": step, "lr": 0.1 / (step + 1), "rows": [1, None, "caf\u00e9"]}


def write_model(folder):
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    save_file({"weight": torch.arange(256.0)}, folder / "model.safetensors")


def save(run_dir, step, *, model=write_model, keep=KEEP, elements=300):
    return checkpoint.save(run_dir, step, model, *state(step, elements), keep=keep)


def assert_holds(path, step):
    assert checkpoint.checked(path) == path
    tensors = checkpoint.read_tensors(path)
    values = checkpoint.read_values(path)
    expected, expected_values = state(step)
    assert path.name == f"step-{step}"
    assert values == expected_values
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor)


def newest_without_warning(run_dir) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = checkpoint.newest(run_dir)
    assert path is not None
    return path


def names(run_dir):
    return {path.name for path in (run_dir / "checkpoints").iterdir()}


def forked(work):
    """Return the pid of a forked child that runs `work` and never returns into pytest."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_checkpoints_are_restored_to_the_bit_and_the_newest_are_kept(tmp_path):
    for step in (5, 9, 10, 100):
        assert_holds(save(tmp_path, step), step)
        assert_holds(newest_without_warning(tmp_path), step)
    assert names(tmp_path) == {"step-10", "step-100"}
    manifest = json.loads((tmp_path / "checkpoints/step-10/MANIFEST.json").read_text())
    assert manifest["files"].keys() == {
        "config.json",
        "model.safetensors",
        "trainer_state/state.json",
        "trainer_state/state.safetensors",
    }
    assert checkpoint.newest(tmp_path / "empty") is None


def test_a_resume_hashes_each_file_once(tmp_path, monkeypatch):
    path = save(tmp_path, 3)
    hashed = []
    sha256 = checkpoint._sha256

    def counting(file):
        hashed.append(file)
        return sha256(file)

    monkeypatch.setattr(checkpoint, "_sha256", counting)
    assert checkpoint.newest_to_resume(tmp_path) == path
    assert checkpoint.read_values(path) == state(3)[1]
    assert checkpoint.read_tensors(path).keys() == state(3)[0].keys()
    assert len(hashed) == len(set(hashed)) == 4
    assert checkpoint.newest_to_resume(tmp_path / "empty") is None


def edit_version(path, version) -> None:
    """Change the format version of a checkpoint, None to remove it, and its manifest."""
    file = path / "trainer_state/state.json"
    values = json.loads(file.read_text())
    assert values.pop("format_version") == 2
    if version is not None:
        values["format_version"] = version
    file.write_text(json.dumps(values))
    (path / "MANIFEST.json").unlink()
    checkpoint._write_manifest(path, int(path.name.removeprefix("step-")))


def test_a_checkpoint_of_version_1_is_loaded(tmp_path):
    path = save(tmp_path, 3)
    edit_version(path, None)
    assert_holds(path, 3)
    assert_holds(newest_without_warning(tmp_path), 3)


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_skipped(tmp_path):
    save(tmp_path, 2)
    path = save(tmp_path, 3)
    edit_version(path, 7)
    message = r"step-3 has format version 7, this expo_fast reads versions up to 2: [^\n]+$"
    assert checkpoint.checked(path) == checkpoint.newest_to_resume(tmp_path) == path
    with pytest.raises(ValueError, match=message):
        checkpoint.read_values(path)


def test_a_new_checkpoint_is_kept_despite_damaged_ones_of_later_steps(tmp_path):
    """Such a run starts again because all of its checkpoints are damaged."""
    for step in (10, 20):
        file = save(tmp_path, step) / "config.json"
        file.write_bytes(file.read_bytes().swapcase())
    with pytest.warns(UserWarning, match="skipped the damaged checkpoint"):
        assert checkpoint.newest(tmp_path) is None
    assert_holds(save(tmp_path, 5), 5)
    assert names(tmp_path) == {"step-5", "step-10", "step-20"}
    save(tmp_path, 6)
    assert names(tmp_path) == {"step-6", "step-10", "step-20"}


def test_an_undamaged_checkpoint_is_never_written_again(tmp_path):
    path = save(tmp_path, 3)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}

    def fail(folder):
        raise AssertionError("written again")

    assert save(tmp_path, 3, model=fail) == path
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside(tmp_path):
    (save(tmp_path, 3) / "config.json").unlink()
    with pytest.warns(UserWarning, match=r"step-3 is now step-3\.bad-0: .*config\.json is missing"):
        assert_holds(save(tmp_path, 3), 3)
    assert names(tmp_path) == {"step-3", "step-3.bad-0"}


@pytest.mark.slow
def test_a_kill_at_any_line_of_a_save_leaves_a_complete_checkpoint(tmp_path, monkeypatch):
    """After a SIGKILL at any line, the old or the new checkpoint is complete."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill loses no written page
    run_dir = tmp_path / "run"
    for step in (1, 2):
        save(run_dir, step)
    shutil.copytree(run_dir, tmp_path / "before")
    seen = set()
    k = 0
    while True:
        pid = forked(lambda k=k: (sys.settrace(killer(k)), save(run_dir, 3)))
        _, status = os.waitpid(pid, 0)
        path = newest_without_warning(run_dir)
        step = int(path.name.removeprefix("step-"))
        assert_holds(path, step)
        assert "step-2" in names(run_dir)
        seen.add(step)
        if not os.WIFSIGNALED(status):
            break
        if k % 4 == 0:  # the next save removes the files of the killed one
            save(run_dir, 4)
            assert names(run_dir) <= {"step-2", "step-3", "step-4"}
        shutil.rmtree(run_dir)
        shutil.copytree(tmp_path / "before", run_dir)
        k += 1
    assert k > 50
    assert seen == {2, 3}


def killer(k):
    """Return a trace function that kills its process at the k-th line of checkpoint.py."""
    reached = set()

    def trace(frame, event, _):
        if frame.f_code.co_filename != checkpoint.__file__:
            return None
        if event == "line":
            reached.add(frame.f_lineno)
            if len(reached) > k:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def test_a_kill_during_the_removal_of_an_old_checkpoint_damages_none(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)

    def die(folder, **_):
        next(Path(folder).rglob("*.json")).unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die():
        shutil.rmtree = die
        save(tmp_path, 3)

    _, status = os.waitpid(forked(save_and_die), 0)
    assert os.WIFSIGNALED(status)
    complete = {name for name in names(tmp_path) if name.startswith("step-")}
    assert complete == {"step-2", "step-3"}
    assert not [name for name in complete if checkpoint.fault(tmp_path / "checkpoints" / name)]


@pytest.mark.parametrize("trial", range(15))
def test_a_kill_at_a_random_time_leaves_the_newest_reported_checkpoint(tmp_path, trial):
    save(tmp_path, 1)
    done, report = os.pipe()

    def save_for_ever():
        for step in range(2, 10_000):
            save(tmp_path, step)
            os.write(report, step.to_bytes(2, "big"))

    pid = forked(save_for_ever)
    os.close(report)
    time.sleep(random.Random(trial).uniform(0.001, 0.1))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with open(done, "rb") as pipe:
        reported = pipe.read()
    path = newest_without_warning(tmp_path)
    step = int(path.name.removeprefix("step-"))
    assert_holds(path, step)
    assert step >= int.from_bytes(reported[-2:] or b"\x01", "big")
    save(tmp_path, step + 1)
    assert not [name for name in names(tmp_path) if name.startswith(".tmp")]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_the_files_of_a_checkpoint_obey_the_umask(tmp_path, mask):
    def write(folder):
        save_model(tiny_model(), tiny_tokenizer(), folder)

    before = os.umask(mask)
    try:
        path = save(tmp_path, 1, model=write)
    finally:
        os.umask(before)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~mask}


@pytest.mark.parametrize("missing", ["model.safetensors", "trainer_state/state.json"])
def test_a_manifest_that_lists_too_little_is_a_fault(tmp_path, missing):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    del manifest["files"][missing]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert checkpoint.fault(path) == f"MANIFEST.json does not list {missing}"
    (path / "MANIFEST.json").write_text(json.dumps({"step": 1, "files": {}}))
    assert "does not list" in (checkpoint.fault(path) or "")


def test_a_flipped_bit_in_any_file_is_found_and_the_older_checkpoint_is_used(tmp_path):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    files = sorted(path for path in new.rglob("*") if path.is_file())
    assert len(files) == 5
    for file in files:
        content = file.read_bytes()
        for bit in random.Random(0).sample(range(8 * len(content)), 40):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            with pytest.warns(UserWarning, match=r"skipped the damaged checkpoint .*step-2"):
                assert checkpoint.newest(tmp_path) == old
            with pytest.raises(ValueError, match=r"step-2 is damaged"):
                checkpoint.checked(new)
        file.write_bytes(content)
    assert_holds(newest_without_warning(tmp_path), 2)


def test_a_renamed_checkpoint_is_not_used(tmp_path):
    save(tmp_path, 2).rename(tmp_path / "checkpoints/step-3")
    with pytest.warns(UserWarning, match=r"MANIFEST\.json belongs to step 2"):
        assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 10)])
def test_missing_and_truncated_files_are_found(tmp_path, damage):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    for file in files:
        shutil.copytree(new, tmp_path / "copy")
        damage(new / file)
        with pytest.warns(UserWarning, match=file.name):
            assert checkpoint.newest(tmp_path) == old
        shutil.rmtree(new)
        (tmp_path / "copy").rename(new)


def test_a_full_disk_keeps_the_old_checkpoint_and_leaves_no_new_files(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # writes beyond it fail
    try:
        with pytest.raises(OSError, match=r"step-2 could not be written .*older checkpoints are"):
            save(tmp_path, 2, elements=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == {"step-1"}
    assert_holds(newest_without_warning(tmp_path), 1)


@pytest.mark.parametrize("k", range(9))  # 5 files, 2 folders and their 2 parents
def test_a_disk_error_at_any_sync_keeps_the_old_checkpoint(tmp_path, monkeypatch, k):
    save(tmp_path, 1)
    calls = iter(range(100))

    def fsync(descriptor):
        if next(calls) == k:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"Input/output error"):
        save(tmp_path, 2)
    assert "step-1" in names(tmp_path)
    assert_holds(newest_without_warning(tmp_path), 1 if k < 7 else 2)


def test_too_little_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)._replace(free=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def fail(folder):
        raise AssertionError("a byte was written")

    with pytest.raises(OSError, match=r"needs about \S+ kB; 2\.0 kB are free"):
        save(tmp_path, 2, model=fail)
    assert names(tmp_path) == {"step-1"}


def test_an_interrupt_during_a_save_leaves_no_files(tmp_path):
    def interrupt(folder):
        write_model(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 1, model=interrupt)
    assert names(tmp_path) == set()


def test_unfinished_folders_of_dead_processes_are_removed(tmp_path):
    dead = forked(lambda: None)
    os.waitpid(dead, 0)
    folder = tmp_path / "checkpoints"
    for pid in (dead, os.getppid()):
        (folder / f".tmp-step-7-{pid}").mkdir(parents=True)
    save(tmp_path, 8)
    assert names(tmp_path) == {"step-8"}  # a living process has the id of a dead one


def test_checkpoints_beyond_the_resumed_step_are_set_aside(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    with pytest.warns(UserWarning, match="the run was resumed at step 1"):
        checkpoint.set_aside_after(tmp_path, 1)
    assert names(tmp_path) == {"step-1", "step-2.bad-0", "step-3.bad-0"}
    assert_holds(newest_without_warning(tmp_path), 1)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"step-9 does not exist"):
        checkpoint.checked(tmp_path / "step-9")


def test_a_second_trainer_is_refused_with_the_process_id_of_the_first(tmp_path):
    held, ready = os.pipe()

    def hold():
        with checkpoint.run_lock(tmp_path / "run"):
            worker = forked(lambda: time.sleep(60))  # outlives its trainer
            os.write(ready, worker.to_bytes(4, "big"))
            time.sleep(60)

    pid = forked(hold)
    worker = int.from_bytes(os.read(held, 4), "big")
    with (
        pytest.raises(OSError, match=f"run is in use by process {pid}; wait for it"),
        checkpoint.run_lock(tmp_path / "run"),
    ):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with checkpoint.run_lock(
        tmp_path / "run"
    ):  # its death releases the lock, although a worker lives
        assert (tmp_path / "run/.lock").read_text() == f"{os.getpid()}\n"
    with checkpoint.run_lock(tmp_path / "run"):  # the end of the block does too
        os.kill(worker, signal.SIGKILL)
