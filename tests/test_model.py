"""Compare the decoder with transformers' models, and packs with single sequences."""

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expo_fast.generate import Generator, Request
from expo_fast.modeling.decoder import Decoder
from expo_fast.storage.fused_projections import split_projections
from expo_fast.storage.hf_files import StoredTensor
from judges import (
    assert_gradients_near,
    gradients_of,
    hidden_states,
    max_error,
    max_relative_error,
    relative_error,
)
from tiny import (
    LINEAR_ROPE,
    VARIANTS,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    transformers_copy,
)

LENGTHS = (19, 1, 30)  # tokens; beyond every window of the variants
# a shared prefix with windows, two ropes, norms over all heads, multipliers and partial RoPE
TREES = ["llama", "qwen2-windows", "smollm3-windows", "gemma3", "olmo3", "granite", "phi3-longrope"]
CLOSE = 1e-4  # fp32, ours against transformers


def sequences(V: int, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, V, (n,), generator=random) for n in lengths]


def pack(parts: list[Tensor], starts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens, positions, cu_seqlens) of segments whose positions begin at `starts`."""
    places = [torch.arange(len(p)) + start for p, start in zip(parts, starts, strict=True)]
    borders = torch.tensor([0, *accumulate(map(len, parts))], dtype=torch.int32)
    return torch.cat(parts), torch.cat(places), borders


@pytest.mark.parametrize("kind", VARIANTS)
def test_packed_hidden_states_and_logits_equal_transformers(kind: str):
    model = tiny_model(kind)
    theirs = transformers_copy(model)
    parts = sequences(model.shape.vocabulary)
    with torch.no_grad():
        hidden = model.hidden(*pack(parts, [0, 0, 0]))
        expected = torch.cat([theirs.model(x[None]).last_hidden_state[0] for x in parts])
        logits = torch.cat([theirs(x[None]).logits[0] for x in parts])
    assert max_error(hidden / model.shape.logit_scale, expected) < CLOSE
    assert max_error(hidden @ model.head_weight.T, logits) < CLOSE
    assert logits.std() > 0.3  # logits are not so flat that they agree by chance


def as_parameters(stored: dict[str, Tensor], model: Decoder) -> dict[str, Tensor]:
    """Return tensors of transformers' model by the names of our parameters."""
    if not model.shape.fused_storage:
        return stored
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    tensors = [StoredTensor(name, tensor, Path()) for name, tensor in stored.items()]
    return {part.key: part.tensor for part in split_projections(tensors, shapes)}


@pytest.mark.parametrize("kind", VARIANTS)
def test_gradients_equal_transformers(kind: str):
    model = tiny_model(kind)
    theirs = transformers_copy(model)
    parts = sequences(model.shape.vocabulary)
    hidden = model.hidden(*pack(parts, [0, 0, 0]))
    logits = hidden @ model.head_weight.T
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    got = gradients_of(model, (logits * upstream).sum())
    expected = torch.cat([theirs(x[None]).logits[0] for x in parts])
    truth = gradients_of(theirs, (expected * upstream).sum())
    truth = as_parameters(truth, model)
    assert_gradients_near(got, truth, CLOSE, max_relative_error)


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3", "smollm3-windows"])
def test_a_pack_equals_its_sequences_one_by_one_in_fp64(kind: str):
    model = tiny_model(kind, dtype=torch.float64)
    parts = sequences(model.shape.vocabulary)
    packed = model.hidden(*pack(parts, [0, 0, 0]))
    one_by_one = torch.cat([hidden_states(model, x) for x in parts])
    assert packed.dtype == torch.float64
    assert max_error(packed, one_by_one) < 1e-12
    assert max_error(packed, tiny_model(kind).hidden(*pack(parts, [0, 0, 0]))) < CLOSE


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_of_segments_equals_complete_sequences_outputs_and_gradients(kind: str):
    """The tree: worked examples, two questions, two samples of each."""
    model = tiny_model(kind, dtype=torch.float64)
    parts = sequences(model.shape.vocabulary, (11, 6, 4, 9, 1, 8, 3))
    parents = [-1, 0, 0, 1, 1, 2, 2]
    chains = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4], [0, 2, 5], [0, 2, 6]]
    starts = [sum(len(parts[a]) for a in chain[:-1]) for chain in chains]
    tree = model.hidden(*pack(parts, starts), torch.tensor(parents))
    complete = [hidden_states(model, torch.cat([parts[a] for a in chain])) for chain in chains]
    tails = torch.cat([h[-len(part) :] for h, part in zip(complete, parts, strict=True)])
    assert max_error(tree, tails) < 1e-12
    random = torch.Generator().manual_seed(3)
    upstream = torch.randn(tree.shape, generator=random, dtype=torch.float64)
    got = gradients_of(model.model, (tree * upstream).sum())
    truth = gradients_of(model.model, (tails * upstream).sum())
    assert_gradients_near(got, truth, 1e-10, max_relative_error)


def test_a_parent_after_its_segment_is_refused():
    model = tiny_model()
    parts = sequences(model.shape.vocabulary, (3, 4))
    with pytest.raises(AssertionError, match="segment 0 continues segment 1"):
        model.hidden(*pack(parts, [0, 0]), torch.tensor([1, -1]))


