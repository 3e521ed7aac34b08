"""Lazy imports of OpenCV and SciPy (extra `classic`), with clear errors for broken installs."""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from types import ModuleType

from maskseg.errors import UserError

WHEELS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
INSTALL = "pip install -e '.[classic]'"


@cache
def opencv() -> ModuleType:
    """Import cv2 with its contrib modules.

    Sets OpenCV to one thread in the whole process. Results must not depend on the number of threads
    (OpenCV may add floats in another order), each worker of a data loader would start one thread
    per core, and a forked worker may wait forever for the threads of its parent.

    Raises UserError if cv2 is missing, lacks the contrib modules, or comes from multiple wheels.
    """
    wheels = _installed_wheels()
    advice = f"pip uninstall -y {' '.join(wheels)}, then {INSTALL}" if wheels else INSTALL
    if len(wheels) > 1:
        raise UserError(
            f"{' and '.join(wheels)} are installed together and overwrite each other's files: "
            f"{advice}"
        )
    try:
        cv2 = import_module("cv2")
    except Exception as error:
        # An incomplete wheel raises AttributeError, a missing system library ImportError.
        raise UserError(
            f"this needs OpenCV's contrib modules, but cv2 cannot be imported ({error}): {advice}"
        ) from error
    if not hasattr(cv2, "ximgproc"):
        raise UserError(
            "this needs OpenCV's contrib modules, which the installed "
            f"{''.join(wheels) or 'OpenCV'} lacks: {advice}"
        )
    cv2.setNumThreads(1)
    return cv2


def scipy(module: str) -> ModuleType:
    """Import scipy.`module`. Raises UserError if SciPy is not installed."""
    try:
        return import_module(f"scipy.{module}")
    except ImportError as error:
        raise UserError(
            f"this needs SciPy, which cannot be imported ({error}): {INSTALL}"
        ) from error


def _installed_wheels() -> list[str]:
    """The installed OpenCV wheels.

    conda-forge's package registers several of these names at once, but lists no files under them.
    """
    wheels = []
    for name in WHEELS:
        try:
            record = metadata.distribution(name).read_text("RECORD")
        except metadata.PackageNotFoundError:
            continue
        if "cv2/__init__.py" in (record or ""):
            wheels.append(name)
    return wheels
