"""Transforms change pixels, boxes and masks consistently: a painted object is found again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from maskseg.data.sample import Sample
from maskseg.data.transforms import (
    ColorJitter,
    Flip,
    RandomCrop,
    ResizeShortestEdge,
    ScaleJitterCrop,
    Transform,
)
from maskseg.errors import UserError
from maskseg.masks.annotated import AnnotatedMasks, Polygons, RunLengths
from maskseg.masks.base import rle_to_bitmaps

HEIGHT, WIDTH = 60, 90
# An L: flipped or rotated it is another shape in the same box. Corners x, y in whole pixels.
CORNERS = np.array([[12, 8], [22, 8], [22, 30], [44, 30], [44, 38], [12, 38]], dtype=np.float64)
BOX = (12, 8, 44, 38)
KINDS = ["polygons", "runs"]


def painted() -> np.ndarray:
    """The L as bool [HEIGHT, WIDTH]."""
    found = np.zeros((HEIGHT, WIDTH), dtype=bool)
    found[8:38, 12:22] = True
    found[30:38, 12:44] = True
    return found


def run_lengths(bitmap: np.ndarray) -> RunLengths:
    flat = bitmap.ravel(order="F")
    change = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return RunLengths(np.concatenate([change, [flat.size]]).astype(np.int64), *bitmap.shape)


def shape(kind: str) -> Polygons | RunLengths:
    return Polygons((CORNERS,)) if kind == "polygons" else run_lengths(painted())


def make_sample(kind: str | None) -> Sample:
    """The L in white on black; a second object, a crowd, covers the left third."""
    image = torch.from_numpy(painted()).to(torch.uint8).mul(255).expand(3, -1, -1).clone()
    crowd = np.zeros((HEIGHT, WIDTH), dtype=bool)
    crowd[:, :30] = True
    masks = (
        None
        if kind is None
        else AnnotatedMasks.from_file([shape(kind), run_lengths(crowd)], HEIGHT, WIDTH)
    )
    boxes = torch.tensor([BOX, (0, 0, 30, HEIGHT)], dtype=torch.float32)
    return Sample(
        image,
        boxes,
        torch.tensor([4, 1]),
        torch.tensor([False, True]),
        masks,
        17,
        "l.png",
        (HEIGHT, WIDTH),
    )


def white(image: Tensor) -> np.ndarray:
    return np.asarray(image[0].numpy() > 127)


def tight(bitmap: np.ndarray) -> list[int]:
    y, x = np.nonzero(bitmap)
    return [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def moved_mask(sample: Sample, row: int = 0) -> np.ndarray:
    assert sample.masks is not None
    return np.asarray(rle_to_bitmaps(sample.masks.to_rle())[row])


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


def assert_whole(sample: Sample) -> None:
    """Check what no transform may change, and that the masks' frames are the image's."""
    assert (sample.image_id, sample.file_name, sample.original_size) == (
        17,
        "l.png",
        (HEIGHT, WIDTH),
    )
    assert sample.image.dtype == torch.uint8
    assert len(sample.boxes) == len(sample.labels) == len(sample.iscrowd)
    if sample.masks is not None:
        assert len(sample.masks) == len(sample.boxes)
        assert sample.masks.frames.tolist() == [list(sample.size)] * len(sample.boxes)


def same(first: Sample, second: Sample) -> bool:
    tensors = ("image", "boxes", "labels", "iscrowd")
    equal = all(torch.equal(getattr(first, name), getattr(second, name)) for name in tensors)
    if first.masks is None or second.masks is None:
        return equal and first.masks is second.masks
    return equal and first.masks.to_rle() == second.masks.to_rle()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("horizontal", "vertical"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_a_flip_is_exact(kind: str, horizontal: float, vertical: float) -> None:
    found = Flip(horizontal, vertical)(make_sample(kind), np.random.default_rng(0))
    expected = painted()[:: -1 if vertical else 1, :: -1 if horizontal else 1]
    assert_whole(found)
    np.testing.assert_array_equal(white(found.image), expected)
    np.testing.assert_array_equal(moved_mask(found), expected)
    assert found.boxes[0].tolist() == tight(expected)
    assert found.boxes[1].tolist() == ([60, 0, 90, 60] if horizontal else [0, 0, 30, 60])
    assert found.labels.tolist() == [4, 1]
    assert found.iscrowd.tolist() == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_two_flips_restore_the_sample(kind: str) -> None:
    flip = Flip(1.0, 1.0)
    twice = flip(flip(make_sample(kind), np.random.default_rng(0)), np.random.default_rng(1))
    assert same(twice, make_sample(kind))


def test_the_probabilities_of_a_flip() -> None:
    rng = np.random.default_rng(3)
    sample = make_sample(None)
    boxes = [tuple(Flip(0.5, 0.25)(sample, rng).boxes[0].tolist()) for _ in range(2000)]
    across = np.mean([box[0] != BOX[0] for box in boxes])
    down = np.mean([box[1] != BOX[1] for box in boxes])
    assert across == pytest.approx(0.5, abs=0.05)
    assert down == pytest.approx(0.25, abs=0.05)
    assert Flip(0.0, 0.0)(sample, rng) is sample


def test_both_flips_are_drawn_independently() -> None:
    sample = noise(6, 6)
    flips = [Flip(0.5, 0.5)(sample, np.random.default_rng(seed)).image for seed in range(60)]
    across, down = sample.image.flip(-1), sample.image.flip(-2)
    for expected in (sample.image, across, down, across.flip(-2)):
        assert sum(torch.equal(found, expected) for found in flips) > 5


class Reversed(np.random.Generator):
    """All factors are 1.4; the changes have the given order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__(np.random.PCG64(0))
        self.order = order

    def permutation(self, *_: object, **__: object) -> list[int]:  # type: ignore[override]
        return self.order

    def uniform(self, *_: object, **__: object) -> float:  # type: ignore[override]
        return 1.4


