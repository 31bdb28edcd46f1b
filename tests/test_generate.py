"""The generator serves what it is asked, with the trainer's own log-probs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expo_fast import generate
from expo_fast.generate import Completion, Generator, Request
from expo_fast.model import Decoder
from tiny import tiny_model, tiny_tokenizer

SHARED = (20, 21, 22, 23, 24, 25, 26)


def requests(n: int = 24, **changes) -> list[Request]:
    """Groups of three on prompts of several lengths, with a common beginning."""
    asked = [
        Request((*SHARED, *range(30, 31 + i // 3)), 4 + i % 9, temperature=0.8, seed=i)
        for i in range(n)
    ]
    return [replace(r, **changes) for r in asked]


def trainer_logp(model: Decoder, request: Request, done: Completion) -> Tensor:
    whole = torch.tensor([*request.prompt_ids, *done.token_ids])
    borders = torch.tensor([0, len(whole)], dtype=torch.int32)
    hidden = model.hidden(whole, torch.arange(len(whole)), borders)
    logits = (hidden @ model.head_weight.T).float() / (request.temperature or 1.0)
    start = len(request.prompt_ids)
    return logits.log_softmax(-1)[start - 1 : -1].gather(1, whole[start:, None]).squeeze(1)


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [done.token_ids for done in completions]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral-window", "smollm3-windows"])
@pytest.mark.parametrize("slots", [1, 5, 64])
def test_log_probs_are_those_of_a_full_forward(kind: str, slots: int, monkeypatch):
    monkeypatch.setattr(generate, "MAX_SLOTS", slots)
    model, asked = tiny_model(kind), requests()
    for request, done in zip(asked, Generator(model).sample(asked), strict=True):
        expected = trainer_logp(model, request, done)
        torch.testing.assert_close(done.logp, expected, rtol=0, atol=1e-4)


def test_refill_and_prefix_sharing_change_no_token(monkeypatch):
    model, asked = tiny_model(dtype=torch.float64), requests()
    alone = [Generator(model).sample([request])[0] for request in asked]
    for slots in (1, 3, 7, 64):
        monkeypatch.setattr(generate, "MAX_SLOTS", slots)
        together = Generator(model).sample(asked)
        assert tokens(together) == tokens(alone)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-6)


def test_a_repeated_call_gives_the_same_tokens_and_log_probs():
    model, asked = tiny_model(), requests()
    generator = Generator(model)
    first, again = generator.sample(asked), generator.sample(asked)
    fresh = Generator(model).sample(asked)
    for other in (again, fresh):
        assert tokens(first) == tokens(other)
        assert all(torch.equal(a.logp, b.logp) for a, b in zip(first, other, strict=True))


def test_batch_invariant_mode_gives_the_same_bits_in_any_company():
    model, asked = tiny_model(), requests()
    generator = Generator(model, batch_invariant=True)
    together, half = generator.sample(asked), generator.sample(asked[1::2][::-1])[::-1]
    for a, b in zip(together[1::2], half, strict=True):
        assert a.token_ids == b.token_ids
        assert torch.equal(a.logp, b.logp)


def test_weights_changed_in_place_are_seen_at_once():
    model, asked = tiny_model(), requests(3)
    generator = Generator(model)
    before = generator.sample(asked)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    after = generator.sample(asked)
    assert tokens(before) != tokens(after)
    expected = trainer_logp(model, asked[0], after[0])
    torch.testing.assert_close(after[0].logp, expected, rtol=0, atol=1e-4)


def test_length_limit_and_stop_tokens_end_a_completion():
    model = tiny_model()
    asked = requests(stop_ids=(), max_new_tokens=9)
    done = Generator(model).sample(asked)
    assert {(c.finish_reason, len(c.token_ids)) for c in done} == {("length", 9)}
    stop = done[0].token_ids[4]
    stopped = Generator(model).sample([replace(asked[0], stop_ids=(stop,))])[0]
    end = done[0].token_ids.index(stop) + 1  # the stop token is included
    assert stopped.token_ids == done[0].token_ids[:end]
    assert stopped.finish_reason == "stop"
    assert len(stopped.logp) == end


def test_the_models_own_eos_is_the_default_stop():
    model = tiny_model(eos_token_id=[1, 50])
    asked = requests(200, max_new_tokens=40, temperature=1.5)
    done = Generator(model).sample(asked)
    stopped = [c for c in done if c.finish_reason == "stop"]
    assert stopped
    assert all(c.token_ids[-1] in (1, 50) for c in stopped)
    assert not any({1, 50} & set(c.token_ids[:-1]) for c in done)


def test_stop_string_across_token_borders():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    free = Generator(model).sample(requests(1, max_new_tokens=12, stop_ids=()))[0]
    text = tokenizer.decode(free.token_ids)
    stop = text[3:6]  # three characters, and so up to three tokens
    asked = requests(1, max_new_tokens=12, stop_ids=(), stop_strings=(stop,))
    done = Generator(model, tokenizer=tokenizer).sample(asked)[0]
    assert done.finish_reason == "stop"
    assert stop in tokenizer.decode(done.token_ids)
    assert stop not in tokenizer.decode(done.token_ids[:-1])


def test_budget_bounds_the_cache_and_changes_no_token():
    model, asked = tiny_model(dtype=torch.float64), requests()
    token = generate.Cache.bytes_per_token(model)
    generator = Generator(model, kv_cache_bytes=50 * token)
    assert tokens(generator.sample(asked)) == tokens(Generator(model).sample(asked))
    assert generator._cache is not None
    slab = generator._cache.slab
    assert slab.numel() * slab.element_size() <= 50 * token
    with pytest.raises(ValueError, match=f"kv_cache_bytes={token} holds no sequence"):
        Generator(model, kv_cache_bytes=token).sample(asked)


def test_a_nan_ends_its_request_and_leaves_no_trace():
    model, asked = tiny_model(), requests(3)
    generator = Generator(model)
    sampled = {t for done in generator.sample(asked) for t in done.token_ids}
    bad = next(t for t in range(40, 100) if t not in sampled)
    asked += [replace(r, prompt_ids=(*SHARED, 30, bad)) for r in asked]
    clean = generator.sample(asked)
    weight = model.model.embed_tokens.weight
    with torch.no_grad():
        kept = weight[bad].clone()
        weight[bad] = torch.nan
    poisoned = generator.sample(asked)
    assert [c.finish_reason for c in poisoned[3:]] == ["error"] * 3
    assert tokens(poisoned[:3]) == tokens(clean[:3])
    with torch.no_grad():
        weight[bad] = kept
    assert tokens(generator.sample(asked)) == tokens(clean)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt_ids": ()}, "request 0 has an empty prompt"),
        ({"max_new_tokens": 0}, "max_new_tokens=0, need at least 1"),
        ({"max_new_tokens": 250}, "8 prompt . 250 new tokens, the model's context holds 256"),
        ({"prompt_ids": (5, 100_000)}, "token id outside"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": 1e-40}, "temperature=1e-40"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"stop_strings": "ab"}, "stop_strings='ab'"),
        ({"stop_strings": ("",)}, "need non-empty strings"),
        ({"stop_strings": ("x",)}, "give Generator a tokenizer"),
    ],
)
def test_an_impossible_request_is_refused_before_any_work(changes, sentence):
    asked = requests(1, **changes)
    with pytest.raises(ValueError, match=sentence):
        next(Generator(tiny_model()).stream(asked))


def test_no_request_no_work():
    assert Generator(tiny_model()).sample([]) == []
