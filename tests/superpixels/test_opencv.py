"""The import of OpenCV and SciPy: missing, without contrib, broken, multiple wheels, and lazy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from maskseg.errors import UserError
from maskseg.superpixels.opencv import INSTALL, WHEELS, opencv, scipy


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replace sys.path by an empty folder; yields a function that installs a wheel there.

    Its arguments are the wheel's name and the source of its cv2, or None for no files.
    """
    opencv.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] in ("cv2", "scipy")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def install_wheel(name: str, source: str | None) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-5.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 5.0\n")
        if source is not None:
            (folder / "RECORD").write_text("cv2/LICENSE.txt,,\ncv2/__init__.py,sha256=0,6\n")
            (tmp_path / "cv2").mkdir(exist_ok=True)
            (tmp_path / "cv2" / "__init__.py").write_text(source)

    yield install_wheel
    opencv.cache_clear()
    sys.modules.pop("cv2", None)


COMPLETE = "threads = []\nsetNumThreads = threads.append\nximgproc = 1\n"


def test_one_thread_set_once(install: Callable[..., None]) -> None:
    install("opencv-contrib-python", COMPLETE)
    assert opencv() is opencv()
    assert opencv().threads == [1]


def test_the_installed_opencv_has_one_thread() -> None:
    assert opencv().getNumThreads() == 1


@pytest.mark.usefixtures("install")
def test_not_installed() -> None:
    with pytest.raises(
        UserError,
        match=(
            r"needs OpenCV's contrib modules.*No module named 'cv2'.*: "
            r"pip install -e '\.\[classic\]'$"
        ),
    ):
        opencv()


@pytest.mark.parametrize("source", ["import nowhere", "missing", "raise OSError('libGL.so.1')"])
def test_a_broken_wheel_is_to_be_uninstalled_first(
    install: Callable[..., None], source: str
) -> None:
    install("opencv-contrib-python", source)
    with pytest.raises(
        UserError,
        match=(
            r"cannot be imported \(.+\): "
            r"pip uninstall -y opencv-contrib-python, then pip install"
        ),
    ):
        opencv()


def test_without_contrib(install: Callable[..., None]) -> None:
    install("opencv-python-headless", "")
    expected = (
        r"contrib modules, which the installed opencv-python-headless lacks: "
        r"pip uninstall -y opencv-python-headless, then pip install -e '"
    )
    with pytest.raises(UserError, match=expected):
        opencv()


@pytest.mark.parametrize("second", WHEELS[:3])
def test_two_wheels(install: Callable[..., None], second: str) -> None:
    install("opencv-contrib-python-headless", COMPLETE)
    install(second, COMPLETE)
    with pytest.raises(UserError) as error:
        opencv()
    problem = (
        f"{second} and opencv-contrib-python-headless are installed together and overwrite "
        "each other's files"
    )
    assert (
        str(error.value)
        == f"{problem}: pip uninstall -y {second} opencv-contrib-python-headless, then {INSTALL}"
    )


def test_wheels_without_files_are_ignored(install: Callable[..., None]) -> None:
    for name in WHEELS[:3]:
        install(name, None)
    install(WHEELS[3], COMPLETE)
    assert opencv().ximgproc


@pytest.mark.usefixtures("install")
def test_no_scipy() -> None:
    with pytest.raises(UserError, match=r"needs SciPy.*: pip install -e '\.\[classic\]'$"):
        scipy("sparse")


def test_imports_are_lazy() -> None:
    imports = "import sys, maskseg.variants.hash.merging, maskseg.superpixels.methods"
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{imports}; print(*sorted({{'cv2', 'scipy', 'torch'}} & set(sys.modules)))",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.strip() == ""
