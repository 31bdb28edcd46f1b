"""The distributions: the wheel has every module and the command, the sdist has its tests."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import expo_fast

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta as b; print(b.build_{}('{}'))"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=skip)
    run(BUILD.format("sdist", folder), cwd=checkout)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(unpacked: Path) -> Path:
    """Return the folder of the unpacked wheel, made from the source distribution."""
    folder = unpacked.parent
    run(BUILD.format("wheel", folder), cwd=unpacked)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder / "site")
    return folder / "site"


def run(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_source_and_nothing_else(installed: Path):
    kernels = {f"expo_fast/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
    csrc = {f"expo_fast/csrc/{path.name}" for path in ROOT.glob("csrc/*")}
    presets = {f"expo_fast/presets/{path.name}" for path in ROOT.glob("expo_fast/presets/*.toml")}
    page = {f"expo_fast/reporting/{x}" for x in ("report.css", "report.js", "vega_licenses.txt")}
    files = [path for path in installed.rglob("*") if path.is_file()]
    shipped = {path.relative_to(installed).as_posix() for path in files}
    ours = {path for path in shipped if ".dist-info/" not in path}
    assert ours == sources() | kernels | csrc | presets | page | {"expo_fast/py.typed"}


def sources() -> set[str]:
    """Return the Python files of the package, without those behind links."""
    found = set()
    for path in ROOT.glob("expo_fast/**/*.py"):
        if not path.parent.is_symlink():
            found.add(path.relative_to(ROOT).as_posix())
    return found


@pytest.mark.slow
def test_each_module_of_the_wheel_can_be_imported(installed: Path):
    modules = [path.removesuffix(".py").replace("/", ".") for path in sorted(sources())]
    assert "expo_fast.reporting.run_log" in modules
    code = f"""
import importlib
for name in {modules!r}:
    module = importlib.import_module(name.removesuffix(".__init__"))
    print(module.__file__)
"""
    files = run(code, cwd=installed.parent, PYTHONPATH=str(installed)).splitlines()
    assert len(files) == len(modules)
    assert [path for path in files if installed not in Path(path).parents] == []


def test_the_wheel_contains_its_license(installed: Path):
    (license,) = installed.glob("*.dist-info/licenses/LICENSE")
    assert license.read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_ops_of_the_wheel_work_with_torch_alone(installed: Path):
    """The log-prob of a token of V equal logits is -log V."""
    code = """
import sys, torch
sys.modules |= dict.fromkeys(("transformers", "tokenizers", "safetensors", "rich", "tyro"))
import expo_fast.ops
print(expo_fast.ops.__file__)
out = expo_fast.ops.linear_logprob(torch.ones(3, 4), torch.ones(8, 4), torch.tensor([0, 7, -100]))
print(*(round(x, 6) for x in out.logp.tolist()))
"""
    path, logp = run(code, cwd=installed.parent, PYTHONPATH=str(installed)).splitlines()
    assert Path(path) == installed / "expo_fast/ops.py"
    assert logp == "-2.079442 -2.079442 0.0"


def test_the_wheel_has_the_version_and_the_command(installed: Path):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    assert f"\nVersion: {expo_fast.__version__}\n" in metadata.read_text()
    (scripts,) = installed.glob("*.dist-info/entry_points.txt")
    assert "expo-fast = expo_fast.__main__:main" in scripts.read_text()


@pytest.mark.slow
def test_the_tests_of_the_source_distribution_run(unpacked: Path):
    for name in ("Makefile", "constraints.txt", "csrc/common.h", "docs/architecture.md"):
        assert (unpacked / name).is_file()
    for folder in ("benchmarks", "kernels", "tests"):
        files = {path.name for path in (ROOT / folder).glob("*.py")}
        assert {path.name for path in (unpacked / folder).glob("*.py")} == files
    some = ["tests/test_house.py", "tests/test_config.py", "tests/test_objectives.py"]
    arguments = [*some, "-q", "-p", "no:cacheprovider", "-m", "not slow and not long"]
    code = f"import pytest, sys; sys.exit(pytest.main({arguments}))"
    # an empty PYTHONPATH, because the tests must import the files beside them
    printed = run(code, cwd=unpacked, PYTHONPATH="", PYTHONDONTWRITEBYTECODE="1")
    assert " passed" in printed
    assert "failed" not in printed
