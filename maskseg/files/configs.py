"""Where the YAML files of the configuration are."""

from __future__ import annotations

from pathlib import Path


def config_folder() -> Path:
    """`configs/` of the repository, or inside the installed package."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def experiments() -> list[str]:
    """The names of the experiments."""
    return sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
