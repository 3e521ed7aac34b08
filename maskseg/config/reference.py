"""Generates docs/config.md, the page of all config keys: python -m maskseg.config.reference

Defaults and meanings come from the YAML files and the comments beside their keys, types from
`maskseg.config.schema`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from maskseg.config.schema import GROUPS, ToolKeys, TrainKeys, describe, types_of
from maskseg.files.configs import config_folder

_HEAD = """# Config keys

Every key of `configs/`, with its default, type and meaning. A tool's command line changes a key
with `key=value` and chooses a file of a group with `group=name`. This page is generated:
`python -m maskseg.config.reference > docs/config.md`. A test checks that it is up to date.

`???` marks a key without a default. `${key}` is the value of another key.
"""


@dataclass(frozen=True)
class Key:
    """One key of a YAML file. path: with dots, within the file."""

    path: str
    default: str
    comment: str
    target: str | None  # the `_target_` beside it


def config_reference() -> str:
    """The page as Markdown."""
    folder = config_folder()
    parts = [_HEAD]
    tools = [path for path in sorted(folder.glob("*.yaml")) if not path.name.startswith("_")]
    parts += ["## Tools\n", *(_file_section(path, "", path.stem) for path in tools)]
    groups = sorted({path.parent for path in folder.glob("*/**/*.yaml")})
    for group in groups:
        name = str(group.relative_to(folder))
        if name == "experiment":
            continue
        parts.append(f"## Group `{name}`\n")
        for path in sorted(group.glob("*.yaml")):
            parts.append(_file_section(path, name, f"{name}={path.stem}"))
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _file_section(path: Path, group: str, title: str) -> str:
    """The summary and the table of one file."""
    text = path.read_text(encoding="utf-8")
    if path.stem.startswith("_"):
        title = f"{group}: keys shared by its files (`{path.stem}`)"
    lines = [f"### {title}\n"]
    summary = " ".join(_leading_comments(text))
    if summary:
        lines.append(f"{summary}\n")
    keys = list(_keys(text))
    if keys:
        lines.append("| key | default | type | meaning |")
        lines.append("|---|---|---|---|")
        lines += [_row(key, group) for key in keys]
        lines.append("")
    return "\n".join(lines)


def _leading_comments(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").strip()


def _keys(text: str) -> Iterator[Key]:
    """The keys of a YAML text that have a value of their own."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if isinstance(root, yaml.MappingNode):
        yield from _keys_of(root, "", text.splitlines())


def _keys_of(node: yaml.MappingNode, prefix: str, lines: list[str]) -> Iterator[Key]:
    values = {key.value: value for key, value in node.value}
    target = values["_target_"].value if "_target_" in values else None
    for name, value in values.items():
        if name.startswith("_") or (name == "defaults" and not prefix):
            continue
        path = f"{prefix}{name}"
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _keys_of(value, f"{path}.", lines)
            continue
        last = lines[value.end_mark.line if value.end_mark.column else value.end_mark.line - 1]
        comment = last.partition(" # ")[2].strip()
        yield Key(path, _source_of(value, lines), comment, target)


def _source_of(node: Any, lines: list[str]) -> str:
    """The text of a value, in one line."""
    start = node.start_mark
    end = node.end_mark
    if start.line == end.line:
        return str(lines[start.line][start.column : end.column])
    rows = [lines[start.line][start.column :], *lines[start.line + 1 : end.line]]
    if end.column:
        rows.append(lines[end.line][: end.column])
    return " ".join(row.partition(" # ")[0].strip() for row in rows).strip()


def _row(key: Key, group: str) -> str:
    cells = [f"`{key.path}`", f"`{key.default}`", _type_of(key, group), key.comment]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type_of(key: Key, group: str) -> str:
    name = key.path.rpartition(".")[2]
    parent = key.path.rpartition(".")[0] or group
    if key.target is not None:
        hints = types_of(key.target)
    elif parent in GROUPS:
        hints = typing.get_type_hints(GROUPS[parent])
    elif group == "data":
        hints = types_of("maskseg.data.datasets.coco.CocoSource")
    else:
        hints = {**typing.get_type_hints(ToolKeys), **typing.get_type_hints(TrainKeys)}
    return describe(hints[name]) if name in hints else ""


if __name__ == "__main__":
    print(config_reference(), end="")
