"""`Generator` samples completions, with the log-probs of a full forward."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from expo_fast import generate
from expo_fast.algorithms.logprobs import ForwardOptions, completion_logprobs
from expo_fast.generate import Completion, Generator, Request
from expo_fast.inference import cpu_engine
from expo_fast.inference.cpu_engine import NativeEngine
from expo_fast.inference.engine import Engine
from expo_fast.inference.exact_hidden import exact_hidden
from expo_fast.inference.torch_engine import TorchEngine
from expo_fast.modeling.decoder import Decoder
from expo_fast.modeling.packing import Sample
from expo_fast.op_backends import dispatch, native_library
from judges import completion_logps, max_error
from tiny import VARIANTS, tiny_model, tiny_tokenizer

SHARED = (20, 21, 22, 23, 24, 25, 26)
SEVERAL_PAGES = tuple(20 + i % 60 for i in range(75))


@pytest.fixture(params=["torch", "native"])
def backend(request) -> str:
    return request.param


def requests(n: int = 24, shared: tuple[int, ...] = SHARED, **changes) -> list[Request]:
    """Return groups of three requests on prompts of several lengths with a common prefix."""
    asked = [
        Request((*shared, *range(30, 31 + i // 3)), 4 + i % 9, temperature=0.8, seed=i)
        for i in range(n)
    ]
    return [replace(r, **changes) for r in asked]


BATCHED = ("llama", "qwen2-windows", "gemma3", "olmo2")  # also with one row and with many


@torch.no_grad()
def full_forward_logps(model: Decoder, request: Request, done: Completion) -> Tensor:
    """Return the log-probs (N,) of a completion's tokens; greedy ones have temperature 1."""
    temperature = request.temperature or 1.0
    return completion_logps(model, request.prompt_ids, done.token_ids, temperature)


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [done.token_ids for done in completions]


def same(a: list[Completion], b: list[Completion]) -> bool:
    bits = all(torch.equal(x.logp, y.logp) for x, y in zip(a, b, strict=True))
    return tokens(a) == tokens(b) and bits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rows"),
    [(kind, 5) for kind in VARIANTS] + [(kind, rows) for kind in BATCHED for rows in (1, 64)],
)
def test_log_probs_are_those_of_a_full_forward(kind: str, rows: int, backend: str, monkeypatch):
    monkeypatch.setattr(generate, "MAX_ROWS", rows)
    model = tiny_model(kind)
    asked = requests(12) + requests(12, SEVERAL_PAGES, max_new_tokens=40)
    done = Generator(model, backend=backend).sample(asked)
    for request, completion in zip(asked, done, strict=True):
        expected = full_forward_logps(model, request, completion)
        torch.testing.assert_close(completion.logp, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefill", [1, 7, 512])
def test_long_prompts_may_be_computed_in_pieces(prefill: int, backend: str, monkeypatch):
    asked = requests(6, SEVERAL_PAGES)
    at_once = Generator(tiny_model(), backend=backend).sample(asked)
    monkeypatch.setattr(Engine, "prefill_tokens", prefill)
    in_pieces = Generator(tiny_model(), backend=backend).sample(asked)
    for a, b in zip(in_pieces, at_once, strict=True):
        torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-5)


def test_refill_and_prefix_sharing_change_no_token(monkeypatch):
    model = tiny_model(dtype=torch.float64)
    asked = requests() + requests(6, SEVERAL_PAGES)
    alone = [Generator(model).sample([request])[0] for request in asked]
    for rows in (1, 3, 7, 64):
        monkeypatch.setattr(generate, "MAX_ROWS", rows)
        together = Generator(model).sample(asked)
        assert tokens(together) == tokens(alone)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-6)


def test_a_repeated_call_gives_the_same_tokens_and_log_probs(backend: str):
    model = tiny_model()
    asked = requests()
    generator = Generator(model, backend=backend)
    first = generator.sample(asked)
    assert same(first, generator.sample(asked))
    assert same(first, Generator(model, backend=backend).sample(asked))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exact", [False, True])
