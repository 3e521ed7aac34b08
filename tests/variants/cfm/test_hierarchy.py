"""Segment proposals: grouping against a replay from pixels, invariants, IoU by brute force."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.superpixels.methods import Felzenszwalb, Labels, label_components
from maskseg.variants.cfm import hierarchy
from maskseg.variants.cfm.grouping import (
    TERMS,
    Forest,
    RegionSet,
    build_hierarchies,
    mutual_nearest,
    sum_pairs,
)
from maskseg.variants.cfm.hierarchy import (
    HierarchicalGrouping,
    best_ious,
    convert_color,
    describe_superpixels,
    majority_segments,
    suppress_duplicates,
    texture_histograms,
)

SIZES = [(1, 1), (1, 2), (2, 1), (1, 40), (5, 300), (300, 5), (40, 61)]
ALL = "+".join(TERMS)


def random_image(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def regions_of(image: NDArray[np.uint8], labels: Labels) -> RegionSet:
    return describe_superpixels(image, texture_histograms(image[..., 1], labels), labels)


def patches(height: int = 24, width: int = 30, seed: int = 0) -> tuple[NDArray[np.uint8], Labels]:
    """Connected regions of irregular shapes, and an image with different colors for each."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 4, (height // 3, width // 3)).repeat(3, axis=0).repeat(3, axis=1)
    labels = label_components(coarse)
    base = rng.integers(0, 200, (int(labels.max()) + 1, 3))
    return (base[labels] + rng.integers(0, 56, (height, width, 3))).astype(np.uint8), labels


def shapes() -> tuple[NDArray[np.uint8], list[NDArray[np.bool_]]]:
    """A square in a disc on a background, each of one color, and their masks.

    The color of the disc is between those of the square and the background.
    """
    y, x = np.mgrid[:80, :100]
    disc = (y - 40) ** 2 + (x - 45) ** 2 < 30**2
    square = (abs(y - 40) < 12) & (abs(x - 45) < 12)
    image = np.full((80, 100, 3), (200, 60, 40), dtype=np.uint8)
    image[disc] = 30, 140, 60
    image[square] = 40, 50, 180
    return image, [~disc, disc & ~square, square, disc, np.ones_like(disc)]


def test_region_set_literal() -> None:
    labels = np.array([[0, 0, 1], [0, 2, 1]], dtype=np.int32)
    pieces = regions_of(np.zeros((2, 3, 3), dtype=np.uint8), labels)
    assert pieces.sizes.tolist() == [3, 2, 1]
    assert pieces.outlines.tolist() == [8, 6, 4]
    assert pieces.extents.tolist() == [[0, 0, -2, -2], [2, 0, -3, -2], [1, 1, -2, -2]]
    assert pieces.pairs.tolist() == [[0, 1], [0, 2], [1, 2]]
    assert pieces.lengths.tolist() == [1, 2, 1]
    assert np.flatnonzero(pieces.colors[0]).tolist() == [0, 25, 50]
    assert pieces.colors[0].sum() == pytest.approx(1)


def test_colors_and_textures_literal() -> None:
    image = np.zeros((9, 12, 3), dtype=np.uint8)
    image[..., 2] = 255
    image[:, 6:, 0] = 128
    pieces = regions_of(image, np.zeros((9, 12), dtype=np.int32))
    assert {i: round(float(v), 4) for i, v in enumerate(pieces.colors[0]) if v} == {
        0: 0.1667,
        12: 0.1667,
        25: 0.3333,
        74: 0.3333,
    }
    ramp = np.repeat(
        np.arange(0, 240, 5, dtype=np.uint8)[None], 20, axis=0
    )  # 5 gray levels per pixel, to the right
    inner = np.zeros((20, 48), dtype=np.int32)
    inner[5:15, 5:43] = 1
    right = texture_histograms(ramp, inner)[1]
    down = texture_histograms(ramp.T.copy(), inner.T.copy())[1]
    assert np.flatnonzero(right).tolist() == [1 + 8]  # from 3 to 8, direction 0 of 8
    assert np.flatnonzero(down).tolist() == [1 + 8 + 2]
    assert (
        texture_histograms(np.full((4, 4), 9, dtype=np.uint8), np.zeros((4, 4), dtype=np.int32))[
            0, 0
        ]
        == 1
    )


