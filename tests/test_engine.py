"""The engines draw from the model's distribution, and csrc agrees with PyTorch."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

from distribution import allowed, assert_drawn_from
from expo_fast.generate import Generator, Request
from expo_fast.inference import native_structs
from expo_fast.inference.cpu_engine import NativeEngine
from expo_fast.inference.engine import Engine
from expo_fast.inference.kv_pages import Pages, pages_for
from expo_fast.inference.prefill import Segment, prefill_batches
from expo_fast.inference.sampling import Sampling, Truncation
from expo_fast.inference.stop_rules import StopRules
from expo_fast.inference.torch_engine import TorchEngine
from expo_fast.op_backends import native_library
from expo_fast.weights import load_model
from judges import error_norm, hidden_states, logps_of
from tiny import VARIANTS, tiny_model

V = 700  # several tiles of csrc, the last one partial
DRAWS = 20_000
ISAS = [name for name in native_library.COMPILER_FLAGS if native_library.supports_isa(name)]
# together they have every flag of csrc/decoder.cpp
ALL_FLAGS = ("llama-biases", "qwen3", "smollm3-windows", "gemma3", "olmo3", "granite")
ALL_FLAGS += ("phi3-longrope",)


def sampling(
    n: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Sampling:
    cut = Truncation(torch.full((n,), top_k), torch.full((n,), top_p), torch.full((n,), min_p))
    return Sampling(torch.arange(n), torch.full((n,), temperature), cut)


def opened(engine):
    engine.open(2, 8)
    return engine


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TorchEngine, NativeEngine])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.0, 0, 1.0, 0.2),
        (0.8, 40, 0.9, 0.05),
    ],
)
def test_frequencies_match_the_distribution(kind, dtype, temperature, top_k, top_p, min_p):
    model = tiny_model(vocab_size=V, dtype=dtype)
    engine = opened(kind(model))
    hidden = (torch.randn(48) / 2).to(dtype)
    logits = model.head_weight.detach().double() @ hidden.double() / temperature
    expected = DRAWS * allowed(logits.softmax(-1), top_k, top_p, min_p)
    counts = torch.zeros(V)
    logp = logits.log_softmax(-1)
    asked = sampling(DRAWS, temperature, top_k, top_p, min_p)
    for rows in torch.arange(DRAWS).split(2000):
        drawn = engine.draw(hidden.expand(len(rows), -1).contiguous(), rows * 0 + 7, asked[rows])
        counts += torch.bincount(drawn[0], minlength=V)
        torch.testing.assert_close(drawn[1].double(), logp[drawn[0]], rtol=0, atol=5e-6)
    assert_drawn_from(counts, expected)


def test_both_engines_draw_the_same_tokens():
    model = tiny_model(vocab_size=V)
    n = 500
    hidden = torch.randn(n, 48)
    positions = torch.arange(n)
    asked = sampling(n)
    asked.temperature[:50] = 0
    asked.truncation.top_p[25:100] = 0.7
    engines = [opened(kind(model)) for kind in (TorchEngine, NativeEngine)]
    a, b = (engine.draw(hidden, positions, asked) for engine in engines)
    assert int((a[0] != b[0]).sum()) <= 1  # a uniform number may fall between two roundings
    equal = a[0] == b[0]
    torch.testing.assert_close(a[1][equal], b[1][equal], rtol=0, atol=2e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_reported_and_leave_other_rows_unchanged(bad: float):
    model = tiny_model(vocab_size=V)
    hidden = torch.randn(3, 48)
    engine = opened(NativeEngine(model))
    asked = sampling(3)
    clean = engine.draw(hidden, torch.arange(3), asked)
    hidden[1, 5] = bad
    tokens, logp = engine.draw(hidden, torch.arange(3), asked)
    assert logp.isnan().tolist() == [False, True, False]
    assert torch.equal(tokens[::2], clean[0][::2])
    assert torch.equal(logp[::2], clean[1][::2])


def engine_hidden_states(engine, lengths: list[int]) -> list[Tensor]:
    """Return those (T, D) of sequences of the given lengths, on pages that held NaN before."""
    pages = Pages(1 + sum(pages_for(n, engine.page) for n in lengths), engine.page)
    engine.open(len(pages), max(lengths))
    slab = engine.slab if isinstance(engine, TorchEngine) else engine.opened.pages
    slab.view(torch.uint8).fill_(255)  # NaN in any dtype
    random = torch.Generator().manual_seed(1)
    segments = [
        Segment(torch.randint(4, 90, (n,), generator=random), 0, pages.fork([], 0, n)[0])
        for n in lengths
    ]
    return prefill(engine, segments)


def prefill(engine: Engine, segments: list[Segment]) -> list[Tensor]:
    """Return the hidden states (T, D) of each segment."""
    found: list[list[Tensor]] = [[] for _ in segments]
    for batch in prefill_batches(segments, engine.prefill_tokens):
        hidden = engine.run(batch.tokens()).split(batch.lengths)
        for piece, rows in zip(batch.pieces, hidden, strict=True):
            found[piece.index].append(rows)
    return [torch.cat(parts) for parts in found]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "isa"),
    [(kind, ISAS[-1]) for kind in VARIANTS]
    + [(kind, isa) for kind in ALL_FLAGS for isa in ISAS[:-1]],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_at_most_twice_those_of_plain_pytorch(kind: str, dtype, isa: str, monkeypatch):
    monkeypatch.setenv("EXPO_FAST_ISA", isa)
    lengths = [1, 16, 33, 70, 31]
    model = tiny_model(kind, dtype=dtype)
    exact = engine_hidden_states(TorchEngine(tiny_model(kind, dtype=dtype).double()), lengths)
    plain = engine_hidden_states(TorchEngine(model), lengths)
    ours = engine_hidden_states(NativeEngine(model), lengths)

    def error(found: list[Tensor]) -> float:
        return error_norm(torch.cat(found), torch.cat(exact))

    assert error(ours) <= 2 * error(plain)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dtype", "window"), [(torch.bfloat16, None), (torch.float32, 37), (torch.bfloat16, 150)]
)
def test_long_contexts_are_right_and_independent_of_their_neighbours(
    dtype, window: int | None, isa: str, monkeypatch
):
    monkeypatch.setenv("EXPO_FAST_ISA", isa)
    # Scores become weights four pages of 32 tokens at a time. A window begins inside such a span.
    lengths = [200, 129, 128, 5]
    flags = {} if window is None else {"sliding_window": window}
    kind = "llama" if window is None else "smollm3-windows"
    model = tiny_model(kind, dtype=dtype, **flags)
    in_fp64 = tiny_model(kind, dtype=dtype, **flags).double()
    exact = engine_hidden_states(TorchEngine(in_fp64), lengths)
    plain = engine_hidden_states(TorchEngine(model), lengths)
    engine = NativeEngine(model)
    ours = engine_hidden_states(engine, lengths)
    allowed = 2 * error_norm(torch.cat(plain), torch.cat(exact))
    assert error_norm(torch.cat(ours), torch.cat(exact)) <= allowed
    engine.prefill_tokens = 21  # in pieces, beside other rows
    assert all(map(torch.equal, engine_hidden_states(engine, lengths), ours))


def test_samples_of_long_prompts_are_independent_of_their_neighbours():
    # Rows share four pages of 32 tokens, and then have pages of their own in the same span.
    first = tuple(4 + i % 80 for i in range(140))
    second = (*first[:130], *range(50, 70))
    asked = [
        Request(prompt, 9, seed=i, stop_ids=()) for i in range(3) for prompt in (first, second)
    ]
    generator = Generator(tiny_model("qwen3", dtype=torch.bfloat16))
    together = generator.sample(asked)
    for request, found in zip(asked, together, strict=True):
        (alone,) = generator.sample([request])
        assert found.token_ids == alone.token_ids
        assert torch.equal(found.logp, alone.logp)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_instruction_set_and_number_of_threads_samples_the_same(isa, threads, monkeypatch):
    model = tiny_model("qwen3", vocab_size=V)
    asked = [Request((20, 21, 30 + i % 4), 12, seed=i, stop_ids=()) for i in range(20)]
    expected = Generator(model, backend="torch").sample(asked)
    monkeypatch.setenv("EXPO_FAST_ISA", isa)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = Generator(model, backend="native").sample(asked)
    finally:
        torch.set_num_threads(before)
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


@pytest.mark.parametrize("sizes", [{"head_dim": 80}, {"head_dim": 24, "num_key_value_heads": 6}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_unaligned_sizes_are_at_most_twice_those_of_plain_pytorch(sizes, dtype):
    model = tiny_model(dtype=dtype, intermediate_size=86, hidden_size=42, **sizes)
    exact = engine_hidden_states(TorchEngine(model.double()), [40, 3])
    model = model.to(dtype)
    plain = engine_hidden_states(TorchEngine(model), [40, 3])
    ours = engine_hidden_states(NativeEngine(model), [40, 3])
    for a, b, c in zip(ours, plain, exact, strict=True):
        assert error_norm(a, c) <= 2 * error_norm(b, c)


def test_a_struct_that_differs_from_csrc_is_refused(monkeypatch):
    class Short(ctypes.Structure):
        _fields_ = native_structs.DrawStruct._fields_[1:]  # without `hidden`

    native_library.checked_library.cache_clear()
    monkeypatch.setitem(native_structs.STRUCTS, "draw", Short)
    with pytest.raises(RuntimeError, match=r"struct draw has .* bytes in Python"):
        NativeEngine(tiny_model())


@pytest.mark.parametrize(
    ("token_ids", "reason"), [([7], None), ([7, 5], "stop"), ([7, 7, 7], "length")]
)
def test_the_last_token_decides_whether_a_completion_ends(token_ids, reason):
    rules = StopRules(eos_ids=(5,), tokenizer=None)
    assert rules.finish_reason(Request((4,), max_new_tokens=3), token_ids) == reason


def test_a_stop_token_within_the_limit_is_a_stop():
    rules = StopRules(eos_ids=(5,), tokenizer=None)
    assert rules.finish_reason(Request((4,), max_new_tokens=1), [5]) == "stop"


@pytest.fixture(scope="module")
def smollm():
    return load_model("smollm2-135m")


@pytest.mark.parametrize("stop", ["\U0001f642", "né", "two  ", "Question:", " "])
def test_stop_strings_are_found_where_a_character_has_several_tokens(stop: str, smollm):
    _, tokenizer = smollm
    text = f"one {stop}three"
    ids = tokenizer(text).input_ids
    rules = StopRules((), tokenizer)
    request = Request((5,), 50, stop_strings=(stop,))
    ends = range(1, len(ids) + 1)
    stopped = [n for n in ends if rules.finish_reason(request, ids[:n]) == "stop"]
    expected = [n for n in ends if stop in tokenizer.decode(ids[:n])]
    assert stopped and stopped[0] == expected[0]


@pytest.mark.slow
@torch.no_grad()
def test_the_bf16_gap_to_the_trainer_is_no_larger_than_within_transformers(smollm, tmp_path):
    """The gap is between a cached decode and a full forward of the same tokens."""
    from transformers import AutoModelForCausalLM

    from expo_fast.weights import save_model

    model, tokenizer = smollm
    save_model(model, tokenizer, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    prompt = tokenizer("Anna has 12 apples and buys 5 more. How many does she have?").input_ids
    asked = [Request(prompt, 32, seed=i, stop_ids=()) for i in range(12)]
    done = Generator(model).sample(asked)
    n = len(prompt)
    ours = []
    for completion in done:
        tokens = torch.tensor([*prompt, *completion.token_ids])
        # Logits are bf16, as transformers computes its own.
        logits = (hidden_states(model, tokens) @ model.head_weight.T).float()
        ours.append(logps_of(logits[n - 1 : -1], tokens[n:]) - completion.logp)
    sequences = torch.tensor([[*prompt, *completion.token_ids] for completion in done])
    targets = sequences[:, n:]
    full = theirs(sequences).logits[:, n - 1 : -1].float()
    cache = theirs(sequences[:, :n], use_cache=True)
    steps = []
    for column in targets.T:
        steps.append(cache.logits[:, -1].float())
        cache = theirs(column[:, None], past_key_values=cache.past_key_values, use_cache=True)
    cached = torch.stack(steps, 1)
    own = logps_of(full.flatten(0, 1), targets.flatten())
    own -= logps_of(cached.flatten(0, 1), targets.flatten())
    gap, allowed = torch.cat(ours).abs(), own.abs()
    assert float(gap.mean()) <= 1.2 * float(allowed.mean())
    assert float(gap.square().mean()) <= 1.2**2 * float(allowed.square().mean())
