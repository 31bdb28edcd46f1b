"""Flags and TOML files to a configuration, and back."""

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

C = TypeVar("C")  # a dataclass of fields that are flags


def parse(kind: type[C], argv: Sequence[str]) -> C:
    """`--config` (a TOML file or the name of a preset), overridden by flags.

    ValueError on an unknown key or a bad value.
    """
    argv = [word for given in argv for word in _separate(given)]
    default = kind()
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs a TOML file behind it, or the name of a preset")
        default = from_toml(kind, preset_or_file(argv[at + 1]))
        del argv[at : at + 2]
    about = (
        f"{kind.__doc__} --config FILE.toml, or the name of a preset ({', '.join(presets())}), "
        "gives defaults, which flags override."
    )
    return from_flags(kind, argv, about, {"default": default})


def from_flags(kind: type[C], argv: Sequence[str], about: str, options: dict[str, Any]) -> C:
    """A dataclass from flags; a field without a default is positional. ValueError as `parse`."""
    import tyro

    positional, said = tyro.conf.PositionalRequiredArgs, io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=argv, description=about, config=(positional,), **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise ValueError(_sentence(said.getvalue())) from None


def _sentence(box: str) -> str:
    """What tyro says inside the frame that it draws: no colours, title or advice."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [re.sub(r"[^ -~]|--+$", "", line).strip() for line in plain.splitlines()]
    _, *said = filter(None, lines)
    advice = ("Argument helptext", "Perhaps", "For full helptext", "Similar arguments")
    end = next((i for i, line in enumerate(said) if line.startswith(advice)), len(said))
    return " ".join(said[:end]) + "; see --help"


def _separate(word: str) -> list[str]:
    return ["--config", word[9:]] if word.startswith("--config=") else [word]


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_or_file(given: str) -> Path:
    """What is no preset's name is a file."""
    return PRESETS / f"{given}.toml" if given in presets() else Path(given)


def from_toml(kind: type[C], path: Path) -> C:
    """A config from a TOML file of its fields."""
    if not path.is_file():
        known = ", ".join(presets())
        raise FileNotFoundError(f"no file {path}: --config needs a TOML file, or one of {known}")
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    types, fields = get_type_hints(kind), {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in types:
            raise ValueError(f"{path} has an unknown key {name!r}; known: {', '.join(types)}")
        if name in fields:
            raise ValueError(f"{path} has {name} twice, spelt with - and with _: keep one")
        try:
            fields[name] = _typed(value, types[name])
        except (TypeError, OverflowError):
            raise ValueError(f"{path}: {name}={value!r}: need {_named(types[name])}") from None
    return kind(**fields)


def _typed(value: Any, wanted: Any) -> Any:
    """The TOML value as a field's type; TypeError where it is none."""
    arguments = get_args(wanted)
    if get_origin(wanted) is Literal:
        fits = value in arguments
    elif get_origin(wanted) is tuple:
        fits = isinstance(value, list) and (... in arguments or len(value) == len(arguments))
        value = tuple(_typed(x, arguments[0]) for x in value) if fits else value
    elif wanted is float:
        fits = type(value) in (int, float)
        value = float(value) if fits else value
    else:
        fits = type(value) in (arguments or (wanted,))  # not isinstance: true is no 1
    if not fits:
        raise TypeError
    return value


def _named(wanted: Any) -> str:
    """A field's type in plain words."""
    plain = [t for t in get_args(wanted) or (wanted,) if t is not type(None)]
    if get_origin(wanted) is Literal:
        return f"one of {', '.join(map(repr, plain))}"
    if get_origin(wanted) is tuple:
        count = "" if ... in plain else f"{len(plain)} "
        return f"a list of {count}{plain[0].__name__}"
    return f"the type {plain[0].__name__}"


def dump_toml(config: Train | Evaluate) -> str:
    """The TOML that `from_toml` reads back; what is None is left out."""
    values = dataclasses.asdict(config).items()
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values if value is not None)


def _toml(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
