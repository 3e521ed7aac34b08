"""Run lengths, compared with pycocotools and bitmaps."""

from __future__ import annotations

import numpy as np
import pytest
from made.bitmaps import counts_of, encode, random_masks
from pycocotools import mask as coco_mask

from maskseg.ops import rle as rle_ops

Bitmaps = np.ndarray


@pytest.mark.parametrize("seed", range(5))
def test_counts_from_string(seed: int) -> None:
    big = np.zeros((700, 900), dtype=bool)  # runs of multiple characters, differences of both signs
    big[100:650, 50:51] = True
    big[3:5, 800:] = True
    for mask in [*random_masks(40, seed=seed), big, ~big]:
        np.testing.assert_array_equal(
            rle_ops.counts_from_string(encode(mask)["counts"]), counts_of(mask)
        )


def test_counts_from_large_runs() -> None:
    for counts in ([2**31 + 5], [0, 2**31], [7, 2**30, 2**29, 3, 2**30], [1, 1, 1, 1]):
        total = sum(counts)
        rle = coco_mask.frPyObjects({"size": [1, total], "counts": counts}, 1, total)
        np.testing.assert_array_equal(rle_ops.counts_from_string(rle["counts"]), counts)


def test_strings_from_counts() -> None:
    big = np.zeros((700, 900), dtype=bool)
    big[100:650, 50:51] = True
    big[3:5, 800:] = True
    masks = [
        *random_masks(60),
        big,
        ~big,
        np.zeros((4, 5), dtype=bool),
        np.ones((4, 5), dtype=bool),
    ]
    counts = [counts_of(m) for m in masks]
    texts = rle_ops.strings_from_counts(np.concatenate(counts), np.array([len(c) for c in counts]))
    assert texts == [encode(m)["counts"].decode() for m in masks]
    assert (
        rle_ops.strings_from_counts(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)) == []
    )


@pytest.mark.parametrize("seed", range(3))
def test_strings_of_any_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = [(2 ** rng.uniform(0, 31, n)).astype(np.int64) - 1 for n in rng.integers(0, 12, 50)]
    edges = 2 ** np.arange(4, 31)  # where a number needs one more character
    counts += [np.stack([edges - 1, edges, edges + 1, np.zeros_like(edges)]).T.ravel()]
    texts = rle_ops.strings_from_counts(np.concatenate(counts), np.array([len(c) for c in counts]))
    for text, count in zip(texts, counts, strict=True):
        np.testing.assert_array_equal(rle_ops.counts_from_string(text.encode()), count)
        if (
            len(count) and count.max() < 2**28
        ):  # pycocotools overflows its buffer beyond six characters per number
            assert (
                text
                == coco_mask.frPyObjects(
                    {"size": [1, int(count.sum())], "counts": count.tolist()}, 1, int(count.sum())
                )["counts"].decode()
            )


@pytest.mark.parametrize("text", [b"~", b"/", b"o", b"00o", b"oooooooooooo0", b"\xff"])
def test_invalid_strings(text: bytes) -> None:
    with pytest.raises(ValueError, match="compressed RLE"):
        rle_ops.counts_from_string(text)


def test_an_empty_string_has_no_counts() -> None:
    assert rle_ops.counts_from_string(b"").tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_contains_points(seed: int) -> None:
    masks = random_masks(20, seed=seed)
    rng = np.random.default_rng(seed)
    x, y = rng.integers(-5, 45, (2, len(masks), 300))
    heights, widths = np.array([m.shape for m in masks]).T
    result = rle_ops.contains_points(
        [np.cumsum(counts_of(m)) for m in masks], heights, widths, x, y
    )
    for i, mask in enumerate(masks):
        padded = np.pad(mask, 50)
        np.testing.assert_array_equal(result[i], padded[y[i] + 50, x[i] + 50])


def test_column_spans_rebuild_the_mask() -> None:
    for mask in random_masks(60):
        column, top, bottom = rle_ops.column_spans(np.cumsum(counts_of(mask)), mask.shape[0])
        again = np.zeros_like(mask)
        for c, t, b in zip(column, top, bottom, strict=True):
            assert not again[t:b, c].any()
            again[t:b, c] = True
        np.testing.assert_array_equal(again, mask)
        assert (np.diff(column) >= 0).all()


def test_column_spans_with_empty_runs() -> None:
    column, top, bottom = rle_ops.column_spans(np.cumsum([2, 0, 1, 3, 0, 2, 4]), 4)
    assert [column.tolist(), top.tolist(), bottom.tolist()] == [[0, 1, 1], [3, 0, 2], [4, 2, 4]]


@pytest.mark.parametrize("seed", range(3))
def test_counts_from_crop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for crop in random_masks(80, seed=seed):
        top, left, below, right = rng.integers(0, 3, 4)
        whole = np.pad(crop, ((top, below), (left, right)))
        np.testing.assert_array_equal(
            rle_ops.counts_from_crop(crop, int(left), int(top), *whole.shape), counts_of(whole)
        )
    assert rle_ops.counts_from_crop(np.zeros((0, 0), dtype=bool), 0, 0, 4, 5).tolist() == [20]


def test_many_strings_are_decoded_at_once() -> None:
    """Counts and boxes are those of one mask at a time; an invalid string has no counts."""
    rng = np.random.default_rng(0)
    texts = [b"", b"~~~", b"o", b"P" * 9 + b"0", b"a\xff"]
    boxes = [np.zeros(4)] * 5
    heights = [7] * 5
    for _ in range(300):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        mask = (rng.random((height, width)) < rng.random() ** 2).astype(np.uint8)
        encoded = coco_mask.encode(np.asfortranarray(mask))
        x, y, w, h = coco_mask.toBbox(encoded)
        texts.append(encoded["counts"])
        boxes.append(np.array([x, y, x + w, y + h]))
        heights.append(height)
    order = rng.permutation(len(texts))
    texts = [texts[i] for i in order]
    starts = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    counts, count_starts = rle_ops.counts_from_strings(
        np.frombuffer(b"".join(texts), dtype=np.uint8), starts
    )
    for row, text in enumerate(texts):
        try:
            expected = rle_ops.counts_from_string(text)
        except ValueError:
            expected = np.zeros(0, dtype=np.int64)
        np.testing.assert_array_equal(counts[count_starts[row] : count_starts[row + 1]], expected)
    tight = rle_ops.boxes_from_counts(counts, count_starts, np.array(heights)[order])
    np.testing.assert_array_equal(tight, np.array(boxes)[order])


def test_no_strings() -> None:
    none = np.zeros(0, dtype=np.int64)
    counts, starts = rle_ops.counts_from_strings(
        np.zeros(0, dtype=np.uint8), np.zeros(1, dtype=int)
    )
    assert (len(counts), starts.tolist()) == (0, [0])
    assert rle_ops.boxes_from_counts(none, np.zeros(1, dtype=np.int64), none).shape == (0, 4)
