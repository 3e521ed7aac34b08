"""Invalid polygons and RLEs are reported and never reach pycocotools; others are repaired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made.coco_files import SQUARE, cleaned, dataset, errors, rle
from pycocotools import mask as coco_mask

from maskseg.data.coco.file import check_coco
from maskseg.data.coco.packed_segmentations import (
    SegmentationError,
    SegmentationPacker,
    clip_polygon,
)
from maskseg.masks.annotated import Polygons

PIXELS = 20 * 30


# Polygons


@pytest.mark.parametrize(
    ("polygons", "kind"),
    [
        ([[1, 1, float("nan"), 1, 5, 5]], "polygon with NaN or infinity"),
        ([[1, 1, 9, 1, 5, 5], [1, 1, float("-inf"), 1, 5, 5]], "polygon with NaN or infinity"),
        ([[1, 1, 9, 1, 5, 5, 7]], "polygon with an odd number of coordinates"),
        ([[1, 2, 3]], "polygon with an odd number of coordinates"),
        ([[1, 1, "9", 1, 5, 5]], "polygon that is not a list of numbers"),
        ([[1, 1, None, 1, 5, 5]], "polygon that is not a list of numbers"),
        ([[[1, 1], [9, 1], [5, 5]]], "polygon that is not a list of numbers"),
        ([1, 1, 9, 1, 5, 5], "polygon that is not a list of numbers"),
        ([[10**400, 1, 9, 1, 5, 5]], "polygon that is not a list of numbers"),
        ("abc", "segmentation that is neither polygons nor RLE"),
        (7, "segmentation that is neither polygons nor RLE"),
    ],
)
def test_invalid_polygons(tmp_path: Path, polygons: Any, kind: str) -> None:
    assert errors(tmp_path, dataset({"bbox": [1, 1, 8, 4], "segmentation": polygons})) == {kind: 1}
    assert errors(
        tmp_path,
        dataset({"segmentation": polygons}, {"segmentation": SQUARE}, {"segmentation": polygons}),
    ) == {kind: 2}


def test_short_polygons_are_dropped(tmp_path: Path) -> None:
    content = dataset(
        {"segmentation": [[1, 1, 2, 2], *SQUARE]},
        {"bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 2, 2]]},
        {"segmentation": [[], []]},
    )
    file, warnings = cleaned(tmp_path, content)
    assert warnings == {
        "polygon with fewer than 3 points, dropped": 3,
        "annotation whose polygons all have fewer than 3 points, dropped": 2,
    }
    found = file.annotations(1)
    assert found.ids.tolist() == [10]
    assert isinstance(found.shapes[0], Polygons)
    assert [p.tolist() for p in found.shapes[0].parts] == [[[4, 3], [14, 3], [14, 9], [4, 9]]]
    np.testing.assert_array_equal(found.boxes, [[4, 3, 14, 9]])


def test_polygons_outside_the_image(tmp_path: Path) -> None:
    content = dataset(
        {"segmentation": [[-10, -10, 10, -10, 10, 10, -10, 10]]},
        {"bbox": [1, 1, 5, 5], "segmentation": [[-10, -10, -5, -10, -5, 10]]},
        {"segmentation": [[40, 0, 50, 0, 50, 10]]},
        {"segmentation": [[-1e300, -1e300, 1e300, -1e300, 1e300, 1e300, -1e300, 1e300]]},
        {"segmentation": [[1, 1, 30.25, 1, 30.25, 9, 1, 9]]},
        {
            "segmentation": [[-30, 5, 5, 40, -30, 40]]
        },  # the box overlaps the image, the triangle does not
    )
    file, warnings = cleaned(tmp_path, content)
    found = file.annotations(1)
    assert found.ids.tolist() == [10, 13, 14]
    np.testing.assert_array_equal(found.boxes, [[0, 0, 10, 10], [0, 0, 30, 20], [1, 1, 30, 9]])
    for shape in found.shapes:
        assert isinstance(shape, Polygons)
        for part in shape.parts:
            assert part.min() >= 0
            assert (part <= [30, 20]).all()
    assert warnings == {
        "annotation outside its image, dropped": 3,
        "polygon that extends beyond its image, clipped": 2,
    }


def test_clipped_polygons_keep_their_pixels() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        points = rng.uniform([-30, -20], [60, 40], (rng.integers(3, 8), 2)).round()
        whole = coco_mask.frPyObjects([(points + np.array([30, 20])).ravel().tolist()], 60, 90)
        expected = coco_mask.decode(whole)[20:40, 30:60, 0]
        cut = clip_polygon(points, 20, 30)
        if not len(cut):
            assert expected.sum() <= 3
            continue
        assert (cut >= 0).all()
        assert (cut <= [30, 20]).all()
        found = coco_mask.decode(coco_mask.frPyObjects([cut.ravel().tolist()], 20, 30))[..., 0]
        # pycocotools rounds crossings to 1/5 pixel: only pixels on the outline may change.
        line = np.abs(np.diff(np.pad(expected.astype(int), 1, mode="edge"), axis=0))[:, 1:-1]
        side = np.abs(np.diff(np.pad(expected.astype(int), 1, mode="edge"), axis=1))[1:-1]
        outline = line[1:] | line[:-1] | side[:, 1:] | side[:, :-1]
        wrong = (found != expected) & (outline == 0)
        assert wrong.sum() <= 4
        assert (found != expected).sum() <= 12


def test_polygons_inside_the_image_are_unchanged() -> None:
    points = np.array([[0.0, 0.0], [30.0, 0.0], [17.25, 20.0]])
    np.testing.assert_array_equal(clip_polygon(points, 20, 30), points)


# Run lengths


@pytest.mark.parametrize(
    ("segmentation", "kind"),
    [
        (rle([10, 20]), "RLE whose counts do not sum to the mask's pixels"),
        (rle([10, 20, PIXELS]), "RLE whose counts do not sum to the mask's pixels"),
        (rle([PIXELS + 5, -5]), "RLE with negative counts"),
        (
            rle([2**62, 2**62, 2**62, 2**62 + PIXELS]),
            "RLE whose counts do not sum to the mask's pixels",
        ),
        (rle([10, PIXELS - 10], (30, 20)), "RLE whose size differs from its image's"),
        (rle([100], (10, 10)), "RLE whose size differs from its image's"),
        (rle([1.5, PIXELS - 1.5]), "RLE counts that are not integers"),
        (rle(["a"]), "RLE counts that are not integers"),
        (rle([2**70]), "RLE counts that are not integers"),
        (rle([]), "RLE without counts"),
        (rle(None), "RLE without counts"),
        ({"size": [20, 30]}, "RLE without counts"),
        ({"counts": [PIXELS]}, "RLE without a size of two positive integers"),
        (rle([PIXELS], (20.5, 30)), "RLE without a size of two positive integers"),
        (rle([PIXELS], (-20, -30)), "RLE without a size of two positive integers"),
        (rle([PIXELS], (20, 30, 1)), "RLE without a size of two positive integers"),
        (rle([3_600_000_000], (60000, 60000)), "RLE of more pixels than data.max_pixels"),
        (rle("anything", (60000, 60000)), "RLE of more pixels than data.max_pixels"),
        (rle("1"), "RLE whose counts do not sum to the mask's pixels"),
        (rle("~~~"), "RLE that cannot be decoded"),
        (rle("ooo"), "RLE that cannot be decoded"),
        (rle("\u00e9"), "RLE that cannot be decoded"),
        (rle("oooooooooooooooooooo0"), "RLE that cannot be decoded"),
        (rle("h00"), "RLE whose counts do not sum to the mask's pixels"),
        (rle("O"), "RLE with negative counts"),
    ],
)
def test_invalid_rle(tmp_path: Path, segmentation: Any, kind: str) -> None:
    assert errors(tmp_path, dataset({"bbox": [1, 1, 8, 4], "segmentation": segmentation})) == {
        kind: 1
    }
    assert "annotation 10 (image 2)" in check_coco(tmp_path / "data.json", max_pixels=10_000).text()


def test_damaged_strings_never_pass() -> None:
    """Randomly changed strings are refused, or decoded as by pycocotools."""
    rng = np.random.default_rng(0)
    mask = (rng.random((20, 30)) < 0.3).astype(np.uint8)
    text = coco_mask.encode(np.asfortranarray(mask))["counts"]
    packer, strings = SegmentationPacker(10_000), []
    for i in range(400):
        changed = bytearray(text)
        for _ in range(1 + i % 3):
            changed[rng.integers(len(changed))] = rng.integers(48, 112)
        strings.append(changed.decode())
        packer.add(rle(strings[-1]))
    packed, passed = packer.to_segmentations(), 0
    for row, string in enumerate(strings):
        try:
            counts = packed.counts(row)
        except SegmentationError:
            continue
        passed += 1
        decoded = coco_mask.decode(rle(string))
        np.testing.assert_array_equal(
            decoded.ravel(order="F"), np.repeat(np.arange(len(counts)) % 2, counts)
        )
    assert 0 < passed < 100


def test_empty_masks_are_dropped(tmp_path: Path) -> None:
    box = {"bbox": [1, 1, 5, 5]}
    zeros = coco_mask.encode(np.zeros((20, 30), dtype=np.uint8, order="F"))["counts"].decode()
    file, warnings = cleaned(
        tmp_path,
        dataset(
            {**box, "segmentation": rle([PIXELS])},
            {"segmentation": rle(zeros)},
            {**box, "segmentation": []},
        ),
    )
    assert warnings == {
        "annotation with an empty mask, dropped": 2,
        "object without a mask, beside objects with masks": 1,
    }
    assert file.annotations(1).shapes == (None,)