def test_the_order_of_colour_changes_is_random() -> None:
    sample, jitter = noise(6, 6), ColorJitter(0.5, 0.5)
    one, other = (jitter(sample, Reversed(order)).image for order in ([0, 1, 2, 3], [1, 0, 2, 3]))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [2, 3])
def test_an_enlargement_by_a_whole_number_is_exact(kind: str, factor: int) -> None:
    found = ResizeShortestEdge([HEIGHT * factor], 10_000)(
        make_sample(kind), np.random.default_rng(0)
    )
    expected = painted().repeat(factor, axis=0).repeat(factor, axis=1)
    assert_whole(found)
    assert found.boxes[0].tolist() == [factor * side for side in BOX]
    np.testing.assert_array_equal(moved_mask(found), expected)
    assert overlap(white(found.image), expected) > (0.999 if factor == 2 else 0.98)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("short", [32, 45, 97])
def test_pixels_box_and_mask_agree_at_any_scale(kind: str, short: int) -> None:
    found = ResizeShortestEdge([short], 10_000)(make_sample(kind), np.random.default_rng(0))
    assert_whole(found)
    assert found.size == (short, round(WIDTH * short / HEIGHT))
    np.testing.assert_allclose(found.boxes[0].tolist(), tight(white(found.image)), atol=1.01)
    np.testing.assert_allclose(
        found.boxes[0].tolist(),
        np.array(BOX) * ([found.size[1] / WIDTH, short / HEIGHT] * 2),
        atol=1e-4,
    )
    assert overlap(white(found.image), moved_mask(found)) > 0.85


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 640), 800, 1333, (625, 1333)),  # the longer side is the limit
        ((640, 100), 800, 1333, (1333, 208)),
        ((800, 800), 800, 1333, (800, 800)),
        ((1, 500), 64, 100, (1, 100)),  # at least one pixel
        (
            (64, 100),
            8,
            1333,
            (8, 13),
        ),  # 12.5: halves are rounded up, as in detectron2 and mmdetection
        ((64, 84), 8, 1333, (8, 11)),  # 10.5
    ],
)
def test_sizes_of_the_shortest_edge(
    size: tuple[int, int], short: int, longest: int, expected: tuple[int, int]
) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    sample = Sample(
        torch.zeros((3, *size), dtype=torch.uint8),
        torch.zeros(0, 4),
        nothing,
        nothing.bool(),
        None,
        0,
        "",
        size,
    )
    found = ResizeShortestEdge([short], longest)(sample, np.random.default_rng(0))
    assert found.size == expected
    assert found.boxes.shape == (0, 4)


