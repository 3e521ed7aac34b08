"""Packages and version; everything else is in pyproject.toml.

`configs/` is at the top of the repository and is installed inside the package, so that
`pip install` alone is enough.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

version = re.search(
    r'__version__ = "(.+)"', Path(__file__).with_name("maskseg").joinpath("__init__.py").read_text()
)
assert version is not None

configs = [
    "maskseg.configs" + "".join(f".{part}" for part in path.relative_to("configs").parts)
    for path in Path("configs").glob("**/")
]

setup(
    version=version[1],
    packages=[*find_packages(include=["maskseg", "maskseg.*"]), *configs],
    package_dir={"maskseg.configs": "configs"},
    package_data={
        "": ["*.yaml", "py.typed", "*.json", "*.csv"],
        "maskseg.annotation.review": [f"page/*.{kind}" for kind in ("html", "js", "css")],
    },
)
