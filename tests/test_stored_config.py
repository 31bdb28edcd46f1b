"""Configs that are read without transformers: they equal those that transformers reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from expo_fast.modeling.rope import rope_frequencies
from expo_fast.modeling.shape import check_config, read_shape
from expo_fast.storage.hf_files import read_config
from expo_fast.storage.stored_config import StoredConfig, is_explicit
from expo_fast.weights import load_model, save_model
from tiny import VARIANTS, tiny_config, tiny_model, tiny_tokenizer

EXPLICIT = {"llama", "llama-tied", "llama-biases", "llama-wide-heads"}
# The style of older files: RoPE beside the other fields, no head_dim.
OLDER = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.04,
    "intermediate_size": 80,
    "max_position_embeddings": 256,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 100,
}


def written(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def check_equal(folder: Path, *, is_stored: bool) -> None:
    """Check that a folder's config has the shape and the RoPE of its transformers config."""
    ours = read_config(folder, check_config)
    theirs = AutoConfig.from_pretrained(folder)
    assert isinstance(ours, StoredConfig) == is_stored
    shape = read_shape(ours)
    assert shape == read_shape(theirs)
    rope = rope_frequencies(ours, shape)
    expected = rope_frequencies(theirs, shape)
    assert rope.inv_freq.equal(expected.inv_freq)
    assert rope.scales == expected.scales
    assert ours.eos_token_id == theirs.eos_token_id
    if is_stored:
        assert ours._complete is None, "the decoder needed a field that the file does not have"
        assert vars(ours.complete()) == vars(theirs)
        assert ours.complete().to_dict() == theirs.to_dict()


@pytest.mark.parametrize("kind", VARIANTS)
def test_each_architecture_has_the_numbers_of_transformers(kind: str, tmp_path: Path):
    tiny_config(kind).save_pretrained(tmp_path)
    check_equal(tmp_path, is_stored=kind in EXPLICIT)


@pytest.mark.parametrize("change", [{}, {"head_dim": 16}, {"eos_token_id": None}])
def test_an_older_file_has_the_numbers_of_transformers(change: dict[str, Any], tmp_path: Path):
    check_equal(written(tmp_path, OLDER | change), is_stored=True)


UNUSUAL = {
    "another RoPE": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "an unknown field": {"sliding_window": 4},
    "no number": {"rms_norm_eps": "1e-5"},
    "not finite": {"rms_norm_eps": float("nan")},
    "an integer for a float": {"rms_norm_eps": 1},
    "a float for an integer": {"hidden_size": 48.0},
    "no integer": {"num_hidden_layers": True},
    "a default": {"num_key_value_heads": None},
    "an end outside the vocabulary": {"eos_token_id": 100},
    "a pad outside the vocabulary": {"pad_token_id": -1},
    "heads of a broken size": {"num_attention_heads": 5},
    "remote code": {"auto_map": {"AutoConfig": "code.Config"}},
    "quantized": {"quantization_config": {}},
    "another architecture": {"model_type": "qwen2"},
}


@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_unusual_is_left_to_transformers(what: str):
    assert is_explicit(OLDER)
    assert not is_explicit(OLDER | UNUSUAL[what])


@pytest.mark.parametrize("name", ["eos_token_id", "attention_bias", "rope_theta", "vocab_size"])
def test_a_missing_field_is_left_to_transformers(name: str):
    assert not is_explicit({key: value for key, value in OLDER.items() if key != name})


def test_a_change_is_kept_by_the_complete_config(tmp_path: Path):
    config = StoredConfig(written(tmp_path, OLDER), OLDER)
    config.eos_token_id = [7]
    assert config._complete is None
    (tmp_path / "config.json").unlink()  # the folder may be gone when the model is saved
    assert config.complete().eos_token_id == [7]
    config.eos_token_id = [8]
    assert config.complete().eos_token_id == [8]
    assert config.initializer_range == 0.04
    assert OLDER["eos_token_id"] == [2, 3]


def test_a_loaded_model_is_saved_with_the_same_config(tmp_path: Path):
    save_model(tiny_model("llama-tied"), tiny_tokenizer(), tmp_path / "first")
    model, tokenizer = load_model(tmp_path / "first", dtype=torch.float32)
    assert isinstance(model.stored_config, StoredConfig)
    assert model.stored_config._complete is None
    save_model(model, tokenizer, tmp_path / "second")
    first = (tmp_path / "first" / "config.json").read_text()
    assert (tmp_path / "second" / "config.json").read_text() == first
    assert model.config.model_type == "llama"