def test_every_size_of_the_list_is_drawn() -> None:
    rng = np.random.default_rng(0)
    resize = ResizeShortestEdge([20, 30, 40], 100)
    found = [resize(make_sample(None), rng).size[0] for _ in range(90)]
    assert {size: found.count(size) > 15 for size in (20, 30, 40)} == {20: True, 30: True, 40: True}
    assert set(found) == {20, 30, 40}


def noise(height: int, width: int) -> Sample:
    """An image of noise without objects."""
    nothing = torch.zeros(0, dtype=torch.int64)
    image = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
    )
    return Sample(image, torch.zeros(0, 4), nothing, nothing.bool(), None, 0, "", (height, width))


@pytest.mark.parametrize("short", [37, 211])
def test_pillow_resizes_as_pillow(short: int) -> None:
    sample = noise(101, 150)
    found = ResizeShortestEdge([short], 1000, "pillow")(sample, np.random.default_rng(0))
    size = (round(150 * short / 101), short)
    expected = Image.fromarray(sample.image.permute(1, 2, 0).numpy()).resize(
        size, Image.Resampling.BILINEAR
    )
    assert np.array_equal(found.image.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("short", [37, 211])
def test_plain_resizes_as_torchvisions_detectors(short: int) -> None:
    sample = noise(101, 150)
    found = ResizeShortestEdge([short], 1000, "plain")(sample, np.random.default_rng(0))
    theirs = GeneralizedRCNNTransform(short, 1000, [0.0] * 3, [1.0] * 3)([sample.image / 255])[0]
    assert found.size == theirs.image_sizes[0]
    expected = theirs.tensors[0, :, : found.size[0], : found.size[1]] * 255
    assert (found.image - expected).abs().max() < 0.51
    assert (
        ResizeShortestEdge([37], 1000)(sample, np.random.default_rng(0)).image[:, :37, :54]
        - expected[:, :37, :54]
    ).abs().max() > 10


def test_a_resize_by_an_unknown_method_is_refused() -> None:
    with pytest.raises(
        UserError, match="method must be one of antialias, pillow, plain, not 'nearest'"
    ):
        ResizeShortestEdge([10], 20, "nearest")


@pytest.mark.parametrize(
    ("sizes", "longest"), [((), 100), ((0,), 100), ((200,), 100), ((50, -1), 100)]
)
def test_invalid_sizes_are_refused(sizes: tuple[int, ...], longest: int) -> None:
    with pytest.raises(UserError, match="resize: sizes must be positive"):
        ResizeShortestEdge(sizes, longest)


class FixedWindow:
    """A random generator that returns given values."""

    def __init__(self, *values: int) -> None:
        self.values = list(values)

    def integers(self, high: int) -> int:
        value = self.values.pop(0)
        assert 0 <= value < high
        return value


def crop(sample: Sample, size: int, top: int, left: int, min_pixels: float = 1.0) -> Sample:
    return RandomCrop(size, min_pixels)(sample, FixedWindow(top, left))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_crop_affects_pixels_and_mask_alike(kind: str) -> None:
    found = crop(make_sample(kind), 40, 5, 18)
    expected = painted()[5:45, 18:58]
    assert_whole(found)
    np.testing.assert_array_equal(white(found.image), expected)
    np.testing.assert_array_equal(moved_mask(found), expected)
    assert found.boxes[0].tolist() == tight(expected) == [0, 3, 26, 33]
    assert found.boxes[1].tolist() == [0, 0, 12, 40]  # the crowd, clipped at three sides


@pytest.mark.parametrize("kind", KINDS)
def test_a_clipped_object_gets_the_tight_box_of_the_visible_part(kind: str) -> None:
    # Right of x = 25 only the foot of the L is left: the clipped box is 8..38, the foot 30..38.
    found = crop(make_sample(kind), 50, 0, 25)
    assert found.boxes[0].tolist() == tight(painted()[:50, 25:75]) == [0, 30, 19, 38]


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_inside_the_window_keeps_its_box(kind: str) -> None:
    sample = make_sample(kind)
    loose = sample.boxes.clone()
    loose[0] = torch.tensor([10.5, 6.25, 45.5, 39.75])  # as in the file, not the box of the mask
    found = crop(Sample(**{**sample.__dict__, "boxes": loose}), 55, 2, 3)
    assert found.boxes[0].tolist() == [7.5, 4.25, 42.5, 37.75]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("min_pixels", "kept"), [(1.0, [4]), (24.0, [4]), (25.0, [])])
