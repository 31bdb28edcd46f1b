"""The commands: `expo-fast`, `python -m expo_fast`, and the sentence about a missing package."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import expo_fast
from expo_fast import __main__ as commands
from expo_fast.cli import exit_status, missing_packages, program
from expo_fast.cli.missing_packages import EXTRAS, advice_on, how_to_install

ROOT = Path(__file__).resolve().parents[1]
# In a folder of PYTHONPATH, Python imports this file at its start.
HIDE_PACKAGES = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def run_without(names: tuple[str, ...], folder: Path, *words: str) -> subprocess.CompletedProcess:
    """Run Python with the arguments `words`, as if these packages were not installed."""
    (folder / "sitecustomize.py").write_text(HIDE_PACKAGES.format(names=names))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def sentence_of(done: subprocess.CompletedProcess) -> str:
    """Return the only line of stderr of a command that a user's error ended."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch):
    """Return a function that sets the process's arguments and runs the commands."""

    def start(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", [*words])
        return commands.main()

    return start


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_without_a_command_the_commands_are_listed(started, capsys, words):
    assert started("/usr/bin/expo-fast", *words) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: expo-fast COMMAND")
    for name, does in commands.COMMANDS.items():
        assert re.search(rf"^  {name} +{does}$", printed, re.MULTILINE)


def test_an_unknown_command_gets_a_hint(started, capsys):
    assert started("expo-fast", "trian") == 2
    error = "error: unknown command 'trian': perhaps you meant train; see --help\n"
    assert capsys.readouterr().err == error
    assert started("expo-fast", "xyz") == 2
    assert "need one of train, evaluate" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(started, capsys):
    assert started("expo-fast", "--version") == 0
    assert capsys.readouterr().out == f"expo-fast {expo_fast.__version__}\n"
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["dynamic"] == ["version"]
    attribute = settings["tool"]["setuptools"]["dynamic"]["version"]
    assert attribute == {"attr": "expo_fast.__version__"}


def test_the_list_of_commands_loads_no_torch(tmp_path: Path):
    hidden = ("torch", "numpy", "tyro")
    done = run_without(hidden, tmp_path, "-m", "expo_fast", "--version")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_is_run_with_its_flags(started, capsys):
    assert started("expo-fast", "report", "no-such-run") == 2
    assert "'no-such-run'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "usage"),
    [
        ("/opt/bin/expo-fast", "expo-fast train"),
        ("/x/expo_fast/__main__.py", "python -m expo_fast train"),
        ("/x/expo_fast/train.py", "python -m expo_fast.train"),
    ],
)
def test_the_usage_names_the_command_as_it_was_started(monkeypatch, start, usage):
    monkeypatch.setattr(sys, "argv", [start])
    assert program.name_of_command("train") == usage


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        ("torch", ["-m", "expo_fast.train"]),
        ("transformers", ["-m", "expo_fast.train"]),
        ("tyro", ["-m", "expo_fast", "report", "run"]),
    ],
)
@pytest.mark.slow
def test_a_missing_package_is_one_sentence_and_exit_code_2(tmp_path: Path, hidden, words):
    line = sentence_of(run_without((hidden,), tmp_path, *words))
    assert line.startswith(f"error: the package {hidden} is not installed: ")


def test_the_first_missing_package_is_named(tmp_path: Path):
    hidden = ("torch", "transformers", "tyro")
    line = sentence_of(run_without(hidden, tmp_path, "-m", "expo_fast.evaluate"))
    assert line.startswith("error: the package torch is not installed: ")


def test_the_advice_fits_how_expo_fast_was_installed(monkeypatch: pytest.MonkeyPatch, tmp_path):
    checkout = tmp_path / "checkout"
    file = checkout / "expo_fast/cli/missing_packages.py"
    monkeypatch.setattr(missing_packages, "__file__", str(file))
    monkeypatch.setattr(missing_packages, "is_installed", lambda: True)
    assert how_to_install("train") == "pip install 'expo-fast[train]'"
    assert how_to_install(None) == "pip install 'expo-fast'"
    monkeypatch.setattr(missing_packages, "is_installed", lambda: False)
    assert how_to_install("train") == f"pip install -e '{checkout}[train]'"
    (checkout / ".venv").mkdir(parents=True)
    assert how_to_install("train").endswith(f"source {checkout}/.venv/bin/activate")


def test_the_module_of_another_package_keeps_its_own_error():
    def main(_argv):
        raise ModuleNotFoundError("No module named 'mine'", name="mine")

    with pytest.raises(ModuleNotFoundError, match="mine"):
        exit_status.run(main, [])
    windows = advice_on(ModuleNotFoundError("No module named 'fcntl'", name="fcntl"))
    assert windows is not None and "WSL" in windows


def test_each_package_of_an_extra_that_is_imported_has_its_advice():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known: dict[str, set[str | None]] = {}
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements:
            known.setdefault(module_of(requirement), set()).add(extra)
    for requirement in project["dependencies"]:
        known.setdefault(module_of(requirement), set()).add(None)
    for module, extra in EXTRAS.items():
        assert extra in known[module], module
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["train"]]:
        assert module_of(requirement) in EXTRAS


def module_of(requirement: str) -> str:
    """Return the module that a requirement of pyproject.toml installs."""
    name = re.match(r"[\w-]+", requirement)
    assert name is not None
    return MODULES.get(name[0], name[0].replace("-", "_"))


MODULES = {"vl-convert-python": "vl_convert"}  # of packages with another name


def test_make_train_says_where_the_packages_are():
    command = ["make", "--no-print-directory", "--dry-run", "--always-make", "train"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "source .venv/bin/activate" in done.stdout.splitlines()[-1]


def test_a_broken_pipe_other_than_stdout_is_an_error():
    code = (
        "import sys\n"
        "from expo_fast.cli.exit_status import run\n"
        "def main(argv):\n"
        "    raise BrokenPipeError(32, 'Broken pipe')\n"
        "sys.exit(run(main, []))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 32] Broken pipe\n")
