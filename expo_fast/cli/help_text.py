"""The text of --help: the flags of a command by theme, with the methods that read each of them.

Texts are the docstrings below the fields of a configuration. The methods follow from the tables in
`methods` and `objectives`.
"""

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from expo_fast.cli.program import name_of_command
from expo_fast.config import Prompting, Train
from expo_fast.methods import METHODS, methods_that_read
from expo_fast.objectives import POLICY_OBJECTIVES, PREFERENCE_OBJECTIVES, Entry

# Each field of Train and Evaluate, by theme.
THEMES: dict[str, tuple[str, ...]] = {
    "Run": (
        "method",
        "steps",
        "epochs",
        "prompts_per_step",
        "updates_per_batch",
        "seed",
        "output_dir",
        "resume",
        "inexact_resume",
        "dry_run",
    ),
    "Model": ("model", "dtype", "device"),
    "Data": (
        "train_data",
        "data_weights",
        "eval_data",
        "eval_fraction",
        "data",
        "data_dir",
        "columns",
        "limit",
        "levels",
    ),
    "Prompts": (
        "shots",
        "shots_data",
        "system_prompt",
        "instruction",
        "escape_special_tokens",
    ),
    "Sampling": (
        "num_generations",
        "samples",
        "max_completion_length",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "generation_budget",
        "dynamic_sampling",
        "k",
    ),
    "Reward": ("reward", "reward_weights", "reward_timeout", "right_above", "overlong_buffer"),
    "Policy loss": (
        "objective",
        "loss",
        "advantage_scale",
        "clip_low",
        "clip_high",
        "kl_coef",
        "entropy_coef",
        "mask_truncated",
    ),
    "Explanations and the SFT term": (
        "exp_sft_coef",
        "exp_sft_reduction",
        "exp_sft_schedule",
        "exp_sft_max_accuracy",
        "explanations_per_question",
        "keep_explanations",
        "choose_explanations",
        "append_answer",
        "shuffle_explanations",
        "explain_every",
        "explain_temperature",
    ),
    "Pairs": (
        "pairs_every",
        "refresh_reference",
        "pairs_per_question",
        "preference",
        "dpo_beta",
        "label_smoothing",
        "rdpo_alpha",
    ),
    "LoRA": ("lora_rank", "lora_alpha"),
    "Optimizer": (
        "learning_rate",
        "warmup_steps",
        "schedule",
        "betas",
        "eps",
        "weight_decay",
        "max_grad_norm",
    ),
    "Memory and precision": (
        "pack_tokens",
        "pack_memory",
        "gradient_checkpointing",
        "batch_invariant",
    ),
    "Several GPUs or machines": ("shard", "gather", "collective_timeout"),
    "Evaluation": ("eval_every", "eval_limit", "eval_samples", "eval_temperature"),
    "Checkpoints and logs": (
        "checkpoint_every",
        "keep_checkpoints",
        "keep_best",
        "save_patience",
        "stop_within",
        "diagnose",
        "diagnose_every",
        "report_to",
        "push_to_hub",
    ),
    "Alarms": (
        "alarm_steps",
        "alarm_clipped_ratio",
        "alarm_entropy",
        "alarm_kl",
        "alarm_nll",
        "alarm_grad_spike",
        "stop_on_collapse",
    ),
    "Results": ("output", "lm_eval_output"),
}
ARGUMENTS = "Arguments"  # the title of positional arguments
OTHERS = "Flags"  # the title of fields without a theme
CONFIG = "Take values in place of the defaults"
OVERRIDE = "Flags override them."

MOST_COLUMNS = 100
TEXT_COLUMN = 30


@dataclass(frozen=True)
class Flag:
    """A flag as --help shows it."""

    name: str
    """Name of the field; a positional argument has the same name."""
    forms: str
    """What to type: the flag and the form of its value."""
    text: str
    """What it sets, with the unit."""
    default: str
    """The default as text; empty if there is none."""
    readers: str
    """The methods and objectives that read it; empty: all."""


def themes(kind: type, defaults: Mapping[str, Any] | None = None) -> dict[str, list[Flag]]:
    """Return the flags of a command's dataclass by theme, without empty themes.

    defaults: values in place of those of the dataclass, by field.
    """
    defaults = defaults or {}
    texts = texts_of_fields(kind)
    types = get_type_hints(kind)
    flags: dict[str, Flag] = {}
    for field in dataclasses.fields(kind):
        value = defaults.get(field.name, field.default)
        flags[field.name] = Flag(
            name=field.name,
            forms=forms_of(field.name, types[field.name], positional=is_required(field)),
            text=texts.get(field.name, ""),
            default="" if is_required(field) else shown(value),
            readers=readers_of(field.name) if issubclass(kind, Train) else "",
        )
    found: dict[str, list[Flag]] = {}
    arguments = [field.name for field in dataclasses.fields(kind) if is_required(field)]
    if arguments:
        found[ARGUMENTS] = [flags.pop(name) for name in arguments]
    of_kind = THEMES if issubclass(kind, Prompting) else {}
    for title, names in of_kind.items():
        members = [flags.pop(name) for name in names if name in flags]
        if members:
            found[title] = members
    if flags:
        found[OTHERS] = list(flags.values())
    return found


