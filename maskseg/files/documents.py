"""JSON and YAML of unknown origin, parsed with bounded memory and time."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

_LOADER = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # the same in C, where PyYAML was built with it
MAX_YAML_CHARS, MAX_YAML_NODES, MAX_YAML_DEPTH = 2**20, 100_000, 50
MAX_PLAIN_SCALAR = 1000  # characters: converting a longer number takes quadratic time
_NUMBER = re.compile(r"[-+.]?[0-9]")


def parse_json(text: str | bytes, **keywords: Any) -> Any:
    """`json.loads`. Raises ValueError, also for a document that is nested too deeply, where the standard library raises RecursionError."""
    try:
        return json.loads(text, **keywords)
    except RecursionError as error:
        raise ValueError("the JSON document is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """The values of a document that `check_yaml` accepts. Raises ValueError."""
    check_yaml(text)
    try:
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(_one_line(error)) from error


def check_yaml(text: str) -> None:
    """Raises ValueError for YAML that is malformed, too large or too deep, or that has aliases or explicit tags.

    A few aliases of aliases expand to billions of nodes; a tag names a Python type. No file that this package writes has either.
    """
    if len(text) > MAX_YAML_CHARS:
        raise ValueError(f"the YAML document has more than {MAX_YAML_CHARS} characters")
    nodes = 0
    open_nodes: list[
        int | None
    ] = []  # of each open mapping how many of its keys and values have begun, None for a sequence
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            _check_event(
                event, bool(open_nodes) and open_nodes[-1] is not None and open_nodes[-1] % 2 == 0
            )
            if isinstance(event, yaml.NodeEvent):
                nodes += 1
                if open_nodes and open_nodes[-1] is not None:
                    open_nodes[-1] += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append(0 if isinstance(event, yaml.MappingStartEvent) else None)
            elif isinstance(event, yaml.CollectionEndEvent):
                open_nodes.pop()
            if nodes > MAX_YAML_NODES or len(open_nodes) > MAX_YAML_DEPTH:
                raise ValueError(
                    f"the YAML document has more than {MAX_YAML_NODES} values or {MAX_YAML_DEPTH} levels"
                )
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_one_line(error)) from error


def _check_event(event: Any, is_key: bool) -> None:
    if isinstance(event, yaml.AliasEvent):
        raise ValueError(f"the YAML alias *{event.anchor} is refused")
    if getattr(event, "tag", None) is not None:
        raise ValueError(f"the YAML tag {event.tag} is refused")
    if (
        is_key
        and isinstance(event, yaml.NodeEvent)
        and (
            not isinstance(event, yaml.ScalarEvent)
            or (not event.style and _NUMBER.match(event.value))
        )
    ):
        raise ValueError("a key of the YAML document is no text")  # numbers can all have one hash
    if (
        isinstance(event, yaml.ScalarEvent)
        and not event.style
        and len(event.value) > MAX_PLAIN_SCALAR
    ):
        raise ValueError(
            f"a YAML scalar without quotes has more than {MAX_PLAIN_SCALAR} characters"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
