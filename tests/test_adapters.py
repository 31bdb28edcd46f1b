"""LoRA: training, interchange with PEFT in both directions, and the merged copy for sampling."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from expo_fast import weights
from expo_fast.generate import Generator, Request
from expo_fast.inference.cpu_engine import NativeEngine
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.lora import (
    attach,
    is_attached,
    load_adapter,
    merged_copy,
    save_adapter,
    switched_off,
)
from expo_fast.modeling.optimizer import Optimizer
from expo_fast.storage import hub
from expo_fast.storage.lora_files import CONFIG, PROJECTIONS, TENSORS
from expo_fast.weights import load_model, save_model
from judges import complete_logits, completion_logps, hidden_states, max_error
from tiny import tiny_model, tiny_tokenizer, transformers_copy

TOKENS = torch.tensor([5, 60, 7, 33, 8, 90, 21, 4])
Q_PROJ = "model.layers.1.self_attn.q_proj"
Q_LORA_A = f"base_model.model.{Q_PROJ}.lora_A.weight"
Q_LORA_B = f"base_model.model.{Q_PROJ}.lora_B.weight"


def hidden(model: Decoder) -> Tensor:
    """Return the hidden states (N, D) of TOKENS."""
    return hidden_states(model, TOKENS)


@torch.no_grad()
def logits(model: Decoder) -> Tensor:
    """Return the logits (N, V) of TOKENS."""
    return complete_logits(model, TOKENS)


def adapted(
    kind: str = "llama-biases", *, rank: int = 4, alpha: float = 6, **given: Any
) -> Decoder:
    """Return a tiny model with adapters whose B is as large as after training."""
    model = tiny_model(kind, **given)
    attach(model, rank=rank, alpha=alpha, seed=0)
    randomize(model)
    return model


def randomize(model: Decoder, seed: int = 0) -> None:
    """Draw every B again."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=random))


def lora(model: Decoder) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora" in name}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def folders(tmp_path: Path, tokenizer: Any = None, **given: Any) -> tuple[Decoder, Path]:
    """Save a model's adapters in tmp_path/adapter, its base in tmp_path/base. Return both."""
    base = tiny_model("llama-biases", **given)
    save_model(base, tokenizer, tmp_path / "base")
    model = adapted(**given)
    save_adapter(model, None, tmp_path / "adapter", str(tmp_path / "base"))
    return model, tmp_path / "adapter"


def edit_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(
        json.dumps({key: value for key, value in values.items() if value is not ...})
    )


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_no_logit_and_only_they_are_trained(dtype: torch.dtype):
    model = tiny_model("llama-biases", dtype=dtype)
    before, count = logits(model), len(list(model.parameters()))
    attach(model, rank=3, alpha=6, seed=0)
    assert torch.equal(logits(model), before)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == lora(model).keys()
    assert len(trained) == 2 * 7 * 4  # A and B, projections, layers
    assert len(list(model.parameters())) == count + len(trained)
    assert {p.dtype for p in trained.values()} == {dtype}
    assert {min(p.shape) for p in trained.values()} == {3}
    assert all(bool(p.any()) == ("lora_A" in name) for name, p in trained.items())


def test_the_lora_a_matrices_depend_only_on_the_seed():
    drawn = []
    for seed, dtype in ((1, torch.float32), (1, torch.bfloat16), (2, torch.float32)):
        model = tiny_model(dtype=dtype)
        torch.manual_seed(seed + len(drawn))
        state = torch.get_rng_state()
        attach(model, rank=4, alpha=8, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(lora(model))
    first, rounded, other = drawn
    assert_same({name: p.bfloat16() for name, p in first.items()}, rounded)
    a = [name for name in first if "lora_A" in name]
    assert not any(torch.equal(first[name], other[name]) for name in a)
    q_proj = [first[name] for name in a if "q_proj" in name]
    assert not torch.equal(q_proj[0], q_proj[1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 0}, "rank is 0, need an integer from 1 to 16"),
        ({"rank": 17}, "rank is 17, need an integer from 1 to 16"),  # k_proj has 2 heads of 8
        ({"rank": 2.0}, r"rank is 2\.0"),
        ({"rank": True}, "rank is True"),
        ({"alpha": 0}, "alpha is 0, need a positive number"),
        ({"alpha": -1.5}, r"alpha is -1\.5"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
    ],
)
def test_invalid_ranks_and_alphas_are_refused(given: dict[str, Any], message: str):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        attach(model, **({"rank": 4, "alpha": 8, "seed": 0} | given))
    assert not is_attached(model)
    attach(model, rank=16, alpha=8, seed=0)