def test_objects_with_too_few_pixels_left_are_dropped(
    kind: str, min_pixels: float, kept: list[int]
) -> None:
    # The window shows the end of the L's foot, 6 x 4 pixels, and nothing of the crowd.
    found = crop(make_sample(kind), 12, 34, 38, min_pixels)
    assert white(found.image).sum() == 24
    assert found.labels.tolist() == kept
    assert_whole(found)


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_outside_the_window_is_dropped(kind: str) -> None:
    found = crop(make_sample(kind), 20, 40, 60)
    assert_whole(found)
    assert found.labels.tolist() == []
    assert found.boxes.shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_with_a_visible_box_but_no_visible_mask_is_dropped(kind: str) -> None:
    # The window is in the empty corner of the L's box.
    found = crop(make_sample(kind), 12, 10, 30)
    assert not white(found.image).any()
    assert 4 not in found.labels.tolist()


def test_boxes_without_masks_are_clipped_too() -> None:
    found = crop(make_sample(None), 40, 5, 18)
    assert found.masks is None
    assert found.boxes.tolist() == [[0, 3, 26, 33], [0, 0, 12, 40]]
    # A corner of 4 x 8 is left of the box 12..44 x 8..38.
    assert crop(make_sample(None), 30, 30, 40, min_pixels=32.0).labels.tolist() == [4]
    assert crop(make_sample(None), 30, 30, 40, min_pixels=33.0).labels.tolist() == []


def test_a_crop_reaches_every_position_and_no_other() -> None:
    image = torch.arange(6, dtype=torch.uint8).expand(3, 5, 6).clone()
    nothing = torch.zeros(0, dtype=torch.int64)
    sample = Sample(image, torch.zeros(0, 4), nothing, nothing.bool(), None, 0, "", (5, 6))
    rng = np.random.default_rng(0)
    found = [RandomCrop(4)(sample, rng) for _ in range(100)]
    assert {s.size for s in found} == {(4, 4)}
    assert {int(s.image[0, 0, 0]) for s in found} == {0, 1, 2}


def test_a_window_larger_than_the_image_changes_nothing() -> None:
    sample = make_sample("runs")
    assert RandomCrop(100)(sample, np.random.default_rng(0)) is sample
    assert RandomCrop(70)(sample, np.random.default_rng(0)).size == (60, 70)  # each side by itself


@pytest.mark.parametrize("kind", KINDS)
def test_scale_jitter_keeps_pixels_boxes_and_masks_together(kind: str) -> None:
    jitter = ScaleJitterCrop(64, (0.5, 2.0))
    rng = np.random.default_rng(5)
    seen: list[tuple[int, int]] = []
    for _ in range(40):
        found = jitter(make_sample(kind), rng)
        assert_whole(found)
        seen.append(found.size)
        at = found.labels.tolist().index(4) if 4 in found.labels.tolist() else None
        visible = white(found.image)
        if at is None:
            assert visible.sum() <= 40  # at most a sliver along the border
            continue
        if visible.sum() < 60:
            continue
        np.testing.assert_allclose(found.boxes[at].tolist(), tight(visible), atol=1.3)
        assert overlap(visible, moved_mask(found, at)) > 0.8
    assert max(max(size) for size in seen) == 64
    assert min(min(size) for size in seen) < 43


