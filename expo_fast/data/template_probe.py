"""The program that renders a chat template under limits, before it is rendered in the trainer.

A template is a program from a model folder. `'x' * 10**10` and a format of a large width use all
memory inside one operation, where no time limit reaches. So the first rendering runs in a process
that the caller ends. It reads {"template", "conversations", "variables"} as JSON. Its exit code is
TOO_MUCH_MEMORY, or 0 also if the template fails: the caller renders it again and reports that.
"""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from expo_fast.data.programs import bare_environment, command_of

TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30
TOO_MUCH_MEMORY = 3
PROBE = "expo_fast.data.template_probe"
# transformers marks the text of the assistant by these tags. They print nothing.
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


@lru_cache(maxsize=64)
def fault_of_template(template: str, conversations: str, variables: str) -> str | None:
    """Return why a template cannot be rendered within the limits, or None if it can.

    conversations, variables: JSON of a list of conversations, and of an object.
    """
    given = f'{{"template": {json.dumps(template)}, "conversations": {conversations}, '
    given += f'"variables": {variables}}}'
    try:
        done = subprocess.run(
            command_of(PROBE),
            env=bare_environment(),
            input=given.encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {TIMEOUT_S:g} s to render one short question"
    if done.returncode == TOO_MUCH_MEMORY or done.returncode < 0:
        return f"takes more than {MEMORY_BYTES >> 20} MiB of memory to render one short question"
    return None


def main() -> None:
    """Render the conversations that standard input has."""
    given = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        render(GENERATION.sub("", given["template"]), given["conversations"], given["variables"])
    except MemoryError:
        sys.exit(TOO_MUCH_MEMORY)
    except Exception:  # a template may raise anything, and the caller reports it
        return


def render(
    template: str, conversations: Sequence[Sequence[Mapping[str, str]]], variables: dict[str, Any]
) -> None:
    """Render conversations in an environment like that of transformers."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = json.dumps
    environment.globals["raise_exception"] = fail
    compiled = environment.from_string(template)
    for messages in conversations:
        for for_answer in (False, True):
            compiled.render(messages=messages, add_generation_prompt=for_answer, **variables)


def fail(message: str) -> None:
    """Fail, as a template asks for by raise_exception."""
    raise ValueError(message)


if __name__ == "__main__":
    main()