def test_adapters_cannot_be_attached_twice_and_are_needed_to_merge():
    model = tiny_model()
    for needs_adapters in (merged_copy, lambda m: save_adapter(m, None, "nowhere", "base")):
        with pytest.raises(ValueError, match="the model has no adapters"):
            needs_adapters(model)
    attach(model, rank=4, alpha=8, seed=0)
    assert is_attached(model)
    before = lora(model)
    with pytest.raises(ValueError, match="has adapters already"):
        attach(model, rank=4, alpha=8, seed=1)
    assert_same(lora(model), before)
    with pytest.raises(ValueError, match=r"save them with lora\.save_adapter"):
        save_model(model, None, "nowhere")
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_adapters_switched_off_equals_its_base_to_the_bit(dtype: torch.dtype):
    base, model = tiny_model("llama-biases", dtype=dtype), adapted(dtype=dtype)
    expected, policy = logits(base), logits(model)
    assert not torch.equal(policy, expected)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with switched_off(model):
        assert torch.equal(logits(model), expected)
        with switched_off(model):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
        assert not hidden(model).requires_grad
    assert torch.equal(logits(model), policy)
    with pytest.raises(RuntimeError, match="inside"), switched_off(model):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), policy)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_full_weights_by_the_chain_rule(checkpointing: bool):
    model = adapted(dtype=torch.float64)
    model.checkpointing = checkpointing
    full = deepcopy(merged_copy(model).model).requires_grad_(True)
    upstream = torch.randn(len(TOKENS), model.shape.hidden, dtype=torch.float64)
    for each in (model, full):
        (hidden(each) * upstream).sum().backward()
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 7 * 4
    for name, layer in layers.items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        dW, scale = full.get_parameter(f"{name}.weight").grad, 6 / 4
        assert dW is not None and dW.abs().max() > 1e-3
        torch.testing.assert_close(B.grad, scale * dW @ A.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(A.grad, scale * B.T @ dW, rtol=1e-10, atol=1e-12)
    for name, p in model.named_parameters():
        assert (p.grad is None) == ("lora" not in name), name


def test_a_reference_between_forward_and_backward_changes_no_gradient():
    """DPO does this with a checkpointed policy, whose layers run again after the switch."""
    grads = []
    for between in (False, True):
        model = adapted()
        model.checkpointing = True
        out = hidden(model)
        if between:
            with switched_off(model), torch.no_grad():
                hidden(model)
        out.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_same(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_updates_only_the_adapters(dtype: torch.dtype):
    model = tiny_model("llama-biases", dtype=dtype)
    attach(model, rank=4, alpha=8, seed=0)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    goal = torch.randn(len(TOKENS), model.shape.hidden)
    optimizer = Optimizer(model.named_parameters(), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    losses = []
    for _ in range(20):
        loss = (hidden(model).float() - goal).square().mean()
        losses.append(loss.item())
        loss.backward()
        assert optimizer.step(1e-2, 1.0).update_norm > 0
    assert losses[-1] < 0.8 * losses[0]
    assert_same({n: p.detach() for n, p in model.named_parameters() if n in frozen}, frozen)


@pytest.mark.parametrize(
    "kind",
    ["llama-biases", "qwen2", "qwen3", "mistral", "smollm3", "gemma3", "olmo2", "granite", "phi3"],
)
def test_peft_loads_what_we_save(kind: str, tmp_path: Path):
    base = tiny_model(kind)
    save_model(base, None, tmp_path / "base")
    model = adapted(kind)
    save_adapter(model, tiny_tokenizer(), tmp_path / "adapter", str(tmp_path / "base"))
    onto = PeftModel.from_pretrained(transformers_copy(base), tmp_path / "adapter")
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert max_error(logits(model), logits(base)) > 0.1
    for theirs in (onto, found):
        with torch.no_grad():
            given = theirs.eval()(input_ids=TOKENS[None]).logits[0]
        assert max_error(given, logits(model)) < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert tokenizer("The answer").input_ids == tiny_tokenizer()("The answer").input_ids


def test_adapters_of_joined_projections_are_loaded_to_the_bit(tmp_path: Path):
    model = adapted("phi3")
    save_adapter(model, None, tmp_path, "base")
    other = tiny_model("phi3")
    attach(other, rank=4, alpha=6, seed=9)
    load_adapter(other, tmp_path)
    assert_same(lora(other), lora(model))
    with pytest.raises(ValueError, match="need plain LoRA, or a multiple of r for joined"):
        edit_config(tmp_path, alpha_pattern={"qkv_proj": 18, "gate_up_proj": 13})
        load_adapter(other, tmp_path)


def test_an_adapter_of_peft_on_joined_projections_is_merged(tmp_path: Path):
    """Its parts share A. It cannot be trained on here, because ours have an A each."""
    base = tiny_model("phi3")
    save_model(base, None, tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["qkv_proj", "gate_up_proj"])
    theirs: Any = get_peft_model(transformers_copy(base), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    merged, _ = load_model(tmp_path / "adapter", dtype=torch.float32, device="cpu")
    with torch.no_grad():
        given = theirs.eval()(input_ids=TOKENS[None]).logits[0]
    assert max_error(given, logits(merged)) < 1e-4
    assert max_error(given, logits(base)) > 0.1
    attach(base, rank=3, alpha=6, seed=0)
    with pytest.raises(ValueError, match="adapts 20 projections, the model has adapters on 28"):
        load_adapter(base, tmp_path / "adapter")


def test_a_saved_adapter_is_the_same_file_in_every_process(tmp_path: Path):
    _, folder = folders(tmp_path)
    values = json.loads((folder / CONFIG).read_text())
    assert values["target_modules"] == sorted(PROJECTIONS)  # PEFT writes them in a set's order
    assert values["base_model_name_or_path"] == str(tmp_path / "base")
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_adapter_equals_the_saved_one_to_the_bit_and_is_in_place(
    dtype: torch.dtype, tmp_path: Path
):
    model, folder = folders(tmp_path, dtype=dtype)
    other = tiny_model("llama-biases", dtype=dtype)
    attach(other, rank=4, alpha=6, seed=9)
    places = [p.data_ptr() for p in other.parameters()]
    load_adapter(other, folder)
    assert_same(lora(other), lora(model))
    assert [p.data_ptr() for p in other.parameters()] == places
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize(
    ("rank", "alpha", "kind", "dtype", "message"),
    [
        (2, 6, "llama-biases", torch.float32, r"has rank 4 and scale 1\.5, .* have 2 and 3\.0"),
        (4, 8, "llama-biases", torch.float32, r"has rank 4 and scale 1\.5, .* have 4 and 2\.0"),
        (4, 6, "llama-biases", torch.bfloat16, "is torch.float32, the model has torch.bfloat16"),
        (
            4,
            6,
            "llama-wide-heads",
            torch.float32,
            r"shape \(16, 48\), the model needs \(96, 48\)",
        ),
    ],
)
def test_an_adapter_of_another_kind_is_refused_and_changes_nothing(
    tmp_path: Path, rank: int, alpha: float, kind: str, dtype: torch.dtype, message: str
):
    _, folder = folders(tmp_path)
    model = adapted(kind, rank=rank, alpha=alpha, dtype=dtype)
    before = lora(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert_same(lora(model), before)


def test_an_adapter_for_fewer_projections_is_refused(tmp_path: Path):
    model, folder = folders(tmp_path)
    edit_config(folder, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"target_modules .* does not name .*down_proj"):
        load_adapter(model, folder)
    edit_tensors(folder, lambda t: [t.pop(key) for key in list(t) if "q_proj" not in key])
    with pytest.raises(ValueError, match="adapts 4 projections, the model has adapters on 28"):
        load_adapter(model, folder)
    with pytest.raises(ValueError, match="adapts 4 projections, the model has adapters on 0"):
        load_adapter(tiny_model("llama-biases"), folder)
    with pytest.raises(FileNotFoundError, match=f"not an adapter folder: it has no {CONFIG}"):
        load_adapter(model, tmp_path / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_folder_loads_as_its_merged_model(dtype: torch.dtype, tmp_path: Path):
    model, folder = folders(tmp_path, dtype=dtype)
    merged, tokenizer = load_model(folder, dtype=dtype, device="cpu")
    assert tokenizer is None
    assert not is_attached(merged) and isinstance(Generator(merged).engine(), NativeEngine)
    assert all(p.requires_grad for p in merged.parameters())
    copied = merged_copy(model).model
    assert_same(dict(merged.state_dict()), dict(copied.state_dict()))
    save_model(merged, None, tmp_path / "merged")
    assert_same(
        dict(load_model(tmp_path / "merged", dtype=dtype)[0].state_dict()), copied.state_dict()
    )


def test_an_fp32_adapter_is_merged_into_a_bf16_base_with_one_rounding(tmp_path: Path):
    model, folder = folders(tmp_path)
    for name, p in load_model(folder, dtype=torch.bfloat16)[0].named_parameters():
        if name.split(".")[-2] not in PROJECTIONS or name.endswith("bias"):
            continue
        layer: Any = model.get_submodule(name.removesuffix(".weight"))
        A, B = (x["default"].weight.double() for x in (layer.lora_A, layer.lora_B))
        exact = layer.base_layer.weight.bfloat16().double() + 1.5 * B @ A
        assert_rounded_once(p, exact)


def assert_rounded_once(weight: Tensor, exact: Tensor) -> None:
    """Assert one rounding, and allow 1e-7 for the fp32 sum, in case W and s B A cancel."""
    error = (weight.double() - exact).abs()
    assert (error <= 0.501 * spacing(exact) + 1e-7).all()


def spacing(x: Tensor) -> Tensor:
    """Return the distance between neighbouring bf16 numbers at x; they have 8 bits."""
    return torch.exp2(x.abs().log2().floor() - 7)


def test_the_adapters_tokenizer_comes_before_that_of_the_base(tmp_path: Path):
    _, folder = folders(tmp_path, tiny_tokenizer())
    _, tokenizer = load_model(folder)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    own = tiny_tokenizer()
    own.chat_template = "{{ messages[0].content }}"
    own.save_pretrained(folder)
    assert load_model(folder)[1].chat_template == own.chat_template


@pytest.mark.parametrize("tokenizer", [None, tiny_tokenizer()])
def test_a_missing_end_token_is_taken_from_the_adapters_tokenizer(tmp_path: Path, tokenizer: Any):
    model, _ = folders(tmp_path, eos_token_id=None)
    save_adapter(model, tokenizer, tmp_path / "adapter", str(tmp_path / "base"))
    assert load_model(tmp_path / "adapter")[0].eos_ids == (() if tokenizer is None else (1,))


def test_a_base_may_be_a_relative_path_a_name_or_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, folder = folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    edit_config(folder, base_model_name_or_path="base")
    once = load_model(folder, dtype=torch.float32)[0]
    assert max_error(logits(once), logits(model)) < 1e-4
    monkeypatch.setattr(weights, "find_default_model", lambda: tmp_path / "base")
    edit_config(folder, base_model_name_or_path=weights.DEFAULT_MODEL)
    assert_same(load_model(folder, dtype=torch.float32)[0].state_dict(), once.state_dict())
    attach(once, rank=2, alpha=3, seed=5)
    randomize(once, seed=5)
    save_adapter(once, None, "second", "adapter")
    twice = load_model("second", dtype=torch.float32)[0]
    assert_same(twice.state_dict(), merged_copy(once).model.state_dict())
    edit_config(folder, base_model_name_or_path="second")
    with pytest.raises(ValueError, match="the adapter is its own base model"):
        load_model(folder)


def test_a_folder_with_an_adapter_beside_a_model_is_a_model(tmp_path: Path):
    _, folder = folders(tmp_path)
    save_model(tiny_model(seed=3), None, folder)
    assert torch.equal(
        logits(load_model(folder, dtype=torch.float32)[0]), logits(tiny_model(seed=3))
    )


@pytest.mark.parametrize(
    ("targets", "more"),
    [
        (["q_proj", "down_proj"], {}),
        ([Q_PROJ, "model.layers.3.mlp.up_proj"], {}),
        (r"model\.layers\.[12]\..*_proj", {}),
        ("all-linear", {"lora_dropout": 0.3}),
        (["v_proj"], {"use_rslora": True}),
        (["v_proj"], {"init_lora_weights": "gaussian"}),
    ],
)
def test_adapters_saved_by_peft_are_merged(tmp_path: Path, targets: Any, more: dict[str, Any]):
    base = tiny_model("llama-biases")
    save_model(base, None, tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM", **more)
    theirs: Any = get_peft_model(transformers_copy(base), config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
        expected = theirs(input_ids=TOKENS[None]).logits[0]
    theirs.save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    given = logits(load_model(tmp_path / "adapter", dtype=torch.float32)[0])
    assert max_error(expected, logits(base)) > 0.01
    assert max_error(given, expected) < 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported, need 'LORA'"),
        ({"peft_type": ...}, "peft_type None"),
        ({"use_dora": True}, "use_dora True is not supported, need plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only'"),
        ({"lora_bias": True}, "lora_bias True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern {'q_proj': 2}"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern {'q_proj': 2}"),
        ({"layers_to_transform": [1]}, r"layers_to_transform \[1\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),  # PiSSA changes the base
        ({"revision": 2}, "revision is 2, need a branch, a tag or a commit"),
        ({"an_option_of_next_year": "on"}, "an_option_of_next_year 'on'"),
        ({"r": 0}, "r is 0, need a positive integer"),
        ({"r": "4"}, "r is '4'"),
        ({"r": 10**400}, "does not fit r=1000"),
        ({"r": 3}, r"has shape \(4, \d+\), which does not fit r=3"),
        ({"lora_alpha": None}, "lora_alpha is None, need a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None, need a folder"),
        ({"base_model_name_or_path": "gone"}, "base_model_name_or_path: .*no model at gone"),
        ({"target_modules": None}, "target_modules is None, need names of projections"),
        ({"target_modules": ["c_attn"]}, "target_modules has 'c_attn', expo_fast adapts q_proj, k"),
        ({"target_modules": [5]}, "target_modules has 5"),
        ({"target_modules": "(q_proj"}, r"target_modules '\(q_proj': "),
        ({"target_modules": "[a-z]+_proj"}, r"target_modules '\[a-z\]\+_proj' does not name model"),
        ({"target_modules": ["q_proj"]}, r"target_modules \['q_proj'\] does not name model"),
    ],
    ids=str,
)
def test_a_config_other_than_plain_lora_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
):
    _, folder = folders(tmp_path)
    edit_config(folder, **changes)
    refusal(folder, message)


def drop(keys: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if keys in key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(Q_LORA_A), f"has only one of A and B of {Q_PROJ}"),
        (drop(Q_PROJ), f"names {Q_PROJ}, of which {TENSORS} lacks the tensors"),
        (drop(""), "lacks the tensors"),
        (lambda t: t[Q_LORA_B].view(-1)[3].fill_(float("nan")), f"{Q_LORA_B} must have finite"),
        (
            lambda t: [t[key].fill_(1e20) for key in (Q_LORA_A, Q_LORA_B)],
            f"merging it into {Q_PROJ} gives non-finite weights",
        ),
        (
            lambda t: t.update({Q_LORA_A: t[Q_LORA_A].to(torch.int8)}),
            f"{Q_LORA_A} must have finite",
        ),
        (lambda t: t.update({Q_LORA_A: t[Q_LORA_A][:3].clone()}), r"has shape \(3, 48\), which"),
        (lambda t: t.update({Q_LORA_A: t[Q_LORA_A][0].clone()}), r"has shape \(48,\), which"),
        (
            lambda t: t.update({Q_LORA_A: t[Q_LORA_A][:, 1:].clone()}),
            r"B A of .*q_proj has shape \(48, 47\), the model needs \(48, 48\)",
        ),
        (
            lambda t: t.update(
                {key.replace(".1.", ".7."): x.clone() for key, x in list(t.items())}
            ),
            r"it adapts model\.layers\.7\..*, which the model lacks",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 48)}),
            r"unexpected tensor base_model\.model\.lm_head\.lora_A\.weight",
        ),
        (lambda t: t.update(extra=torch.ones(2)), "unexpected tensor extra"),
    ],
)
def test_invalid_adapter_tensors_are_named(tmp_path: Path, change: Any, message: str):
    _, folder = folders(tmp_path)
    edit_tensors(folder, change)
    refusal(folder, message)


def test_damaged_and_missing_files_are_named(tmp_path: Path):
    _, folder = folders(tmp_path)
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])
    refusal(folder, f"{TENSORS} is damaged or cut short")
    (folder / TENSORS).unlink()
    refusal(folder, f"has no {TENSORS}$")
    (folder / "adapter_model.bin").touch()
    refusal(folder, rf"has no {TENSORS} \(a \.bin is a pickle")
    (folder / CONFIG).write_text('{"peft_type": ')
    refusal(folder, f"{CONFIG} is not valid JSON")
    (folder / CONFIG).write_text("[]")
    refusal(folder, f"{CONFIG} holds a list")