def test_merged_regions_equal_those_of_the_merged_map() -> None:
    image, labels = patches()
    region = np.random.default_rng(1).integers(0, 7, int(labels.max()) + 1)
    proposals = regions_of(image, labels).merge(region)
    expected = regions_of(image, region[labels].astype(np.int32))
    for field in fields(RegionSet):
        assert np.allclose(
            getattr(proposals, field.name), getattr(expected, field.name), atol=1e-6
        ), field.name


def test_mutual_nearest_literal() -> None:
    pairs = np.array([[0, 1], [1, 2], [2, 3], [3, 4], [5, 6], [5, 7]])
    assert mutual_nearest(pairs, np.array([1.0, 2.0, 3.0, 4.0, 1.0, 1.0]), 8).tolist() == [3, 4]
    assert mutual_nearest(pairs, np.array([4.0, 3.0, 3.5, 1.0, 1.0, 2.0]), 8).tolist() == [0, 2, 5]
    assert mutual_nearest(pairs, np.zeros(6), 8).tolist() == [0, 4]  # of equal scores, the first
    assert mutual_nearest(pairs[:0], np.zeros(0), 8).tolist() == []


def test_sum_pairs_literal() -> None:
    pairs, values = sum_pairs(np.array([[2, 5], [0, 1], [2, 5]]), np.array([1.0, 2.0, 4.0]), 6)
    assert (pairs.tolist(), values.tolist()) == ([[0, 1], [2, 5]], [2, 5])


def slow_scores(
    image: NDArray[np.uint8], labels: Labels, terms: list[str]
) -> dict[tuple[int, int], float]:
    """Compute the similarity of all neighbors from the pixels."""
    n = regions_of(image, labels)
    proposals = {}
    pixels = labels.size
    for a, b in np.argwhere(np.triu(np.ones((len(n.sizes),) * 2), 1)):
        one = labels == a
        other = labels == b
        right = (one[:, :-1] & other[:, 1:]) | (other[:, :-1] & one[:, 1:])
        below = (one[:-1] & other[1:]) | (other[:-1] & one[1:])
        if not (length := int(right.sum() + below.sum())):
            continue
        y, x = np.nonzero(one | other)
        box = (y.max() - y.min() + 1) * (x.max() - x.min() + 1)
        sides = [
            int(np.abs(np.diff(np.pad(m, 1).astype(int), axis=axis)).sum())
            for m in (one, other)
            for axis in (0, 1)
        ]
        values = {
            "color": np.minimum(n.colors[a], n.colors[b]).sum(),
            "texture": np.minimum(n.textures[a], n.textures[b]).sum(),
            "size": 1 - (one | other).sum() / pixels,
            "fill": 1 - (box - (one | other).sum()) / pixels,
            "border": length / min(sum(sides[:2]), sum(sides[2:])),
        }
        proposals[int(a), int(b)] = float(sum(values[t] for t in terms))
    return proposals


@pytest.mark.parametrize("terms", [*([t] for t in TERMS), list(TERMS)])
def test_each_round_merges_mutually_most_similar_regions(terms: list[str]) -> None:
    """Replay the merges on the pixel map, with other trees in the same forest."""
    image, labels = patches(30, 36, 3)
    forest = build_hierarchies(
        [regions_of(image, labels)] * 3, [["size"], terms, ["color"]], labels.size
    )
    nodes = np.flatnonzero(forest.trees == 1)
    offset = int(nodes[0])
    count = int(labels.max()) + 1
    name = np.arange(offset, offset + count)  # the node that contains each region
    for number in range(1, int(forest.rounds[nodes].max()) + 1):
        alive, now = np.unique(name, return_inverse=True)
        score = slow_scores(image, now[labels].astype(np.int32), terms)
        best = {i: max(s for pair, s in score.items() if i in pair) for i in range(len(alive))}
        new = nodes[forest.rounds[nodes] == number]
        merged = {tuple(sorted(np.searchsorted(alive, forest.children[i]).tolist())) for i in new}
        assert all(score[pair] > max(best[i] for i in pair) - 1e-6 for pair in merged)
        alone = {
            p
            for p, s in score.items()
            if not [
                q for q, other in score.items() if q != p and set(p) & set(q) and other > s - 1e-6
            ]
        }
        assert alone <= merged
        for i in new:
            name[np.isin(name, forest.children[i])] = i
            assert forest.sizes[i] == np.isin(labels, np.flatnonzero(name == i)).sum()
    assert len(set(name)) == 1
    assert len(nodes) == 2 * count - 1


def node_sets(forest: Forest, count: int) -> list[frozenset[int]]:
    """Return the leaves below each node of a forest of one tree."""
    sets = [frozenset([i]) for i in range(count)]
    for a, b in forest.children[count:]:
        sets.append(sets[a] | sets[b])
    return sets


