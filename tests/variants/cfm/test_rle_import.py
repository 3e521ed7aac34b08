"""Import of proposals from a file of masks: results and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from maskseg.data.coco.checks import ImageRecord
from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.variants.cfm.rle_import import MaskJob, RleFile, segments_from_masks
from maskseg.variants.cfm.store import SegmentStore, write_store

IMAGES = [ImageRecord(7, "a.png", 2, 4), ImageRecord(-2, "b.png", 3, 3)]


def read(
    folder: Path, entries: Any, most: int = 10, images: list[ImageRecord] = IMAGES
) -> dict[int, SegmentProposals]:
    path = folder / "masks.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    jobs = RleFile(path, images, IMAGES, most, max_pixels=1000)
    assert len(jobs) == len(images)
    return {job.image_id: segments_from_masks(job.load()) for job in jobs}


def bitmaps(proposals: SegmentProposals) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return proposals.members[:, proposals.labels]


def entry(
    counts: Any, score: float = 0.5, image_id: int = 7, size: tuple[int, int] = (2, 4)
) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "segmentation": {"size": list(size), "counts": counts},
        "score": score,
    }


def test_a_literal(tmp_path: Path) -> None:
    """Two masks that overlap in one column, one inside both, and one of another image."""
    proposals = read(
        tmp_path,
        [
            entry([0, 4, 4], 0.3),
            entry([2, 4, 2], 0.9),
            entry([3, 1, 4], 0.1),
            entry([0, 9], 1.0, -2, (3, 3)),
        ],
    )
    assert proposals[7].labels.dtype == np.int32
    assert proposals[7].labels.tolist() == [[0, 1, 2, 3], [0, 4, 2, 3]]
    assert proposals[7].members.tolist() == [
        [False, True, True, False, True],
        [True, True, False, False, True],
        [False, False, False, False, True],
    ]
    assert proposals[-2].labels.tolist() == [[0] * 3] * 3
    assert proposals[-2].members.tolist() == [[True]]


def test_forms_of_a_mask(tmp_path: Path) -> None:
    mask = np.array([[0, 1, 1, 0], [0, 1, 1, 0]], dtype=np.uint8)
    packed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    square = [[1.0, 0.0, 3.0, 0.0, 3.0, 2.0, 1.0, 2.0]]
    large = [[1.0, -5.0, 3.0, -5.0, 3.0, 9.0, 1.0, 9.0]]
    for segmentation in (
        {"size": [2, 4], "counts": packed},
        {"size": [2, 4], "counts": [2, 3, 0, 1, 2, 0]},
        square,
        large,
    ):
        proposals = read(tmp_path, [{"image_id": 7, "segmentation": segmentation, "score": 1}])[7]
        assert bitmaps(proposals).tolist() == [mask.astype(bool).tolist()], segmentation


def test_the_best_by_score_and_none_without_a_pixel(tmp_path: Path) -> None:
    outside = {"image_id": 7, "segmentation": [[9.0, 9.0, 12.0, 9.0, 12.0, 12.0]], "score": 0.9}
    entries = [
        entry([1, 1, 6], 0.2),
        entry([8], 1.0),
        entry([2, 1, 5], 0.7),
        entry([3, 1, 4], 0.7),
        entry([0, 8], 0.1),
        outside,
        entry([0, 0, 8], 1),
    ]
    proposals = read(tmp_path, entries, most=3)
    assert [np.flatnonzero(m.T.ravel()).tolist() for m in bitmaps(proposals[7])] == [[2], [3], [1]]
    assert proposals[-2].members.shape == (0, 1)
    assert proposals[-2].labels.tolist() == [[0] * 3] * 3
    assert [m.all() for m in bitmaps(read(tmp_path, [entry([0, 8]), entry([0, 8, 0])])[7])] == [
        True,
        True,
    ]
    assert set(read(tmp_path, entries, images=IMAGES[1:])) == {-2}
    assert read(tmp_path, [])[7].members.shape == (0, 1)


def test_superpixels_are_the_distinct_combinations() -> None:
    rng = np.random.default_rng(0)
    masks = np.repeat(np.repeat(rng.random((40, 9, 7)) < 0.4, 3, axis=1), 2, axis=2)
    masks[0] = True
    ends = [np.flatnonzero(np.diff(m.ravel(order="F"), prepend=False)) for m in masks]
    proposals = segments_from_masks(MaskJob(1, 27, 14, ends))
    assert (bitmaps(proposals) == masks).all()
    assert proposals.members.shape[1] == len(np.unique(masks.reshape(40, -1), axis=1).T)
    assert len(np.unique(proposals.members, axis=1).T) == proposals.members.shape[1]


def test_import_into_a_store(tmp_path: Path) -> None:
    path = tmp_path / "masks.json"
    path.write_text(json.dumps([entry([0, 4, 4]), entry([2, 4, 2])]))
    jobs = RleFile(path, IMAGES, IMAGES, 5)
    assert (
        write_store(
            tmp_path / "store", jobs, segments_from_masks, {"input": str(path)}, 1
        ).num_written
        == 2
    )
    store = SegmentStore(tmp_path / "store", [(r.id, r.height, r.width) for r in IMAGES])
    assert (bitmaps(store.load(7, 2, 4)) == bitmaps(segments_from_masks(next(iter(jobs))))).all()
    assert len(store.load(-2, 3, 3)) == 0


GOOD = entry([0, 4, 4])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry([0, 4, 4], image_id=8), "entry 1: image 8 is not in the dataset"),
        ({**GOOD, "image_id": "7"}, "entry 1: image '7' is not in the dataset"),
        ({**GOOD, "score": None}, r"entry 1 \(image 7\): the score is not a number but None"),
        ({**GOOD, "score": float("nan")}, "the score is not a number but nan"),
        ({**GOOD, "score": True}, "the score is not a number but True"),
        ({"image_id": 7, "score": 1.0}, r"entry 1 \(image 7\): there is no segmentation"),
        (
            entry([0, 4, 4], size=(4, 2)),
            r"entry 1 \(image 7\): RLE of another size than its image"
            r" \(4 x 2, the image is 2 x 4 \(height x width\)\)",
        ),
        (
            entry([0, 4, 5]),
            r"entry 1 \(image 7\): RLE whose counts do not sum to the mask's pixels"
            r" \(9 instead of 2 x 4 = 8\)",
        ),
        (entry([0, 12, -4]), "RLE with negative counts"),
        (entry("0"), "RLE whose counts do not sum"),
        (entry([8], 10**400), r"the score is not a number but 1000"),
        (entry([8], float("nan")), r"the score is not a number but nan"),
        (entry("~~~"), "RLE that cannot be decoded"),
        (entry([0, 10**6], size=(1000, 1000)), r"RLE of more pixels than data\.max_pixels"),
        ({**GOOD, "segmentation": [[0, 0, 2, 0, float("nan"), 2]]}, "polygon with NaN or infinity"),
        (
            {**GOOD, "segmentation": [[0, 0, 2, 0, 2, 2, 1]]},
            "polygon with an odd number of coordinates or of fewer than 3 points",
        ),
        ({**GOOD, "segmentation": [[0, 0, 2, 0]]}, "of fewer than 3 points"),
        ({**GOOD, "segmentation": "x"}, "segmentation that is neither polygons nor RLE"),
    ],
)
def test_invalid_entries_are_named_by_their_index(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"masks\.json: .*{message}"):
        read(tmp_path, [GOOD, bad])
    with pytest.raises(
        UserError, match=rf"masks\.json: .*{message}"
    ):  # also for images that are not requested
        read(tmp_path, [GOOD, bad], images=IMAGES[1:])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "{}",
        "[1]",
        "[null]",
        '{"annotations": []}',
        json.dumps({"a": [GOOD]}),
        json.dumps([[GOOD]]),
        "[" * 10**5,
    ],
)
def test_files_of_another_form(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"masks\.json: not "):
        read(tmp_path, text)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.json: cannot be read"):
        RleFile(tmp_path / "no.json", IMAGES, IMAGES, 5)
