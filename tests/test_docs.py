"""The documentation: each code block runs or is checked, links lead somewhere, the site builds.

A fence names its language, and a comment on the line before it may say how it is checked:

    <!-- dry-run: needs a hub -->        a command is checked by --dry-run, with a tiny model
    <!-- not run: installs packages -->  only what can be checked without running it
    <!-- run: twice -->                  run it twice, such as a resume

Without a comment, Python runs in one namespace for each page, and commands run with a tiny model
and small sizes. A fence with title="FILE" is written to that file first.
"""

import ast
import dataclasses
import glob
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import picture
from expo_fast import check, evaluate, report, train, weights
from expo_fast.cli import flags_page
from expo_fast.cli.flags import parse
from expo_fast.config import Evaluate, Train
from expo_fast.inspection import model_table, op_checks
from expo_fast.methods import methods_that_read
from expo_fast.runtime.endings import Collapsed
from expo_fast.storage import checkpoint
from expo_fast.weights import save_model
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
PAGES += ["README.md", "examples/README.md"]
FENCE = re.compile(r"^```(\w*)(?: +(.*))?$")
MARK = re.compile(r"^<!-- (dry-run|not run|run): (.+) -->$")
TITLE = re.compile(r'^title="([\w.-]+)"$')
CHECKED_ELSEWHERE = {"math", "mermaid", "text"}  # the site build converts formulas


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    title: str | None
    mark: str | None
    reason: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page. Fail for a fence that is not closed or not known."""
    found = []
    lines = (ROOT / page).read_text().splitlines()
    number = 0
    while number < len(lines):
        if not lines[number].startswith("```"):
            number += 1
            continue
        opening = FENCE.match(lines[number])
        assert opening is not None, f"{page}:{number + 1}: {lines[number]}"
        end = lines.index("```", number + 1)
        mark = MARK.match(lines[number - 1]) if number else None
        title = TITLE.match(opening[2]) if opening[2] else None
        assert bool(title) == bool(opening[2]), f"{page}:{number + 1}: {lines[number]}"
        block = Block(
            page=page,
            line=number + 1,
            language=opening[1],
            title=title[1] if title else None,
            mark=mark[1] if mark else None,
            reason=mark[2] if mark else "",
            text="\n".join(lines[number + 1 : end]) + "\n",
        )
        found.append(block)
        number = end + 1
    return found


# Checks without running


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes(page: str):
    """Each block has a language that is run or checked, and commands are known."""
    for block in blocks_of(page):
        if block.language == "python":
            ast.parse(block.text, block.place)
        elif block.language == "bash":
            for words in commands(block):
                assert is_known(words, block), f"{block.place}: unknown command {words}"
                check_flags(words)
        elif block.language in ("json", "jsonl", "toml"):
            parse_data(block)
        else:
            assert block.language in CHECKED_ELSEWHERE, f"{block.place}: {block.language!r}"
            assert block.mark is None, block.place
        if block.language == "text":
            assert not re.match(r"\s*(\$|python |pip |make |expo-fast )", block.text), block.place


def parse_data(block: Block) -> None:
    if block.language == "jsonl":
        for line in block.text.splitlines():
            json.loads(line)
    elif block.language == "json":
        json.loads(block.text)
    else:
        tomllib.loads(block.text)


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def is_known(words: Sequence[str], block: Block) -> bool:
    """Return whether a command is known, and marked if it is not run."""
    program = words[0]
    rest = list(words[1:])
    not_run = block.mark == "not run"
    if program in ("source", "cd", "export", "expo-fast"):
        return True
    if program == "python":
        return is_known_python(rest, not_run=not_run)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return all(word in targets or "=" in word for word in rest)
    if program in ("pytest", "bash"):
        return not_run and (ROOT / rest[0]).exists()
    if program in ("pip", "uv"):
        check_extras(rest)
    return not_run and program in ("pip", "uv", "git", "tensorboard", "torchrun")


def check_flags(words: Sequence[str]) -> None:
    """Fail for flags that a command does not have, and for values that it refuses."""
    module, arguments = module_of(words)
    kind = {"train": Train, "check": Train, "evaluate": Evaluate}.get(module)
    if kind is not None:
        parse(kind, arguments)


def module_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the module of expo_fast that a command runs, and its arguments; "" for another."""
    if words[0] == "expo-fast" and len(words) > 1:
        return words[1], list(words[2:])
    if list(words[:2]) == ["python", "-m"] and words[2].startswith("expo_fast."):
        return words[2].removeprefix("expo_fast."), list(words[3:])
    return "", []