def test_the_range_of_scale_jitter() -> None:
    smallest = ScaleJitterCrop(60, (0.5, 0.5))(make_sample(None), np.random.default_rng(0))
    assert smallest.size == (20, 30)  # 60 x 90 fits 60 x 60 at 2/3; half of that
    fitting = ScaleJitterCrop(60, (1.0, 1.0))(make_sample(None), np.random.default_rng(0))
    assert fitting.size == (40, 60)
    largest = ScaleJitterCrop(60, (2.0, 2.0))(make_sample(None), np.random.default_rng(0))
    assert largest.size == (60, 60)


def test_colour_jitter_changes_pixels_only() -> None:
    noise = torch.randint(
        0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    sample = Sample(**{**make_sample("runs").__dict__, "image": noise})
    found = ColorJitter(0.4, 0.4, 0.4, 0.1)(sample, np.random.default_rng(0))
    assert not torch.equal(found.image, sample.image)
    assert found.image.dtype == torch.uint8
    assert found.image.shape == sample.image.shape
    assert same(Sample(**{**found.__dict__, "image": noise}), sample)


def test_colour_jitter_of_no_strength_changes_nothing() -> None:
    sample = make_sample("runs")
    assert torch.equal(ColorJitter()(sample, np.random.default_rng(0)).image, sample.image)


@pytest.mark.parametrize(
    ("strengths", "check"),
    [
        ({"brightness": 0.5}, lambda image: (image[0] == image[1]).all()),  # gray stays gray
        (
            {"saturation": 0.9},
            lambda image: (image.int() - 100).abs().max() <= 1,
        ),  # gray has no saturation
        ({"hue": 0.5}, lambda image: (image == 100).all()),  # nor hue
        (
            {"contrast": 0.9},
            lambda image: (image.int() - 100).abs().max() <= 1,
        ),  # a uniform color has no contrast
    ],
)
def test_what_each_colour_change_preserves(
    strengths: dict[str, float], check: Callable[[Tensor], Tensor]
) -> None:
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    sample = Sample(**{**make_sample(None).__dict__, "image": grey})
    for seed in range(5):
        assert check(ColorJitter(**strengths)(sample, np.random.default_rng(seed)).image)


def test_a_strength_above_one_gives_no_negative_factor() -> None:
    # Guards against: torchvision refuses a negative factor such as 1 - 1.8
    jitter, sample = ColorJitter(1.8, 1.8, 1.8), noise(8, 8)
    changed = [jitter(sample, np.random.default_rng(seed)).image for seed in range(40)]
    assert len({int(image.sum()) for image in changed}) > 20


def test_the_range_of_brightness() -> None:
    sample = Sample(
        **{**make_sample(None).__dict__, "image": torch.full((3, 4, 4), 100, dtype=torch.uint8)}
    )
    rng = np.random.default_rng(0)
    values = [int(ColorJitter(brightness=0.5)(sample, rng).image[0, 0, 0]) for _ in range(200)]
    assert 49 <= min(values) < 60
    assert 140 < max(values) <= 150


@pytest.mark.parametrize("strengths", [{"brightness": -0.1}, {"hue": 0.6}, {"contrast": -1}])
def test_invalid_colour_strengths_are_refused(strengths: dict[str, float]) -> None:
    with pytest.raises(UserError, match="color jitter"):
        ColorJitter(**strengths)


@pytest.mark.parametrize(
    "transform",
    [
        Flip(0.5, 0.5),
        ResizeShortestEdge([30, 40, 50, 60, 70], 200),
        RandomCrop(40),
        ScaleJitterCrop(64),
        ColorJitter(0.4, 0.4, 0.4, 0.1),
    ],
)
def test_the_result_depends_on_the_generator_only(transform: Transform) -> None:
    results = []
    for seed in range(6):
        first, second = (
            transform(make_sample("polygons"), np.random.default_rng(seed)) for _ in range(2)
        )
        assert same(first, second)
        results.append(first)
    assert any(not same(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "transform",
    [Flip(1.0, 1.0), ResizeShortestEdge([47], 200), RandomCrop(20), ScaleJitterCrop(64)],
)
def test_the_input_sample_is_not_changed(transform: Transform) -> None:
    sample = make_sample("polygons")
    transform(sample, np.random.default_rng(0))
    assert same(sample, make_sample("polygons"))
