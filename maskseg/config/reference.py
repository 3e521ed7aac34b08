"""Generates docs/config.md, the page of all config keys: python -m maskseg.config.reference

Defaults and meanings come from the YAML files and the comments beside or above their keys, types
from `maskseg.config.schema`. A key without a comment has the meaning of the same key elsewhere: of
the same class, or at the same place of the composed config. So no meaning is written twice.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import yaml

from maskseg.config.schema import DataKeys, top_level_types, types_at, types_of
from maskseg.config.trust import TRANSFORMS
from maskseg.data.datasets.coco import CocoSource
from maskseg.errors import UserError
from maskseg.files.configs import config_folder
from maskseg.values import Hint, describe, type_hints

_HEAD = """# Configuration

This page lists all config keys with their default, type and meaning. A key is changed by
`key=value` on the command line of a tool, and a file of a group is chosen by `group=name`:

```bash
python tools/train.py experiment=nuclei_r18 data.root=DIR batch_size=4 model/proposer=file
python tools/train.py optimizer=sgd --cfg job   # prints the composed config and runs nothing
python tools/train.py --info                    # prints the groups and the choices
```

In the tables, `???` marks a key that has no default and must be set, `null` is no value, and
`${key}` the value of another key. A type names the range of its values. It is checked when the
config is composed, before anything is written: a value out of range ends the tool with one line and
exit code 2. Numbers are finite (no `nan`, no `inf`), and a whole number may be written as `1e4`.
"""
_FOOT = """This page is generated from `configs/` and the types in the code:
`python -m maskseg.config.reference > docs/config.md`.
"""
_FIRST_TOOL = "train"  # the tool that most keys belong to
_OTHER_TOOLS = "other tools"
# Groups in the order in which users look for them, and what they choose. Others follow by name.
_TITLES = {
    _FIRST_TOOL: "a training: its keys at the top level",
    "experiment": "whole runs",
    "data": "the dataset",
    "model": "the model",
    "model/backbone": "the backbone",
    "model/trunk": "the trunk below a feature pyramid",
    "model/proposer": "where regions come from",
    "model/sampler": "which regions the heads are trained on",
    "model/classifier": "the head that classifies regions",
    "model/heads": "further heads for each region",
    "model/segmenter": "segments of the whole image",
    "model/superpixels": "superpixels of a segmenter",
    "segment_method": "segment proposals",
    "segment_sampler": "which segments are learned from",
    "optimizer": "the optimizer",
    "scheduler": "the schedule of the learning rate",
    "trainer": "length, device, precision and checkpoints of a training",
    "evaluation": "the evaluation",
    "debug": "short runs to find errors",
    _OTHER_TOOLS: "keys of the other tools at the top level",
}


@dataclass(frozen=True)
class Key:
    """A key of a YAML file that has a value. path: with dots, within the file."""

    path: str
    default: str
    comment: str
    target: str | None  # the `_target_` beside it

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file of a group. place: of its keys in the composed config, with dots."""

    group: str
    name: str
    place: str
    summary: str
    keys: list[Key]
    includes: list[str]  # the entries of its defaults list

    def place_of(self, key: Key) -> str:
        """The key in the composed config."""
        return f"{self.place}.{key.path}" if self.place else key.path

    @property
    def section(self) -> str:
        """The part of the page that the file is in: its group, or one for tools."""
        tools = _FIRST_TOOL if self.name == _FIRST_TOOL else _OTHER_TOOLS
        return self.group or tools

    @property
    def choice(self) -> str:
        """What chooses the file on a command line."""
        if not self.group:
            return self.name
        is_elsewhere = self.place and self.place != self.group.replace("/", ".")
        group = f"{self.group}@{self.place}" if is_elsewhere else self.group
        return f"{group}={self.name}"


@dataclass
class Meanings:
    """What is known about keys: by the class that takes them, and by their place."""

    comments: dict[tuple[str, str], str] = field(default_factory=dict)
    types: dict[tuple[str, str], Hint] = field(default_factory=dict)

    def add(self, file: ConfigFile) -> None:
        """Add the keys of a file; the first file that explains a key counts."""
        for key in file.keys:
            hints = _hints_of(file, key)
            for owner in self._owners(file, key):
                if key.comment:
                    self.comments.setdefault(owner, key.comment)
                if key.name in hints:
                    self.types.setdefault(owner, hints[key.name])

    def comment_of(self, file: ConfigFile, key: Key) -> str:
        """The meaning of a key, empty where no file has it."""
        known = (self.comments.get(owner, "") for owner in self._owners(file, key))
        return key.comment or next((comment for comment in known if comment), "")

    def type_of(self, file: ConfigFile, key: Key) -> str:
        """The type of a key in words."""
        known = [self.types[owner] for owner in self._owners(file, key) if owner in self.types]
        return describe(known[0]) if known else ""

    @staticmethod
    def _owners(file: ConfigFile, key: Key) -> list[tuple[str, str]]:
        owners = [] if key.target is None else [(key.target, key.name)]
        return [*owners, ("", file.place_of(key))]