def test_batch_order_and_refill_change_no_bit(dtype, exact: bool, monkeypatch):
    model = tiny_model("qwen3", dtype=dtype)
    asked = requests() + requests(9, SEVERAL_PAGES, temperature=1.3, top_p=0.9)
    generator = Generator(model, backend="native", batch_invariant=exact)
    together = generator.sample(asked)
    for rows in (1, 3, 20):
        monkeypatch.setattr(generate, "MAX_ROWS", rows)
        assert same(generator.sample(asked), together)
        half = generator.sample(asked[1::2][::-1])[::-1]
        assert same(half, together[1::2])
    assert same([generator.sample([r])[0] for r in asked], together)
    torch.set_num_threads(before := torch.get_num_threads())
    try:
        torch.set_num_threads(3)
        three = generator.sample(asked)
    finally:
        torch.set_num_threads(before)
    assert tokens(three) == tokens(together)


def test_the_batch_invariant_mode_samples_one_by_one_in_pytorch():
    model = tiny_model()
    asked = requests()
    generator = Generator(model, batch_invariant=True, backend="torch")
    together = generator.sample(asked)
    half = generator.sample(asked[1::2][::-1])[::-1]
    assert same(half, together[1::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "smollm3-windows"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_recomputes_the_same_bits_in_the_batch_invariant_mode(kind, dtype, temperature):
    model = tiny_model(kind, dtype=dtype)
    asked = requests(temperature=temperature) + requests(6, SEVERAL_PAGES, temperature=temperature)
    done = Generator(model, batch_invariant=True).sample(asked)
    samples = [
        Sample(tuple(r.prompt_ids), tuple(c.token_ids)) for r, c in zip(asked, done, strict=True)
    ]

    def gap(pack_tokens: int) -> float:
        scored = completion_logprobs(model, samples, ForwardOptions(temperature, pack_tokens))
        return max_error(torch.cat(scored), torch.cat([c.logp for c in done]))

    assert gap(4096) > 0
    model.exact = exact_hidden(model)
    for pack_tokens in (4096, 100):
        assert gap(pack_tokens) == 0


def test_exact_hidden_states_have_the_gradients_of_pytorch():
    model = tiny_model()
    given = (torch.arange(20, 32), torch.arange(12), torch.tensor([0, 12], dtype=torch.int32))
    upstream = torch.randn(12, 48)
    weights = list(model.parameters())[:-1]  # without the LM head, the last one
    expected = torch.autograd.grad((model.hidden(*given) * upstream).sum(), weights)
    model.exact = exact_hidden(model)
    found = torch.autograd.grad((model.hidden(*given) * upstream).sum(), weights)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_weights_changed_in_place_are_used_at_once(backend: str):
    model = tiny_model()
    asked = requests(3)
    generator = Generator(model, backend=backend)
    before = generator.sample(asked)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    after = generator.sample(asked)
    assert tokens(before) != tokens(after)
    expected = full_forward_logps(model, asked[0], after[0])
    torch.testing.assert_close(after[0].logp, expected, rtol=0, atol=1e-4)


def test_length_limit_and_stop_tokens_end_a_completion(backend: str):
    model = tiny_model()
    asked = requests(stop_ids=(), max_new_tokens=9)
    done = Generator(model, backend=backend).sample(asked)
    assert {(c.finish_reason, len(c.token_ids)) for c in done} == {("length", 9)}
    stop = done[0].token_ids[4]
    stopped = Generator(model, backend=backend).sample([replace(asked[0], stop_ids=(stop,))])[0]
    end = done[0].token_ids.index(stop) + 1  # the stop token is included
    assert stopped.token_ids == done[0].token_ids[:end]
    assert stopped.finish_reason == "stop"
    assert len(stopped.logp) == end


def test_the_models_own_eos_is_the_default_stop(backend: str):
    model = tiny_model(eos_token_id=[1, 50])
    asked = requests(200, max_new_tokens=40, temperature=1.5)
    done = Generator(model, backend=backend).sample(asked)
    stopped = [c for c in done if c.finish_reason == "stop"]
    assert stopped
    assert all(c.token_ids[-1] in (1, 50) for c in stopped)
    assert not any({1, 50} & set(c.token_ids[:-1]) for c in done)


def test_a_stop_string_is_found_across_token_borders(backend: str):
    model = tiny_model()
    tokenizer = tiny_tokenizer()
    free = Generator(model, backend=backend).sample(requests(1, max_new_tokens=12, stop_ids=()))[0]
    text = tokenizer.decode(free.token_ids)
    stop = text[3:6]  # three characters, and so up to three tokens
    asked = requests(1, max_new_tokens=12, stop_ids=(), stop_strings=(stop,))
    done = Generator(model, tokenizer=tokenizer, backend=backend).sample(asked)[0]
    assert done.finish_reason == "stop"
    assert stop in tokenizer.decode(done.token_ids)
    assert stop not in tokenizer.decode(done.token_ids[:-1])


def test_a_memory_budget_bounds_the_cache_and_changes_no_token(backend: str, monkeypatch):
    model = tiny_model()
    asked = requests() + requests(6, SEVERAL_PAGES)
    generator = Generator(model, backend=backend)
    engine = type(generator.engine())
    opened = []
    page = generator.engine().page_bytes()

    def open_(self, n_pages, n_positions, open=engine.open):
        opened.append(n_pages * page)
        open(self, n_pages, n_positions)

    monkeypatch.setattr(engine, "open", open_)
    free = generator.sample(asked)
    for pages in (20, 8, 6):
        generator.kv_cache_bytes = pages * page
        bound = generator.sample(asked)
        assert tokens(bound) == tokens(free)
        assert page < opened[-1] <= pages * page < opened[0]
    generator.kv_cache_bytes = 2 * page
    with pytest.raises(
        ValueError, match=f"kv_cache_bytes={2 * page} cannot hold request 24 of 79 tokens"
    ):
        generator.sample(asked)


def test_memory_is_returned_after_sampling_and_after_an_interruption(monkeypatch):
    model = tiny_model()
    asked = requests()
    engines: list[NativeEngine] = []

    class Spy(NativeEngine):
        calls = 0

        def open(self, *sizes):
            super().open(*sizes)
            engines.append(self)

        def run(self, tokens):
            Spy.calls += 1
            if Spy.calls == 8:
                raise KeyboardInterrupt
            return super().run(tokens)

    monkeypatch.setattr(cpu_engine, "NativeEngine", Spy)
    generator = Generator(model, backend="native")
    with pytest.raises(KeyboardInterrupt):
        generator.sample(asked)
    again = generator.sample(asked)
    assert len(engines) == 2
    assert not any(engine._opened or engine.workspace.numel() for engine in engines)
    monkeypatch.undo()
    assert same(again, Generator(model, backend="native").sample(asked))


def test_longest_requests_start_first_and_completions_come_as_they_finish(monkeypatch):
    monkeypatch.setattr(generate, "MAX_ROWS", 1)
    asked = [Request((20, 21, i), n, stop_ids=()) for i, n in ((30, 3), (31, 9), (32, 6))]
    stream = Generator(tiny_model()).stream(asked)
    assert [i for i, _ in stream] == [1, 2, 0]


class Adapter(torch.nn.Module):
    """Stands for the layer that LoRA puts in place of a projection."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.base = base
        self.extra = torch.nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.extra(x)


def test_sampling_goes_through_adapters_and_hooks():
    asked = requests(6)
    model = tiny_model()
    assert isinstance(Generator(model).engine(), NativeEngine)
    hook = model.model.norm.register_forward_hook(lambda *_: _[2] * 2)
    doubled = Generator(model).sample(asked)
    expected = full_forward_logps(model, asked[0], doubled[0])
    torch.testing.assert_close(doubled[0].logp, expected, rtol=0, atol=1e-4)
    hook.remove()
    attention = model.model.layers[1].self_attn
    assert isinstance(attention, torch.nn.Module)
    attention.v_proj = Adapter(attention.v_proj)  # pyright: ignore[reportArgumentType]
    assert isinstance(Generator(model).engine(), TorchEngine)
    for request, done in zip(asked, Generator(model).sample(asked), strict=True):
        expected = full_forward_logps(model, request, done)
        torch.testing.assert_close(done.logp, expected, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"the C\+\+ engine does not run this model"):
        Generator(model, backend="native").sample(asked)


def test_a_forward_set_on_a_module_instance_is_called():
    model = tiny_model()
    own = model.model.norm.forward
    model.model.norm.forward = lambda x: 2 * own(x)
    assert isinstance(Generator(model).engine(), TorchEngine)


def test_parameters_that_move_while_sampling_raise():
    model = tiny_model()
    stream = Generator(model, backend="native").stream(requests())
    next(stream)
    model.bfloat16()
    with pytest.raises(RuntimeError, match="parameters were moved during sampling"):
        list(stream)


def test_training_in_place_while_sampling_changes_what_is_sampled():
    model = tiny_model()
    before = Generator(model).sample(requests())
    stream = Generator(model).stream(requests())
    done = dict([next(stream)])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    done |= dict(stream)
    assert tokens([done[i] for i in range(24)]) != tokens(before)


def test_without_a_compiler_pytorch_samples_and_warns(monkeypatch):
    def library(name: str, part: str = "ops"):
        raise native_library.Unavailable(f"no compiler for {part}")

    monkeypatch.setattr(native_library, "library", library)
    monkeypatch.setattr(native_library, "isa", lambda: "portable")
    dispatch.compiles.cache_clear()
    try:
        with pytest.warns(UserWarning, match="slower: no compiler for engine"):
            assert isinstance(Generator(tiny_model()).engine(), TorchEngine)
    finally:
        dispatch.compiles.cache_clear()


def test_an_out_of_memory_error_is_not_caught(monkeypatch):
    def fail(self, n_pages, n_positions):
        raise MemoryError("none left")

    monkeypatch.setattr(NativeEngine, "open", fail)
    with pytest.raises(MemoryError, match="none left"):
        Generator(tiny_model(), backend="native").sample(requests())


def test_a_request_too_large_is_refused_before_any_sampling():
    model = tiny_model()
    generator = Generator(model, batch_invariant=True, backend="torch")
    generator.kv_cache_bytes = 5 * generator.engine().page_bytes()
    with pytest.raises(ValueError, match="cannot hold request 1 of 139 tokens"):
        next(generator.stream([Request((20, 21), 4), Request(tuple(range(20, 60)), 100)]))


def test_the_default_dtype_and_device_of_torch_change_nothing(backend: str):
    model = tiny_model()
    asked = requests()
    expected = Generator(model, backend=backend).sample(asked)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = Generator(model, backend=backend).sample(asked)
    finally:
        torch.set_default_dtype(before)
    assert same(found, expected)
    if backend == "native":
        with torch.device("meta"):
            assert same(Generator(model, backend=backend).sample(asked), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend: str, dtype, cast_to):
    """It would write keys in another dtype than the cache's."""
    generator = Generator(tiny_model(dtype=dtype), backend=backend)
    expected = generator.sample(requests())
    with torch.autocast("cpu", dtype=cast_to):
        found = generator.sample(requests())
        assert torch.is_autocast_enabled("cpu")
    assert same(found, expected)


def test_a_consumer_keeps_its_modes_while_it_has_results(backend: str):
    with torch.autocast("cpu"), torch.inference_mode():
        for _ in Generator(tiny_model(), backend=backend).stream(requests()):
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_inference_mode_enabled()


def test_token_ids_may_be_any_integers(backend: str):
    model, (asked,) = tiny_model(), requests(1)
    for ids in (np.array(asked.prompt_ids, np.int32), torch.tensor(asked.prompt_ids).int()):
        other = replace(asked, prompt_ids=ids)
        generator = Generator(model, backend=backend)
        assert same(generator.sample([other]), generator.sample([asked]))


def test_a_common_prefix_is_computed_once(monkeypatch):
    seen: list[int] = []

    def run(self, asked, run=NativeEngine.run):
        seen.append(len(asked.ids))
        return run(self, asked)

    monkeypatch.setattr(NativeEngine, "run", run)
    Generator(tiny_model(), backend="native").sample(requests(12, max_new_tokens=1))
    own = [1 + i // 3 for i in range(0, 12, 3)]  # tokens after SHARED; the first is shared too
    assert sum(seen) == len(SHARED) + sum(own)


@pytest.mark.parametrize("exact", [False, True])
def test_greedy_tokens_have_their_log_prob_at_temperature_one(exact: bool, backend: str):
    if exact and backend == "torch":
        pytest.skip("only csrc's log-probs are the ops'")
    model = tiny_model()
    asked = requests(6, temperature=0.0)
    done = Generator(model, backend=backend, batch_invariant=exact).sample(asked)
    for request, completion in zip(asked, done, strict=True):
        expected = full_forward_logps(model, request, completion)
        torch.testing.assert_close(completion.logp, expected, rtol=0, atol=1e-4)


def test_the_batch_invariant_mode_is_refused_where_csrc_cannot_run_the_model():
    with pytest.raises(ValueError, match=r"this model of torch\.float64 on cpu"):
        exact_hidden(tiny_model(dtype=torch.float64))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='vllm'"):
        Generator(tiny_model(), backend="vllm")


def test_a_nan_ends_its_request_and_changes_no_other_completion(backend: str):
    model = tiny_model()
    asked = requests(3)
    generator = Generator(model, backend=backend)
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
        ({"prompt_ids": (5, 100_000)}, "the token id 100000 outside"),
        ({"prompt_ids": (20.5, 21.0)}, "prompt_ids=.20.5, 21.0.: need a sequence of integers"),
        ({"max_new_tokens": 5.5}, "max_new_tokens=5.5: need an integer"),
        ({"top_k": 2**70}, "top_k=1180591620717411303424: need an integer"),
        ({"seed": "a"}, "seed='a': need an integer"),
        ({"stop_ids": 5}, "stop_ids=5: need a sequence of integers"),
        ({"stop_ids": (5, 117)}, "request 0 has the stop id 117 outside .0, 117."),
        ({"stop_ids": (-1,)}, "request 0 has the stop id -1 outside .0, 117."),
        ({"stop_strings": (5,)}, "need non-empty strings"),
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
def test_an_invalid_request_is_refused_before_any_sampling(changes, sentence):
    asked = requests(1, **changes)
    with pytest.raises(ValueError, match=sentence):
        next(Generator(tiny_model()).stream(asked))


def test_no_requests_give_no_completions():
    assert Generator(tiny_model()).sample([]) == []


def test_prompts_rebuilt_at_each_access_are_not_confused():
    """The id() of such a list may be that of an earlier, freed list."""

    class Fresh(Request):
        @property
        def prompt_ids(self):  # pyright: ignore[reportIncompatibleVariableOverride]
            return [5 + self.seed, 6]

        @prompt_ids.setter
        def prompt_ids(self, value):
            pass

    model = tiny_model()
    fresh = [object.__new__(Fresh) for _ in range(3)]
    plain = [Request([5 + i, 6], 3, seed=i, stop_ids=()) for i in range(3)]
    for one, like in zip(fresh, plain, strict=True):
        vars(one).update({k: v for k, v in vars(like).items() if k != "prompt_ids"})
    expected = [done.token_ids for done in Generator(model).sample(plain)]
    assert [done.token_ids for done in Generator(model).sample(fresh)] == expected


def test_what_is_no_request_is_refused():
    generator = Generator(tiny_model())
    request = Request((5, 6), 2)
    with pytest.raises(ValueError, match="must be a sequence of them"):
        generator.sample(request)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="request 0 is a list: must be a Request"):
        generator.sample([[5, 6]])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="request 0 has prompt_ids of 2 dimensions"):
        generator.sample([Request(torch.tensor([[5, 6]]), 2)])  # pyright: ignore[reportArgumentType]
