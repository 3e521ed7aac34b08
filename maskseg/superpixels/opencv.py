"""OpenCV and SciPy, which come with the extra `classic`: imported when first asked for, and judged then."""

from __future__ import annotations

from functools import cache
from importlib import import_module, metadata
from typing import Any

from maskseg.errors import UserError

WHEELS = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
INSTALL = "pip install maskseg[classic]"


@cache
def opencv() -> Any:
    """The module cv2 with its contrib modules. Raises UserError where it is not there, lacks them, or is a mixture of several wheels.

    It is set to one thread, in the whole process: results must not hang on the number of threads (OpenCV may add up floats in another order),
    every worker of a loader would start as many threads as the machine has cores, and a forked one may wait for ever for those of its parent.
    """
    wheels = _wheels()
    mend = f"pip uninstall -y {' '.join(wheels)}, then {INSTALL}" if wheels else INSTALL
    if len(wheels) > 1:
        raise UserError(
            f"{' and '.join(wheels)} are installed together and overwrite each other's files: {mend}"
        )
    try:
        cv2 = import_module("cv2")
    except (
        Exception
    ) as error:  # half a wheel raises AttributeError, a missing system library ImportError
        raise UserError(
            f"this needs OpenCV's contrib modules, but cv2 cannot be imported ({error}): {mend}"
        ) from error
    if not hasattr(cv2, "ximgproc"):
        raise UserError(
            f"this needs OpenCV's contrib modules, which the installed {''.join(wheels) or 'OpenCV'} lacks: {mend}"
        )
    cv2.setNumThreads(1)
    return cv2


def scipy(part: str) -> Any:
    """The module scipy.`part`. Raises UserError where SciPy is not installed."""
    try:
        return import_module(f"scipy.{part}")
    except ImportError as error:
        raise UserError(
            f"this needs SciPy, which cannot be imported ({error}): {INSTALL}"
        ) from error


def _wheels() -> list[str]:
    """The installed OpenCV wheels. conda-forge's package goes by several of their names at once, but lists no files under them."""
    found = []
    for name in WHEELS:
        try:
            record = metadata.distribution(name).read_text("RECORD")
        except metadata.PackageNotFoundError:
            continue
        if "cv2/__init__.py" in (record or ""):
            found.append(name)
    return found