def config_reference(folder: Path | None = None) -> str:
    """The page as Markdown.

    folder: of the config files. Raises UserError where a key has no meaning.
    """
    files = read_files(folder or config_folder())
    meanings = Meanings()
    for file in files:
        if file.group != "experiment":
            meanings.add(file)
    _check_meanings(files, meanings)
    groups: dict[str, list[ConfigFile]] = defaultdict(list)
    for file in files:
        groups[file.section].append(file)
    order = [group for group in _TITLES if group in groups]
    order += [group for group in groups if group not in _TITLES]
    parts = [_HEAD, _contents(order, groups)]
    for group in order:
        parts.append(f"## {group}\n")
        if group == "experiment":
            parts.append(_experiment_table(groups[group]))
            continue
        parts += [_file_section(file, meanings) for file in groups[group]]
        if group == "data":
            parts.append(_transform_table())
    return "\n".join([*parts, _FOOT])


def _check_meanings(files: list[ConfigFile], meanings: Meanings) -> None:
    missing = [
        f"{file.group or 'configs'}/{file.name}.yaml: {key.path}"
        for file in files
        if file.group != "experiment"
        for key in file.keys
        if not meanings.comment_of(file, key)
    ]
    if missing:
        raise UserError(f"keys without a comment that explains them: {'; '.join(missing)}")


