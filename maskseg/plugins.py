"""Plug-ins: packages of users that add classes and config files. See docs/extending.md.

A plug-in registers its classes with the decorator `register`. Enabled are the packages that the
entry points of installed distributions name in the group `maskseg.plugins`, and those that the
environment variable `MASKSEG_PLUGINS` names. Nothing else enables one, least of all a checkpoint:
see docs/decisions/0017-plugins.md. This module imports no other part of maskseg but the errors.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Literal, TypeVar, get_args

from maskseg.errors import UserError

GROUP = "maskseg.plugins"
VARIABLE = "MASKSEG_PLUGINS"
Kind = Literal["part", "model", "transform", "superpixels"]

T = TypeVar("T")
_registry: dict[str, Kind] = {}  # class, by its full name -> what it is


@dataclass(frozen=True)
class Plugin:
    """An enabled plug-in.

    source: what enables it, for messages; configs: its folder of config files, None without one.
    """

    package: str
    source: str
    configs: Path | None

    def contains(self, target: str) -> bool:
        """Whether a class or module of this full name belongs to the package."""
        return f"{target}.".startswith(f"{self.package}.")


def register(kind: Kind) -> Callable[[type[T]], type[T]]:
    """Return a decorator that allows the config of a checkpoint to name a class.

    kind: `part` for a part of a model, `model` for a whole model, `transform` for a transform of
        samples, `superpixels` for a method that makes superpixels.
    The constructor is then called with the values of a checkpoint, which may come from anyone: it
    must not run, read or write what they name. The one exception is the parameter `weights`, which
    is None there.
    Raises UserError for another kind, and for a class that is not at the top level of its module.
    """
    if kind not in get_args(Kind):
        raise UserError(f"register: kind must be one of {', '.join(get_args(Kind))}, not {kind!r}")

    def add(registered_class: type[T]) -> type[T]:
        name = f"{registered_class.__module__}.{registered_class.__qualname__}"
        if "." in registered_class.__qualname__:
            raise UserError(f"register: {name} must be at the top level of its module")
        _registry[name] = kind
        return registered_class

    return add


def registered(*kinds: Kind) -> frozenset[str]:
    """The full names of the classes that the enabled plug-ins have registered.

    kinds: by default all. Imports the enabled plug-ins. Raises UserError.
    """
    import_plugins()
    names = set()
    for name, kind in _registry.items():
        if (not kinds or kind in kinds) and owner(name) is not None:
            names.add(name)
    return frozenset(names)


def owner(target: str) -> Plugin | None:
    """The enabled plug-in that a class or module of this full name belongs to."""
    return next((plugin for plugin in enabled() if plugin.contains(target)), None)


def import_plugins() -> None:
    """Import the packages of all enabled plug-ins, which register their classes.

    Raises UserError for a package that cannot be imported.
    """
    for plugin in enabled():
        try:
            importlib.import_module(plugin.package)
        except Exception as error:  # the code of the plug-in can raise any error
            raise _import_error(plugin.package, plugin.source, error) from error


def enabled() -> tuple[Plugin, ...]:
    """The enabled plug-ins: the installed ones by name, then those of the environment variable.

    No plug-in is imported. Raises UserError for a name that does not lead to a package.
    """
    return _find_plugins(os.environ.get(VARIABLE, ""), tuple(sys.path))


@functools.lru_cache(maxsize=8)
def _find_plugins(variable: str, search_path: tuple[str, ...]) -> tuple[Plugin, ...]:
    """variable: the value of MASKSEG_PLUGINS; search_path: where packages are found now."""
    del search_path  # a key of the cache
    sources: dict[str, str] = {}
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        distribution = entry.dist.name if entry.dist is not None else "an installed distribution"
        sources.setdefault(entry.value, f"the entry point {entry.name!r} of {distribution}")
    for name in filter(None, map(str.strip, variable.split(","))):
        sources.setdefault(name, f"{VARIABLE}={variable}")
    return tuple(_find_plugin(package, source) for package, source in sources.items())


def _find_plugin(package: str, source: str) -> Plugin:
    """Locate a package without importing it. Raises UserError."""
    if not all(part.isidentifier() for part in package.split(".")):
        raise UserError(
            f"plug-in {package!r} ({source}): not the name of a package, such as my_package"
        )
    try:
        spec = util.find_spec(package)  # imports the parents of a dotted name
    except Exception as error:  # raised by these parents
        raise _import_error(package, source, error) from error
    if spec is None:
        raise UserError(
            f"plug-in {package!r} ({source}): there is no such package; install it, or add the "
            "folder that contains it to PYTHONPATH"
        )
    if spec.origin is None:
        raise UserError(f"plug-in {package!r} ({source}): the folder has no __init__.py")
    folder = Path(spec.origin).parent / "configs"
    is_package = spec.submodule_search_locations is not None
    return Plugin(package, source, folder if is_package and folder.is_dir() else None)


def _import_error(package: str, source: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"plug-in {package!r} ({source}): it cannot be imported: {type(error).__name__}: {reason}"
    )
