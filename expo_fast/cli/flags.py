"""Convert flags and TOML files to a configuration, and a configuration to TOML."""

import contextlib
import dataclasses
import io
import json
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from expo_fast.config import Evaluate, Train

PRESETS = Path(__file__).parents[1] / "presets"

C = TypeVar("C")  # a dataclass whose fields are flags


def parse(kind: type[C], argv: Sequence[str]) -> C:
    """Return the configuration of `--config`, with the other flags as overrides.

    `--config` takes a TOML file or the name of a preset. Raise ValueError for an unknown key or a
    bad value, and FileNotFoundError for a missing file.
    """
    words = []
    for word in argv:
        if word.startswith("--config="):
            words += ["--config", word.removeprefix("--config=")]
        else:
            words.append(word)
    default = kind()
    if "--config" in words:
        at = words.index("--config")
        if at + 1 == len(words):
            raise ValueError("--config has no value: need a TOML file or the name of a preset")
        default = from_toml(kind, preset_or_file(words[at + 1]))
        del words[at : at + 2]
    about = (
        f"{kind.__doc__} --config takes a TOML file or the name of a preset "
        f"({', '.join(presets())}), whose values replace the defaults. Other flags override them."
    )
    return from_flags(kind, words, about, default)


def from_flags(kind: type[C], argv: Sequence[str], about: str, default: C | None = None) -> C:
    """Return the dataclass with the values of the flags. A field without a default is positional.

    about: the description in --help.
    default: values of fields without a flag. None: the defaults of the dataclass.

    Raise ValueError for an unknown flag or a bad value.
    """
    import tyro

    options: dict[str, Any] = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                kind,
                args=argv,
                description=about,
                config=(tyro.conf.PositionalRequiredArgs,),
                **options,
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ValueError(_sentence(printed.getvalue())) from None


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
    return " ".join(message) + "; see --help"


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
    if not path.is_file():
        known = ", ".join(presets())
        raise FileNotFoundError(f"no file {path}: --config needs a TOML file, or one of {known}")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    types = get_type_hints(kind)
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in types:
            raise ValueError(f"{path} has an unknown key {name!r}; known: {', '.join(types)}")
        if name in fields:
            raise ValueError(f"{path} has {name} twice, with - and with _: keep one of them")
        try:
            fields[name] = _typed(value, types[name])
        except (TypeError, OverflowError):
            need = _type_in_words(types[name])
            raise ValueError(f"{path}: {name}={value!r}: need {need}") from None
    return kind(**fields)


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
    elif wanted is float:
        fits = type(value) in (int, float)
    else:
        # type() and not isinstance, for which true is an integer. `arguments` are of a union.
        fits = type(value) in (arguments or (wanted,))
    if not fits:
        raise TypeError
    return float(value) if wanted is float else value


def _typed_tuple(value: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    any_length = ... in arguments
    if not isinstance(value, list):
        raise TypeError
    if not any_length and len(value) != len(arguments):
        raise TypeError
    return tuple(_typed(element, arguments[0]) for element in value)


def _type_in_words(wanted: Any) -> str:
    types = [each for each in get_args(wanted) or (wanted,) if each is not type(None)]
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(repr, types))}"
    if get_origin(wanted) is tuple:
        count = "" if ... in types else f"{len(types)} "
        return f"a list of {count}{types[0].__name__}"
    return f"the type {types[0].__name__}"


def dump_toml(config: Train | Evaluate) -> str:
    """Return the TOML text that `from_toml` reads. Fields that are None are left out."""
    lines = []
    for name, value in dataclasses.asdict(config).items():
        if value is not None:
            lines.append(f"{name} = {_toml_value(value)}\n")
    return "".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
