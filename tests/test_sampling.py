"""Draws follow the expected distribution, and return the log-prob of the drawn token."""

import math

import pytest
import torch
from torch import Tensor

from distribution import allowed, assert_drawn_from
from expo_fast.inference.sampling import Truncation, draw_from_logits, uniform
from judges import logps_of, max_error

V = 700  # more than two blocks of columns, the last one partial
DRAWS = 40_000


def truncation(n: int, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Truncation:
    return Truncation(torch.full((n,), top_k), torch.full((n,), top_p), torch.full((n,), min_p))


def frequencies(logits: Tensor, temperature: float, cut: Truncation) -> Tensor:
    u = uniform(torch.arange(DRAWS), torch.full((DRAWS,), 7))
    counts = torch.zeros(V)
    for part in torch.arange(DRAWS).split(4000):
        rows = logits.repeat(len(part), 1)
        tokens, _ = draw_from_logits(
            rows, torch.full((len(part),), temperature), cut[part], u[part]
        )
        counts += torch.bincount(tokens, minlength=V)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.0, 0, 0.9999, 0.0),
        (1.0, 0, 1.0, 0.2),
        (0.8, 40, 0.9, 0.05),
    ],
)
def test_frequencies_match_the_distribution(temperature, top_k, top_p, min_p):
    logits = 2.5 * torch.randn(V, generator=torch.Generator().manual_seed(1))
    p = (logits.double() / temperature).softmax(-1)
    expected = DRAWS * allowed(p, top_k, top_p, min_p)
    counts = frequencies(logits, temperature, truncation(DRAWS, top_k, top_p, min_p))
    assert_drawn_from(counts, expected)


def test_log_prob_is_at_the_temperature_and_before_truncation():
    logits = 3 * torch.randn(64, V)
    temperature = torch.linspace(0.5, 1.5, 64)
    u = uniform(torch.arange(64), torch.zeros(64, dtype=torch.int64))
    tokens, logp = draw_from_logits(
        logits.clone(), temperature, truncation(64, top_k=3, top_p=0.9), u
    )
    expected = logps_of(logits.double() / temperature[:, None].double(), tokens)
    assert max_error(logp, expected) <= 2e-6


@pytest.mark.parametrize("cut", [{"top_p": 0.7}, {"top_k": 50}, {"top_k": 600}])
def test_ties_are_broken_the_same_way_in_any_batch(cut: dict):
    logits = torch.randn(9, V)
    logits[:, 300:] = logits[:, 300:301]  # 400 equal weights, of which the rules allow some
    alone = truncation(9, **cut)
    beside = Truncation(*(x.clone() for x in vars(alone).values()))
    beside.top_p[8] = 0.9999
    beside.top_k[8] = 0  # needs all columns
    u = torch.linspace(0, 0.999, 9, dtype=torch.float64)
    a, _ = draw_from_logits(logits[:8].clone(), torch.ones(8), alone[:8], u[:8])
    b, _ = draw_from_logits(logits.clone(), torch.ones(9), beside, u)
    assert a.tolist() == b[:8].tolist()


def test_temperature_0_takes_the_likeliest_token_with_its_log_prob_at_temperature_1():
    logits = torch.randn(8, V)
    u = torch.full((8,), 0.999, dtype=torch.float64)
    tokens, logp = draw_from_logits(logits.clone(), torch.zeros(8), truncation(8, top_p=0.5), u)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(logp, logits.log_softmax(-1).max(-1).values, rtol=0, atol=1e-6)


def test_the_ends_of_the_unit_interval_draw_no_token_of_probability_0():
    logits = torch.full((2, V), -torch.inf)
    logits[:, 300:303] = torch.tensor([0.0, 1.0, 0.5])
    u = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    tokens, _ = draw_from_logits(logits, torch.ones(2), truncation(2), u)
    assert tokens.tolist() == [300, 302]


def test_a_row_with_a_nan_is_reported_and_leaves_the_others_unchanged():
    logits = torch.randn(3, V)
    alone = draw_from_logits(
        logits[:1].clone(), torch.ones(1), truncation(1), torch.tensor([0.3]).double()
    )
    logits[1, 5] = torch.nan
    u = torch.full((3,), 0.3, dtype=torch.float64)
    tokens, logp = draw_from_logits(logits.clone(), torch.ones(3), truncation(3), u)
    assert logp.isnan().tolist() == [False, True, False]
    assert (tokens[0], logp[0]) == (alone[0][0], alone[1][0])


def test_uniform_numbers_are_those_of_splitmix64():
    """So runs of different versions sample the same. The truth is from Python's exact integers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    cases = [(0, 0), (1, 0), (0, 1), (12345, 678), (2**63 - 1, 2**31), (-1, 5)]
    seeds = torch.tensor([seed for seed, _ in cases])
    positions = torch.tensor([position for _, position in cases])
    expected = []
    for seed, position in cases:
        mixed = mix(mix(seed & mask) ^ ((position * 0x9E3779B97F4A7C15) & mask))
        expected.append((mixed >> 11) * 2.0**-53)
    assert uniform(seeds, positions).tolist() == expected


def test_uniform_numbers_are_uniform_and_depend_on_seed_and_position():
    seeds = torch.arange(20_000).repeat_interleave(5)
    u = uniform(seeds, torch.arange(5).repeat(20_000))
    assert float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u.float(), 100, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 99 + 4 * math.sqrt(2 * 99)
    assert len(u.unique()) == len(u)
    grid = u.view(-1, 5)
    for lag in (1, 2):  # neither neighbouring seeds nor neighbouring positions are correlated
        for a, b in ((grid[lag:], grid[:-lag]), (grid[:, lag:], grid[:, :-lag])):
            r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(float(r)) < 4 / math.sqrt(a.numel())
