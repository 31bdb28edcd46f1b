"""A warning names the line of the user's code, however deep in the package it is issued."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from expo_fast.runtime.caller_warnings import warn_caller


def called_from(module: str, function: Callable[[], None]) -> Callable[[], None]:
    """Return a function that calls another one, as if it were in the module of this name."""
    code = "def call():\n    yield function()\ndef finish():\n    return list(call())\n"
    names: dict[str, Any] = {"__name__": module, "function": function}
    exec(compile(code, f"{module}.py", "exec"), names)
    return names["finish"]


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        (["expo_fast", "script"], "script.py"),
        (["expo_fast.inference.engine", "expo_fast.generate", "script"], "script.py"),
        (["expo_fast.modeling.lora", "torch.utils", "expo_fast.weights", "script"], "script.py"),
        (["expo_fast.reward", "rewards", "expo_fast.train", "script"], "rewards.py"),
        (["expo_fast.reward", "expo_fast_rewards"], "expo_fast_rewards.py"),
    ],
)
def test_the_innermost_line_outside_the_package_is_named(modules: list[str], named: str):
    function = partial(warn_caller, "slow")
    for module in modules:
        function = called_from(module, function)
    with pytest.warns(UserWarning, match="^slow$") as caught:
        function()
    (warning,) = caught
    assert (warning.filename, warning.lineno) == (named, 2)


def test_a_warning_without_a_caller_outside_the_package_is_issued(monkeypatch):
    """As in a thread that a program written in C has started."""
    monkeypatch.setattr("expo_fast.runtime.caller_warnings._package_of", lambda frame: "expo_fast")
    with pytest.warns(UserWarning, match="^slow$"):
        warn_caller("slow")
