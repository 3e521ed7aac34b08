"""Classes as users choose them: by name, or by the category id of their data."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from maskseg.errors import UserError
from maskseg.structures import Categories

ClassChoice = str | int | Sequence[str | int]

_MAX_NAMED = 10  # classes in a message


def find_labels(classes: ClassChoice, categories: Categories) -> list[int]:
    """The labels of classes, ascending and each once.

    classes: a name or a category id of the data, or several. Raises UserError for one that does
    not exist, with the closest name.
    """
    chosen = [classes] if isinstance(classes, str | int) else list(classes)
    labels: set[int] = set()
    for choice in chosen:
        known: Sequence[str | int] = categories.names if isinstance(choice, str) else categories.ids
        matching = [label for label, value in enumerate(known) if value == choice]
        if not matching:
            raise UserError(_describe_missing(choice, categories))
        labels.update(matching)
    return sorted(labels)


def _describe_missing(choice: str | int, categories: Categories) -> str:
    close = difflib.get_close_matches(str(choice), categories.names, n=1)
    if close:
        return f"classes: there is no {choice!r}; did you mean {close[0]!r}?"
    pairs = zip(categories.names, categories.ids, strict=True)
    shown = [f"{name} (id {category_id})" for name, category_id in pairs][:_MAX_NAMED]
    more = " ..." if len(categories) > _MAX_NAMED else ""
    return f"classes: there is no {choice!r}, but {', '.join(shown)}{more}"
