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
OURS = sorted(
    path
    for path in [*ROOT.glob("expo_fast/**/*.py"), *ROOT.glob("kernels/*.py")]
    if path.parent != ROOT / "expo_fast/kernels"  # the link
)
TESTS = sorted(ROOT.glob("tests/*.py"))
PYTHON = [*OURS, *TESTS, *sorted(ROOT.glob("benchmarks/**/*.py"))]

# A package or public module imports only those above it. docs/architecture.md shows them.
ORDER = [
    "kernels",
    "storage",
    "op_backends",
    "ops",
    "config",
    "data",
    "modeling",
    "inference",
    "generate",
    "cli",
    "reward",
    "weights",
    "reporting",
    "algorithms",
    "evaluate",
    "report",
    "train",
]

# missing from a bare GPU image, where ops, model, generator and benchmarks must still run
OPTIONAL = {"datasets", "flash_attn", "gguf", "liger_kernel", "math_verify", "rich", "tensorboard"}
OPTIONAL |= {"sympy", "tyro", "peft", "matplotlib"}


def package_of(path: Path) -> str:
    """Return the package of a file, or the name of a module that lies flat in expo_fast/."""
    if path.parent == ROOT / "expo_fast":
        return path.stem
    return path.parent.name


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all that the tree imports; relative ones start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def packages_imported(path: Path) -> set[str]:
    """Return the packages and flat modules of expo_fast that the file imports anywhere."""
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


def test_imports_between_packages_point_one_way():
    rank = {name: place for place, name in enumerate(ORDER)}
    wrong = []
    for path in OURS:
        here = package_of(path)
        if here == "__init__":
            assert not packages_imported(path)
            continue
        assert here in rank, f"{here} has no row in ORDER"
        below = [there for there in packages_imported(path) if rank[there] > rank[here]]
        wrong += [f"{path.relative_to(ROOT)} imports {there}" for there in below]
    assert wrong == []


def test_imports_of_modules_make_no_circle():
    """A circle inside a package would be as hard to follow as one between packages."""
    modules = {dotted_name(path): path for path in OURS}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = set(imports(ast.parse(path.read_text())))
        parents = {each.rpartition(".")[0] for each in imported}
        graph[name] = (imported | parents) & modules.keys() - {name}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


def dotted_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    inside = relative.parts if relative.parts[0] == "expo_fast" else ("expo_fast", *relative.parts)
    return ".".join(inside).removesuffix(".__init__")


def test_few_modules_lie_flat():
    flat = [path.stem for path in OURS if path.parent == ROOT / "expo_fast"]
    assert len(flat) <= 14


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
    modules = sorted(dotted_name(path) for path in OURS if path.parent.name != "kernels")
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
