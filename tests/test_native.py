"""Compare the CPU kernels, on each instruction set of this machine, with fp64 and plain PyTorch."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expo_fast.kernels import reference
from expo_fast.kernels.head import Head, Needs, RowGrads
from expo_fast.op_backends import cpu, dispatch, native_head, native_library
from expo_fast.ops import linear_logprob
from judges import linear_results, max_error, relative_error, results_of_head

ISAS = [name for name in native_library.COMPILER_FLAGS if native_library.supports_isa(name)]
BOTH = (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)
MIXED = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16,) * 2


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    monkeypatch.setenv("EXPO_FAST_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_head(n, d, v, dtypes, *, spread=1.0) -> Head:
    g = torch.Generator().manual_seed(n + d + v)
    hidden = (torch.randn(n, d, generator=g) * spread).to(dtypes[0])
    weight = torch.randn(v, d, generator=g).to(dtypes[1])
    bias, temperature = torch.randn(v, generator=g), torch.rand(n, generator=g) + 0.5
    return Head(hidden, weight, bias, torch.randint(v, (n,), generator=g), temperature)


def by_definition(head: Head, upstream: Tensor) -> list[Tensor]:
    """Return logp, entropy, lse, and the gradients of hidden, weight and bias, in fp64."""
    return results_of_head(linear_results, head, upstream, torch.float64)


def by_plain_pytorch(head: Head, upstream: Tensor) -> list[Tensor]:
    """Return the same as `by_definition`, by PyTorch in fp32."""
    return results_of_head(reference.linear_logprob, head, upstream, torch.float32)


def by_kernels(head: Head, upstream: Tensor) -> list[Tensor]:
    forward = cpu.log_probs(head)
    row_grads = RowGrads(upstream[0], upstream[1], upstream[2])
    grads = cpu.gradients(head, forward, row_grads, Needs(True, True, True))
    return [x for x in (*forward.results.to(torch.float32), *grads) if x is not None]


SHAPES = [(1, 1, 2), (5, 7, 3), (63, 33, 1000), (130, 64, 509), (1100, 30, 77), (17, 130, 1531)]
# A span of at most 64 rows multiplies the weight without a copy.
SHAPES += [(1, 16, 3), (2, 16, 255), (15, 64, 1009), (64, 20, 130), (65, 20, 130)]
SHAPES += [(1030, 30, 77)]  # the last span is one of few rows


@pytest.mark.parametrize("dtypes", [*BOTH, *MIXED], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_plain_pytorch(isa, shape, dtypes):
    """Plain PyTorch computes in fp32 from the same values; bf16 inputs have bf16 gradients."""
    n, d, v = shape
    head = make_head(n, d, v, dtypes)
    upstream = torch.randn(3, n, generator=torch.Generator().manual_seed(1))
    truth = by_definition(head, upstream)
    plain, ours = by_plain_pytorch(head, upstream), by_kernels(head, upstream)
    for t, p, o in zip(truth[:3], plain[:3], ours[:3], strict=True):
        assert max_error(o, t) <= 2 * max_error(p, t) + 1e-6
    rounded = torch.bfloat16 in dtypes
    for t, p, o in zip(truth[3:], plain[3:], ours[3:], strict=True):
        assert relative_error(o, t) <= 2 * relative_error(p, t) + (4e-3 if rounded else 1e-6)


@pytest.mark.parametrize("dtypes", [*BOTH, *MIXED], ids=str)
def test_a_row_has_the_same_bits_in_any_batch(isa, dtypes):
    """The batch-invariant mode needs it: sampling computes few rows, and training many."""
    head = make_head(1100, 33, 700, dtypes)
    together = cpu.log_probs(head).results
    for n in (1, 6, 48, 64, 65, 1030):
        for rows in (slice(0, n), slice(1100 - n, 1100)):
            alone = cpu.log_probs(head.take(rows)).results
            for a, b in zip(alone, together.take(rows), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 48, 9), (3, 17, 700)], ids=str)
def test_rows_of_the_weight_may_have_a_stride(isa, shape, dtype):
    n, d, v = shape
    head = make_head(n, d, v, (dtype, dtype))
    wider = torch.full((v, d + 7), torch.nan, dtype=dtype)
    wider[:, :d] = head.weight
    strided = Head(head.hidden, wider[:, :d], head.bias, head.targets, head.temperature)
    upstream = torch.randn(3, n, generator=torch.Generator().manual_seed(1))
    for a, b in zip(by_kernels(strided, upstream), by_kernels(head, upstream), strict=True):
        assert torch.equal(a, b)


def test_bf16_is_no_worse_than_plain_bf16(isa):
    head = make_head(300, 64, 1000, BOTH[1])
    head = Head(head.hidden, head.weight, None, head.targets, 1.0)
    truth = linear_results(head.hidden.double(), head.weight.double(), head.targets)
    plain = reference.linear_logprob(head.hidden, head.weight, head.targets)
    for t, p, o in zip(truth, plain, cpu.log_probs(head).results, strict=True):
        assert max_error(o, t) < 0.01 * max_error(p, t)


@pytest.mark.parametrize("dtypes", BOTH, ids=str)
@pytest.mark.parametrize("count", [1, 3, 7])
def test_results_are_right_with_any_number_of_threads(isa, threads, count, dtypes):
    head, upstream = make_head(1100, 24, 700, dtypes), torch.ones(3, 1100)
    truth = by_definition(head, upstream)
    threads(count)
    first, again = by_kernels(head, upstream), by_kernels(head, upstream)
    for t, a, b in zip(truth, first, again, strict=True):
        assert torch.equal(a, b)  # same threads, same bits
        assert relative_error(a, t) < (4e-3 if dtypes == BOTH[1] else 2e-6)


def test_weight_gradient_of_many_spans_is_summed_in_fp32(isa):
    n = 5 * cpu.SPAN + 3
    head = make_head(n, 16, 40, BOTH[1])
    grads = by_kernels(head, torch.ones(3, n))[3:]
    truth = by_definition(head, torch.ones(3, n))[3:]
    assert grads[1].dtype == torch.float32
    assert relative_error(grads[1], truth[1]) < 2e-3  # dz is rounded to bf16, its sums are not


@pytest.mark.parametrize("rest", [10.0**-k for k in range(2, 9)])
def test_relative_accuracy_as_the_probability_goes_to_one(isa, rest):
    """z_y - lse, which other implementations compute, has no correct digit there."""
    v = 1000
    weight = torch.full((v, 1), math.log(rest / (v - 1)))
    weight[777] = 0
    got = cpu.log_probs(Head(torch.ones(1, 1), weight, None, torch.tensor([777]), 1.0)).results
    others = weight.double()[0, 0].exp() * (v - 1)
    assert abs(got.logp.item() / -torch.log1p(others).item() - 1) < 5e-6


def test_large_logits_cost_the_gradient_no_digits(isa):
    """An lse rounded at 4096 would scale a row's probabilities by up to 1 + 2e-4."""
    weight = 4096 + torch.arange(200.0).remainder(4)[:, None]  # exact in fp32, and so are logits
    hidden, targets = torch.ones(20, 1), torch.arange(20)
    head = Head(hidden, weight, torch.zeros(200), targets, torch.ones(20))
    row_grads = torch.stack([torch.ones(20), torch.full((20,), 0.3), torch.full((20,), 0.2)])
    truth = by_definition(head, row_grads)[-1]
    assert relative_error(by_kernels(head, row_grads)[-1], truth) < 1e-6