def test_by_size_the_tree_is_that_of_single_merges() -> None:
    image, labels = patches(30, 30, 5)
    count = int(labels.max()) + 1
    pieces = regions_of(image, labels)
    rng = np.random.default_rng(2)
    pieces.sizes[:] = rng.permutation(count) + rng.random(count)  # no ties
    proposals = set(
        node_sets(build_hierarchies([pieces], [["size"]], int(pieces.sizes.sum())), count)
    )
    sizes = {frozenset([i]): float(s) for i, s in enumerate(pieces.sizes)}
    touch = set(map(tuple, pieces.pairs.tolist()))
    expected = set(sizes)
    while len(sizes) > 1:
        pairs = [
            (a, b)
            for a in sizes
            for b in sizes
            if a != b and any((i, j) in touch for i in a for j in b)
        ]
        one, other = min(pairs, key=lambda p: sizes[p[0]] + sizes[p[1]])
        sizes[one | other] = sizes.pop(one) + sizes.pop(other)
        expected.add(one | other)
    assert proposals == expected


def test_enclosed_regions_join_their_surroundings_by_the_border_term() -> None:
    labels = np.zeros((9, 18), dtype=np.int32)
    labels[:, 9:] = 1
    labels[3:6, 3:6] = 2
    forest = build_hierarchies([regions_of(random_image(9, 18), labels)], [["border"]], labels.size)
    assert forest.children.tolist() == [[-1, -1]] * 3 + [[0, 2], [1, 3]]


def test_ranks_and_fill_bits_literal() -> None:
    # Tree 0: nodes 0, 1, 2 -> 5 = 0 + 1, 7 = 5 + 2; tree 1: nodes 3, 4 -> 6.
    children = np.array([[-1, -1]] * 5 + [[0, 1], [3, 4], [2, 5]])
    forest = Forest(
        children, np.array([0, 0, 0, 0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 1, 0, 1, 0]), np.ones(8)
    )
    assert forest.ranks().tolist() == [5, 4, 3, 3, 2, 2, 1, 1]
    rows = np.array([1, 2, 4, 8, 16, 0, 0, 0], dtype=np.uint8)[:, None]
    forest.fill_bits(rows)
    assert rows.ravel().tolist() == [1, 2, 4, 8, 16, 3, 24, 7]


def test_majority_segments_literal() -> None:
    fine = np.array([[0, 0, 0, 1, 2, 2]], dtype=np.int32)
    coarse = np.array([[0, 3, 3, 1, 3, 3]], dtype=np.int32)
    assert majority_segments(fine, coarse).tolist() == [1, 0, 1]


