"""The backward pass computes inputs of linear maps again: the same bits, and less memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expo_fast.modeling import lora
from expo_fast.modeling.decoder import Block, Decoder
from expo_fast.op_backends import recomputing
from test_native import isa
from tiny import tiny_model

__all__ = ["isa"]  # a fixture

N = 70  # tokens, more than native_layer.LEAST_TOKENS
KINDS = ["llama-biases", "qwen2", "qwen3", "smollm3", "olmo2", "gemma3", "granite"]


def hidden(model: Decoder) -> Tensor:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.shape.vocabulary, (N,), generator=g)
    borders = torch.tensor([0, 30, N], dtype=torch.int32)
    return model.hidden(tokens, torch.arange(N), borders)


def hidden_and_gradients(model: Decoder) -> list[Tensor | None]:
    out = hidden(model)
    g = torch.Generator().manual_seed(2)
    out.backward(torch.randn(out.shape, generator=g).to(out.dtype))
    found = [out.detach(), *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


def kept_bytes(compute: Callable[[], object], model: Decoder) -> int:
    """Return the bytes of activations that autograd keeps."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def require_same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if theirs is None:
            assert ours is None, index
        else:
            assert ours is not None and torch.equal(ours, theirs), index


@pytest.fixture
def separate(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let norms, linear maps and activations be operations of their own from the call on."""
    return lambda: monkeypatch.setattr(recomputing, "runs", lambda *x: False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_have_the_same_bits(kind, dtype, checkpointing, separate):
    model = tiny_model(kind, dtype=dtype)
    model.checkpointing = checkpointing
    found = hidden_and_gradients(model)
    separate()
    require_same(found, hidden_and_gradients(model))


def test_the_bits_are_the_same_on_every_instruction_set(isa, separate):
    model = tiny_model("llama-biases", dtype=torch.bfloat16)
    found = hidden_and_gradients(model)
    separate()
    require_same(found, hidden_and_gradients(model))


@pytest.mark.parametrize("frozen", ["norm", "q_proj", "down_proj", "proj", "embed"])
def test_frozen_weights_get_no_gradient(frozen, separate):
    model = tiny_model("llama-biases", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    found = hidden_and_gradients(model)
    separate()
    require_same(found, hidden_and_gradients(model))


def test_normed_inputs_and_activated_values_are_not_kept(separate):
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = kept_bytes(lambda: hidden(model), model)
    separate()
    before = kept_bytes(lambda: hidden(model), model)
    shape = model.shape
    layers = len(model.model.layers)
    saved = layers * N * 2 * (2 * shape.hidden + shape.intermediate)  # two norms, one activation
    scales = layers * 2 * N * 4  # 1 / rms of a token in fp32
    assert before - found == saved + scales


def test_adapters_and_hooks_are_called(separate):
    """They need the modules themselves."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    seen: list[str] = []
    for layer in model.model.layers:
        assert isinstance(layer, Block)
        layer.mlp.up_proj.register_forward_hook(lambda *x: seen.append("up"))
        layer.mlp.down_proj.register_forward_pre_hook(lambda *x: seen.append("down"))
        norm = layer.get_submodule("input_layernorm")
        norm.register_full_backward_hook(lambda *x: seen.append("norm"))
    hidden_and_gradients(model)
    assert {each: seen.count(each) for each in ("up", "down", "norm")} == {
        "up": len(model.model.layers),
        "down": len(model.model.layers),
        "norm": len(model.model.layers),
    }
    adapted = tiny_model("llama", dtype=torch.bfloat16)
    lora.attach(adapted, rank=2, alpha=4, seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    found = hidden_and_gradients(adapted)
    separate()
    require_same(found, hidden_and_gradients(adapted))


def test_autocast_has_its_own_products():
    model = tiny_model("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hidden_and_gradients(model)
    assert all(each is None or each.isfinite().all() for each in found)


def test_a_backward_pass_under_autocast_has_the_products_of_forward():
    """Products in another dtype would be read as if they had the dtype of forward."""
    model = tiny_model("llama")
    expected = hidden_and_gradients(model)
    out = hidden(model)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.backward(upstream)
    for parameter, gradient in zip(model.parameters(), expected[1:], strict=True):
        if gradient is None:
            continue
        assert parameter.grad is not None
        error = (parameter.grad - gradient).norm() / gradient.norm()
        assert error < 0.05  # PyTorch's other products are in bf16


def test_hooks_of_all_modules_are_called():
    model = tiny_model("llama", dtype=torch.bfloat16)
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_full_backward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        hidden_and_gradients(model)
    finally:
        handle.remove()
    layers = len(model.model.layers)
    assert seen.count("Linear") == 7 * layers
    assert seen.count("RMSNorm") == 2 * layers + 1


def test_the_input_of_frozen_weights_is_not_computed_again(monkeypatch):
    model = tiny_model("llama", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)

    def unexpected(*_):
        raise AssertionError("computed again")

    expected = hidden_and_gradients(model)
    monkeypatch.setattr(recomputing, "normed_linear_maps", unexpected)
    monkeypatch.setattr(recomputing, "swiglu_linear_map", unexpected)
    require_same(hidden_and_gradients(model), expected)
