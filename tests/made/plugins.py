"""Plug-ins: the packages in tests/plugins, and small ones that a test writes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from made.runs import ROOT

from maskseg.plugins import VARIABLE

FOLDER = ROOT / "tests" / "plugins"
EXAMPLES = ("convnext_trunk", "boundary_head", "yolo_reader", "recipe")


def enable(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Enable packages of tests/plugins by the environment variable."""
    if find_spec("albumentations") is None:
        monkeypatch.syspath_prepend(str(FOLDER / "stand_in"))
    for package in packages:
        monkeypatch.syspath_prepend(str(FOLDER / package))
    monkeypatch.setenv(VARIABLE, ",".join(packages))


def write_package(folder: Path, package: str, files: dict[str, str]) -> None:
    """Write a package with these files: path -> text."""
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_distribution(folder: Path, name: str, entry_points: str) -> None:
    """Write the metadata of an installed distribution with entry points for plug-ins."""
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[maskseg.plugins]\n{entry_points}\n")