@pytest.mark.parametrize("gap", [50.0, 94.0, 1000.0, 1e5])
def test_unlikely_targets_do_not_overflow(isa, gap):
    hidden, weight = torch.ones(40, 1), torch.zeros(900, 1)
    weight[3], weight[800] = -gap, gap / 3  # the largest is in another tile and thread
    head = Head(hidden, weight, torch.zeros(900), torch.full((40,), 3), torch.ones(40))
    truth = by_definition(head, torch.ones(3, 40))
    for t, o in zip(truth, by_kernels(head, torch.ones(3, 40)), strict=True):
        assert max_error(o, t) <= 1e-5 * max(1.0, t.abs().max().item())


def test_padding_of_the_vocabulary_adds_no_probability(isa):
    """In verl #2656, rows beyond a ragged vocabulary counted as logits of 0."""
    for v in (1000, 997, 129):
        weight = torch.full((v, 1), -30.0)
        got = cpu.log_probs(
            Head(torch.ones(3, 1), weight, None, torch.tensor([0, 1, v - 1]), 1.0)
        ).results
        torch.testing.assert_close(
            got.logp, torch.full((3,), -math.log(v)).double(), atol=1e-5, rtol=0
        )


def test_a_row_of_nan_leaves_other_rows_unchanged(isa):
    head = make_head(40, 8, 300, BOTH[0])
    head.hidden[7] = math.nan
    got = cpu.log_probs(head).results
    clean = torch.arange(40) != 7
    for x in got:
        assert x[7].isnan() and x[clean].isfinite().all()


