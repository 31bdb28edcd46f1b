"""Saved folders give the same results in transformers 4, in transformers 5 and in expo_fast."""

import json
import os
import random
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import attach, save_adapter
from expo_fast.storage import default_model
from expo_fast.weights import load_model, save_model
from read_with_transformers4 import logits as logits_of
from read_with_transformers4 import tokenizer_results
from tiny import CHAT_TEMPLATE, VARIANTS, tiny_model, tiny_tokenizer

OLD = Path(sys.prefix) / "transformers-4.57"  # the Makefile puts it there
READER = Path(__file__).with_name("read_with_transformers4.py")

TOKENS = [(7 * i * i + 3 * i + 5) % 117 for i in range(48)]


def rope(rope_type: str, theta: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **scaling}}


LLAMA3 = rope(
    "llama3",
    500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rope(
    "yarn",
    100000.0,
    factor=8.0,
    original_max_position_embeddings=32,
    beta_fast=16,
    beta_slow=2,
    attention_factor=1.3,
)

# Models to test besides the variants of tiny.py. Their values are not defaults of any version.
UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-base": ("llama", rope("default", 100000.0)),
    "llama-tied-wide": ("llama-tied", rope("default", 100000.0) | {"head_dim": 16}),
    "llama-llama3": ("llama", LLAMA3),
    "llama-yarn": ("llama-wide-heads", YARN),
    "llama-linear": ("llama-biases", rope("linear", 100000.0, factor=4.0)),
    "mistral-base": ("mistral-window", rope("default", 1e6)),
    "mistral-yarn": ("mistral-window", YARN),
    "qwen2-base": ("qwen2", rope("default", 1e6)),
    "qwen2-yarn-windows": ("qwen2-windows", YARN),
    "qwen3-base": ("qwen3-biases", rope("default", 1e6) | {"head_dim": 16}),
    "qwen3-linear": ("qwen3", rope("linear", 1e6, factor=2.5)),
    "smollm3-base": ("smollm3", rope("default", 5e6)),
    "smollm3-llama3-windows": ("smollm3-windows", LLAMA3),
    "smollm3-untied": ("smollm3", {"tie_word_embeddings": False, "no_rope_layers": [1, 0, 1, 1]}),
}
LATER = ("ministral3",)  # transformers 4.57 does not have them
MODELS = {kind: (kind, {}) for kind in VARIANTS if kind not in LATER} | UNUSUAL
ADAPTED = ("llama-base", "mistral-yarn", "qwen2-base", "qwen3-base", "smollm3-base", "gemma3")
ADAPTED += ("olmo2-biases", "granite", "phi3-longrope")


