"""Curves of training runs: panels, and plots of complete and broken metrics files."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from maskseg.errors import UserError
from maskseg.visualization import curves
from maskseg.visualization.curves import plot_curves


def records(steps=60):
    rows = []
    for step in range(1, steps + 1):
        terms = {"loss/box": 1 / step, "loss/mask": 2 / step}
        rows.append(
            {
                "step": step,
                "kind": "train",
                "loss": 3 / step,
                **terms,
                "lr": 0.01,
                "images_per_second": 9.0,
            }
        )
        if step % 20 == 0:
            rows.append(
                {
                    "step": step,
                    "kind": "val",
                    "bbox/AP": 0.1,
                    "segm/AP": 0.2,
                    "segm/AP50": 0.4,
                    "segm/APl": -1.0,
                    "loss/box": 1.0,
                }
            )
    return rows


@pytest.mark.parametrize(
    "rows",
    [
        records(),
        [r for r in records() if r["kind"] == "train"],
        [r for r in records() if r["kind"] == "val"],
        records()[:1],
        [{"step": 5, "kind": "val", "bbox/AP": -1.0, "segm/AP": 0.0}],
        [
            {"step": 1, "kind": "train", "loss": float("nan"), "lr": 0.0},
            {"step": 2, "kind": "train", "loss": float("inf"), "lr": None},
        ],
    ],
    ids=["both", "no validation", "only validation", "one line", "no ground truth", "not finite"],
)
def test_plot_curves(tmp_path, rows):
    source = tmp_path / "metrics.jsonl"
    output = tmp_path / "new" / "results.png"
    source.write_text("\n".join(json.dumps(r) for r in rows) + '\n{"step": 61, "ki')
    plot_curves(source, output)
    assert np.asarray(Image.open(output)).std() > 0


def test_panels():
    rows = records()
    rows.append({"step": 60, "kind": "train", "loss": 7.0})  # repeated after a resume
    train = {
        k: {r["step"]: r[k] for r in rows if r["kind"] == "train" and k in r}
        for k in ("loss", "loss/box", "loss/mask", "lr")
    }
    val = {
        k: {r["step"]: r[k] for r in rows if r["kind"] == "val"}
        for k in ("bbox/AP", "segm/AP", "segm/AP50", "segm/APl", "loss/box")
    }
    panels = dict(curves._panels(train, val))
    assert list(panels) == ["loss", "loss: box", "loss: mask", "learning rate", "average precision"]
    assert [line[0] for line in panels["loss"]] == ["train", "validation"]
    assert panels["loss"][0][1][60] == 7.0
    assert [line[0] for line in panels["average precision"]] == ["bbox AP", "segm AP", "segm AP50"]


def test_the_later_line_of_a_step_counts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "kind": "train", "loss": 1}\nnot json\n[1]\n'
        '{"step": 1, "kind": "train", "loss": 2}\n{"kind": "val"}\n'
    )
    assert curves.read_metrics(path) == ({"loss": {1: 2.0}}, {})


def test_damaged_values_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "kind": {}, "loss": 1}\n{"step": 1, "kind": ["val"], "loss": 1}\n'
        f'{{"step": {10**400}, "kind": "val", "loss": 1}}\n'
        '{"step": -1, "kind": "val", "loss": 1}\n{"step": true, "kind": "val", "loss": 1}\n'
        f'{{"step": 1, "kind": "val", "loss": {10**400}, "AP": 3, "loss/a": "x"}}\n'
    )
    assert curves.read_metrics(path) == ({}, {"AP": {1: 3.0}})


def test_curves_of_nothing(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        plot_curves(tmp_path / "missing.jsonl", tmp_path / "results.png")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no training or validation metrics"):
        plot_curves(tmp_path / "empty.jsonl", tmp_path / "results.png")


def test_running_mean():
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    np.testing.assert_allclose(curves._running_mean(values, 2), [1, 2, 3, 5, 6])


def test_no_pyplot(tmp_path, monkeypatch):
    # Importing pyplot would raise: it holds global state and may need a display.
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(records()[0]))
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "results.png")