def refusal(folder: Path, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_model(folder, device="cpu")
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_an_adapter_that_is_not_lora_is_refused(tmp_path: Path):
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(transformers_copy(tiny_model()), config).save_pretrained(str(tmp_path))
    refusal(tmp_path, "peft_type 'IA3' is not supported")


@pytest.mark.parametrize("kind", ["llama-biases", "llama-tied", "qwen3"])
def test_a_merged_copy_shares_all_but_the_merged_projections(kind: str):
    model = adapted(kind)
    model.generation_config = GenerationConfig(eos_token_id=[1, 2])
    copied = merged_copy(model).model
    ours = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    for name, p in copied.named_parameters():
        assert not p.requires_grad
        merged = name.split(".")[-2] in PROJECTIONS and name.endswith("weight")
        assert (p is ours[name]) != merged
        assert (p.data_ptr() == ours[name].data_ptr()) != merged
    assert copied.config is model.config and copied.eos_ids == model.eos_ids == (1, 2)
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())


def test_a_merged_copy_is_refreshed_in_place():
    model = adapted()
    copied = merged_copy(model)
    places = [p.data_ptr() for p in copied.model.parameters()]
    assert max_error(logits(copied.model), logits(model)) < 1e-4
    stale = logits(copied.model)
    randomize(model, seed=1)
    assert torch.equal(logits(copied.model), stale)
    copied.refresh()
    assert max_error(logits(model), stale) > 0.1
    assert max_error(logits(copied.model), logits(model)) < 1e-4
    with switched_off(model):  # the reference is computed during a step
        copied.refresh()
    assert max_error(logits(copied.model), logits(model)) < 1e-4
    assert [p.data_ptr() for p in copied.model.parameters()] == places