def check_extras(words: Sequence[str]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = set(settings["project"]["optional-dependencies"])
    for word in words:
        for named in re.findall(r"\[([\w,-]+)\]", word):
            assert set(named.split(",")) <= extras, word


def is_known_python(words: Sequence[str], *, not_run: bool) -> bool:
    if words[0] != "-m":
        return words[0].startswith("examples/") and (ROOT / words[0]).exists()
    if words[1] == "venv":
        return not_run
    module = ROOT / words[1].replace(".", "/")
    exists = module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    return exists and (words[1].startswith("expo_fast") or not_run)


def test_relative_links_lead_to_files_and_headings():
    wrong = []
    for page in [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]:
        for target in links_of(page):
            path, _, anchor = target.partition("#")
            file = (ROOT / page).parent / path if path else ROOT / page
            if not file.exists() or (anchor and anchor not in anchors_of(file)):
                wrong.append(f"{page}: {target}")
    assert wrong == []


def links_of(page: str) -> list[str]:
    """Return the relative targets of a page's links and pictures, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^()\s]+)\)", text)
    targets += re.findall(r'(?:src|srcset)="([^"]+)"', text)
    return [target for target in targets if not re.match(r"\w+:", target)]


def anchors_of(file: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    anchors = set()
    for heading in re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchors.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return anchors


def test_the_quoted_messages_are_those_of_the_code():
    """A table of troubleshooting quotes messages, with `...` or letters for what varies."""
    constants = "\0".join([*string_constants(), "No module named"])
    table = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| (?:warning )?`([^`]+)`", table, re.MULTILINE)
    assert len(quoted) > 40
    wrong = []
    for message in quoted:
        for part in re.split(r"\.\.\.|\b[A-Z]\b(?!\+)|'[^']*'|\b(?:\d+|RUN)\b", message):
            words = part.strip(" :;,.()='")
            if len(words) > 12 and words not in constants:
                wrong.append(f"{message}: {words!r}")
    assert wrong == []


def string_constants() -> Iterator[str]:
    """Yield the strings of the package's sources; an f-string has NUL for each value."""
    for path in [*ROOT.glob("expo_fast/**/*.py"), *ROOT.glob("kernels/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.Constant) and isinstance(node.value, bytes):
                yield node.value.decode(errors="replace")
            elif isinstance(node, ast.JoinedStr):
                constant = [isinstance(each, ast.Constant) for each in node.values]
                parts = zip(node.values, constant, strict=True)
                yield "".join(ast.literal_eval(part) if fixed else "\0" for part, fixed in parts)


def test_names_of_trl_and_flags_exist_in_both():
    trl = pytest.importorskip("trl")
    from transformers import TrainingArguments

    kinds = [trl.GRPOConfig, trl.DPOConfig, trl.SFTConfig, TrainingArguments]
    theirs = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    wrong = []
    for row in re.findall(
        r"^\| (.*?`.*?) \| (.*) \|$", page_text("docs/from-trl.md"), re.MULTILINE
    ):
        left, right = row
        names = re.findall(r"`([a-z]\w*)(?:=[^`]*)?`", left)
        wrong += [name for name in names if name not in theirs | NOT_OPTIONS_OF_TRL]
        wrong += [flag for flag in flags_in(right) if not hasattr(Train, flag)]
    assert wrong == []


NOT_OPTIONS_OF_TRL = {"peft_config"}  # an argument of the trainers


def page_text(page: str) -> str:
    return (ROOT / page).read_text()


def flags_in(text: str) -> list[str]:
    """Return the flags that a text names, as fields."""
    return [flag.replace("-", "_") for flag in re.findall(r"--([a-z][\w-]*)", text)]


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_the_text_exist(page: str):
    text = re.sub(r"^```.*?^```", "", page_text(page), flags=re.MULTILINE | re.DOTALL)
    known = {field.name for kind in (Train, Evaluate) for field in dataclasses.fields(kind)}
    wrong = [flag for flag in flags_in(text) if flag.removeprefix("no_") not in known | OTHER_FLAGS]
    assert wrong == []


OTHER_FLAGS = {"config", "help", "version"}
OTHER_FLAGS |= {"nnodes", "nproc_per_node", "max_restarts", "rdzv_endpoint"}  # torchrun
OTHER_FLAGS |= {"ranks", "simulate"}  # benchmarks.scaling


def test_names_of_the_api_page_exist():
    module = None
    checked = 0
    for line in page_text("docs/api.md").splitlines():
        heading = re.match(r"## (expo_fast\.\w+)$", line)
        if heading:
            module = importlib.import_module(heading[1])
        if not line.startswith("| `"):
            continue
        for name in re.findall(r"`([A-Za-z_.]+)", line.split(" | ")[0]):
            assert has_name(module, name), f"{module}: {name}"
            checked += 1
    assert checked > 15


def has_name(module: object, dotted: str) -> bool:
    """Return whether a module has a name, which may be a field of a dataclass."""
    owner, _, name = dotted.rpartition(".")
    holder = getattr(module, owner) if owner else module
    fields = getattr(holder, "__dataclass_fields__", {})
    return hasattr(holder, name) or name in fields


def test_each_cell_of_the_comparison_has_a_source():
    rows = [
        line.strip("|").split(" | ")
        for line in page_text("docs/comparison.md").splitlines()
        if line.startswith("| **")
    ]
    assert len(rows) >= 12
    assert [cell for row in rows for cell in row[1:] if "([source](" not in cell] == []
    assert {len(row) for row in rows} == {7}


def test_the_picture_is_that_of_the_committed_measurements():
    assert picture.OUTPUT.read_text() == picture.picture()


def test_the_page_of_flags_is_fresh():
    assert page_text("docs/flags.md") == flags_page.page()


def test_the_readme_is_short():
    assert len(page_text("README.md").splitlines()) < 200


def test_each_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    docs = [page for page in PAGES if page.startswith("docs/")]
    missing = [page for page in docs if Path(page).name not in text]
    assert missing == []


# Running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model with room for the prompts of the default job."""
    folder = tmp_path_factory.mktemp("docs") / "model"
    save_model(tiny_model(max_position_embeddings=4096), tiny_tokenizer(), folder)
    return folder


@pytest.fixture
def tiny_default(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the default model a tiny one, and small sizes the defaults of all runs."""
    monkeypatch.setattr(weights, "find_default_model", lambda: model)
    full = train.run

    def run_small(config: Train) -> train.TrainResult:
        return full(small(config))

    monkeypatch.setattr(train, "run", run_small)
    return model


SMALL = {
    "steps": 2,
    "prompts_per_step": 2,
    "num_generations": 2,
    "explanations_per_question": 2,
    "max_completion_length": 8,
    "eval_limit": 2,
    "eval_samples": 1,
}


def small(config: Train) -> Train:
    """Return the configuration with sizes of at most SMALL, as far as the method reads them."""
    changes: dict[str, object] = {"dtype": "float32"}
    for name, most in SMALL.items():
        if config.method in methods_that_read(name):
            changes[name] = min(getattr(config.resolved(), name), most)
    if config.generation_budget:
        changes["generation_budget"] = 4
    if config.overlong_buffer:
        changes["overlong_buffer"] = 4
    changes["updates_per_batch"] = min(config.updates_per_batch, 2)
    return dataclasses.replace(config, **changes)


def pages_that_run() -> list[str]:
    runs = []
    for page in PAGES:
        kinds = {block.language for block in blocks_of(page) if block.mark != "not run"}
        if kinds & {"python", "bash"}:
            runs.append(page)
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_that_run())
def test_blocks_run(page, tiny_default, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("examples").symlink_to(ROOT / "examples")
    namespace = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", namespace)
    for block in blocks_of(page):
        if block.title is not None:
            Path(block.title).write_text(block.text)
        if block.mark == "not run":
            continue
        if block.language == "python":
            exec(compile(block.text, block.place, "exec"), vars(namespace))
        elif block.language == "bash":
            times = 2 if (block.mark, block.reason) == ("run", "twice") else 1
            for words in [*commands(block)] * times:
                run_command(words, dry=block.mark == "dry-run", model=tiny_default)
    capsys.readouterr()


def run_command(words: Sequence[str], *, dry: bool, model: Path) -> None:
    """Run a command in this process, with small sizes."""
    module, arguments = module_of(words)
    if module:  # `test_no_block_escapes` has checked other commands
        expanded = [path for word in arguments for path in expand(word)]
        RUNNERS[module](expanded, dry, model)


def expand(word: str) -> list[str]:
    """Return the paths that a word with * matches, as a shell does, or the word."""
    return sorted(glob.glob(word)) or [last_checkpoint(word)]


def last_checkpoint(word: str) -> str:
    """Return the path of the last checkpoint of a short run for that of the documented run."""
    run_dir, separator, _ = word.partition("/checkpoints/step-")
    if not separator or Path(word).exists():
        return word
    return str(checkpoint.newest(Path(run_dir)))


def run_train(arguments: list[str], dry: bool, model: Path) -> None:
    config = parse(Train, arguments)
    if dry:
        train.run(dataclasses.replace(config, model=str(model), dry_run=True))
        return
    with suppress(Collapsed):  # a random model explains nothing, so offline ExP-DPO has no pairs
        train.run(config)


def run_evaluate(arguments: list[str], dry: bool, model: Path) -> None:
    config = parse(Evaluate, arguments)
    least = [
        "--limit",
        "2",
        "--max-completion-length",
        "8",
        "--samples",
        str(min(config.samples, 2)),
    ]
    if config.k:
        least += ["--k", "2"]
    if dry:
        least += ["--model", str(model)]
    evaluate.main([*arguments, *least])


def run_report(arguments: list[str], dry: bool, model: Path) -> None:
    report.main(arguments)


def run_check(arguments: list[str], dry: bool, model: Path) -> None:
    small = {"N_ROWS": 24, "DEPTH": 16, "VOCABULARY": 131}  # Triton's interpreter is slow
    with pytest.MonkeyPatch.context() as patch:
        for name, value in small.items():
            patch.setattr(op_checks, name, value)
        check.main([*arguments, "--model", str(model)] if arguments else arguments)


RUNNERS: dict[str, Callable[[list[str], bool, Path], None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "report": run_report,
    "check": run_check,
}


EXAMPLES = sorted(path.stem for path in ROOT.glob("examples/*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tiny_default, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    compared = re.search(r"loss of \w+ (-?[\d.]+), of expo_fast (-?[\d.]+)", printed)
    assert bool(compared) == ("loss of" in page_text(f"examples/{name}.py"))
    if compared:
        assert float(compared[1]) == pytest.approx(float(compared[2]), rel=1e-3, abs=1e-6)
    assert printed.count("\n") > 1


def test_each_example_is_in_the_table():
    table = page_text("examples/README.md")
    assert [name for name in EXAMPLES if f"[{name}.py]({name}.py)" not in table] == []


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    quickstart = (tmp_path / "site/index.html").read_text()
    assert "fonts.googleapis.com" not in quickstart
    assert "<math" in (tmp_path / "site/ops/index.html").read_text()


def test_the_readmes_table_of_models_is_fresh():
    readme = (ROOT / "README.md").read_text()
    message = "run python -m expo_fast.inspection.model_table"
    assert model_table.with_table(readme) == readme, message