def test_forbidden_tokens_get_no_gradient(isa):
    head = make_head(50, 8, 300, BOTH[0])
    assert head.bias is not None
    head.bias[100:] = -math.inf
    head = Head(head.hidden, head.weight, head.bias, head.targets % 100, head.temperature)
    *_, d_weight, d_bias = by_kernels(head, torch.ones(3, 50))
    assert not d_weight[100:].count_nonzero() and not d_bias[100:].count_nonzero()
    assert d_weight[:100].isfinite().all() and d_weight[:100].count_nonzero()


def test_a_large_bias_does_not_enter_through_the_padding(isa):
    """Padding rows, up to the next 16, have the bias as their logit; 2^bias may be inf."""
    head = make_head(3, 8, 40, BOTH[0])
    assert head.bias is not None
    head.bias[2] = 300.0
    truth = by_definition(head, torch.ones(3, 3))
    for t, o in zip(truth, by_kernels(head, torch.ones(3, 3)), strict=True):
        assert max_error(o, t) <= 1e-4 * max(1.0, t.abs().max().item())


def test_a_large_entropy_gradient_makes_no_nan_of_a_forbidden_token(isa):
    head = make_head(20, 8, 40, BOTH[0])
    assert head.bias is not None
    head.bias[7] = -math.inf
    head = Head(head.hidden, head.weight, head.bias, head.targets % 7, 0.05)
    row_grads = RowGrads(None, torch.full((20,), 1e9))
    grads = cpu.gradients(head, cpu.log_probs(head), row_grads, Needs(True, True, True))
    assert all(g is not None and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_torch_defaults_change_nothing(default):
    head, upstream = make_head(64, 8, 300, BOTH[0]), torch.ones(3, 64)
    before = by_kernels(head, upstream)
    try:
        torch.set_default_dtype(default)
        with torch.device("meta"):
            after = by_kernels(head, upstream)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_a_failing_kernel_raises_an_exception():
    """An exception in a thread of the kernel would end the process."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("oneDNN has no bf16 products here")
    program = """
import torch
from expo_fast.ops import linear_logprob
x = torch.ones(20, 4, dtype=torch.bfloat16)
linear_logprob(x, x, torch.zeros(20, dtype=torch.int64), backend="native")
"""
    done = run({"EXPO_FAST_ISA": "amx", "ONEDNN_MAX_CPU_ISA": "AVX2"}, program)
    assert "RuntimeError: the CPU kernel forward failed" in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_frozen_inputs_get_no_gradient(isa, wanted):
    head = make_head(70, 8, 300, BOTH[1])
    forward = cpu.log_probs(head)
    every = cpu.gradients(head, forward, RowGrads(torch.ones(70)), Needs(True, True, False))
    needs = Needs(wanted[0], wanted[1], False)
    some = cpu.gradients(head, forward, RowGrads(torch.ones(70)), needs)
    for want, a, b in zip(needs, some, every, strict=True):
        assert (a is not None) is want
        assert a is None or (b is not None and torch.equal(a, b))


def test_weights_and_hidden_states_may_be_any_view():
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(300, 20, generator=g)
    hidden = torch.randn(8, 50, generator=g).T
    targets = torch.randint(300, (50,), generator=g)
    for weight in (wide[:, :8], wide[:, 5:13], wide.T[:8].T, wide.T.contiguous()[:8].T):
        got = linear_logprob(hidden, weight, targets, backend="native")
        truth = linear_results(hidden.double(), weight.double(), targets)
        for a, t in zip(got, truth, strict=True):
            assert a.dtype == torch.float32 and max_error(a, t) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, 64 << 20])
def test_memory_of_rows_times_vocabulary_is_held_only_within_the_budget(budget):
    """Measure the peak resident memory in a process of its own."""
    program = PEAK.format(budget=budget)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    peak, square, gradients = map(float, done.stdout.split())
    sums = 2 * gradients if budget else 0  # in fp32, of the kept rows and the others
    tiles = 8e6  # of two threads
    assert peak < budget + 0.05 * square + gradients + sums + tiles


PEAK = """
import torch
from expo_fast.op_backends import cpu
from expo_fast.ops import linear_logprob

def peak():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) * 1024

