"""Time every op at every shape that fits: run `pytest benchmarks`.

A round times the peers first and then ours. The table of pytest-benchmark shows ours. The figures
of all are printed, and are in the extra_info of the JSON.
"""

import pytest

from benchmarks.cases import OURS, Group, groups
from benchmarks.measure import foreseen_seconds, gemm_rate, warm_up
from benchmarks.summary import default_device, show

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="session")
def rate() -> float:
    return gemm_rate(default_device())


@pytest.mark.parametrize("group", groups(), ids=str)
def test_op(group: Group, rate: float, benchmark, capsys, request):
    device = default_device()
    limit = request.config.getoption("max_seconds")
    rounds = request.config.getoption("benchmark_min_rounds")
    foreseen = foreseen_seconds(group, device, rounds, rate)
    if foreseen > limit:
        pytest.skip(f"would take about {foreseen:.0f} s, more than --max-seconds {limit:g}")
    comparison = warm_up(group, device)

    def time_peers() -> None:
        comparison.run_round(without=OURS)
        comparison.start()

    benchmark.pedantic(
        comparison.finished(OURS),
        setup=time_peers,
        teardown=lambda: comparison.stop(OURS),
        rounds=rounds,
    )
    if benchmark.stats:  # None with --benchmark-disable, which only checks the results
        benchmark.extra_info.update(comparison.result())
        with capsys.disabled():
            show(benchmark.extra_info)
