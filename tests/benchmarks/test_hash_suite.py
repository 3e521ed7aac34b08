"""The benchmark of the hash layer runs and says what its table needs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from maskseg.benchmarks.hash import hash as suite
from maskseg.benchmarks.report import table


def test_a_round_of_it() -> None:
    pytest.importorskip("cv2")
    found = suite(SimpleNamespace(trunk="resnet18", rounds=1), counts=(60,), bits=(4,))
    (case,) = found["cases"]
    assert set(case["seconds"]) == {"backbone", "backbone, hash and merge", "superpixels (SLIC)"}
    assert 1 <= case["agreement"]["segments"] <= 120
    assert "hash and merge add, percent" in table(found)
