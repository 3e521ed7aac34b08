"""The limits of the package's style that ruff does not check."""

from __future__ import annotations

import measure_style
import pytest

# The most that `python tests/measure_style.py` may print.
LIMITS = {
    "statements per code line": 0.80,
    "line length p90": 88,
    "line length max": 100,
    "complexity p90": 7,
    "complexity max": 10,
    "parameters of a function": 8,
    "parameters of a constructor": 12,
    "cast": 19,
    "Any": 119,
    "reach-ins": 0,
}


@pytest.fixture(scope="module")
def figures() -> dict[str, float]:
    return measure_style.measure([measure_style.ROOT / "maskseg"]).summary()


@pytest.mark.parametrize("name", LIMITS)
def test_limits(figures: dict[str, float], name: str) -> None:
    assert figures[name] <= LIMITS[name]


def test_every_figure_has_a_limit(figures: dict[str, float]) -> None:
    assert set(figures) == set(LIMITS)


def test_what_is_counted() -> None:
    style = measure_style.Style()
    source = """
def function(self, a, b):
    if a: return other._private
    for x in cast(Any, b):
        pass
class C:
    def __init__(self, a, *, b): os._exit(1)
"""
    style.add(source, "file.py")
    figures = style.summary()
    assert figures["reach-ins"] == figures["cast"] == figures["Any"] == 1
    assert figures["complexity max"] == 3
    assert figures["parameters of a function"] == figures["parameters of a constructor"] == 2
    assert figures["line length max"] == 44
