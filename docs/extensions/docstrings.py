"""Renders the docstrings of the package, which are plain text, in the API reference.

The docstrings use single backticks for code, `Args:` sections, and paragraphs such as

    boxes: f32 [R, 4]; image_index: i64 [R]. Returns [R, C, S, S].

Everything else in them is text: `[N, 4]`, `->`, `*` and `_` have no meaning. This extension
converts them to reStructuredText before Napoleon reads the sections.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from typing import Any, TypeVar

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.roles import XRefRole

_CODE = re.compile(r"``(.+?)``|`([^`]+)`", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")
_SPECIAL = re.compile(r"(?<!^)\*|^\*(?! )|[\\|]|_(?!\w)", re.MULTILINE)
_SECTION = re.compile(r"(Args|Arguments|Attributes|Returns|Raises|Yields|Example|Examples|Note):")
# The start of a described name: at the start of a line or sentence, or after a semicolon.
_ITEM = re.compile(r"(?:^|(?<=[;.:] )|(?<=[;.:]\n))(\w+(?:, \w+)*):\s", re.MULTILINE)
# What follows the last description in the same paragraph.
_TAIL = re.compile(r"(?<=[.;)\]])\s+(?=(?:Returns?|Raises|Yields?)\b|->)")


def convert(lines: list[str], names: frozenset[str], attributes_are_parameters: bool) -> list[str]:
    """Convert a docstring to reStructuredText with Napoleon's sections.

    names: the parameters of the documented object.
    """
    converted: list[str] = []
    in_section = False
    for block in "\n".join(lines).split("\n\n"):
        if not block.strip():
            continue
        first = block.strip().split("\n", 1)[0]
        if _SECTION.fullmatch(first):
            in_section = True
        elif not block.startswith(" "):
            in_section = False
        if in_section:
            if attributes_are_parameters:
                block = re.sub(r"^(\s*)Attributes:$", r"\1Args:", block, flags=re.MULTILINE)
            converted += [*_escape(block, names).split("\n"), ""]
        else:
            converted += _convert_paragraph(block, names)
    return converted


def _convert_paragraph(block: str, names: frozenset[str]) -> list[str]:
    """Turn the descriptions of parameters in a paragraph into a section."""
    items = [item for item in _ITEM.finditer(block) if names.issuperset(item[1].split(", "))]
    if not items:
        return [*_escape(_join_lines(block), names).split("\n"), ""]
    lines: list[str] = []
    lead = re.sub(r";$", ".", block[: items[0].start()].strip())
    if lead:
        lines += [*_escape(_join_lines(lead), names).split("\n"), ""]
    lines.append("Args:")
    tail = ""
    ends = [item.start() for item in items[1:]] + [len(block)]
    for item, end in zip(items, ends, strict=True):
        text = " ".join(block[item.end() : end].split())
        if end == len(block):
            text, _, tail = _split_tail(text)
        lines.append(f"    {item[1]}: {_escape(text.rstrip(';'), names)}")
    lines.append("")
    if tail:
        lines += [_escape(tail, names), ""]
    return lines


def _join_lines(block: str) -> str:
    """Join the lines of a paragraph, whose indentation means nothing; keep lists and code."""
    if block.startswith(" ") or re.search(r"^([*-] |\d+\. )", block, re.MULTILINE):
        return block
    return " ".join(block.split())


def _split_tail(text: str) -> tuple[str, str, str]:
    match = _TAIL.search(text)
    if match is None:
        return text, "", ""
    return text[: match.start()], " ", text[match.end() :]


def _escape(text: str, names: frozenset[str]) -> str:
    """Escape what reStructuredText would interpret, and mark code."""
    parts: list[str] = []
    position = 0
    for match in _CODE.finditer(text):
        parts.append(_SPECIAL.sub(r"\\\g<0>", text[position : match.start()]))
        code = " ".join((match[1] or match[2]).split())
        before = text[match.start() - 1 : match.start()]
        after = text[match.end() : match.end() + 1]
        parts.append("\\ " if before.isalnum() or before == "\\" else "")
        parts.append(_mark_code(code, names))
        parts.append("\\ " if after.isalnum() else "")
        position = match.end()
    parts.append(_SPECIAL.sub(r"\\\g<0>", text[position:]))
    return "".join(parts)


def _mark_code(code: str, names: frozenset[str]) -> str:
    if _NAME.fullmatch(code) and code not in names:
        return f":name:`{code}`"
    return f"``{code}``"


def parameter_names(documented: Any) -> frozenset[str]:
    """The names of the parameters of a function, or of the constructor of a class."""
    if isinstance(documented, property) or not callable(documented):
        return frozenset()
    try:
        parameters = inspect.signature(documented).parameters
    except (TypeError, ValueError):
        return frozenset()
    return frozenset(parameters)


def process_docstring(
    app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]
) -> None:
    """Convert a docstring in place (event `autodoc-process-docstring`)."""
    del app, what, name, options
    lines[:] = convert(lines, parameter_names(documented), dataclasses.is_dataclass(documented))


class NameRole(XRefRole):
    """A name in backticks: a link if it names an object of this site, else code."""

    def __init__(self) -> None:
        super().__init__(innernodeclass=nodes.literal, warn_dangling=False)

    def process_link(
        self,
        env: BuildEnvironment,
        refnode: nodes.Element,
        has_explicit_title: bool,
        title: str,
        target: str,
    ) -> tuple[str, str]:
        """Make it a reference of the Python domain."""
        del has_explicit_title
        refnode["refdomain"] = "py"
        refnode["reftype"] = "obj"
        refnode["may_be_missing"] = True
        refnode["py:module"] = env.ref_context.get("py:module")
        refnode["py:class"] = env.ref_context.get("py:class")
        return title, target.removesuffix("()")


def resolve_missing(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Resolve a name below `maskseg`, or one that is unique, such as `CocoFile.to_dict`.

    Names in docstrings that are no object of this site stay code.
    """
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if _is_type_variable(target):
        return content
    domain = env.domains.python_domain
    matches = [name for name in domain.objects if name.endswith(f".{target}")]
    is_class = target.rsplit(".", 2)[0][:1].isupper() or target[:1].isupper()
    if f"maskseg.{target}" in domain.objects:
        matches = [f"maskseg.{target}"]
    elif not is_class or len(matches) != 1:
        return content if node.get("may_be_missing") else None
    found = node.copy()
    found["reftarget"] = matches[0]
    return domain.resolve_xref(
        env,
        env.current_document.docname or node["refdoc"],
        app.builder,
        "obj",
        matches[0],
        found,
        content,
    )


def _is_type_variable(target: str) -> bool:
    """Whether a full name is that of a type variable, which has no documentation."""
    module, _, name = target.rpartition(".")
    return isinstance(getattr(sys.modules.get(module), name, None), TypeVar)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    app.add_role("name", NameRole())
    app.connect("autodoc-process-docstring", process_docstring, priority=400)  # before Napoleon
    app.connect("missing-reference", resolve_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