def test_a_bf16_merged_copy_is_rounded_once():
    model = adapted(dtype=torch.bfloat16)
    copied = merged_copy(model)
    for merged in copied.merged:
        layer, weight = merged.layer, merged.weight
        A, B = (x["default"].weight.double() for x in (layer.lora_A, layer.lora_B))
        exact = layer.base_layer.weight.double() + 1.5 * B @ A
        assert_rounded_once(weight, exact)


def test_a_merged_copy_samples_in_cpp_with_the_trainers_log_probs():
    model = adapted("qwen2")
    assert not isinstance(Generator(model).engine(), NativeEngine)
    generator = Generator(merged_copy(model).model)
    assert isinstance(generator.engine(), NativeEngine)
    prompt = [5, 60, 7]
    requests = [Request(prompt, max_new_tokens=24, seed=s, stop_ids=()) for s in range(8)]
    for done in generator.sample(requests):
        with torch.no_grad():
            expected = completion_logps(model, prompt, done.token_ids)
        assert len(expected) == 24
        assert max_error(done.logp, expected) < 1e-4


def test_all_files_of_an_adapter_on_the_hub_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, folder = folders(tmp_path)
    asked = []

    def from_hub(name: str, files: list[str], **_: Any) -> Path:
        asked.append((name, set(files)))
        return folder

    monkeypatch.setattr(hub, "snapshot", from_hub)
    merged, _ = load_model("someone/adapter", dtype=torch.float32)
    assert max_error(logits(merged), logits(model)) < 1e-4
    assert [name for name, _ in asked] == ["someone/adapter"]
    assert asked[0][1] >= {CONFIG, TENSORS}
