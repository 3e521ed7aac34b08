"""JSON and YAML documents of unknown origin, parsed in bounded memory and time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import yaml

# The loader in C, if PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_YAML_CHARS = 2**20
MAX_YAML_NODES = 100_000
MAX_YAML_DEPTH = 50
MAX_PLAIN_SCALAR = 1000  # characters: converting a longer number takes quadratic time
_NUMBER = re.compile(r"[-+.]?[0-9]")


def parse_json(
    text: str | bytes, object_hook: Callable[[dict[str, Any]], object] | None = None
) -> Any:
    """Parse JSON as `json.loads` does.

    object_hook: replaces each JSON object by its result.
    Raises ValueError, also for a document that is nested too deeply, for which the standard library
    raises RecursionError.
    """
    try:
        return json.loads(text, object_hook=object_hook)
    except RecursionError as error:
        raise ValueError("the JSON document is nested too deeply") from error


def parse_yaml(text: str) -> Any:
    """Parse a document that `check_yaml` accepts. Raises ValueError."""
    check_yaml(text)
    try:
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, RecursionError, OverflowError) as error:
        raise ValueError(_one_line(error)) from error


def check_yaml(text: str) -> None:
    """Raise ValueError for YAML that is malformed, too large, too deep, or has aliases or tags.

    A few aliases of aliases can expand to billions of nodes, and a tag can name a Python type. No
    file that this package writes contains either.
    """
    if len(text) > MAX_YAML_CHARS:
        raise ValueError(f"the YAML document has more than {MAX_YAML_CHARS} characters")
    counter = _NodeCounter()
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            _check_event(event, counter.expects_key())
            counter.add(event)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(_one_line(error)) from error


class _NodeCounter:
    """Counts the nodes of a YAML document and tracks the mappings and sequences that are open."""

    def __init__(self) -> None:
        self.nodes = 0
        # For each open mapping the number of keys and values so far, None for an open sequence.
        self.open_nodes: list[int | None] = []

    def expects_key(self) -> bool:
        """Whether the next node is the key of a mapping."""
        count = self.open_nodes[-1] if self.open_nodes else None
        return count is not None and count % 2 == 0

    def add(self, event: yaml.Event) -> None:
        """Count one event. Raises ValueError if the document exceeds a limit."""
        if isinstance(event, yaml.NodeEvent):
            self.nodes += 1
            if self.open_nodes and self.open_nodes[-1] is not None:
                self.open_nodes[-1] += 1
        if isinstance(event, yaml.CollectionStartEvent):
            self.open_nodes.append(0 if isinstance(event, yaml.MappingStartEvent) else None)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.open_nodes.pop()
        if self.nodes > MAX_YAML_NODES or len(self.open_nodes) > MAX_YAML_DEPTH:
            raise ValueError(
                f"the YAML document has more than {MAX_YAML_NODES} values "
                f"or {MAX_YAML_DEPTH} levels"
            )


def _check_event(event: yaml.Event, is_key: bool) -> None:
    if isinstance(event, yaml.AliasEvent):
        raise ValueError(f"the YAML alias *{event.anchor} is refused")
    tag = getattr(event, "tag", None)
    if tag is not None:
        raise ValueError(f"the YAML tag {tag} is refused")
    # Integers can be chosen so that all have the same hash, which makes a dictionary quadratic.
    if is_key and isinstance(event, yaml.NodeEvent) and not _is_text(event):
        raise ValueError("a key of the YAML document is not a string")
    if (
        isinstance(event, yaml.ScalarEvent)
        and not event.style
        and len(event.value) > MAX_PLAIN_SCALAR
    ):
        raise ValueError(f"an unquoted YAML scalar has more than {MAX_PLAIN_SCALAR} characters")


def _is_text(event: yaml.NodeEvent) -> bool:
    """Whether a node is a scalar that is not read as a number."""
    if not isinstance(event, yaml.ScalarEvent):
        return False
    return bool(event.style) or not _NUMBER.match(event.value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
