"""--push-to-hub with its model card, and the command merge."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from expo_fast import merge, train
from expo_fast.config import Train
from expo_fast.modeling.lora import attach, merged_copy, save_adapter
from expo_fast.reporting.model_card import CardFacts, model_card
from expo_fast.weights import load_model, save_model
from jobs import write_rows
from judges import max_error
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Return the options of a run of one step, in a folder with a tiny model and data."""
    save_model(tiny_model(num_hidden_layers=1), tiny_tokenizer(), tmp_path / "model")
    rows = [
        {"question": f"{n} + 1?", "answer": f"{n + 1}", "solution": f"{n} + 1 = {n + 1}."}
        for n in range(4)
    ]
    write_rows(tmp_path / "data.jsonl", rows)
    return {
        "model": str(tmp_path / "model"),
        "train_data": str(tmp_path / "data.jsonl"),
        "eval_data": str(tmp_path / "data.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "method": "expert-grpo",
        "steps": 1,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "eval_samples": 1,
        "dtype": "float32",
        "report_to": "none",
    }


def test_a_folder_gets_the_model_and_a_card(job: dict[str, Any], tmp_path: Path):
    train.run(Train(**job, push_to_hub=str(tmp_path / "pushed")))
    pushed = tmp_path / "pushed"
    names = {file.name for file in pushed.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {"MANIFEST.json", "trainer_state"} & names
    AutoModelForCausalLM.from_pretrained(pushed)
    card = (pushed / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "- expert-grpo" in card
    assert "A model trained from `model`, after step 1 of `expert-grpo`" in card
    assert str(tmp_path) not in card
    assert "| 0 | 4 | 0.000 " in card
    assert "| training data | `" in card
    assert 'train_data = "data.jsonl"' in card
    assert "output_dir" not in card
    front = card.split("---")[1]
    assert "base_model" not in front  # a path of this machine means nothing on the hub
    assert huggingface_hub.ModelCard(card).data.to_dict()["library_name"] == "transformers"


def test_a_card_has_the_verdicts_on_explanations_and_no_path_of_the_machine(tmp_path: Path):
    (tmp_path / "config.toml").write_text('method = "expo-grpo"\nmodel = "/models/m"\n')
    steps = [
        {"step": step, "exp/lift": lift, "exp/nll_over_expert": -0.5, "time/loss": 1.0}
        for step, lift in ((1, 2.0), (2, -1.0), (3, 3.0))
    ]
    lines = [json.dumps(row) + "\n" for row in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    facts = CardFacts("mine", base="org/base", is_adapter=True, step=3, hashes={"data": "0f"})
    card = model_card(tmp_path, facts)
    assert "library_name: peft\npipeline_tag: text-generation\nbase_model: org/base\n" in card
    assert "A LoRA adapter of `org/base`, after step 3 of `expo-grpo`" in card
    assert "- In-distribution: holds in 3 of 3 measured steps" in card
    assert "- Learning signal (the files do not say whether the answer was masked): holds" in card
    assert "| exp/lift | 3 |" in card
    assert 'model = "m"' in card
    assert "/home" not in card
    assert "time/" not in card
    assert "Accuracy" not in card


def test_the_hub_gets_one_commit_and_a_failure_ends_no_run(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    commits: list[Any] = []

    class Api:
        def whoami(self) -> dict[str, str]:
            return {"name": "org"}

        def create_repo(self, name: str, *, exist_ok: bool) -> None:
            assert (name, exist_ok) == ("org/name", True)

        def create_commit(self, name: str, operations: list[Any], commit_message: str) -> Any:
            if commits:
                raise ConnectionError("the network is down")
            commits.append([operation.path_in_repo for operation in operations])
            return SimpleNamespace(repo_url=f"https://hub/{name}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    train.run(Train(**job, push_to_hub="org/name", lora_rank=2, eval_every=0))
    (names,) = commits
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(names)
    assert "uploaded step-1: https://hub/org/name" in capsys.readouterr().out
    train.run(Train(**job, push_to_hub="org/name", lora_rank=2, eval_every=0))
    assert "was not uploaded to org/name: the network is down" in capsys.readouterr().out


def test_an_upload_that_cannot_work_is_refused_before_the_run(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    def refuse(self: object) -> None:
        raise OSError("no token\nmore")

    monkeypatch.setattr(huggingface_hub.HfApi, "whoami", refuse)
    with pytest.raises(ValueError, match=r"accepts no upload \(no token\): run `hf auth login`"):
        train.run(Train(**job, push_to_hub="org/name"))
    assert not Path(job["output_dir"]).exists()
    with pytest.raises(ValueError, match="push_to_hub='name': need ORG/NAME, or a folder"):
        Train(**job, push_to_hub="name")
    with pytest.raises(ValueError, match="need checkpoint_every above 0"):
        Train(**job, push_to_hub="org/name", checkpoint_every=0)


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_merge_writes_the_model_that_the_adapter_makes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    save_model(tiny_model(kind), tiny_tokenizer(), tmp_path / "base")
    model = tiny_model(kind)
    attach(model, rank=3, alpha=6, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(model, None, tmp_path / "adapter", str(tmp_path / "base"))
    merge.main([str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), "--dtype", "float32"])
    assert f"merged {tmp_path / 'adapter'}: {tmp_path / 'out'}" in capsys.readouterr().out
    merged, tokenizer = load_model(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert tokenizer is not None
    expected = dict(merged_copy(model).model.named_parameters())
    for name, parameter in merged.named_parameters():
        assert max_error(parameter, expected[name]) < 1e-6
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_merge_takes_a_run_and_refuses_what_is_no_adapter(job: dict[str, Any], tmp_path: Path):
    train.run(Train(**job, lora_rank=2, eval_every=0))
    output = tmp_path / "merged"
    merge.main([job["output_dir"], "--output", str(output)])
    stored = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="merged' exists: name a new or an empty folder"):
        merge.main([job["output_dir"], "--output", str(output)])
    with pytest.raises(ValueError, match="model holds no LoRA adapter"):
        merge.main([job["model"], "--output", str(tmp_path / "other")])
