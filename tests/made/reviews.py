"""Small files of masks to review."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SQUARE = [[4.0, 3.0, 14.0, 3.0, 14.0, 9.0, 4.0, 9.0]]
HEIGHT = 40
WIDTH = 60


def proposals() -> dict[str, Any]:
    """Build two images of 40 x 60 pixels, four annotations, and unknown fields."""
    rle = {
        "size": [HEIGHT, WIDTH],
        "counts": [5 * HEIGHT + 10, 20, 20, 20, HEIGHT * WIDTH - 5 * HEIGHT - 70],
    }
    return {
        "info": {"year": 2024, "note": "é"},
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH, "camera": i}
            for i in (7, 3)
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 4,
                "bbox": [4, 3, 10, 6],
                "area": 60,
                "iscrowd": 0,
                "segmentation": SQUARE,
                "technique": "cam",
            },
            {
                "id": 2,
                "image_id": 3,
                "category_id": 4,
                "bbox": [5, 10, 2, 20],
                "iscrowd": 0,
                "segmentation": rle,
                "score": 0.25,
            },
            {
                "id": 5,
                "image_id": 7,
                "category_id": 9,
                "bbox": [20.5, 10.0, 20, 20],
                "segmentation": [],
            },
            {
                "id": 9,
                "image_id": 3,
                "category_id": 9,
                "bbox": [1, 1, 5, 5],
                "segmentation": [[1.0, 1.0, 6.0, 1.0, 6.0, 6.0, 1.0, 6.0]],
            },
        ],
        "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog", "colour": "red"}],
        "thresholds": [0.1, 0.2],
    }


def write_proposals(folder: Path) -> Path:
    """Write `proposals` and its images: noise, with a bright disc around (30, 20)."""
    path = folder / "masks.json"
    path.write_text(json.dumps(proposals(), indent=1))
    for number in (7, 3):
        pixels = np.random.default_rng(number).integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[disc(8)] += 180
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return path


def disc(radius: float) -> np.ndarray:
    """Return the pixels around (30, 20), bool [40, 60]."""
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    return (x + 0.5 - 30) ** 2 + (y + 0.5 - 20) ** 2 < radius**2
