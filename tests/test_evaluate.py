"""pass@k and its intervals, by hand."""

from itertools import combinations

import pytest

from expo_fast.evaluate import Evaluation


def evaluation(right: list[int], samples: int, levels: list[int | None]) -> Evaluation:
    return Evaluation(right, levels, samples, 0, 10.0, 0.0, 1.0, 100, 1.0)


@pytest.mark.parametrize("c", range(6))
@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one(c: int, k: int):
    samples = [True] * c + [False] * (5 - c)
    draws = list(combinations(samples, k))
    truth = sum(any(draw) for draw in draws) / len(draws)
    assert evaluation([c], 5, [None]).pass_at(k) == pytest.approx(truth)


def test_levels_are_reported_apart():
    result = evaluation([4, 0, 2, 0], 4, [1, 1, 2, None])
    row = result.summary()
    assert row["pass@1"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert row["pass@4"] == pytest.approx(0.5)
    assert row["all_fail"] == 0.5
    assert row["levels"] == [
        {"level": 1, "problems": 2, "pass@1": 0.5, "pass@4": 0.5},
        {"level": 2, "problems": 1, "pass@1": 0.5, "pass@4": 1.0},
    ]


def test_bootstrap_interval_covers_what_a_normal_one_does():
    right = [0] * 150 + [1] * 50  # pass@1 of one sample each: 0.25
    low, high = evaluation(right, 1, [None] * 200).interval(1)
    half = 1.96 * (0.25 * 0.75 / 200) ** 0.5
    assert low == pytest.approx(0.25 - half, abs=0.015)
    assert high == pytest.approx(0.25 + half, abs=0.015)


def test_interval_of_certainty_is_a_point():
    assert evaluation([0] * 20, 4, [None] * 20).interval(4) == (0.0, 0.0)
