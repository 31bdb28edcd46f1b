"""Convert flags and TOML files to a configuration, and a configuration to TOML."""

import contextlib
import dataclasses
import io
import json
import math
import re
import tomllib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from expo_fast.cli.help_text import help_text
from expo_fast.cli.unknown_flags import hint
from expo_fast.config import (
    Evaluate,
    Train,
    default_of,
    options_without_effect,
    type_in_words,
)
from expo_fast.objectives import POLICY_OBJECTIVES, PREFERENCE_OBJECTIVES

PRESETS = Path(__file__).parents[1] / "presets"

C = TypeVar("C")  # a dataclass whose fields are flags


def parse(kind: type[C], argv: Sequence[str]) -> C:
    """Return the configuration of `--config`, with the other flags as overrides.

    `--config` takes a TOML file or the name of a preset. Raise ValueError for an unknown key or a
    bad value, and FileNotFoundError for a missing file.
    """
    words = list(argv)
    given = _take_config(words)
    if _take_config(words) is not None:
        raise ValueError("--config is given twice: give one preset or file, and flags to override")
    values = {} if given is None else _values_of_toml(kind, preset_or_file(given))
    typed = _names_of_flags(words)
    if {"steps", "epochs"} <= typed:
        raise ValueError("--steps and --epochs are both given: give one of them; see --help")
    if "epochs" in typed:
        values.pop("steps", None)
    if "steps" in typed:
        values.pop("epochs", None)
    if _wants_help(words):
        named = presets() if issubclass(kind, Train) else ()
        _print_help(kind, str(kind.__doc__), presets=named, defaults=values)
    options = _values_of_flags(kind, words, values)
    if given in presets() and issubclass(kind, Train):
        options |= _defaults_for_unfit(options, typed, preset=given, of_preset=values)
    return kind(**options)


def from_flags(kind: type[C], argv: Sequence[str], about: str) -> C:
    """Return the dataclass with the values of the flags. A field without a default is positional.

    about: the description in --help.

    Raise ValueError for an unknown flag or a bad value.
    """
    if _wants_help(argv):
        _print_help(kind, about)
    return kind(**_values_of_flags(kind, argv, {}))


def _take_config(words: list[str]) -> str | None:
    """Remove --config and its value from the words, and return the value. None: there is none."""
    for at, word in enumerate(words):
        if word.startswith("--config="):
            del words[at]
            return word.removeprefix("--config=")
        if word == "--config":
            if at + 1 == len(words):
                raise ValueError("--config has no value: need a TOML file or the name of a preset")
            value = words[at + 1]
            del words[at : at + 2]
            return value
    return None


def _names_of_flags(words: Sequence[str]) -> set[str]:
    """Return the names of the fields whose flags are among the words, and unknown names."""
    names = set()
    for word in words:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            names.add(name.removeprefix("no_"))
    return names


def _wants_help(words: Sequence[str]) -> bool:
    return "--help" in words or "-h" in words


def _print_help(kind: type, about: str, **options: Any) -> NoReturn:
    print(help_text(kind, about, **options), flush=True)
    raise SystemExit(0)


