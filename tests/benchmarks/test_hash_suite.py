"""Benchmark suite `hash`: it runs and fills its table. Times are not checked."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from maskseg.benchmarks.hash import hash as suite
from maskseg.benchmarks.report import table


def test_a_round_of_the_suite() -> None:
    pytest.importorskip("cv2")
    result = suite(SimpleNamespace(trunk="resnet18", rounds=1), counts=(60,), bits=(4,))
    (case,) = result["cases"]
    assert set(case["seconds"]) == {"backbone", "backbone, hash and merge", "superpixels (SLIC)"}
    assert 1 <= case["agreement"]["segments"] <= 120
    assert "hash and merge add, percent" in table(result)