def iou_table(rows: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """Compute the IoU of masks [n, ...] with masks [m, ...]."""
    return np.array([[(a & b).sum() / max(1, (a | b).sum()) for b in others] for a in rows])


@pytest.mark.parametrize("max_iou", [0.3, 0.8, 1.0])
def test_suppress_duplicates_equals_brute_force(
    max_iou: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    members = rng.random((90, 12)) < rng.random((90, 1))
    members[:, 0] |= ~members.any(axis=1)
    sizes = rng.integers(1, 9, 12)
    keep: list[int] = []
    table = iou_table(members.repeat(sizes, axis=1), members.repeat(sizes, axis=1))
    for i in range(90):
        if not (table[i, keep] > max_iou).any():
            keep.append(i)
    monkeypatch.setattr(hierarchy, "BLOCK", 7)
    assert suppress_duplicates(members, sizes.astype(np.float64), max_iou).tolist() == keep
    assert 0 < len(keep) <= 90
    assert suppress_duplicates(members[:0], sizes.astype(np.float64), max_iou).tolist() == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("of", ["noise", "constant"])
def test_every_image_has_proposals(size: tuple[int, int], of: str) -> None:
    image = random_image(*size) if of == "noise" else np.full((*size, 3), 77, dtype=np.uint8)
    before = image.copy()
    proposals = HierarchicalGrouping(max_proposals=60)(image)
    assert proposals.labels.dtype == np.int32
    assert proposals.labels.shape == size
    assert np.unique(proposals.labels).tolist() == list(range(proposals.members.shape[1]))
    assert 1 <= len(proposals) <= 60
    assert proposals.members[0].all()
    assert len(np.unique(proposals.members, axis=0)) == len(proposals)
    bitmaps = proposals.members[:, proposals.labels]
    assert proposals.areas().tolist() == bitmaps.sum(axis=(1, 2)).tolist()
    assert proposals.areas().min() >= max(1, 5e-4 * image[..., 0].size)
    assert proposals.nbytes() == proposals.labels.nbytes + proposals.members.size
    assert (image == before).all()
    if of == "constant":
        assert proposals.members.tolist() == [[True]]


def test_flat_shapes_are_found_exactly() -> None:
    image, masks = shapes()
    proposals = HierarchicalGrouping(sigma=0.0)(image)
    assert best_ious(proposals, np.stack(masks)).tolist() == [1.0] * 5
    assert proposals.areas()[0] == image[..., 0].size


def test_the_result_depends_only_on_the_pixels() -> None:
    image, _ = patches(39, 60)
    grouping = HierarchicalGrouping()
    first = grouping(image)
    for other in (
        image,
        np.asfortranarray(image),
        np.concatenate([image, image], axis=1)[:, : image.shape[1]],
    ):
        again = grouping(other)
        assert (first.labels == again.labels).all()
        assert first.members.tolist() == again.members.tolist()


@pytest.fixture(scope="module")
def textured() -> NDArray[np.uint8]:
    return patches(60, 90, 9)[0]


def test_max_proposals_keeps_the_best(textured: NDArray[np.uint8]) -> None:
    everything = HierarchicalGrouping()(textured)
    assert len(everything) > 40
    assert (
        HierarchicalGrouping(max_proposals=7)(textured).members.tolist()
        == everything.members[:7].tolist()
    )


def test_min_area_drops_small_proposals(textured: NDArray[np.uint8]) -> None:
    everything = HierarchicalGrouping(max_iou=1.0)(textured)
    large = HierarchicalGrouping(max_iou=1.0, min_area=0.2)(textured)
    least = 0.2 * textured[..., 0].size
    assert everything.areas().min() < least
    assert large.members.tolist() == everything.members[everything.areas() >= least].tolist()
    assert len(HierarchicalGrouping(min_area=1.0)(textured)) == 1


@pytest.mark.parametrize("max_iou", [0.5, 0.9])
def test_max_iou_bounds_the_overlaps(textured: NDArray[np.uint8], max_iou: float) -> None:
    proposals = HierarchicalGrouping(max_iou=max_iou)(textured)
    common = (proposals.members * np.bincount(proposals.labels.ravel())) @ proposals.members.T
    iou = common / (proposals.areas()[:, None] + proposals.areas() - common)
    assert np.triu(iou, 1).max() <= max_iou
    assert len(proposals) < len(HierarchicalGrouping(max_iou=1.0)(textured))


@pytest.mark.parametrize("share", [2e-3, 0.01, 0.1])
def test_superpixels_have_the_minimum_area(textured: NDArray[np.uint8], share: float) -> None:
    proposals = HierarchicalGrouping(superpixel_area=share, scales=(1.0,))(textured)
    assert np.bincount(proposals.labels.ravel()).min() >= share * textured[..., 0].size
    assert proposals.members.shape[1] <= 1 / share


def test_one_hierarchy_has_all_nodes_of_its_tree(textured: NDArray[np.uint8]) -> None:
    grouping = HierarchicalGrouping(("rgb",), (30.0,), (ALL,), min_area=0.0, max_iou=1.0)
    proposals = grouping(textured)
    assert (proposals.labels == Felzenszwalb(0.5, 30.0, 3)(textured)).all()
    count = proposals.members.shape[1]
    sets = node_sets(
        build_hierarchies(
            [
                describe_superpixels(
                    textured,
                    texture_histograms(_grey(textured), proposals.labels),
                    proposals.labels,
                )
            ],
            [list(TERMS)],
            5400,
        ),
        count,
    )
    assert [frozenset(np.flatnonzero(row).tolist()) for row in proposals.members] == sets[
        ::-1
    ]  # the last merge first


def _grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    cv2 = hierarchy.opencv()
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))


@pytest.mark.parametrize("space", ["rgb", "lab", "hsv"])
def test_scales_add_the_coarser_segments_of_the_space(
    textured: NDArray[np.uint8], space: str
) -> None:
    options: dict[str, Any] = {
        "color_spaces": (space,),
        "similarities": ("size",),
        "min_area": 0.0,
        "max_iou": 1.0,
    }
    one, two = (
        HierarchicalGrouping(scales=scales, **options)(textured)
        for scales in ((30.0,), (30.0, 900.0))
    )
    assert (one.labels == two.labels).all()
    start = majority_segments(
        one.labels, Felzenszwalb(0.5, 900.0, 3)(convert_color(textured, space))
    )
    assert 1 < start.max() + 1 < one.members.shape[1]
    coarse = {tuple(row) for row in (start == np.arange(start.max() + 1)[:, None]).tolist()}
    before, after = ({tuple(row) for row in proposals.members.tolist()} for proposals in (one, two))
    assert coarse <= after
    assert not coarse <= before
    assert before <= after


