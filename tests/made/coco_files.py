"""Small COCO files, valid or not, and the reports of reading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from maskseg.data.coco.file import CocoFile, check_coco, read_coco
from maskseg.errors import UserError

SQUARE = [[4.0, 3.0, 14.0, 3.0, 14.0, 9.0, 4.0, 9.0]]


def dataset(*annotations: dict[str, Any]) -> dict[str, Any]:
    """Build a COCO dataset of two images of 20 x 30 pixels.

    It has one valid annotation (id 1, image 1) and the given ones, by default of image 2.
    """
    valid = {
        "id": 1,
        "image_id": 1,
        "category_id": 4,
        "bbox": [4, 3, 10, 6],
        "area": 60,
        "iscrowd": 0,
        "segmentation": SQUARE,
    }
    completed = [
        {"id": 10 + i, "image_id": 2, "category_id": 4, **a} for i, a in enumerate(annotations)
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in (1, 2)],
        "annotations": [valid, *completed],
        "categories": [{"id": 4, "name": "cat"}],
    }


def write(folder: Path, content: Any) -> Path:
    path = folder / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def errors(folder: Path, content: Any, **keys: Any) -> dict[str, int]:
    """Return the errors of a file by kind, with counts. The exception carries the same report."""
    path = write(folder, content)
    keys.setdefault("max_pixels", 10_000)
    report = check_coco(path, **keys)
    with pytest.raises(UserError) as caught:
        read_coco(path, **keys)
    assert str(caught.value) == report.text()
    assert str(path) in report.text()
    return {kind: entry.count for kind, entry in report.errors.items()}


def cleaned(folder: Path, content: Any) -> tuple[CocoFile, dict[str, int]]:
    """Return the file and its corrections by kind. pycocotools must accept the result."""
    file = read_coco(write(folder, content), max_pixels=10_000)
    coco = COCO()
    coco.dataset = file.to_dict()
    coco.createIndex()
    for annotation in coco.anns.values():
        if annotation["segmentation"]:
            assert coco.annToMask(annotation).shape == (20, 30)
        x, y, w, h = annotation["bbox"]
        assert min(x, y) >= 0
        assert min(w, h) > 0
        assert x + w <= 30
        assert y + h <= 20
        assert np.isfinite(annotation["area"])
    return file, {kind: entry.count for kind, entry in file.report.warnings.items()}


def rle(counts: Any, size: Any = (20, 30)) -> dict[str, Any]:
    return {"size": list(size), "counts": counts}