def is_required(field: dataclasses.Field) -> bool:
    """Return whether a field has no default, so that it is a positional argument."""
    return field.default is dataclasses.MISSING


def texts_of_fields(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and of its bases, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        name = None
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
            elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                texts[name] = " ".join(str(node.value.value).split())
                name = None
            else:
                name = None
    return texts


def forms_of(name: str, wanted: Any, *, positional: bool) -> str:
    """Return a flag with the form of its value, as in `--steps INT`."""
    if positional:
        return form_of_value(wanted).replace("TEXT", name.upper().removesuffix("S"))
    flag = f"--{name.replace('_', '-')}"
    if wanted is bool:
        return f"{flag}, --no-{name.replace('_', '-')}"
    return f"{flag} {form_of_value(wanted)}"


def form_of_value(wanted: Any) -> str:
    """Return the form of a value of this type, such as INT or {a,b}."""
    arguments = [each for each in get_args(wanted) if each is not type(None)]
    if get_origin(wanted) is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if get_origin(wanted) is tuple:
        form = form_of_value(arguments[0])
        return f"{form} ..." if ... in arguments else " ".join([form] * len(arguments))
    if arguments:  # of a union; the last one is the most general
        return form_of_value(arguments[-1])
    return "TEXT" if wanted is str else wanted.__name__.upper()


def shown(value: Any) -> str:
    """Return a default as it is typed on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(shown, value)) or "empty"
    if isinstance(value, str) and (not value or " " in value):
        return repr(value).replace("\\\\", "\\")
    return str(value)


def readers_of(option: str) -> str:
    """Return the methods, objectives and preferences that read an option; empty: all."""
    parts = []
    methods = methods_that_read(option)
    others = [name for name in METHODS if name not in methods]
    if len(others) > len(methods):
        parts.append(", ".join(methods))
    elif others:
        parts.append(f"all but {', '.join(others)}")
    for flag, table in (
        ("--objective", POLICY_OBJECTIVES),
        ("--preference", PREFERENCE_OBJECTIVES),
    ):
        names = entries_that_read(table, option)
        if names and len(names) < len(table):
            parts.append(f"{flag} {', '.join(names)}")
    return "; ".join(parts)


def entries_that_read(table: Mapping[str, Entry], option: str) -> list[str]:
    """Return the names of the objectives of a table that read an option."""
    return [name for name, entry in table.items() if option in entry.options]


def help_text(
    kind: type,
    about: str,
    *,
    presets: Collection[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> str:
    """Return the text that --help prints.

    about: the description of the command.
    presets: names that --config takes besides a file. None: there is no --config.
    defaults: values in place of those of the dataclass, by field.
    """
    width = min(shutil.get_terminal_size().columns, MOST_COLUMNS)
    by_theme = themes(kind, defaults)
    arguments = [flag.forms for flag in by_theme.get(ARGUMENTS, [])]
    usage = " ".join([name_of_command(kind.__name__.lower()), *arguments, "[FLAGS]"])
    lines = [f"usage: {usage}", "", *textwrap.wrap(about, width)]
    if issubclass(kind, Train):
        note = (
            "Brackets name the methods that read a flag. The other methods refuse values other "
            "than the default. All methods read a flag without brackets."
        )
        lines += ["", *textwrap.wrap(note, width)]
    lines += ["", "General", *general_flags(presets, width)]
    for title, flags in by_theme.items():
        lines += ["", title]
        lines += [entry(flag.forms, "".join(description(flag)), width) for flag in flags]
    return "\n".join(lines)


def general_flags(presets: Collection[str] | None, width: int) -> Iterator[str]:
    """Yield the entries of the flags that are no fields."""
    if presets:
        source = f"from a preset ({', '.join(presets)}) or from a TOML file"
        yield entry("--config NAME|FILE", f"{CONFIG} {source}. {OVERRIDE}", width)
    elif presets is not None:
        yield entry("--config FILE", f"{CONFIG} from a TOML file. {OVERRIDE}", width)
    yield entry("--help", "Print this text.", width)


def description(flag: Flag) -> Iterator[str]:
    """Yield the parts of a flag's description."""
    yield flag.text
    if flag.default:
        yield f" (default: {flag.default})"
    if flag.readers:
        yield f" [{flag.readers}]"


def entry(forms: str, text: str, width: int) -> str:
    """Return a flag and its description, in two columns."""
    indent = " " * TEXT_COLUMN
    lines = textwrap.wrap(text, width - TEXT_COLUMN, break_on_hyphens=False)
    start = f"  {forms}"
    if len(start) + 2 > TEXT_COLUMN:
        return "\n".join([start, *(indent + line for line in lines)])
    first, *rest = lines
    return "\n".join([start.ljust(TEXT_COLUMN) + first, *(indent + line for line in rest)])
