"""The table of architectures: what runs, what is refused, and one ExP-GRPO step of each."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expo_fast import train
from expo_fast.config import Train
from expo_fast.generate import Generator, Request
from expo_fast.inference import joined_weights
from expo_fast.modeling.architectures import ARCHITECTURES
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.shape import check_config
from expo_fast.weights import load_model, save_model
from jobs import write_rows
from tiny import LONG_CONTEXT, LONG_ROPE, VARIANTS, tiny_config, tiny_model, tiny_tokenizer

OF_LLAMA_S_LAYER = {
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "phi3",
    "ministral",
    "ministral3",
}
LATER = sorted(ARCHITECTURES.keys() - {"llama", "mistral", "qwen2", "qwen3", "smollm3"})


def test_each_architecture_has_a_tiny_variant():
    assert {model_type for model_type, _ in VARIANTS.values()} == ARCHITECTURES.keys()


def kind_of(model_type: str) -> str:
    """Return the first variant of an architecture."""
    return next(kind for kind, (name, _) in VARIANTS.items() if name == model_type)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("model_type", LATER)
def test_an_exp_grpo_step_trains(model_type: str, tmp_path: Path):
    many_ends = [1, *range(10, 100, 5)]  # a text that is cut is not accepted
    model = tiny_model(kind_of(model_type), eos_token_id=many_ends)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(2)]
    write_rows(tmp_path / "data.jsonl", rows)
    (tmp_path / "rewards.py").write_text(
        "def odd(completion_ids, **columns):\n"
        "    return [float(sum(ids) % 2) for ids in completion_ids]\n"
    )
    result = train.run(
        Train(
            model=str(tmp_path / "model"),
            train_data=str(tmp_path / "data.jsonl"),
            reward=f"{tmp_path / 'rewards.py'}:odd",
            output_dir=str(tmp_path / "run"),
            method="expo-grpo",
            exp_sft_coef=1.0,
            steps=1,
            prompts_per_step=2,
            num_generations=3,
            explanations_per_question=4,
            max_completion_length=20,
            learning_rate=1e-3,
            eval_every=0,
            dtype="float32",
            report_to=("none",),
        )
    )
    (row,) = result.metrics
    assert row["logp_gap/max"] < 1e-4  # of sampling and training, fp32
    assert row["grad_norm"] > 0
    assert row["update_norm"] > 0
    assert row["exp/accepted"] > 0


@pytest.mark.parametrize(
    ("model_type", "nearest"),
    [
        ("gemma2", "gemma3_text"),
        ("phimoe", "phi3"),
        ("olmoe", "olmo"),
        ("granitemoe", "granite"),
        ("mixtral", "mistral"),
        ("qwen3_moe", "qwen3"),
        ("llama4", "llama"),
    ],
)
def test_a_refusal_names_the_nearest_architecture(model_type: str, nearest: str):
    expected = f"model_type '{model_type}' is not supported, the nearest that runs is {nearest}"
    with pytest.raises(ValueError, match=expected):
        check_config({"model_type": model_type})


def test_a_refusal_names_the_text_model_of_a_larger_one_or_nothing():
    values = {"model_type": "gemma3n", "text_config": {"model_type": "gemma3_text"}}
    with pytest.raises(ValueError, match="only its text model, gemma3_text, saved without"):
        check_config(values)
    with pytest.raises(ValueError, match="'gpt2' is not supported: expo_fast runs llama, mistral"):
        check_config({"model_type": "gpt2"})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, which is"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3", {"hidden_activation": "relu"}, "hidden_activation 'relu' is not supported"),
        ("granite", {"attention_multiplier": -1.0}, "scales scores or logits by -1.0"),
    ],
)
def test_flags_that_the_decoder_lacks_are_refused(kind: str, changes: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        Decoder(tiny_config(kind, **changes))


@pytest.mark.parametrize("old_names", [False, True])
def test_the_text_model_of_a_model_with_images_is_read(old_names: bool, tmp_path: Path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    ours = tiny_model("gemma3")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = ours.config.to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    theirs = Gemma3ForConditionalGeneration(config)
    theirs.model.language_model.load_state_dict(ours.model.state_dict())
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    if not old_names:
        tensors = load_file(tmp_path / "model.safetensors")
        new = {re.sub("^(?!lm_head)(model.)?", "model.", key): x for key, x in tensors.items()}
        new = {key.replace("language_model.model", "language_model"): x for key, x in new.items()}
        save_file(new, tmp_path / "model.safetensors", {"format": "pt"})
    read, _ = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert read.config.model_type == "gemma3_text"
    expected = dict(ours.named_parameters())
    assert expected.keys() == dict(read.named_parameters()).keys()
    assert all(torch.equal(p, expected[name]) for name, p in read.named_parameters())
    save_model(read, None, tmp_path / "text")
    again, _ = load_model(tmp_path / "text", dtype=torch.float32, device="cpu")
    assert again.shape == ours.shape


def test_longrope_ends_where_its_frequencies_change():
    model = tiny_model("phi3-longrope")
    assert model.shape.context == LONG_CONTEXT["original_max_position_embeddings"] == 128
    assert tiny_model("phi3").shape.context == 256
    with pytest.raises(ValueError, match="context holds 128"):
        Generator(model).sample([Request((4,) * 100, 29)])
    wrong = LONG_ROPE | {"short_factor": [1.0, 0.0, 1.5]}
    with pytest.raises(ValueError, match="do not give 3 finite frequencies"):
        tiny_model("phi3-longrope", rope_parameters=wrong)


def test_the_fused_decode_step_runs_layers_like_those_of_llama():
    fused: set[Any] = set()
    for kind, (model_type, _) in VARIANTS.items():
        shape = tiny_model(kind).shape
        if joined_weights.supports(shape):
            fused.add(model_type)
            assert shape.rotary_dim == shape.head_dim, kind
    assert fused == OF_LLAMA_S_LAYER
