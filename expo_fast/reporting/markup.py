"""HTML of the report: the page and its parts. Text is escaped."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from expo_fast.reporting.text import LONGEST_TEXT, shown_text

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>expo_fast: training runs</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>
{style}</style></head><body>
<h1>Training runs</h1>
{body}
<noscript><p class="warning">Charts and completions need JavaScript.</p></noscript>
<script type="application/json" id="data">{data}</script>
{scripts}
</body></html>
"""


def page(body: str, data: Mapping[str, Any], scripts: Sequence[str]) -> str:
    """Return the page. It loads no other files.

    Its policy allows only the scripts with the given text, so that text of a model cannot run.

    data: JSON values that the scripts read.
    scripts: JavaScript, in the order in which it runs.
    """
    hashes = []
    for script in scripts:
        assert "</script" not in script
        digest = hashlib.sha256(script.encode()).digest()
        hashes.append(f"'sha256-{base64.b64encode(digest).decode()}'")
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src {' '.join(hashes)}"
    return PAGE.format(
        policy=policy,
        style=resource("report.css"),
        body=body,
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )


def resource(name: str) -> str:
    """Return the text of a file of this package."""
    return (files("expo_fast.reporting") / name).read_text(encoding="utf-8")


def escaped(value: Any, longest: int = LONGEST_TEXT) -> str:
    """Return up to `longest` characters of a value as escaped HTML text."""
    return html.escape(shown_text(value, longest))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table. Cells are HTML. The first cell of a row is its header; "" shows a dash."""
    columns = "".join(f"<th>{cell}</th>" for cell in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{cell or '&ndash;'}</td>" for cell in rest)
        lines.append(f"<tr><th>{first}</th>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead>\n{body}</table></div>'


def section(title: str, *parts: str) -> str:
    """Return a section, or "" if all its parts are empty."""
    body = "\n".join(filter(None, parts))
    if not body:
        return ""
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n"


def warning(text: str) -> str:
    """Return a paragraph that stands out."""
    return f'<p class="warning">{text}</p>'


def remark(text: str) -> str:
    """Return a paragraph in small print."""
    return f'<p class="remark">{text}</p>'


def small(text: str) -> str:
    """Return a second line of a cell, or "" if the text is empty."""
    return f"<small>{text}</small>" if text else ""