def test_each_space_and_similarity_adds_its_hierarchy(textured: NDArray[np.uint8]) -> None:
    def rows(spaces: tuple[str, ...], *similarities: str) -> set[tuple[bool, ...]]:
        proposals = HierarchicalGrouping(spaces, (30.0,), similarities, min_area=0.0, max_iou=1.0)(
            textured
        )
        return {tuple(row) for row in proposals.members.tolist()}

    lab = rows(("lab",), "color")
    both = rows(("lab", "hsv"), "color")
    assert lab < both
    assert both != rows(("lab", "rgb"), "color")
    assert lab < rows(("lab",), "color", "texture")
    assert rows(("hsv",), "color") != lab  # the first color space determines the superpixels


def test_segments_of_multiple_hierarchies_come_first() -> None:
    image, masks = shapes()
    image = np.clip(image + np.random.default_rng(0).normal(0, 12, image.shape), 0, 255).astype(
        np.uint8
    )
    proposals = HierarchicalGrouping()(image)
    assert len(proposals) > 20
    assert (
        best_ious(SegmentProposals(proposals.labels, proposals.members[:12]), np.stack(masks)) > 0.9
    ).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color_spaces": ("lab", "cmyk")}, "color_spaces must be some of rgb, lab, hsv"),
        ({"color_spaces": ()}, "not none"),
        ({"color_spaces": ("lab", "lab")}, "without duplicates"),
        (
            {"similarities": ("color+colour",)},
            "similarities must be some of color, texture, size, fill, border",
        ),
        ({"similarities": ()}, "similarities must not be empty"),
        ({"scales": ()}, "scales"),
        ({"scales": (0.0, 10.0)}, "above 0"),
        ({"scales": (100.0, 50.0)}, "ascend"),
        ({"sigma": -1.0}, "sigma"),
        ({"superpixel_area": 0.0}, "superpixel_area"),
        ({"min_area": 1.5}, "1.5"),
        ({"max_iou": 0.0}, "max_iou"),
        ({"max_proposals": 0}, "max_proposals"),
    ],
)
def test_invalid_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HierarchicalGrouping(**options)


@pytest.mark.parametrize(
    "image",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)],
)
def test_other_arrays_raise(image: NDArray[Any]) -> None:
    with pytest.raises(ValueError, match="uint8 RGB"):
        HierarchicalGrouping()(image)


def test_best_ious_equal_brute_force() -> None:
    labels = patches(30, 33, 4)[1]
    rng = np.random.default_rng(4)
    proposals = SegmentProposals(labels, rng.random((25, int(labels.max()) + 1)) < 0.5)
    truths = rng.random((6, 30, 33)) < rng.random((6, 1, 1))
    truths[2] = False
    expected = iou_table(truths, proposals.members[:, labels]).max(axis=1)
    assert best_ious(proposals, truths) == pytest.approx(expected)
    assert best_ious(proposals, truths)[2] == 0
    for threshold in (0.0, 0.2, 0.9):
        assert (best_ious(proposals, truths) >= threshold).mean() == (expected >= threshold).mean()
    assert best_ious(proposals, truths[:0]).shape == (0,)


def test_large_objects_of_photographs_are_found(shared_data: Path) -> None:
    root = shared_data / "coco_tiny"
    data = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    best = []
    for entry in data["images"][:6]:
        height = entry["height"]
        width = entry["width"]
        objects = [
            a
            for a in data["annotations"]
            if a["image_id"] == entry["id"]
            and not a["iscrowd"]
            and a["area"] > 0.02 * height * width
        ]
        if not objects:
            continue
        truths = np.stack(
            [
                coco_mask.decode(
                    coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], height, width))
                ).astype(bool)
                for a in objects
            ]
        )
        with Image.open(root / "val2017" / entry["file_name"]) as image:
            best.append(best_ious(HierarchicalGrouping()(np.asarray(image.convert("RGB"))), truths))
    proposals = np.concatenate(best)
    assert len(proposals) >= 6
    assert (proposals >= 0.5).mean() >= 0.6
