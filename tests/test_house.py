"""The house rules of the layout. Those that nothing checks are wishes."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = [*sorted(ROOT.glob("expo_fast/*.py")), *sorted(ROOT.glob("kernels/*.py"))]
TESTS = sorted(ROOT.glob("tests/*.py"))
PYTHON = [*OURS, *TESTS, *sorted(ROOT.glob("benchmarks/**/*.py"))]

# A module imports from the rows above its own, or from its own; the leaves import only leaves.
ROWS = [
    {"kernels"},
    {"native", "fused", "backends", "described", "library", "ops"},
    LEAVES := {"config", "flags", "tasks", "arithmetic", "checkpoint", "log", "gguf", "answer"},
    {"attention", "cache", "model", "optim", "pack", "sampling"},
    {"engine", "native_engine", "cuda_engine"},
    {
        "weights",
        "layout",
        "adapters",
        "prompts",
        "generate",
        "reward",
        "fitness",
        "explain",
        "diagnose",
    },
    {"pairs", "rollout", "learner"},
    {"grpo", "dpo", "sft"},
    {"train", "evaluate", "report", "figures", "check", "setup", "command"},
]
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row}

# missing from a bare GPU image, where ops, model, generator and benchmarks must still run
OPTIONAL = {"datasets", "flash_attn", "gguf", "liger_kernel", "math_verify", "rich", "tensorboard"}
OPTIONAL |= {"sympy", "tyro", "peft", "matplotlib"}


def module_of(path: Path) -> str:
    return "kernels" if path.parent.name == "kernels" else path.stem


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that the tree imports; relative ones start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def imports_of_ours(path: Path) -> set[str]:
    """Modules of expo_fast, `kernels` as one of them, that the file imports anywhere."""
    names = [name.split(".") for name in imports(ast.parse(path.read_text()))]
    return {name[1] for name in names if name[0] == "expo_fast" and len(name) > 1}


def on_import(node: ast.AST) -> set[str]:
    """Top-level packages imported as soon as the module `node` is."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return set()
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {name.split(".")[0] for name in imports(node)}
    return set().union(*map(on_import, ast.iter_child_nodes(node)))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of every function of the file, decorators left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_one_way(path: Path):
    here = module_of(path)
    if here == "__init__":
        assert not imports_of_ours(path)
        return
    assert here in RANK, f"{path.name} has no place in ROWS"
    for there in imports_of_ours(path):
        assert RANK[there] <= RANK[here], f"{here} imports {there}, which stands above it"
        assert here not in LEAVES or there in LEAVES, f"{here} is a leaf and imports {there}"


def test_imports_make_no_circle():
    graph = {module_of(path): set[str]() for path in OURS}
    for path in OURS:
        graph[module_of(path)] |= imports_of_ours(path) - {module_of(path)}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_kernels_is_no_package_of_its_own():
    # with an __init__.py it would shadow PyPI's `kernels` wherever the root is on sys.path
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "expo_fast/kernels").readlink() == Path("../kernels")
    assert (ROOT / "expo_fast/csrc").readlink() == Path("../csrc")


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_our_imports_are_absolute_and_through_expo_fast(path: Path):
    hidden = {"kernels", "csrc", "tests"}
    if path in OURS:  # what is installed needs nothing that is not
        hidden.add("benchmarks")
    for name in imports(ast.parse(path.read_text())):
        assert not name.startswith("."), f"relative import {name}"
        assert name.split(".")[0] not in hidden, name


def test_files_fit_in_one_sitting():
    lines = {path: len(path.read_text().splitlines()) for path in PYTHON if path not in TESTS}
    assert {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > 400} == {}


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_functions_fit_on_a_screen(path: Path):
    limit = 120 if path.parent.name == "kernels" else 60
    assert [(name, lines) for name, lines in functions(path) if lines > limit] == []


@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_optional_packages_are_imported_where_they_are_used(path: Path):
    assert on_import(ast.parse(path.read_text())) & OPTIONAL == set()


def test_the_ops_need_nothing_but_torch():
    banned = OPTIONAL | {"transformers", "tokenizers", "safetensors", "triton", "numpy"}
    run_python(
        f"""
        import sys, torch
        sys.modules |= dict.fromkeys({banned!r})  # an import of one of them raises
        import expo_fast.ops
        """
    )


def test_importing_does_nothing():
    """No device probe, process, connection, folder made or environment read."""
    modules = sorted(f"expo_fast.{path.stem}" for path in OURS if path.parent.name == "expo_fast")
    run_python(
        f"""
        import importlib, os, sys, torch, transformers, triton

        def refuse(event, _args):
            if event in ("subprocess.Popen", "os.system", "os.mkdir", "socket.connect"):
                raise RuntimeError(event)

        class Environment(dict):
            def get(self, key, default=None):
                return self[key]
            def __getitem__(self, key):
                raise RuntimeError("read " + key)
            __contains__ = __getitem__

        def probe():
            raise RuntimeError("probed the device")

        sys.addaudithook(refuse)
        torch.cuda.is_available = torch.cuda.device_count = probe
        os.environ = Environment()
        for module in {modules!r}:
            importlib.import_module(module)
        """
    )


def run_python(code: str) -> None:
    """Run the code in a fresh interpreter, in the root; fail with its traceback."""
    command = [sys.executable, "-B", "-c", dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_committed_names_a_folder_of_one_machine():
    machine = re.compile(rb"(?<![\w.:/-])/(root|home|work|Users|mnt)/")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    names = tracked.stdout.decode().split("\0")[:-1]
    assert len(names) > 10
    files = [ROOT / name for name in names if (ROOT / name).is_file()]
    assert [str(f) for f in files if machine.search(f.read_bytes())] == []
