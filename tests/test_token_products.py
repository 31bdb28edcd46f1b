"""Products of weights with the tokens of a batch have the same bits for any number of tokens."""

import pytest
import torch
from torch import Tensor

from expo_fast.generate import Completion, Generator, Request
from expo_fast.inference.cpu_engine import NativeEngine
from expo_fast.inference.sampling import Sampling, Truncation
from expo_fast.modeling.decoder import Decoder
from expo_fast.op_backends import native_library
from tiny import tiny_model

MOST = 40  # sequences; the numbers up to it take each form of the C++ kernels
# One part of a sum, several parts, and more columns than gemm.h copies at once. The last 16 or 32
# columns that are transposed together are incomplete.
DEPTHS = [42, 354, 1110]
SUPPORTED = [name for name in native_library.COMPILER_FLAGS if native_library.supports_isa(name)]


def logits_of(model: Decoder, hidden: Tensor) -> Tensor:
    """Return hidden @ head.T as the draws compute it."""
    n = len(hidden)
    zeros = torch.zeros(n, dtype=torch.int64)
    cut = Truncation(zeros, torch.ones(n), torch.zeros(n))
    sampling = Sampling(torch.arange(n), torch.ones(n), cut)
    _, _, logits = NativeEngine(model)._draw(hidden, zeros, sampling, keep_logits=True)
    return logits


@pytest.mark.skipif("avx512" not in SUPPORTED, reason="the CPU has no AVX-512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", DEPTHS)
def test_rows_in_the_lanes_give_the_bits_of_tokens_in_the_lanes(depth, dtype, monkeypatch):
    model = tiny_model(
        dtype=dtype, hidden_size=depth, head_dim=8, num_hidden_layers=1, vocab_size=171
    )
    random = torch.Generator().manual_seed(depth)
    hidden = torch.randn(70, depth, generator=random).to(dtype)
    monkeypatch.setenv("EXPO_FAST_ISA", "avx2")  # tokens are in the lanes
    expected = logits_of(model, hidden)
    monkeypatch.setenv("EXPO_FAST_ISA", "avx512")  # rows of the weights are
    for n in (*range(1, MOST + 1), 64, 70):
        assert torch.equal(logits_of(model, hidden[:n]), expected[:n]), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_sequences_changes_no_bit(dtype):
    model = tiny_model(
        dtype=dtype, hidden_size=354, intermediate_size=602, head_dim=8, num_hidden_layers=2
    )
    generator = Generator(model, backend="native")
    asked = [Request((20, 30 + i % 4), 3, seed=i, stop_ids=()) for i in range(MOST)]

    def same(a: Completion, b: Completion) -> bool:
        return a.token_ids == b.token_ids and torch.equal(a.logp, b.logp)

    alone = [generator.sample([request])[0] for request in asked]
    for n in range(2, MOST + 1):
        together = generator.sample(asked[MOST - n :])
        assert all(map(same, together, alone[MOST - n :])), n
