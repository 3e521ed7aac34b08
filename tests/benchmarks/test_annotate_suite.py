"""Benchmark suite `annotate`: it runs and fills its table. Times are not checked."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskseg import config as configs
from maskseg.benchmarks.annotate import annotate
from maskseg.benchmarks.report import table
from maskseg.data.datasets.scenes import make_scenes

pytest.importorskip("cv2")


def test_the_suite(tmp_path: Path) -> None:
    home = tmp_path / "scenes"
    make_scenes(home, num_train=1, num_val=2, size=128, num_workers=0)
    data = ["data=custom", f"data.val_json={home / 'val.json'}", f"data.images={home / 'images'}"]
    result = annotate(configs.compose("benchmark", [*data, "rounds=1"]), count=2)
    (case,) = result["cases"]
    assert case["name"].startswith("2 objects of ")
    assert set(case["seconds"]) == {"whole image", "maskseg"}
    assert all(value > 0.6 for value in case["agreement"].values())
    assert "2 objects" in table(result)