torch.set_num_threads(2)
cpu.KEPT_BYTES = {budget}
n, d, v = 1024, 64, 100_000
hidden, weight = (torch.randn(s, d, dtype=torch.bfloat16, requires_grad=True) for s in (n, v))
targets = torch.randint(v, (n,))
linear_logprob(hidden[:2], weight[:50], targets[:2] % 50, backend="native").logp.sum().backward()
hidden.grad = weight.grad = None
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the peak counts from here
before = peak()
got = linear_logprob(hidden, weight, targets, backend="native")
(got.logp.sum() + got.entropy.sum()).backward()
print(peak() - before, 2 * n * v, 2 * (n + v) * d)
"""


# The compiled library


def run(environment: dict[str, str], program: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


SCORE = """
import torch
from expo_fast.ops import linear_logprob
print(linear_logprob(torch.ones(1, 2), torch.eye(2), torch.tensor([0]){}).logp.item())
"""


@pytest.mark.slow
def test_without_a_compiler_plain_pytorch_is_used_with_a_warning(tmp_path):
    alone = {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path)}
    alone["CXX"] = ""
    done = run(alone, SCORE.format("") + SCORE.format(', backend="native"'))
    assert float(done.stdout) == pytest.approx(-math.log(2))
    assert done.stderr.count("using plain PyTorch, which is slower: ") == 1
    assert "Unavailable: the C++ kernels are not available: no C++ compiler: install" in done.stderr


@pytest.fixture(scope="module")
def portable() -> Path:
    """Return the file of the portable library, which is compiled if there is none."""
    return Path(native_library.library("portable")._name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set the cache folder of this process to an empty folder. Return it."""
    monkeypatch.delenv("EXPO_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def load_again() -> ctypes.CDLL:
    """Return the portable library as a new process loads it."""
    return native_library.library.__wrapped__("portable")


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_truncated_library_is_compiled_again(portable, cache, monkeypatch, content):
    compiler = cache / "c++"
    compiler.write_text(f'#!/bin/sh\nfor output; do :; done\nexec cp {portable} "$output"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    library = cache / "expo_fast" / "native" / portable.name
    library.parent.mkdir(parents=True)
    library.write_bytes(content)
    assert load_again()._name == str(library)
    assert library.read_bytes() == portable.read_bytes()


def test_an_unusable_cache_folder_is_no_error(cache):
    (cache / "expo_fast").write_text("a file where a folder must be")
    with pytest.raises(native_library.Unavailable, match=r"the C\+\+ kernels are not available: "):
        load_again()


def test_a_compiler_error_is_reported_and_leaves_no_library(cache, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native_library.Unavailable, match="available: false cannot compile csrc"):
        load_again()
    assert not list(cache.rglob("*.so"))


@pytest.mark.slow
def test_concurrent_processes_compile_once(tmp_path):
    log = tmp_path / "log"
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\necho one >> {log}\nexec {native_library.find_compiler()[0]} "$@"\n'
    )
    compiler.chmod(0o755)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(compiler)}
    environment["EXPO_FAST_ISA"] = "portable"
    command = [sys.executable, "-c", SCORE.format(', backend="native"')]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [float(process.communicate(timeout=300)[0]) for process in both]
    assert answers == pytest.approx([-math.log(2)] * 2)
    assert log.read_text().split() == ["one"]
    assert len(list(Path(tmp_path).rglob("*.so"))) == 1


def test_unsupported_dtypes_and_instruction_sets_are_refused(monkeypatch):
    head = make_head(3, 2, 5, (torch.float64,) * 2)
    with pytest.raises(ValueError, match=r"not torch\.float64 hidden states on cpu"):
        dispatch.choose("native", head)
    monkeypatch.setenv("EXPO_FAST_ISA", "avx9")
    with pytest.raises(ValueError, match="EXPO_FAST_ISA='avx9': must be one of amx"):
        native_library.isa()


def test_a_struct_declared_with_other_fields_than_in_csrc_is_refused():
    class Short(ctypes.Structure):
        _fields_: Sequence = native_library.struct_fields(ctypes.c_void_p, "c0 c1")

    kernels = native_library.library(native_library.isa())
    native_library.check_struct_sizes(
        kernels, {"gradients": native_head._Gradients, "head": native_head._Head}
    )
    with pytest.raises(RuntimeError, match=r"struct gradients has 16 bytes in Python .*and 64 in"):
        native_library.check_struct_sizes(kernels, {"gradients": Short})


CROSS_COMPILER = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.slow
@pytest.mark.skipif(CROSS_COMPILER is None, reason="needs g++-aarch64-linux-gnu")
@pytest.mark.parametrize("part", native_library.PARTS)
def test_the_kernels_compile_for_aarch64(tmp_path, part):
    sources = [f"{native_library.SOURCES}/{name}.cpp" for name in native_library.PARTS[part]]
    command = [
        str(CROSS_COMPILER),
        *sources,
        *native_library.COMMON_FLAGS,
        "-O0",  # errors are those of any level, in half of the time
        "-o",
        tmp_path / "part.so",
    ]
    subprocess.run(command, check=True)
