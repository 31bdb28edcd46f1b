"""The sentence about a package that is not installed."""

import sys
from importlib import metadata
from pathlib import Path

# The extra of pyproject.toml that installs a module; None: it is always installed.
EXTRAS: dict[str, str | None] = {
    "torch": None,
    "numpy": "train",
    "transformers": "train",
    "tokenizers": "train",
    "safetensors": "train",
    "gguf": "train",
    "math_verify": "train",
    "rich": "train",
    "tyro": "train",
    "tensorboard": "train",
    "peft": "train",
    "vl_convert": "train",
}
NOT_ON_WINDOWS = "fcntl"


def advice_on(error: ModuleNotFoundError) -> str | None:
    """Return what is missing and how to install it.

    Return None if the module is not one that expo_fast needs, such as an import of a user's file.
    """
    module = (error.name or "").partition(".")[0]
    if module == NOT_ON_WINDOWS:
        return "expo_fast needs Linux or macOS: on Windows, run it in WSL"
    if module not in EXTRAS:
        return None
    return f"the package {module} is not installed: {how_to_install(EXTRAS[module])}"


def how_to_install(extra: str | None) -> str:
    """Return what to do to get the packages of an extra."""
    brackets = f"[{extra}]" if extra else ""
    if is_installed():
        return f"pip install 'expo-fast{brackets}'"
    checkout = Path(__file__).resolve().parents[2]
    environment = checkout / ".venv"
    if environment.is_dir() and environment.resolve() != Path(sys.prefix).resolve():
        return f"`make` installs it into {environment}: source {environment}/bin/activate"
    return f"pip install -e '{checkout}{brackets}'"


def is_installed() -> bool:
    """Return whether an installer such as pip has put expo-fast into this environment.

    pip can add an extra to an installed expo-fast, wherever it came from. A checkout may contain
    metadata too, but these name no installer.
    """
    found = metadata.distributions(name="expo-fast")
    return any(each.read_text("INSTALLER") for each in found)
