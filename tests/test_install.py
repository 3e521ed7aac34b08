"""Installed tools: console scripts, their help texts, and a wheel in another environment."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from made.tools import said

import maskseg
from maskseg.cli import fit_to_installation, name_as_called

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = sorted(PROJECT["scripts"])
SOURCES = ("maskseg", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def function_of(script: str) -> Callable[[], int]:
    module, _, name = PROJECT["scripts"][script].partition(":")
    function: Callable[[], int] = getattr(importlib.import_module(module), name)
    return function


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_command_as_it_was_called(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/env/bin/{script}", "--help"])
    assert function_of(script)() == 0
    text = capsys.readouterr().out
    assert f"\n  {script} " in text
    assert "tools/" not in text
    tool = script.removeprefix("maskseg-").replace("-", "_")
    monkeypatch.setattr(sys, "argv", [f"../tools/{tool}.py"])
    assert f"\n  python ../tools/{tool}.py" in said(tool, "--help").out


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("/env/bin/maskseg-train", "maskseg-check-data x (maskseg-fit-hash)"),
        ("C:\\env\\maskseg-train.exe", "maskseg-check-data x (maskseg-fit-hash)"),
        ("tools/train.py", "python tools/check_data.py x (tools/fit_hash.py)"),
        ("../a/tools/train.py", "python ../a/tools/check_data.py x (../a/tools/fit_hash.py)"),
        ("/usr/bin/pytest", "python tools/check_data.py x (tools/fit_hash.py)"),
    ],
)
def test_messages_name_the_tools_as_called(
    program: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = program.rpartition("\\")[2] if "\\" in program else program
    monkeypatch.setattr(sys, "argv", [name])
    assert name_as_called("python tools/check_data.py x (tools/fit_hash.py)") == expected
    assert name_as_called("input=tools/a.py, /my/tools/b.py") == "input=tools/a.py, /my/tools/b.py"


def test_an_extra_is_installed_by_its_packages_without_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "this needs SciPy: pip install -e '.[classic,demo]'"
    assert fit_to_installation(text, ROOT) == text
    requirements = [
        "torch>=2",
        'a>=1; extra == "classic"',
        'b<2; extra == "demo"',
        'c; extra == "x"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda _: requirements)
    assert fit_to_installation(text, tmp_path) == "this needs SciPy: pip install 'a>=1' 'b<2'"


def test_the_version_is_printed() -> None:
    assert said("train", "--version").out == f"maskseg {maskseg.__version__}\n"


def test_supported_versions_of_python_are_named() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in PROJECT["classifiers"]
    assert (3, 11) <= sys.version_info[:2] <= (3, 13)


@pytest.mark.slow
def test_a_wheel_works_in_another_environment(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*command: str | Path, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )

    pip = ("-m", "pip", "--disable-pip-version-check")
    wheel = (*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist", source)
    built = call(sys.executable, *wheel)
    assert built.returncode == 0, built.stderr
    # An environment that sees the libraries of this one, but not its maskseg.
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    file = next((tmp_path / "dist").glob("maskseg-*.whl"))
    installed = call(python, *pip, "install", "--no-deps", "--ignore-installed", file)
    assert installed.returncode == 0, installed.stderr
    for script in SCRIPTS:
        helped = call(python.with_name(script), "--help")
        assert (helped.returncode, helped.stderr) == (0, ""), script
        assert f"  {script} " in helped.stdout
    where = call(python, "-c", "import maskseg; print(maskseg.__file__)").stdout
    assert Path(where.strip()).is_relative_to(site)
    config = call(python.with_name("maskseg-train"), "--cfg", "job")
    assert config.returncode == 0, config.stderr
    assert "max_steps" in config.stdout
    refused = call(python.with_name("maskseg-predict"))
    assert refused.returncode == 2
    assert "maskseg-predict --help" in refused.stderr
