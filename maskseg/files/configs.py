"""Location of the configuration's YAML files, of this package and of the enabled plug-ins."""

from __future__ import annotations

import functools
from pathlib import Path

from maskseg.errors import UserError
from maskseg.files.documents import parse_yaml
from maskseg.plugins import enabled


def config_folder() -> Path:
    """Return `configs/` of the repository, or the copy inside the installed package."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def config_folders() -> tuple[Path, ...]:
    """Return all folders of config files: first `config_folder()`, then those of the plug-ins.

    Raises UserError for a plug-in that has a file of the same group and name as another folder, or
    a file that cannot be parsed.
    """
    folders = [config_folder()]
    folders += [plugin.configs for plugin in enabled() if plugin.configs is not None]
    return _check_folders(tuple(folders))


@functools.lru_cache(maxsize=8)
def _check_folders(folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """Return the folders. Raises UserError."""
    known = {file.relative_to(folders[0]) for file in folders[0].rglob("*.yaml")}
    for folder in folders[1:]:
        for file in sorted(folder.rglob("*.yaml")):
            name = file.relative_to(folder)
            if name in known:
                first = next(other / name for other in folders if (other / name).is_file())
                raise UserError(
                    f"{file}: {first} has the same group and name; rename the plug-in's file"
                )
            known.add(name)
            _check_file(file)
    return folders


def _check_file(file: Path) -> None:
    """Raise UserError for a config file of a plug-in that is not a mapping of plain YAML."""
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: the config file cannot be used ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: the config file has no keys")


def is_group(key: str) -> bool:
    """Whether a key is a group of config files."""
    return any((folder / key).is_dir() for folder in config_folders())


def groups() -> list[str]:
    """List the groups, such as `model` and `model/trunk`."""
    names: set[str] = set()
    for folder in config_folders():
        names.update(
            file.parent.relative_to(folder).as_posix() for file in folder.glob("*/**/*.yaml")
        )
    return sorted(names)


def group_files(group: str) -> list[Path]:
    """List the files of a group that can be chosen, by name."""
    files: list[Path] = []
    for folder in config_folders():
        files += (folder / group).glob("[!_]*.yaml")
    return sorted(files, key=lambda file: file.name)


def find_config(group: str, name: str) -> Path | None:
    """Return the file that is chosen by `group=name`, None where there is none.

    group: empty for the top level.
    """
    files = (folder / group / f"{name}.yaml" for folder in config_folders())
    return next((file for file in files if file.is_file()), None)


def experiments() -> list[str]:
    """List the names of the experiments."""
    return [file.stem for file in group_files("experiment")]
