"""House rules: the layout of the code, imports, and the size of functions."""

import ast
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from textwrap import dedent
from tokenize import TokenInfo

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "expo_fast"
OURS = sorted(
    path
    for path in [*ROOT.glob("expo_fast/**/*.py"), *ROOT.glob("kernels/*.py")]
    if path.parent != PACKAGE / "kernels"  # the link
)
TESTS = sorted(ROOT.glob("tests/*.py"))
PROGRAMS = [
    *ROOT.glob("benchmarks/**/*.py"),
    *ROOT.glob("examples/*.py"),
    *ROOT.glob("docs/**/*.py"),
]
PYTHON = [*OURS, *TESTS, *sorted(PROGRAMS)]
MOST_FLAT_MODULES = 15
MOST_TOKENS = 600  # of a function; 50 lines have about 400

# A package or public module imports only those above it. docs/architecture.md shows them.
ORDER = [
    "runtime",
    "kernels",
    "distributed",
    "storage",
    "objectives",
    "op_backends",
    "ops",
    "methods",
    "config",
    "answers",
    "data",
    "modeling",
    "inference",
    "generate",
    "cli",
    "reporting",
    "reward_functions",
    "reward",
    "weights",
    "algorithms",
    "inspection",
    "evaluate",
    "report",
    "merge",
    "train",
    "check",
    "__main__",
]

# Missing from a bare GPU image, where ops, model, generator and benchmarks must still run.
OPTIONAL = {"datasets", "flash_attn", "gguf", "liger_kernel", "math_verify", "rich", "tensorboard"}
OPTIONAL |= {"sympy", "tyro", "peft", "pandas", "pyarrow", "trackio", "vl_convert", "wandb"}

of_a_checkout = pytest.mark.skipif(
    not (PACKAGE / "kernels").is_symlink(),
    reason="a source distribution has copies in place of links, and no git",
)


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text())


def shown(path: Path) -> str:
    """Return the path of a file relative to the root, for messages."""
    return path.relative_to(ROOT).as_posix()


def package_of(path: Path) -> str:
    """Return the package of a file, or the name of a module that lies flat in expo_fast/."""
    if path.parent == ROOT / "expo_fast":
        return path.stem
    return path.parent.name


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names of all imports of a tree; relative ones start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = "." * node.level + (node.module or "")
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def packages_imported(path: Path) -> set[str]:
    """Return the packages and flat modules of expo_fast that the file imports anywhere."""
    names = [name.split(".") for name in imports(tree_of(path))]
    return {name[1] for name in names if name[0] == "expo_fast" and len(name) > 1}


