"""The installed package: the two links are real folders, and the ops need torch alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from the source distribution and return its unpacked folder."""
    folder = tmp_path_factory.mktemp("packaging")
    checkout = folder / "checkout"
    skip = shutil.ignore_patterns(".git", ".venv", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=skip)
    build = "from setuptools import build_meta as b; print(b.build_{}('{}'))"
    run(build.format("sdist", folder), cwd=checkout)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    run(build.format("wheel", folder), cwd=folder / archive.name.removesuffix(".tar.gz"))
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
    links = {ROOT / "expo_fast/kernels", ROOT / "expo_fast/csrc"}
    sources = [p for p in ROOT.glob("expo_fast/**/*.py") if p.parent not in links]
    python = {p.relative_to(ROOT).as_posix() for p in sources}
    assert "expo_fast/data/problems.py" in python
    kernels = {f"expo_fast/kernels/{p.name}" for p in ROOT.glob("kernels/*.py")}
    csrc = {f"expo_fast/csrc/{p.name}" for p in ROOT.glob("csrc/*")}
    presets = {f"expo_fast/presets/{p.name}" for p in ROOT.glob("expo_fast/presets/*.toml")}
    shipped = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    assert {p for p in shipped if ".dist-info/" not in p} == python | kernels | csrc | presets


def test_the_wheel_carries_its_license(installed: Path):
    (license,) = installed.glob("*.dist-info/licenses/LICENSE")
    assert license.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_ops_of_the_wheel_work_with_torch_alone(installed: Path):
    """log p is -log V for V equal logits, and 0 for an ignored target."""
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
