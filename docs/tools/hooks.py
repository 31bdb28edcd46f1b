"""Hooks of mkdocs: pages from files outside docs/, links to source files, and formulas.

The pages are also read on GitHub, so their links are relative paths in the repository. Formulas are
LaTeX in fences named math, which GitHub renders; here they become MathML, which browsers draw
without a script.
"""

import html
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify
from pymdownx.superfences import fence_code_format

# Pages of the site that are files elsewhere in the repository: the page's path and the file's.
PAGES = {
    "examples.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "results.md": "benchmarks/RESULTS.md",
    "changelog.md": "CHANGELOG.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
INLINE_MATH = re.compile(r"\$`([^`]+)`\$")
FENCE = re.compile(r"^ *(```|~~~)")
EXTERNAL = ("http://", "https://", "mailto:")


def on_config(config: MkDocsConfig) -> None:
    """Add the fences named mermaid and math, and anchors of headings as GitHub makes them."""
    fences = [
        {"name": "mermaid", "class": "mermaid", "format": fence_code_format},
        {"name": "math", "class": "math", "format": formula},
    ]
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": fences}
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")


def formula(source: str, *_: Any, **__: Any) -> str:
    """Return the LaTeX formula as MathML."""
    return f'<div class="formula">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are files outside docs/, with their pictures."""
    for page, path in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=_absolute(path, config)))
    for path in _pictures(config):
        asset = posixpath.join("repository", path)
        files.append(File.generated(config, asset, abs_src_path=_absolute(path, config)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Convert formulas, and rewrite links that lead out of docs/, outside of code blocks."""
    lines = []
    in_code = False
    for line in markdown.splitlines():
        if FENCE.match(line):
            in_code = not in_code
        elif not in_code:
            line = LINK.sub(lambda link: _rewritten(link, page, config), line)
            line = INLINE_MATH.sub(_inline_formula, line)
        lines.append(line)
    return "\n".join(lines)


def _inline_formula(found: re.Match[str]) -> str:
    # Markdown takes <math> at the beginning of a line as a block.
    return f"<span>{convert(found[1])}</span>"


def _rewritten(link: re.Match[str], page: Page, config: MkDocsConfig) -> str:
    """Return the Markdown link with a target that the site has."""
    picture, text, target = link.groups()
    if target.startswith((*EXTERNAL, "#")):
        return link[0]
    here = page.file.src_uri
    source = PAGES.get(here, posixpath.join("docs", here))
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    anchor = f"#{anchor}" if anchor else ""
    if picture:
        inside = _inside_docs(path) or posixpath.join("repository", path)
        return f"![{text}]({_relative(inside, here)})"
    on_site = {file: name for name, file in PAGES.items()}.get(path) or _inside_docs(path)
    if on_site:
        return f"[{text}]({_relative(on_site, here)}{anchor})"
    if config.repo_url:
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor})"
    return html.unescape(text)


def _inside_docs(path: str) -> str | None:
    """Return the path below docs/; None for a path elsewhere."""
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")


def _pictures(config: MkDocsConfig) -> list[str]:
    """Return the pictures that the pages from outside docs/ show, as paths in the repository."""
    found = []
    for path in PAGES.values():
        with open(_absolute(path, config)) as file:
            text = file.read()
        for picture, _, target in LINK.findall(text):
            if picture and not target.startswith(EXTERNAL):
                found.append(posixpath.normpath(posixpath.join(posixpath.dirname(path), target)))
    return found


def _absolute(path: str, config: MkDocsConfig) -> str:
    assert config.config_file_path is not None
    return posixpath.join(posixpath.dirname(config.config_file_path), path)