def on_import(node: ast.AST) -> set[str]:
    """Return the top-level packages that are imported as soon as the module `node` is."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return set()
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {name.split(".")[0] for name in imports(node)}
    return set().union(*map(on_import, ast.iter_child_nodes(node)))


@of_a_checkout
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
        wrong += [f"{shown(path)} imports {there}" for there in below]
    assert wrong == []


def test_imports_of_modules_have_no_cycle():
    """A cycle inside a package would be as hard to follow as one between packages."""
    modules = {dotted_name(path): path for path in OURS}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = set(imports(tree_of(path)))
        parents = {each.rpartition(".")[0] for each in imported}
        graph[name] = (imported | parents) & modules.keys() - {name}
    TopologicalSorter(graph).prepare()  # CycleError names the cycle


def dotted_name(path: Path) -> str:
    """Return the name under which a file of ours is imported."""
    relative = path.relative_to(ROOT).with_suffix("")
    inside = relative.parts if relative.parts[0] == "expo_fast" else ("expo_fast", *relative.parts)
    return ".".join(inside).removesuffix(".__init__")


def test_expo_fast_has_few_modules_outside_packages():
    flat = [path.stem for path in OURS if path.parent == ROOT / "expo_fast"]
    assert len(flat) <= MOST_FLAT_MODULES


@of_a_checkout
def test_kernels_is_no_package_of_its_own():
    # with an __init__.py it would shadow PyPI's `kernels` wherever the root is on sys.path
    assert not (ROOT / "kernels/__init__.py").exists()
    assert (ROOT / "expo_fast/kernels").readlink() == Path("../kernels")
    assert (ROOT / "expo_fast/csrc").readlink() == Path("../csrc")


def test_imports_are_absolute_and_name_expo_fast():
    wrong = []
    for path in PYTHON:
        hidden = {"kernels", "csrc", "tests"}
        if path in OURS:  # benchmarks are not installed
            hidden.add("benchmarks")
        for name in imports(tree_of(path)):
            if name.startswith(".") or name.split(".")[0] in hidden:
                wrong.append(f"{shown(path)} imports {name}")
    assert wrong == []


def test_optional_packages_are_imported_where_they_are_used():
    wrong = []
    for path in OURS:
        early = on_import(tree_of(path)) & OPTIONAL
        wrong += [f"{shown(path)} imports {name}" for name in sorted(early)]
    assert wrong == []


@of_a_checkout
def test_pyproject_lists_every_package():
    folders = {path.parent for path in OURS if PACKAGE in path.parents}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    links = {f"expo_fast.{path.name}" for path in PACKAGE.iterdir() if path.is_symlink()}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["packages"] == sorted(packages | links)
    without_init = [shown(each) for each in folders if not (each / "__init__.py").exists()]
    assert without_init == []


def test_pre_commit_and_the_workflow_run_the_checks_of_the_makefile():
    rules = (ROOT / "Makefile").read_text()
    lint = rules.split("\nlint:")[1].split("\n\n")[0].splitlines()[1:]
    assert len(lint) == 3
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for line in lint:
        command = line.strip().replace("$(BIN)", ".venv/bin")
        assert f"entry: {command}\n" in hooks
    workflow = (ROOT / ".github/workflows/test.yml").read_text()
    assert "run: make test\n" in workflow
    (torch,) = re.findall(r"^TORCH \?= (torch==[\d.]+)$", rules, re.MULTILINE)
    assert f"TORCH: {torch} --index-url https://download.pytorch.org/whl/cpu\n" in workflow


def test_functions_are_within_the_limit_of_tokens():
    """A limit of lines or statements would reward dense code, a limit of tokens does not."""
    long = []
    for path in OURS:
        if path.parent.name == "kernels":
            continue
        lines = [token.start[0] for token in tokens_of(path)]
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                last = node.end_lineno or node.lineno
                n_tokens = sum(node.lineno <= line <= last for line in lines)
                if n_tokens > MOST_TOKENS:
                    long.append(f"{shown(path)}: {node.name} has {n_tokens} tokens")
    assert long == []


def tokens_of(path: Path) -> list[TokenInfo]:
    """Return the tokens of a file without comments and white space."""
    with tokenize.open(path) as file:
        tokens = list(tokenize.generate_tokens(file.readline))
    kinds = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
    return [token for token in tokens if token.type in kinds]


def test_the_ops_need_nothing_but_torch():
    banned = OPTIONAL | {"transformers", "tokenizers", "safetensors", "triton", "numpy"}
    run_python(
        f"""
        import sys, torch
        sys.modules |= dict.fromkeys({banned!r})  # an import of one of them raises
        import expo_fast.ops
        """
    )


@pytest.mark.slow
def test_importing_a_module_has_no_side_effects():
    """It probes no device, starts no process, makes no folder and reads no environment."""
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
    """Run code in a new interpreter in the root. Fail with its traceback."""
    command = [sys.executable, "-B", "-c", dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@of_a_checkout
def test_nothing_committed_names_a_folder_of_one_machine():
    machine = re.compile(rb"(?<![\w.:/-])/(root|home|work|Users|mnt)/")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    names = tracked.stdout.decode().split("\0")[:-1]
    assert len(names) > 10
    files = [ROOT / name for name in names if (ROOT / name).is_file()]
    assert [str(f) for f in files if machine.search(f.read_bytes())] == []


def test_each_test_file_has_a_test_that_is_not_slow():
    """`make quick` runs a part of everything."""
    without = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        marks = []
        for node in tree_of(path).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                decorators = [ast.unparse(each) for each in node.decorator_list]
                marks.append(any("mark.slow" in each for each in decorators))
        if all(marks):
            without.append(path.name)
    assert without == []