def byte_level_tokenizer(**given: Any) -> Any:
    """Return a byte-level BPE tokenizer with a start token and tokens that strip spaces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "Ġt", "he", "12"])}
    merges = [("Ġ", "t"), ("h", "e"), ("1", "2")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    add_prefix_space = given.pop("add_prefix_space", False)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken("<|left|>", lstrip=True, special=True)])
    backend.add_tokens([AddedToken("<think>", rstrip=True, normalized=False), "word"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>", **given
    )


def unigram_tokenizer() -> Any:
    """Return a Unigram tokenizer like those of SentencePiece."""
    letters = [*string.ascii_lowercase, *string.digits, *".,?!"]
    pieces = ["<unk>", "<s>", "</s>", "▁", *letters, "▁the", "12"]
    vocabulary = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=True,
    )


def templated_tokenizer() -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ messages[0].content }}"}
    return tokenizer


def left_tokenizer() -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "left"
    return tokenizer


TOKENIZERS = {
    "tiny": tiny_tokenizer,
    "byte-level": byte_level_tokenizer,
    "prefix-space": lambda: byte_level_tokenizer(add_prefix_space=True),
    "clean-up": lambda: byte_level_tokenizer(clean_up_tokenization_spaces=True),
    "extra-tokens": lambda: byte_level_tokenizer(extra_special_tokens=["<|one|>", "<|two|>"]),
    "left": left_tokenizer,
    "named-tokens": lambda: byte_level_tokenizer(
        extra_special_tokens=["<|one|>"], model_specific_special_tokens={"image_token": "<|left|>"}
    ),
    "templates": templated_tokenizer,
    "unigram": unigram_tokenizer,
}

PIECES = (
    *("the ", "the", " ", "  ", "\n\n", "\t", "12", "1234", "word", "words", "it's", " .", " ,"),
    *("\\boxed{", "answer", "é", "e\u0301", "日本", "½", "🙂", "\u200b", "ﬁ", "İ", " do n't"),
    *("<|im_start|>", "<|im_end|>", "<think>", "</think> ", "<s>", "</s>", " <|left|> ", "<unk>"),
    *("<|one|>", "<|two|>", "<|three|>", "<|endoftext|>", "{{ x }}", "a", "B", "7", "$"),
)


def make_texts(count: int) -> list[str]:
    """Return texts with words, numbers, accents, other scripts and special tokens."""
    draw = random.Random(0)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 12))) for _ in range(count)]


TEXTS = make_texts(1000)


def make_model(name: str) -> Decoder:
    kind, overrides = MODELS[name]
    return tiny_model(kind, **overrides)


def make_adapted(name: str) -> Decoder:
    """Return a model with adapters. Their B is as large as after training."""
    model = make_model(name)
    attach(model, rank=4, alpha=6, seed=0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.1)
    return model


def our_logits(model: Decoder) -> torch.Tensor:
    tokens = torch.tensor(TOKENS)
    borders = torch.tensor([0, len(tokens)], dtype=torch.int32)
    with torch.no_grad():
        hidden = model.hidden(tokens, torch.arange(len(tokens)), borders)
        return (hidden @ model.head_weight.T).double()


@dataclass(frozen=True)
class Saved:
    """The saved folders, and the results of transformers 4 for them."""

    folder: Path
    adapted: dict[str, torch.Tensor]  # the logits of the adapted models
    old: dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    if not OLD.exists():
        pytest.skip(f"no transformers 4.57 in {OLD}")
    folder = tmp_path_factory.mktemp("transformers4")
    for name in MODELS:
        model = make_model(name)
        if name == "llama-base":
            model.generation_config = GenerationConfig(eos_token_id=[1, 2], temperature=0.6)
        save_model(model, tiny_tokenizer(), folder / "models" / name)
    adapted = {}
    for name in ADAPTED:
        model = make_adapted(name)
        base = str(folder / "models" / name)
        save_adapter(model, tiny_tokenizer(), folder / "adapters" / name, base)
        adapted[name] = our_logits(model)
    for name, make in TOKENIZERS.items():
        save_model(tiny_model(), make(), folder / "tokenizers" / name)
    (folder / "tokenizers" / "of-an-adapter").symlink_to(folder / "adapters" / "llama-base")
    (folder / "tokenizers" / "default-model").symlink_to(default_model.wheel_model())
    (folder / "default").symlink_to(default_model.wheel_model())
    (folder / "tokens.json").write_text(json.dumps(TOKENS))
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    return Saved(folder, adapted, read_with_transformers4(folder))


def read_with_transformers4(folder: Path) -> dict[str, Any]:
    results = folder / "results.json"
    done = subprocess.run(
        [sys.executable, READER, folder, results],
        env=os.environ | {"PYTHONPATH": str(OLD)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_config_has_the_rope_fields_of_transformers_4_and_5(tmp_path, name: str):
    save_model(make_model(name), None, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    new = config["rope_parameters"]
    if "full_attention" in new:
        assert config["rope_local_base_freq"] == new["sliding_attention"]["rope_theta"]
        new = new["full_attention"]
    assert config["rope_theta"] == new["rope_theta"]
    assert config["torch_dtype"] == config["dtype"]
    if new["rope_type"] == "default":
        assert not config.get("rope_scaling")
    else:
        key = "type" if new["rope_type"] == "longrope" else "rope_type"
        assert config["rope_scaling"][key] == new["rope_type"]
        assert "rope_theta" not in config["rope_scaling"]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_computes_the_same_in_transformers_4_and_5(saved: Saved, name: str):
    assert saved.old["version"].startswith("4.57.")
    ours = our_logits(make_model(name))
    of_4 = torch.tensor(saved.old["models"][name]["logits"])
    of_5 = AutoModelForCausalLM.from_pretrained(saved.folder / "models" / name)
    assert (of_4 - ours).abs().max() < 1e-4
    assert (torch.tensor(logits_of(of_5, TOKENS)) - ours).abs().max() < 1e-4
    again, _ = load_model(saved.folder / "models" / name, dtype=torch.float32, device="cpu")
    assert torch.equal(our_logits(again), ours)
    assert saved.old["models"][name]["dtype"] == "torch.float32"
    save_model(again, None, saved.folder / "again")
    first, second = (saved.folder / path / "config.json" for path in (f"models/{name}", "again"))
    assert json.loads(first.read_text()) == json.loads(second.read_text())


@pytest.mark.slow
def test_a_saved_generation_config_is_the_same_in_transformers_4(saved: Saved):
    generation = saved.old["models"]["llama-base"]["generation"]
    assert generation["eos_token_id"] == [1, 2]
    assert generation["temperature"] == 0.6


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTED)
def test_a_saved_adapter_computes_the_same_with_transformers_4(saved: Saved, name: str):
    of_4 = torch.tensor(saved.old["adapters"][name])
    assert (of_4 - saved.adapted[name]).abs().max() < 1e-4
    assert (of_4 - our_logits(make_model(name))).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOKENIZERS, "of-an-adapter", "default-model"])
def test_a_saved_tokenizer_is_the_same_in_transformers_4_and_5(saved: Saved, name: str):
    folder = saved.folder / "tokenizers" / name
    if name == "default-model":
        _, tokenizer = load_model(folder)
    else:
        tokenizer = TOKENIZERS.get(name, tiny_tokenizer)()
    ours = tokenizer_results(tokenizer, TEXTS)
    of_5 = tokenizer_results(AutoTokenizer.from_pretrained(folder), TEXTS)
    for key, value in ours.items():
        assert of_5[key] == value, key
        assert saved.old["tokenizers"][name][key] == value, key


@pytest.mark.slow
def test_the_default_model_has_the_same_loss_in_transformers_4(saved: Saved):
    """Its RoPE base is 100000. With 10000, the loss is 0.19 nats per token higher."""
    model, tokenizer = load_model(saved.folder / "default", dtype=torch.float32, device="cpu")
    ids = tokenizer("\n".join(TEXTS[:12])).input_ids
    assert saved.old["default"]["ids"] == ids
    tokens = torch.tensor(ids)
    borders = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        hidden = model.hidden(tokens, torch.arange(len(ids)), borders)
        logits = hidden[:-1] @ model.head_weight.T
    nats = torch.nn.functional.cross_entropy(logits, tokens[1:]).item()
    assert abs(saved.old["default"]["nats"] - nats) < 1e-4
