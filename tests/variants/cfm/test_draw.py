"""`FixedSegmentSampler` on strips of an image one pixel high, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.variants.cfm.draw import FixedSegmentSampler
from maskseg.variants.cfm.sampling import SegmentGroundTruth, SegmentSampler, append_ground_truth
from maskseg.variants.cfm.settings import SamplerSettings

THINGS, CLASSES = 2, 4  # stuff is 2 and 3, background 4


def strips(*rows: tuple[int, int]) -> SegmentProposals:
    """Segments from a first to a last column (exclusive) of 100; each pixel is a superpixel."""
    column = np.arange(100)
    members = np.array(
        [(column >= first) & (column < last) for first, last in rows], dtype=bool
    ).reshape(len(rows), 100)
    return SegmentProposals(column[None].astype(np.int32), members)


def truth_of(
    things: list[tuple[int, int, int]], stuff: list[tuple[int, int, int]], crowd: list[bool]
) -> SegmentGroundTruth:
    column = np.arange(100)
    semantic = np.full((1, 100), -1, dtype=np.int16)
    masks = np.array(
        [[(column >= first) & (column < last)] for first, last, _ in things], dtype=bool
    ).reshape(-1, 1, 100)
    for first, last, label in stuff:
        semantic[0, first:last] = label
    return SegmentGroundTruth(
        masks,
        np.array([label for *_, label in things], dtype=np.int64),
        np.array(crowd, dtype=bool),
        semantic,
    )


def draw(
    base: SegmentSampler,
    proposals: SegmentProposals,
    truth: SegmentGroundTruth,
    negatives: int = 100,
    below: float = 0.3,
    seed: int = 0,
) -> list:
    rows, labels = FixedSegmentSampler(base, negatives, below)(
        proposals, truth, np.random.default_rng(seed)
    )
    return list(zip(rows.tolist(), labels.tolist(), strict=True))


def test_positives_are_ground_truth_and_selected_stuff_and_negatives_are_far_from_both() -> None:
    truth = truth_of(
        [(0, 20, 1), (20, 40, 0), (30, 30, 0), (80, 100, 1)],
        [(40, 70, 3)],
        [False, False, False, True],
    )
    proposals = strips(
        (0, 20),  # the thing itself, as a proposal: ignored; its mask is appended
        (0, 16),  # an IoU of 0.8 with it: ignored
        (13, 26),  # 0.27 with one, 0.22 with the other: negative
        (12, 28),  # 0.29: negative, but not below 0.28
        (40, 70),  # the stuff
        (40, 68),  # stuff too, but the larger one is selected
        (
            38,
            44,
        ),  # 4 of 6 are stuff: a purity of 0.67, above 0.6, but smaller than the mean candidate
        (70, 75),  # matches nothing: negative
        (82, 90),  # in a crowd: ignored
    )
    base = SegmentSampler(
        THINGS, CLASSES, SamplerSettings(num_samples=2, thing_fraction=0.5, stuff_fraction=0.5)
    )  # these fractions have no effect here
    assert draw(base, proposals, truth) == [(2, 4), (3, 4), (4, 3), (7, 4), (9, 1), (10, 0)]
    assert draw(base, proposals, truth, below=0.28) == [(2, 4), (4, 3), (7, 4), (9, 1), (10, 0)]
    masks = append_ground_truth(proposals, truth.masks)
    assert np.flatnonzero(masks.members[9][masks.labels[0]]).tolist() == list(range(20))
    # the base sampler defines what stuff is
    for purity, found in ((0.6, [(0, 3), (1, 1), (2, 0)]), (0.7, [(1, 1), (2, 0)])):
        assert (
            draw(
                SegmentSampler(THINGS, CLASSES, SamplerSettings(min_purity=purity)),
                strips((38, 44)),
                truth,
            )
            == found
        )


def test_negatives_alone_are_drawn() -> None:
    truth = truth_of([(0, 20, 1)], [(40, 70, 3), (20, 40, 2)], [False])
    proposals = strips(
        *[(40, 70 - i) for i in range(5)], (20, 40), *[(70 + i, 80 + i) for i in range(20)]
    )
    base = SegmentSampler(THINGS, CLASSES)
    runs = [draw(base, proposals, truth, negatives=6, seed=seed) for seed in range(20)]
    assert all([pair for pair in run if pair[1] != 4] == [(0, 3), (5, 2), (26, 1)] for run in runs)
    assert all(sum(label == 4 for _, label in run) == 6 for run in runs)
    assert len({tuple(run) for run in runs}) > 10
    assert draw(base, proposals, truth, negatives=6, seed=3) == runs[3]
    assert sum(label == 4 for _, label in draw(base, proposals, truth)) == 20


def test_images_without_objects_or_segments() -> None:
    base = SegmentSampler(THINGS, CLASSES)
    nothing = truth_of([], [], [])
    assert draw(base, strips((0, 50)), nothing) == [(0, 4)]
    assert draw(base, strips(), nothing) == []
    assert draw(base, strips(), truth_of([(0, 20, 1)], [], [False])) == [(0, 1)]


@pytest.mark.parametrize(("negatives", "below"), [(0, 0.3), (10, 0.0), (10, 0.51)])
def test_errors(negatives: int, below: float) -> None:
    with pytest.raises(
        UserError,
        match=r"fit\.negatives must be at least 1, fit\.negative_below above 0 and at most 0\.5",
    ):
        FixedSegmentSampler(SegmentSampler(THINGS, CLASSES), negatives, below)
