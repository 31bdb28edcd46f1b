import pytest

from benchmarks.summary import machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--max-seconds",
        type=float,
        default=60,
        help="skip a case that would take longer, by the machine's GEMM rate; all cases take hours",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    machine_info["expo_fast"] = machine()
