"""Classes of any number of keypoints, from a stranger's file to evaluated and drawn predictions,
by the tools alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.runs import MASKS, SMALL
from made.tools import done
from PIL import Image

HEAD = [
    "+model/heads@model.heads.keypoint=keypoint",
    "model.heads.keypoint.channels=16",
    "model.heads.keypoint.layers=1",
]


def write(folder: Path, points: dict[str, int], size: int = 96) -> None:
    """Four pictures with an object of each class, whose points lie on its diagonal, the second one
    invisible.
    """
    (folder / "images").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(4):
        pixels = np.full((size, size, 3), 40, np.uint8)
        images.append({"id": 10 * i, "file_name": f"{i}.png", "height": size, "width": size})
        for k, count in enumerate(points.values()):
            x, y, side = 8 + 3 * i + 44 * k, 12 + 5 * i, 32
            pixels[y : y + side, x : x + side] = 120 + 100 * k
            along = np.linspace(1, side - 2, count).round().astype(int)
            corners = [[x, y, x + side, y, x + side, y + side, x, y + side]]
            row = {
                "id": len(annotations) + 1,
                "image_id": 10 * i,
                "category_id": 3 + 4 * k,
                "bbox": [x, y, side, side],
                "segmentation": corners,
            }
            shown = [
                [x + a, y + a, 2] if j != 1 else [0, 0, 0] for j, a in enumerate(along.tolist())
            ]
            annotations.append(
                {
                    **row,
                    "keypoints": [v for point in shown for v in point],
                    "num_keypoints": count - 1,
                }
            )
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    categories = [
        {
            "id": 3 + 4 * k,
            "name": name,
            "keypoints": [f"{name}_{j}" for j in range(count)],
            "skeleton": [[j, j + 1] for j in range(1, count)],
        }
        for k, (name, count) in enumerate(points.items())
    ]
    (folder / "own.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


@pytest.mark.parametrize(
    "points", [{"hand": 5}, pytest.param({"fish": 23, "hand": 5}, marks=pytest.mark.slow)]
)
def test_a_skeleton_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: dict[str, int]
) -> None:
    write(tmp_path, points)
    monkeypatch.chdir(tmp_path)
    data = [
        "data=custom",
        "data.train_json=own.json",
        "data.val_json=own.json",
        "data.images=images",
        "data.num_workers=0",
    ]
    data += [f"data.{split}_transforms=[]" for split in ("train", "test")]
    done(
        "train",
        "experiment=scenes_r18",
        *data,
        *SMALL,
        *MASKS,
        *HEAD,
        "trainer.max_steps=2",
        "run_dir=run",
    )
    done("evaluate", "checkpoint=run", "output=out", *data, "trainer.device=cpu")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {"bbox/AP", "segm/AP", "keypoints/AP"} <= metrics.keys()
    words = [
        "checkpoint=run",
        "input=images",
        "output=drawn",
        "min_score=0.0",
        "model.classifier.score_threshold=0.0",
        "trainer.device=cpu",
    ]
    done("predict", *words)
    rows = json.loads((tmp_path / "drawn" / "predictions.json").read_text())
    wanted = {3 + 4 * k: 3 * count for k, count in enumerate(points.values())}
    assert {row["category_id"]: len(row["keypoints"]) for row in rows} == wanted
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 4
