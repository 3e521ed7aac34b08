"""Non-maximum suppression by mask IoU and pasting of segments, on synthetic superpixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskseg.masks.superpixel import SegmentMasks, superpixel_areas
from maskseg.structures import Regions
from maskseg.variants.cfm import mask_nms
from maskseg.variants.cfm.mask_nms import _superpixel_iou, nms_by_mask_iou, paste_labels

STRIP = np.repeat(np.arange(10, dtype=np.int32), 2)[None].repeat(
    3, axis=0
)  # ten superpixels of 3 x 2 pixels side by side


def segments(
    ranges: list[tuple[int, int]], scores: list[float], labels: list[int], image: int = 0
) -> Regions:
    members = torch.zeros((len(ranges), 10), dtype=torch.bool)
    for row, (first, last) in zip(members, ranges, strict=True):
        row[first:last] = True
    masks = SegmentMasks.of_image(STRIP, members)
    index = torch.full((len(ranges),), image)
    return Regions(
        masks.boxes(), index, torch.tensor(scores), torch.tensor(labels, dtype=torch.int64), masks
    )


def test_the_best_of_overlapping_segments_of_a_class_stays() -> None:
    result = segments(
        [(0, 4), (1, 5), (0, 4), (6, 9), (3, 8)], [0.6, 0.9, 0.8, 0.3, 0.5], [0, 0, 1, 0, 0]
    )
    # 0 and 1 share three of five superpixels; the third is of another class; 4 shares two of seven
    # with 1, and two of six with 3.
    assert nms_by_mask_iou(result, 0.3).tolist() == [1, 2, 4]
    assert nms_by_mask_iou(result, 0.5).tolist() == [1, 2, 4, 3]
    assert nms_by_mask_iou(result, 0.7).tolist() == [1, 2, 0, 4, 3]


def test_no_detections() -> None:
    assert nms_by_mask_iou(segments([], [], []), 0.3).tolist() == []


def test_images_are_suppressed_separately() -> None:
    first = segments([(0, 4)], [0.5], [0])
    second = segments([(0, 4), (5, 6)], [0.9, 0.95], [0, 0], image=1)
    masks = SegmentMasks.cat(
        [m for m in (first.masks, second.masks) if isinstance(m, SegmentMasks)]
    )
    labels = torch.zeros(3, dtype=torch.int64)
    both = Regions(
        masks.boxes(),
        torch.tensor([0, 1, 1]),
        torch.cat([first.scores, second.scores]),
        labels,
        masks,
    )
    assert nms_by_mask_iou(both, 0.3).tolist() == [0, 2, 1]
    maps = paste_labels(both, torch.tensor([[3, 20], [3, 20]]), 4, 24)
    assert maps.shape == (2, 4, 24)
    assert (maps[0, :3, :8] == 0).all()
    assert (maps[0, :3, 8:] == -1).all()
    assert (maps[1, 1, 10:12] == 0).all()
    assert (maps[:, 3] == -1).all()


def test_better_segments_are_not_pasted_over() -> None:
    result = segments([(0, 6), (4, 8), (7, 10)], [0.4, 0.9, 0.7], [2, 0, 1])
    row = paste_labels(result, torch.tensor([[3, 20]]), 3, 20)[0, 0]
    assert row.tolist() == [2] * 8 + [0] * 8 + [1] * 4


def test_pixels_of_no_superpixel_stay_without_a_class() -> None:
    labels = STRIP.copy()
    labels[0, 0] = -1
    masks = SegmentMasks.of_image(labels, torch.ones((1, 10), dtype=torch.bool))
    result = Regions(
        masks.boxes(), torch.zeros(1, dtype=torch.int64), torch.ones(1), torch.tensor([3]), masks
    )
    (label_map,) = paste_labels(result, torch.tensor([[3, 20]]), 3, 20)
    assert label_map[0, 0] == -1
    assert (label_map.flatten()[1:] == 3).all()


@pytest.mark.parametrize("exact", [0, 2**24])
def test_the_iou_is_that_of_the_masks(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_nms, "MAX_EXACT_FLOAT32", exact)
    generator = np.random.default_rng(0)
    labels = generator.integers(-1, 12, (20, 30)).astype(np.int32)
    members = torch.from_numpy(
        generator.random((9, 15)) < 0.3
    )  # superpixels 12 to 14 have no pixel
    masks = SegmentMasks.of_image(labels, members)
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            assert torch.equal(
                _superpixel_iou(members, superpixel_areas(labels, 15)), masks.iou(masks)
            )
