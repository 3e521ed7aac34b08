"""Random bitmaps and their run lengths."""

from __future__ import annotations

import numpy as np
from pycocotools import mask as coco_mask

from maskseg.masks.annotated import RunLengths

Bitmaps = np.ndarray


def counts_of(mask: Bitmaps) -> np.ndarray:
    """Compute the run lengths by their definition: column by column, zeros first."""
    flat = np.concatenate([[0], mask.ravel(order="F").astype(int)])
    return np.diff(np.concatenate([[0], np.flatnonzero(np.diff(flat)), [mask.size]]))


def encode(mask: Bitmaps) -> dict:
    return coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))


def random_masks(
    n: int, height: int | None = None, width: int | None = None, seed: int = 0
) -> list[Bitmaps]:
    """Return noise, rectangles, a full and an empty mask."""
    rng = np.random.default_rng(seed)
    masks = []
    for i in range(n):
        h = height or int(rng.integers(1, 40))
        w = width or int(rng.integers(1, 40))
        if i % 2:
            mask = rng.random((h, w)) < rng.random()
        else:
            y0, y1 = np.sort(rng.integers(0, h + 1, 2))
            x0, x1 = np.sort(rng.integers(0, w + 1, 2))
            mask = np.zeros((h, w), dtype=bool)
            mask[y0:y1, x0:x1] = True
        masks.append(mask)
    first = masks[0].shape
    return [*masks, np.ones(first, dtype=bool), np.zeros(first, dtype=bool)]


def runs_of(mask: Bitmaps) -> RunLengths:
    return RunLengths(np.cumsum(counts_of(mask)), *mask.shape)
