"""Directives and rewrites for the pages of the site.

`tool-help` renders the --help text of a tool, so that the page cannot be outdated. A fence
`{notebook} FILE.ipynb` is replaced by the text and the code of the notebook. Links to files of the
repository that are not pages lead to the page that includes them.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from maskseg.cli import help_text

# Links outside of docs/ -> pages that include these files.
_INCLUDED = {"../SECURITY.md": "security.md"}
_ENTRY = re.compile(r"[a-z][\w ]*: +\S")  # of a list of names with their values
_COMMANDS = re.compile(
    r"^(```)(?=\n(?:python3? |pip |make |torchrun |tensorboard |maskseg-|pytest |git |\. ))",
    re.MULTILINE,
)


_NOTEBOOK = re.compile(r"^```\{notebook\} (\S+)\n```$", re.MULTILINE)
_TITLE = re.compile(r"\A# .*\n+")


class ToolHelp(Directive):
    """The help text of a tool: its paragraphs, and its commands as code."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the text: indented paragraphs are commands."""
        tool = self.arguments[0]
        text = help_text(tool)
        if not text:
            raise self.error(f"there is no tool {tool!r}")
        return [_block(block) for block in split_help(text)]


def split_help(text: str) -> list[tuple[bool, str]]:
    """Split a help text into (whether it is code, text).

    Indented lines are code. In a list of names with their values, whose entries become paragraphs,
    they continue the line above them.
    """
    blocks: list[tuple[bool, list[str]]] = []
    for paragraph in text.strip().split("\n\n"):
        lines = paragraph.split("\n")
        is_list = sum(_ENTRY.match(line) is not None for line in lines) > 1
        for i, line in enumerate(lines):
            is_code = line.startswith("  ") and not is_list
            is_entry = is_list and _ENTRY.match(line) is not None
            if i == 0 or is_entry or is_code != blocks[-1][0]:
                blocks.append((is_code, []))
            blocks[-1][1].append(line)
    return [(is_code, textwrap.dedent("\n".join(lines))) for is_code, lines in blocks]


def _block(block: tuple[bool, str]) -> nodes.Node:
    is_code, text = block
    if is_code:
        code = nodes.literal_block(text, text)
        code["language"] = "bash"
        return code
    paragraph = nodes.paragraph()
    paragraph += nodes.Text(" ".join(text.split()))
    return paragraph


def label_commands(app: Sphinx, page: str, source: list[str]) -> None:
    """Highlight fences without a language that begin with a command (event `source-read`)."""
    del app, page
    source[0] = _COMMANDS.sub(r"\1bash", source[0])


def redirect_included(app: Sphinx, page: str, source: list[str]) -> None:
    """Rewrite links to included files (event `source-read`)."""
    del app
    depth = page.count("/")
    for path, target in _INCLUDED.items():
        up = "../" * depth
        source[0] = re.sub(rf"\]\({re.escape(up + path)}", f"]({up}{target}", source[0])


def notebook_to_markdown(text: str) -> str:
    """Convert a notebook (its JSON) to Markdown, without its title and the outputs of its cells."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"]).strip()
        is_code = cell["cell_type"] == "code"
        parts.append(f"```python\n{source}\n```" if is_code else source)
    return _TITLE.sub("", "\n\n".join(parts))


def include_notebooks(app: Sphinx, page: str, source: list[str]) -> None:
    """Replace the fences of notebooks by their contents (event `source-read`)."""
    folder = (Path(app.srcdir) / page).parent

    def include(match: re.Match[str]) -> str:
        path = folder / match[1]
        app.env.note_dependency(str(path))
        return notebook_to_markdown(path.read_text(encoding="utf-8"))

    source[0] = _NOTEBOOK.sub(include, source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.add_directive("tool-help", ToolHelp)
    app.connect("source-read", include_notebooks)
    app.connect("source-read", redirect_included)
    app.connect("source-read", label_commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