def test_checkpointing_gives_the_same_gradients_to_the_bit():
    plain, recomputing = tiny_model("qwen3"), tiny_model("qwen3")
    recomputing.checkpointing = True
    batch = pack(sequences(plain.shape.vocabulary), [0, 0, 0])
    ours = gradients_of(plain.model, plain.hidden(*batch).square().sum())
    theirs = gradients_of(recomputing.model, recomputing.hidden(*batch).square().sum())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_checkpointing_keeps_fewer_activations():
    def kept(checkpointing: bool) -> int:
        model = tiny_model()
        model.checkpointing = checkpointing
        bytes_kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.hidden(*pack(sequences(model.shape.vocabulary), [0, 0, 0]))
        return bytes_kept

    assert kept(True) < kept(False) / 4


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_counts_the_token_itself(window: int):
    model = tiny_model("mistral-window", sliding_window=window, num_hidden_layers=1)
    (tokens,) = sequences(model.shape.vocabulary, (12,))
    changed = tokens.clone()
    changed[4] = (changed[4] + 1) % model.shape.vocabulary
    moved = (hidden_states(model, tokens) - hidden_states(model, changed)).abs().amax(-1) > 0
    assert moved.nonzero().flatten().tolist() == list(range(4, 4 + window))


def test_a_segment_does_not_see_its_neighbours():
    model = tiny_model()
    parts = sequences(model.shape.vocabulary)
    others = [parts[0].flip(0), parts[1], parts[2].flip(0)]
    before, after = (model.hidden(*pack(p, [0, 0, 0])) for p in (parts, others))
    assert torch.equal(before[19:20], after[19:20])
    assert max_error(before[:19], after[:19]) > 0.1


def test_positions_are_those_of_the_caller():
    model = tiny_model()
    (tokens,) = sequences(model.shape.vocabulary, (9,))
    batch = pack([tokens], [100])
    assert max_error(model.hidden(*batch), hidden_states(model, tokens)) < CLOSE  # RoPE is relative
    spread = model.hidden(batch[0], 3 * batch[1], batch[2])
    assert max_error(spread, hidden_states(model, tokens)) > 0.1


@pytest.mark.parametrize("kind", ["llama", "llama-llama3-rope", "llama-yarn-rope"])
def test_rope_frequencies_stay_fp32_and_initialised_through_casts_and_meta(kind: str):
    expected = tiny_model(kind).inv_freq
    with torch.device("meta"):
        on_meta = Decoder(tiny_config(kind))
    assert torch.equal(on_meta.inv_freq, expected)
    assert torch.equal(tiny_model(kind).to(torch.bfloat16).inv_freq, expected)
    assert torch.equal(tiny_model(kind).double().inv_freq, expected)
    assert expected.dtype == torch.float32
    assert (expected > 0).all()


def test_a_bf16_forward_of_a_long_context_is_near_that_of_fp32():
    exact, rounded = tiny_model(), tiny_model(dtype=torch.bfloat16)
    (tokens,) = sequences(exact.shape.vocabulary, (240,))
    error = relative_error(hidden_states(rounded, tokens), hidden_states(exact, tokens))
    assert error < 0.03


def test_a_tied_head_is_the_embedding():
    tied, untied = tiny_model("llama-tied"), tiny_model("llama")
    assert tied.head_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.head_weight is untied.lm_head.weight


def test_unsupported_configs_are_refused():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match=r"model_type 'gpt2' is not supported.*llama, mistral"):
        Decoder(GPT2Config())
    with pytest.raises(ValueError, match="hidden_act 'gelu' is not supported, need 'silu' or"):
        tiny_model("llama", hidden_act="gelu")
    dynamic = LINEAR_ROPE | {"rope_type": "dynamic"}
    with pytest.raises(ValueError, match="rope_type 'dynamic' is not supported"):
        tiny_model("llama", rope_parameters=dynamic)


def test_eos_ids_come_from_the_generation_config_first():
    from transformers import GenerationConfig

    model = tiny_model()
    assert model.eos_ids == (1,)
    model.generation_config = GenerationConfig(eos_token_id=[1, 2])
    assert model.eos_ids == (1, 2)
    model.generation_config = GenerationConfig(eos_token_id=[])
    assert model.eos_ids == (1,)
    assert tiny_model(eos_token_id=None).eos_ids == ()


def test_a_missing_end_token_is_taken_from_the_tokenizer():
    model, unnamed = tiny_model(eos_token_id=2), tiny_model(eos_token_id=None)
    for one in (model, unnamed):
        one.complete_eos(None)
    assert (model.eos_ids, unnamed.eos_ids) == ((2,), ())
    for one in (model, unnamed):
        one.complete_eos(tiny_tokenizer())
    assert (model.eos_ids, unnamed.eos_ids) == ((2,), (1,))
    prompt = tiny_tokenizer()("1 + 1").input_ids
    with torch.no_grad():
        unnamed.head_weight[1] = (
            9 * hidden_states(unnamed, torch.tensor(prompt))[-1]
        )  # the end token is likely
    (completion,) = Generator(unnamed).sample([Request(prompt, 20, temperature=0.0)])
    assert (completion.token_ids, completion.finish_reason) == ([1], "stop")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 0}, "head_dim is 0, need a positive integer"),
        ({"hidden_size": -48}, "hidden_size is -48, need a positive integer"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4, need a divisor of the 6 heads"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, need a number >= 0"),
        ({"rope_parameters": LINEAR_ROPE | {"factor": 0}}, "'factor': 0} do not give 4 finite"),
        ({"rope_parameters": LINEAR_ROPE | {"factor": "x"}}, "'factor': 'x'}: TypeError"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "do not give 4 finite"),
    ],
)
def test_invalid_config_values_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        Decoder(tiny_config("llama", **changes))


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="sliding_window is 0, need at least one token"):
        tiny_model("mistral-window", sliding_window=0)
