"""Location of the configuration's YAML files."""

from __future__ import annotations

from pathlib import Path


def config_folder() -> Path:
    """Return `configs/` of the repository, or the copy inside the installed package."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def experiments() -> list[str]:
    """List the names of the experiments."""
    return sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
