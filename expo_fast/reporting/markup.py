"""HTML of the report: the page and its parts. Text is escaped, and the page has no scripts."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from expo_fast.reporting.text import LONGEST_TEXT, shown_text

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>expo_fast: training runs</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .remark { font-size: .87rem; max-width: 48rem; opacity: .85; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
td { white-space: nowrap; } thead th { vertical-align: bottom; }
tr { border-bottom: 1px solid #8886; } small { display: block; font-size: .8rem; opacity: .75; }
figure { margin: 1rem 0; } svg { max-width: 100%; height: auto; }
svg * { font-family: system-ui, sans-serif; stroke-linejoin: round; stroke-linecap: butt; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem; margin: .1rem 0 .6rem; }
dl { border-left: 2px solid #8886; padding-left: .8rem; } dd { margin: 0; }
dt { font-size: .8rem; opacity: .75; }
@media print {
  :root { color-scheme: light; font-size: 11px; } body { max-width: none; margin: 0; }
  h2, h3 { break-after: avoid; } figure, tr, dl, li { break-inside: avoid; }
}
</style></head><body>
<h1>Training runs</h1>
BODY</body></html>
"""


def page(body: str) -> str:
    """Return the page. It loads no other files."""
    return PAGE.replace("BODY", body, 1)


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


def remark(text: str) -> str:
    """Return a paragraph in small print."""
    return f'<p class="remark">{text}</p>'


def small(text: str) -> str:
    """Return a second line of a cell, or "" if the text is empty."""
    return f"<small>{text}</small>" if text else ""