def _defaults_for_unfit(
    options: Mapping[str, Any],
    typed: Collection[str],
    *,
    preset: str,
    of_preset: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the defaults of the preset's options that do not fit the method or objective.

    The method or objective would ignore them, or they are those of the preset's own objective: the
    clip range of GSPO is a thousandth of PPO's. A preset fits itself, so that flags have chosen
    another method or objective. Warn about these options.

    typed: the options with a flag. If they are ignored, they are refused later.
    preset, of_preset: the name of the preset and the options that it sets.
    """
    choices = {name: options[name] for name in ("method", "objective", "preference")}
    unfit = [*options_without_effect(**choices), *_options_of_other_objectives(options, of_preset)]
    defaults = {}
    for name in dict.fromkeys(unfit):
        default = default_of(Train, name)
        if name in of_preset and name not in typed and options[name] != default:
            defaults[name] = default
    if defaults:
        values = ", ".join(f"{name}={options[name]!r}" for name in defaults)
        chosen = ", ".join(f"{k}={value}" for k, value in choices.items() if k in typed)
        warnings.warn(
            f"values of preset {preset} do not fit {chosen}, the defaults are used: {values}",
            stacklevel=3,
        )
    return defaults


def _options_of_other_objectives(
    options: Mapping[str, Any], of_preset: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the options that the preset's objective reads, if another one is chosen."""
    for choice, table in (("objective", POLICY_OBJECTIVES), ("preference", PREFERENCE_OBJECTIVES)):
        own = of_preset.get(choice, default_of(Train, choice))
        if options[choice] != own:
            yield from table[own].options


def _values_of_flags(
    kind: type, words: Sequence[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the value of each field. The values are in the type of the field and not checked.

    defaults: values of fields without a flag, in place of the defaults of the dataclass.
    """
    import tyro

    _refuse_unknown_flags(kind, words)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            parsed = tyro.cli(
                _without_checks(kind, defaults),
                args=words,
                config=(tyro.conf.PositionalRequiredArgs,),
            )
    except SystemExit:
        raise ValueError(_sentence(printed.getvalue())) from None
    return dict(vars(parsed))


def _without_checks(kind: type, defaults: Mapping[str, Any]) -> type:
    """Return a dataclass with the fields of `kind` and other defaults, and without its checks.

    The parser would word an error of a check in its own way.
    """
    types = get_type_hints(kind)
    fields = []
    for each in dataclasses.fields(kind):
        value = defaults.get(each.name, each.default)
        fields.append((each.name, types[each.name], dataclasses.field(default=value)))
    return dataclasses.make_dataclass(kind.__name__, fields, kw_only=True)


def _refuse_unknown_flags(kind: type, words: Sequence[str]) -> None:
    """Raise ValueError for flags that the dataclass does not have, with a hint for each."""
    known = [field.name.replace("_", "-") for field in dataclasses.fields(kind)]
    unknown = []
    for word in words:
        name = word[2:].partition("=")[0].replace("_", "-")
        if word.startswith("--") and name.removeprefix("no-") not in known and name:
            unknown.append(name)
    sentences = [f"--{name}{_hint_after_colon(name, known)}" for name in dict.fromkeys(unknown)]
    if len(sentences) == 1:
        raise ValueError(f"unknown {sentences[0]}; see --help")
    if sentences:
        lines = "\n".join(f"  {sentence}" for sentence in sentences)
        raise ValueError(f"{len(sentences)} unknown flags, see --help:\n{lines}")


def _hint_after_colon(unknown: str, known: Collection[str]) -> str:
    found = hint(unknown, known)
    return f": {found}" if found else ""


def _sentence(printed: str) -> str:
    """Return the message in the frame that tyro prints, without colours, title and advice."""
    without_colors = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    lines = [re.sub(r"[^ -~]|--+$", "", line).strip() for line in without_colors.splitlines()]
    _, *rest = filter(None, lines)
    message = []
    for line in rest:
        if line.startswith(("Argument helptext", "Perhaps", "For full helptext", "Similar arg")):
            break
        message.append(line)
    sentence = " ".join(message).removeprefix("Error parsing ").removesuffix(".")
    return sentence + "; see --help"


def presets() -> list[str]:
    """Return the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_or_file(given: str) -> Path:
    """Return the path of the preset, or of the file if no preset has that name."""
    if given in presets():
        return PRESETS / f"{given}.toml"
    return Path(given)


def from_toml(kind: type[C], path: Path) -> C:
    """Return the configuration in a TOML file. A key is the name of a field, with - or _.

    Raise FileNotFoundError for a missing file, and ValueError for an unknown key or a bad value.
    """
    return kind(**_values_of_toml(kind, path))


def from_toml_text(kind: type[C], text: str, path: Path) -> C:
    """Return the configuration in the text of a TOML file, see `from_toml`."""
    return kind(**_values_of_text(kind, text, path))


def _values_of_toml(kind: type, path: Path) -> dict[str, Any]:
    """Return the values in a TOML file by field, in the types of the fields and not checked."""
    if not path.is_file():
        known = ", ".join(presets())
        raise FileNotFoundError(f"no file {path}: --config needs a TOML file, or one of {known}")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    return _values_of_text(kind, text, path)


def _values_of_text(kind: type, text: str, path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    types = get_type_hints(kind)
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in types:
            raise ValueError(f"{path} has an unknown key {name!r}: {_hint_of_key(name, types)}")
        if name in fields:
            raise ValueError(f"{path} has {name} twice, with - and with _: keep one of them")
        try:
            fields[name] = _typed(value, types[name])
        except (TypeError, OverflowError):
            need = type_in_words(types[name])
            raise ValueError(f"{path}: {name}={value!r}: need {need}") from None
    return fields


def _hint_of_key(unknown: str, known: Collection[str]) -> str:
    names = [name.replace("_", "-") for name in known]
    found = hint(unknown.replace("_", "-"), names)
    if found is None:
        return f"need one of {', '.join(known)}"
    return found.replace("--", "")


def _typed(value: Any, wanted: Any) -> Any:
    """Return the TOML value in the type of a field. Raise TypeError if it has another type."""
    arguments = get_args(wanted)
    if get_origin(wanted) is tuple:
        return _typed_tuple(value, arguments)
    if isinstance(value, list):  # only a union may hold a tuple
        tuples = [each for each in arguments if get_origin(each) is tuple]
        if not tuples:
            raise TypeError
        return _typed_tuple(value, get_args(tuples[0]))
    if get_origin(wanted) is Literal:
        fits = value in arguments
    elif float in (wanted, *arguments):
        fits = type(value) in (int, float)
    else:
        # type() and not isinstance, for which true is an integer. `arguments` are of a union.
        fits = type(value) in (arguments or (wanted,))
    if not fits:
        raise TypeError
    return float(value) if float in (wanted, *arguments) else value


def _typed_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    any_length = ... in arguments
    if not isinstance(value, list):
        raise TypeError
    if not any_length and len(value) != len(arguments):
        raise TypeError
    return tuple(_typed(element, arguments[0]) for element in value)


def dump_toml(config: Train | Evaluate, leave_out: Collection[str] = ()) -> str:
    """Return the TOML text that `from_toml` reads. Fields that are None are left out."""
    lines = []
    for name, value in dataclasses.asdict(config).items():
        if value is not None and name not in leave_out:
            lines.append(f"{name} = {_toml_value(value)}\n")
    return "".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
