"""Keyword arguments of Python as overrides of a config.

`trainer__max_steps=60` is the override `trainer.max_steps=60` of the command line: two underscores
stand for a dot, and a dictionary may also have the dots themselves,
`**{"trainer.max_steps": 60}`. The choice of a group is its name, as in `data="custom"`, and
`**{"~model/heads@model.heads.mask": None}` drops a part of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from maskseg.config.overrides import key_of
from maskseg.errors import UserError
from maskseg.files.configs import is_group


def to_overrides(keywords: Mapping[str, object]) -> list[str]:
    """Convert keyword arguments to overrides of the command line, in their order.

    Raises UserError for a value that no config has.
    """
    overrides = []
    for keyword, value in keywords.items():
        key = keyword.replace("__", ".")
        if key.startswith("~"):
            overrides.append(key if value is None else f"{key}={_to_text(value, key)}")
        elif isinstance(value, str) and is_group(key_of(key)):
            overrides.append(f"{key}={value}")
        else:
            overrides.append(f"{key}={_to_text(value, key)}")
    return overrides


def _to_text(value: object, key: str) -> str:
    """A value in Hydra's grammar."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Integral):  # NumPy's numbers, too
        return repr(int(value))
    if isinstance(value, Real):
        return repr(float(value))
    if isinstance(value, str | Path):
        return QuotedString(text=str(value), quote=Quote.single).with_quotes()
    if isinstance(value, Mapping):
        items = [f"{name}: {_to_text(inner, key)}" for name, inner in value.items()]
        return f"{{{', '.join(items)}}}"
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return f"[{', '.join(_to_text(inner, key) for inner in value)}]"
    raise UserError(
        f"{key}: a {type(value).__name__} is no value of a config, which are numbers, bool, None, "
        "strings, paths, lists and dictionaries of them"
    )