def _contents(order: list[str], groups: Mapping[str, list[ConfigFile]]) -> str:
    """The table of contents."""
    lines = ["| group | what it chooses | choices |", "|---|---|---|"]
    for group in order:
        anchor = group.replace("/", "").replace(" ", "-")
        names = [f"`{file.name}`" for file in groups[group] if not file.name.startswith("_")]
        lines.append(f"| [{group}](#{anchor}) | {_TITLES.get(group, '')} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def _experiment_table(files: list[ConfigFile]) -> str:
    lines = ["Chosen by `experiment=name`.\n", "| name | what it trains |", "|---|---|"]
    lines += [f"| `{file.name}` | {_escape(file.summary)} |" for file in files]
    return "\n".join(lines) + "\n"


def _file_section(file: ConfigFile, meanings: Meanings) -> str:
    """The summary and the table of one file."""
    title = f"`{file.choice}`"
    if file.name.startswith("_"):
        title = f"{file.group}: shared keys (`{file.name}`)"
    lines = [f"### {title}\n"]
    if file.summary:
        lines.append(f"{file.summary}\n")
    if file.includes:
        lines.append(f"Includes {', '.join(f'`{entry}`' for entry in file.includes)}.\n")
    if file.keys:
        lines += ["| key | default | type | meaning |", "|---|---|---|---|"]
    for key in file.keys:
        cells = [f"`{file.place_of(key)}`", f"`{key.default}`", meanings.type_of(file, key)]
        cells.append(meanings.comment_of(file, key))
        lines.append(f"| {' | '.join(map(_escape, cells))} |")
    if file.keys:
        lines.append("")
    return "\n".join(lines)


def _transform_table() -> str:
    """The transforms that `data.train_transforms` and `data.test_transforms` may name."""
    lines = [
        "### Transforms\n",
        "The entries of `data.train_transforms` and `data.test_transforms`, such as",
        "`{_target_: maskseg.data.transforms.Flip, horizontal: 0.5}`.\n",
        "| transform | keys | meaning |",
        "|---|---|---|",
    ]
    for target in sorted(TRANSFORMS):
        transform = hydra.utils.get_class(target)
        keys = "; ".join(f"`{key}`: {describe(hint)}" for key, hint in types_of(target).items())
        text = " ".join((inspect.getdoc(transform) or "").split())
        lines.append(f"| `{target}` | {keys} | {_escape(text)} |")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def read_files(folder: Path) -> list[ConfigFile]:
    """The config files in the order of the page: tools, then groups by name; shared keys first."""
    paths = sorted(folder.rglob("*.yaml"), key=lambda path: _order(path, folder))
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    places = _placements(texts, folder)
    files = []
    for path, text in texts.items():
        group = _group_of(path, folder)
        content = yaml.safe_load(text) or {}
        files.append(
            ConfigFile(
                group,
                path.stem,
                _place_of_file(path, text, folder, places),
                " ".join(_leading_comments(text)),
                list(_keys(text)),
                [
                    _describe_default(entry, group)
                    for entry in content.get("defaults", [])
                    if entry != "_self_"
                ],
            )
        )
    return files


def _order(path: Path, folder: Path) -> tuple[str, bool, bool, str]:
    is_first = path.stem.startswith("_") or (path.parent == folder and path.stem == _FIRST_TOOL)
    return _group_of(path, folder), not is_first, path.stem.startswith("_"), path.stem


def _group_of(path: Path, folder: Path) -> str:
    group = path.parent.relative_to(folder).as_posix()
    return "" if group == "." else group


def _describe_default(entry: object, group: str) -> str:
    """An entry of a defaults list as it is written on a command line."""
    if not isinstance(entry, dict):
        return f"{group}={entry}" if group else str(entry)
    ((key, choice),) = entry.items()
    source, at, package = (
        str(key).removeprefix("override ").removeprefix("optional ").partition("@")
    )
    is_relative = bool(group) and not source.startswith("/")
    source = f"{group}/{source}" if is_relative else source.removeprefix("/")
    if at and group:
        package = f"{group.replace('/', '.')}.{package}"
    return f"{source}{at}{package}={choice or 'null'}"


def _placements(texts: Mapping[Path, str], folder: Path) -> dict[str, str]:
    """The places of files that defaults lists put elsewhere, by group=name and by group."""
    places: dict[str, str] = {}
    for path, text in texts.items():
        group = _group_of(path, folder)
        base = _place_of_file(path, text, folder, {})
        for entry in (yaml.safe_load(text) or {}).get("defaults", []):
            if not isinstance(entry, dict):
                continue
            ((key, choice),) = entry.items()
            source, _, package = key.removeprefix("override ").partition("@")
            if not package:
                continue
            source = source.removeprefix("/") if source.startswith("/") else f"{group}/{source}"
            is_absolute = key.startswith("override") or not base
            place = package if is_absolute else f"{base}.{package}"
            # A tool's own place, such as `method`, comes after that in a training.
            if group or source not in places:
                places[f"{source.strip('/')}={choice}"] = place
                places[source.strip("/")] = place
    return places


def _place_of_file(path: Path, text: str, folder: Path, places: Mapping[str, str]) -> str:
    if text.startswith("# @package _global_"):
        return ""
    group = _group_of(path, folder)
    default = places.get(group, group.replace("/", "."))
    return places.get(f"{group}={path.stem}", default)


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
    values = {key.value: (key, value) for key, value in node.value}
    target = values["_target_"][1].value if "_target_" in values else None
    for name, (key, value) in values.items():
        if name.startswith("_") or (name == "defaults" and not prefix):
            continue
        path = f"{prefix}{name}"
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _keys_of(value, f"{path}.", lines)
            continue
        comment = "" if node.flow_style else _comment_of(key, value, lines)
        yield Key(path, _source_of(value, lines), comment, target)


def _comment_of(key: yaml.Node, value: yaml.Node, lines: list[str]) -> str:
    """The comment at the end of a key's first or last line, else that in the lines above it."""
    start = key.start_mark
    end = value.end_mark
    last = end.line if end.column else end.line - 1
    for number in (last, start.line):
        comment = lines[number].partition(" # ")[2].strip()
        if comment:
            return comment
    above: list[str] = []
    number = start.line - 1
    while number >= 0 and lines[number].startswith(f"{' ' * start.column}# "):
        above.insert(0, lines[number].strip().removeprefix("# "))
        number -= 1
    if number < 0:  # at the beginning of a file, the comment is the file's
        return ""
    text = " ".join(above).removesuffix(".")
    is_word = text[1:2].islower()  # unlike RGB
    return text[:1].lower() + text[1:] if is_word else text


def _source_of(node: yaml.Node, lines: list[str]) -> str:
    """The text of a value, in one line."""
    start = node.start_mark
    end = node.end_mark
    if start.line == end.line:
        return lines[start.line][start.column : end.column]
    rows = [lines[start.line][start.column :], *lines[start.line + 1 : end.line]]
    if end.column:
        rows.append(lines[end.line][: end.column])
    text = " ".join(row.partition(" # ")[0].strip() for row in rows).strip()
    if text.startswith("- "):  # a list with one entry per line
        return f"[{text.removeprefix('- ').replace(' - ', ', ')}]"
    return text


def _hints_of(file: ConfigFile, key: Key) -> dict[str, Hint]:
    """The types of the keys beside this one."""
    parent = file.place_of(key).rpartition(".")[0]
    hints = types_at(parent, key.target)
    if parent == "data":
        source_types = types_of(f"{CocoSource.__module__}.{CocoSource.__name__}")
        return {**type_hints(DataKeys), **source_types, **hints}
    return hints if parent else {**hints, **top_level_types()}


if __name__ == "__main__":
    print(config_reference(), end="")
