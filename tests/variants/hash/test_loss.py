"""Ground truth regions as label maps, and the contrastive loss over them, against literals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from maskseg.data.region_map import region_map
from maskseg.masks.annotated import AnnotatedMasks, Polygons
from maskseg.structures import Batch, Targets
from maskseg.variants.hash.loss import contrastive_loss, pair_agreement, region_shares

Rectangle = tuple[int, int, int, int]


def make_batch(
    objects: Sequence[Sequence[Rectangle]],
    sizes: Sequence[tuple[int, int]],
    crowd: Sequence[int] = (),
    stuff: Sequence = (),
) -> Batch:
    """Images padded to 8 x 8 with rectangles (xyxy) as instances.

    crowd: rows of the rectangles that are crowds; stuff: semantic map of each image.
    """
    shapes = [
        [
            Polygons((np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], dtype=float),))
            for x0, y0, x1, y1 in own
        ]
        for own in objects
    ]
    rows = [(i, box) for i, own in enumerate(objects) for box in own]
    targets = Targets(
        torch.tensor([box for _, box in rows], dtype=torch.float32).reshape(-1, 4),
        torch.zeros(len(rows), dtype=torch.int64),
        torch.tensor([i for i, _ in rows], dtype=torch.int64),
        torch.tensor([row in crowd for row in range(len(rows))], dtype=torch.bool),
        AnnotatedMasks.cat(
            [AnnotatedMasks.from_file(s, h, w) for s, (h, w) in zip(shapes, sizes, strict=True)]
        ),
    )
    semantic = torch.full((len(sizes), 8, 8), -1, dtype=torch.int16)
    for canvas, own in zip(semantic, stuff, strict=False):
        canvas[: len(own), : len(own[0])] = torch.tensor(own)
    side = torch.tensor(sizes)
    images = torch.zeros((len(sizes), 3, 8, 8), dtype=torch.uint8)
    names = [f"{i}.png" for i in range(len(sizes))]
    return Batch(
        images,
        side,
        side,
        list(range(len(sizes))),
        names,
        targets,
        semantic=semantic if stuff else None,
    )


def test_instances_and_crowds() -> None:
    batch = make_batch(
        [[(0, 0, 2, 1)], [(0, 0, 2, 2), (1, 1, 4, 2), (3, 2, 5, 3)]], [(2, 3), (3, 5)], crowd=[3]
    )
    assert region_map(batch, 0).tolist() == [[0, 0, -1], [-1, -1, -1]]
    # The later of two instances owns a shared pixel; the pixels of a crowd are unlabeled.
    assert region_map(batch, 1).tolist() == [
        [0, 0, -1, -1, -1],
        [0, 1, 1, 1, -1],
        [-1, -1, -1, -1, -1],
    ]
    assert region_map(batch, 1).dtype == np.int64


def test_stuff_behind_the_instances() -> None:
    sky, sea = 92, 0
    stuff = [[sky, sky, sky, sky], [sea, sea, sky, sea], [sea, -1, sky, sky]]
    batch = make_batch([[(0, 0, 1, 2)]], [(3, 4)], stuff=[stuff])
    assert region_map(batch, 0).tolist() == [[0, 93, 93, 93], [0, 1, 93, 1], [1, -1, 93, 93]]
    # Each connected component is a region; of the three of the sea, those of one pixel are dropped.
    split = region_map(batch, 0, split_stuff=2)
    assert len(set(split[split >= 0].tolist())) == 2
    assert (split >= 0).tolist() == [
        [True, True, True, True],
        [True, False, True, False],
        [False, False, True, True],
    ]
    assert len(set(split[np.array(region_map(batch, 0)) == 93].tolist())) == 1
    pieces = region_map(batch, 0, split_stuff=1)
    sea_pieces = [pieces[1, 1], pieces[1, 3], pieces[2, 0]]
    assert len({0, *sea_pieces, pieces[0, 1]}) == 5
    assert pieces[2, 1] == -1
    assert (pieces == 0).tolist() == (region_map(batch, 0) == 0).tolist()


def test_two_pieces_of_a_kind_of_stuff_that_an_instance_divides() -> None:
    batch = make_batch([[(2, 0, 3, 2)]], [(2, 5)], stuff=[[[7] * 5] * 2])
    whole, split = region_map(batch, 0), region_map(batch, 0, split_stuff=4)
    assert whole.tolist() == [[8, 8, 0, 8, 8]] * 2
    assert len({split[0, 0], split[0, 2], split[0, 4]}) == 3
    assert (split >= 0).all()
    assert (region_map(batch, 0, split_stuff=5) >= 0).tolist() == [
        [False, False, True, False, False]
    ] * 2


def test_a_crowd_hides_stuff_and_no_truth_is_nowhere() -> None:
    batch = make_batch(
        [[(0, 0, 1, 1)], []], [(1, 3), (1, 3)], crowd=[0], stuff=[[[4, 4, 4]], [[4, -1, 4]]]
    )
    assert region_map(batch, 0).tolist() == [[-1, 5, 5]]
    assert region_map(batch, 1).tolist() == [[4, -1, 4]]
    assert region_map(replace(batch, targets=None), 1).tolist() == [[4, -1, 4]]
    nothing = replace(batch, targets=None, semantic=None)
    assert region_map(nothing, 0).tolist() == [[-1, -1, -1]]
    assert region_map(nothing, 0, split_stuff=1).tolist() == [[-1, -1, -1]]


def test_shares_literal() -> None:
    regions = np.array([[5, 5, 9, -1], [5, 9, 9, -1]])
    superpixels = np.array([[0, 0, 1, 2], [0, 1, 1, 2]], dtype=np.int32)
    assert region_shares(regions, superpixels, 3).tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    superpixels = np.array([[0, 0, 0, 0], [1, 1, 1, 1]], dtype=np.int32)
    assert region_shares(regions, superpixels, 3).tolist() == [[0.5, 0.25], [0.25, 0.5], [0.0, 0.0]]
    assert region_shares(np.full((2, 4), -1), superpixels, 2).shape == (2, 0)


def test_agreement_literal() -> None:
    share = torch.tensor([[1.0, 0.0], [0.5, 0.25], [0.0, 1.0], [0.0, 0.0]])
    pairs = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 2], [1, 1], [2, 3]])
    # same: sum of products; different: the remaining labeled share
    expected = [[1.0, 0.0], [0.5, 0.25], [0.0, 1.0], [0.25, 0.5], [0.3125, 0.25], [0.0, 0.0]]
    assert pair_agreement(share, pairs).tolist() == expected
    assert pair_agreement(share, torch.zeros((0, 2), dtype=torch.int64)).shape == (0, 2)
    assert pair_agreement(torch.zeros(3, 0), pairs[:2]).tolist() == [[0.0, 0.0]] * 2


def test_agreement_is_the_probability_of_two_pixels(generator: torch.Generator) -> None:
    regions = torch.randint(-1, 3, (6, 10), generator=generator).numpy()
    superpixels = torch.randint(0, 4, (6, 10), generator=generator).numpy().astype(np.int32)
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    result = pair_agreement(region_shares(regions, superpixels, 4), torch.tensor(pairs))
    for (a, b), (same, different) in zip(pairs, result.tolist(), strict=True):
        one, other = (regions[superpixels == number] for number in (a, b))
        both = [(x, y) for x in one for y in other]
        assert same == pytest.approx(sum(x == y >= 0 for x, y in both) / len(both), abs=1e-6)
        assert different == pytest.approx(
            sum(x != y and min(x, y) >= 0 for x, y in both) / len(both), abs=1e-6
        )


CODES = [[1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.5]]
PAIRS = [[0, 1], [0, 2], [1, 2], [0, 3]]  # 1, 3, 2 and 1.5 bits apart


@pytest.mark.parametrize(
    ("weights", "margin", "together", "apart"),
    [
        ([[1, 0], [1, 0], [0, 1], [0, 1]], 2.0, (1 + 3) / 2, (0 + 0.5) / 2),
        ([[0, 1], [0, 1], [0, 1], [0, 1]], 4.0, 0.0, (3 + 1 + 2 + 2.5) / 4),
        ([[1, 0], [1, 0], [1, 0], [1, 0]], 2.0, (1 + 3 + 2 + 1.5) / 4, 0.0),
        (
            [[0.5, 0.5], [0.5, 0.5], [0.25, 0.75], [0.75, 0.25]],
            2.0,
            (0.5 + 1.5 + 0.5 + 1.125) / 2,
            (0.5 + 0.125) / 2,
        ),
        ([[0.1, 0.0], [0, 0], [0, 0], [0, 0]], 2.0, 0.1, 0.0),  # total weight below one pair
        ([[0, 0]] * 4, 2.0, 0.0, 0.0),
    ],
)
def test_contrast_literals(
    weights: list[list[float]], margin: float, together: float, apart: float
) -> None:
    result = contrastive_loss(
        torch.tensor(CODES), torch.tensor(PAIRS), torch.tensor(weights, dtype=torch.float32), margin
    )
    assert {name: float(value) for name, value in result.items()} == pytest.approx(
        {"hash_together": together, "hash_apart": apart}
    )


@pytest.mark.parametrize(
    "codes", [torch.zeros(0, 8), torch.rand(3, 8, generator=torch.Generator().manual_seed(0))]
)
def test_no_pairs_keep_the_graph_whole(codes: Tensor) -> None:
    weight = torch.ones(8, requires_grad=True)
    result = contrastive_loss(
        codes * weight, torch.zeros((0, 2), dtype=torch.int64), torch.zeros(0, 2), 2.0
    )
    assert [float(value.detach()) for value in result.values()] == [0.0, 0.0]
    sum(result.values(), torch.zeros(())).backward()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_gradients_pull_together_and_push_apart() -> None:
    codes = torch.tensor([[0.6, 0.4], [0.4, 0.4]], requires_grad=True)
    pairs = torch.tensor([[0, 1]])
    for weights, sign in (([[1.0, 0.0]], 1), ([[0.0, 1.0]], -1)):
        (gradient,) = torch.autograd.grad(
            sum(contrastive_loss(codes, pairs, torch.tensor(weights), 2.0).values()), codes
        )
        # d of a + b - 2ab by a is 1 - 2b
        torch.testing.assert_close(gradient, sign * torch.tensor([[0.2, 0.2], [-0.2, 0.2]]))
    (gradient,) = torch.autograd.grad(
        contrastive_loss(codes, pairs, torch.tensor([[0.0, 1.0]]), 0.5)["hash_apart"], codes
    )
    assert not gradient.any()  # their distance exceeds the margin
