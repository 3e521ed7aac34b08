"""Paths on the command line, which are taken as they are typed.

In Hydra's grammar, characters such as blanks, commas, parentheses, `=` and letters outside of ASCII
need quotes within the value, and `2024` is a number. For a key that holds a path, the value is
quoted here where Hydra would not read it as typed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from maskseg.config.overrides import key_of

_PATH_KEY = re.compile(
    r"(input|output|checkpoint|file|fix|images|run_dir|categories|export)"
    r"|([\w.]+\.)?weights"
    r"|trainer\.(init|resume)"
    r"|data\.(root|images|cache|voc|labels|classes|stuff_json|(train|val)_(json|images|proposals"
    r"|semantic|segments|panoptic|list))"
    r"|hydra\.sweep\.dir"
)
_NOT_PATHS = ("", "null", "???")
_LIST = re.compile(r"\[.*\]", re.DOTALL)
_QUOTED = re.compile(r"""'.*'|".*\"""", re.DOTALL)
_SWEEP_FUNCTION = re.compile(r"\w+\(.*\)", re.DOTALL)


def is_path_key(key: str) -> bool:
    """Whether a config key holds the path of a file or folder, or a name in place of one."""
    return _PATH_KEY.fullmatch(key) is not None


def path_value(value: str) -> str:
    """The path that a value of the command line names: as typed, or with `~` expanded.

    Quotes of Hydra's grammar are removed, unless a file has them in its name.
    """
    if _exists(value):
        return value
    if _QUOTED.fullmatch(value):
        unquoted = _parse("path=" + value)
        if isinstance(unquoted, str):
            value = unquoted
    # Unlike pathlib's method, it leaves the name of an unknown user as it is.
    return os.path.expanduser(value)  # noqa: PTH111


def find_path(arguments: Sequence[str], key: str) -> str:
    """The path that the command line gives a key, "" where it gives none."""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == key:
            return path_value(value)
    return ""


def quote_paths(overrides: Sequence[str]) -> list[str]:
    """Quote the values of keys that hold paths, so that Hydra reads them as they are typed.

    Lists of `data` and interpolations are left to Hydra, unless a file has that name.
    """
    return [_quote(override) for override in overrides]


def quote_swept_paths(overrides: Sequence[str]) -> list[str]:
    """As `quote_paths`, for the overrides of a sweep.

    A comma separates values, and `choice(...)` lists them, unless a file has that name.
    """
    quoted = []
    for override in overrides:
        key, _, value = override.partition("=")
        is_literal = _exists(value) or not ("," in value or _SWEEP_FUNCTION.fullmatch(value))
        parts = value.split(",")
        if is_literal or not is_path_key(key_of(override)):
            quoted.append(_quote(override))
        elif all(map(_exists, parts)):  # Hydra separates the quoted values
            quoted.append(f"{key}={','.join(map(_quoted, parts))}")
        else:
            quoted.append(override)
    return quoted


def _quote(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals or value in _NOT_PATHS or not is_path_key(key_of(override)):
        return override
    if not _exists(value):
        is_list = key_of(override).startswith("data.") and _LIST.fullmatch(value)
        if is_list or "${" in value:
            return override
    path = path_value(value)
    if "${" not in path and _parse(override) == path:
        return override
    return f"{key}={_quoted(path)}"


def quote_interpolation(path: str) -> str:
    """A path as the value of a config, where `${` would begin an interpolation."""
    return path.replace("${", "\\${")


def _quoted(path: str) -> str:
    """A path as a quoted string of Hydra's grammar, without interpolations."""
    return QuotedString(text=quote_interpolation(path), quote=Quote.single).with_quotes()


def _parse(override: str) -> object:
    """The value that Hydra reads from an override, None where it cannot be parsed."""
    try:
        return OverridesParser.create().parse_override(override).value()
    except HydraException:
        return None


def _exists(value: str) -> bool:
    try:
        return os.path.lexists(value)
    except (OSError, ValueError):  # too long, or with a null byte
        return False
