"""The mask head: targets against brute force and torchvision, class selection, no regions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import maskrcnn_inference, project_masks_on_boxes

from maskseg.errors import UserError
from maskseg.masks.annotated import AnnotatedMasks, Polygons, RunLengths
from maskseg.masks.base import rle_to_bitmaps
from maskseg.masks.predicted import MaskGrids
from maskseg.models.mask_head import TARGET_MODES, MaskHead, select_class_logits
from maskseg.models.roi_pooler import MultiLevelRoIAlign
from maskseg.ops import boxes as box_ops
from maskseg.structures import Regions, Samples, Targets

K = 3
CHANNELS = 8
SIZES = [(60, 90), (80, 70)]
TRUTH = [[(5, 5, 40, 50, 2), (20.5, 10.25, 90, 60, 0)], [(3, 30, 69, 77, 1), (0, 0, 10, 9, 0)]]


def head(**settings: object) -> MaskHead:
    torch.manual_seed(0)
    return MaskHead(
        MultiLevelRoIAlign({"p2": 4, "p3": 8}, 14),
        K,
        CHANNELS,
        **({"channels": 8, "layers": 2} | settings),
    )  # type: ignore[arg-type]


@pytest.fixture
def features(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "p2": torch.randn((2, CHANNELS, 24, 24), generator=generator),
        "p3": torch.randn((2, CHANNELS, 12, 12), generator=generator),
    }


def shaken(boxes: Tensor, image: Tensor, generator: torch.Generator) -> Tensor:
    """Return boxes near the given ones, clipped to their images as proposals are."""
    return box_ops.clip(
        boxes + (torch.rand(boxes.shape, generator=generator) - 0.5) * 8, torch.tensor(SIZES)[image]
    )


@pytest.fixture
def samples(make_targets: Callable[..., Targets], generator: torch.Generator) -> Samples:
    """Twelve regions; the first and last of each image are background."""
    targets = make_targets(TRUTH, SIZES)
    matched = torch.tensor([0, 0, 1, 1, 0, 0, 0, 2, 3, 2, 3, 0])
    image = torch.tensor([0] * 6 + [1] * 6)
    boxes, labels = shaken(targets.boxes[matched], image, generator), targets.labels[matched]
    labels[[0, 5, 6, 11]] = K
    return Samples(boxes, image, labels, matched, K, targets, torch.arange(9))


def inside(
    points: NDArray[np.float64], polygon: NDArray[np.float64]
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Whether points [n, 2] lie in the polygon [m, 2] (even-odd rule); distance to the outline."""
    a, b = polygon, np.roll(polygon, -1, axis=0)
    x, y = points[:, :1], points[:, 1:]
    crosses = (a[:, 1] > y) != (b[:, 1] > y)
    with np.errstate(divide="ignore", invalid="ignore"):
        at = a[:, 0] + (y - a[:, 1]) * (b[:, 0] - a[:, 0]) / (b[:, 1] - a[:, 1])
    along = np.clip(
        ((points[:, None] - a) * (b - a)).sum(-1) / np.maximum(((b - a) ** 2).sum(-1), 1e-12), 0, 1
    )
    distance = np.linalg.norm(a + along[..., None] * (b - a) - points[:, None], axis=-1).min(axis=1)
    return (crosses & (x < at)).sum(axis=1) % 2 == 1, distance


def cell_centres(box: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    steps = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(box[0] + steps * (box[2] - box[0]), box[1] + steps * (box[3] - box[1]))
    return np.stack([x.ravel(), y.ravel()], axis=1)


def test_crop_rule_of_polygons_asks_each_cell_centre() -> None:
    """Cells agree if their centre is over half a cell from the outline (pycocotools rounds)."""
    size, checked = 28, 0
    random = np.random.default_rng(0)
    for _ in range(40):
        angles = np.sort(random.uniform(0, 2 * np.pi, 9))
        radius = random.uniform(10, 40, 9)
        star = np.stack([60 + radius * np.cos(angles), 50 + radius * np.sin(angles)], axis=1)
        box = np.array([*random.uniform(10, 50, 2), *random.uniform(60, 110, 2)])
        masks = AnnotatedMasks.from_file([Polygons((star,))], 100, 120)
        boxes = torch.from_numpy(box[None]).float()
        found = TARGET_MODES["crop"](masks, torch.tensor([0]), boxes, size)[0].numpy().ravel()
        cells = (star - box[:2]) * size / (box[2:] - box[:2])
        wanted, distance = inside(cell_centres(np.array([0.0, 0.0, size, size]), size), cells)
        clear = distance > 0.75
        assert set(found) <= {0.0, 1.0}
        assert (found[clear] == wanted[clear]).all()
        checked += int((clear & wanted).sum())
    assert checked > 3000


def test_crop_rule_of_a_rectangle_literal() -> None:
    square = np.array([[20.0, 20.0], [40.0, 20.0], [40.0, 60.0], [20.0, 60.0]])
    other = square + np.array([40.0, 0.0])
    masks = AnnotatedMasks.from_file([Polygons((square, other))], 100, 100)
    found = TARGET_MODES["crop"](
        masks,
        torch.tensor([0, 0]),
        torch.tensor([[0.0, 0.0, 80.0, 80.0], [20.0, 20.0, 40.0, 60.0]]),
        4,
    )
    assert found[0].tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert found[1].tolist() == [[1] * 4] * 4


def runs_of(bitmap: NDArray[np.bool_]) -> RunLengths:
    flat = bitmap.T.ravel().astype(np.int8)
    change = np.flatnonzero(np.diff(flat, prepend=0)) if flat.any() else np.zeros(0, dtype=np.int64)
    return RunLengths(
        np.append(change, flat.size) if not len(change) or change[-1] < flat.size else change,
        *bitmap.shape,
    )


def test_crop_rule_of_run_lengths_is_half_cover() -> None:
    random, size, fine = np.random.default_rng(0), 14, 16
    coarse = random.random((2, 10, 12)) < 0.5
    bitmaps = [np.kron(c, np.ones((6, 7), dtype=bool))[:57, :80] for c in coarse]
    masks = AnnotatedMasks.from_file([runs_of(b) for b in bitmaps], 57, 80)
    matched = torch.tensor([0, 1, 1, 0])
    boxes = torch.tensor(
        [
            [0.0, 0.0, 80.0, 57.0],
            [3.3, 4.7, 41.9, 50.2],
            [60.1, 30.2, 88.8, 61.0],
            [20.0, 10.0, 21.0, 11.5],
        ]
    )
    found = TARGET_MODES["crop"](masks, matched, boxes, size).numpy()
    for i, (row, box) in enumerate(zip(matched.tolist(), boxes.double().tolist(), strict=True)):
        points = cell_centres(np.array(box), fine * size)
        x, y = (np.floor(p).astype(int) for p in points.T)
        hit = [
            0 <= a < 80 and 0 <= b < 57 and bool(bitmaps[row][b, a])
            for a, b in zip(x, y, strict=True)
        ]
        share = np.reshape(hit, (size, fine, size, fine)).mean(axis=(1, 3))
        sure = np.abs(share - 0.5) > 1 / fine
        assert (found[i][sure] == (share[sure] > 0.5)).all()
    assert 0.2 < found.mean() < 0.8


def image_bitmaps(targets: Targets, image: int) -> Tensor:
    assert targets.masks is not None
    return torch.from_numpy(rle_to_bitmaps(targets.masks[targets.image_index == image].to_rle()))


@pytest.mark.parametrize("size", [14, 28])
def test_roi_align_rule_equals_torchvision(samples: Samples, size: int) -> None:
    targets = samples.targets
    assert targets.masks is not None
    found = TARGET_MODES["roi_align"](targets.masks, samples.matched_gt, samples.boxes, size)
    first = torch.tensor([0, 2])  # the first row of each image
    for i in range(2):
        own = torch.nonzero((samples.image_index == i) & (samples.matched_gt >= first[i])).squeeze(
            1
        )
        wanted = project_masks_on_boxes(
            image_bitmaps(targets, i), samples.boxes[own], samples.matched_gt[own] - first[i], size
        )
        assert len(own) > 3
        assert 0.2 < wanted.mean() < 0.9
        torch.testing.assert_close(found[own], wanted, rtol=0, atol=1e-5)


def test_roi_align_rule_at_the_border_of_a_small_image_beside_a_large_one() -> None:
    """A region at the border of its image must not depend on the padding of the batch."""
    whole = [np.array([[0.0, 0.0], [w, 0.0], [w, h], [0.0, h]]) for h, w in SIZES]
    masks = AnnotatedMasks.cat(
        [
            AnnotatedMasks.from_file([Polygons((p,))], h, w)
            for p, (h, w) in zip(whole, SIZES, strict=True)
        ]
    )
    boxes = torch.tensor([[60.0, 40.0, 90.0, 60.0], [40.0, 60.0, 70.0, 80.0]])
    for i, (height, width) in enumerate(SIZES):
        wanted = project_masks_on_boxes(
            torch.ones((1, height, width)), boxes[i : i + 1], torch.tensor([0]), 14
        )
        together = TARGET_MODES["roi_align"](masks, torch.tensor([0, 1]), boxes, 14)[i : i + 1]
        torch.testing.assert_close(together, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", TARGET_MODES)
def test_targets_of_no_region(make_targets: Callable[..., Targets], rule: str) -> None:
    masks = make_targets(TRUTH, SIZES).masks
    assert TARGET_MODES[rule](
        masks, torch.zeros(0, dtype=torch.int64), torch.zeros((0, 4)), 28
    ).shape == (0, 28, 28)


@pytest.mark.parametrize("rule", TARGET_MODES)
def test_loss_is_the_mean_over_foreground_cells(
    features: dict[str, Tensor], samples: Samples, rule: str
) -> None:
    module = head(target_mode=rule)
    own = samples.foreground()
    assert samples.targets.masks is not None
    wanted = TARGET_MODES[rule](samples.targets.masks, own.matched_gt, own.boxes, 28)
    all_classes = module.predictor(
        F.relu(module.deconv(module.convs(module.pooler(features, own.boxes, own.image_index))))
    )
    assert all_classes.shape == (8, K, 28, 28)
    expected = (
        sum(
            F.binary_cross_entropy_with_logits(all_classes[i, label], wanted[i])
            for i, label in enumerate(own.labels.tolist())
        )
        / 8
    )
    torch.testing.assert_close(module.losses(features, samples)["mask"], expected)


@pytest.mark.parametrize("agnostic", [True, False])
def test_each_region_gets_its_own_class(
    features: dict[str, Tensor], samples: Samples, agnostic: bool
) -> None:
    module = head(class_agnostic=agnostic)
    assert module.predictor.out_channels == (1 if agnostic else K)
    own = samples.foreground()
    with torch.no_grad():
        logits = module(features, own.boxes, own.image_index, own.labels)
        every = module.predictor(
            F.relu(module.deconv(module.convs(module.pooler(features, own.boxes, own.image_index))))
        )
        theirs = maskrcnn_inference(
            every, [torch.zeros_like(own.labels) if agnostic else own.labels]
        )[0][:, 0]
    assert logits.shape == (8, 28, 28)
    torch.testing.assert_close(logits.sigmoid(), theirs)
    module.losses(features, samples)["mask"].backward()
    used = module.predictor.weight.grad.abs().sum(dim=(1, 2, 3)) > 0
    assert used.tolist() == [True] * (1 if agnostic else K)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_channel_is_that_of_the_convolution(
    generator: torch.Generator, layout: torch.memory_format
) -> None:
    predictor, channel = nn.Conv2d(16, 30, 1), torch.randint(30, (9,), generator=generator)
    x = torch.randn((9, 16, 6, 6), generator=generator).contiguous(memory_format=layout)
    sides, weights = torch.randn((9, 6, 6), generator=generator), (predictor.weight, predictor.bias)
    found, wanted = (
        select_class_logits(x, *weights, channel),
        predictor(x)[torch.arange(9), channel],
    )
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((out * sides).sum(), weights) for out in (found, wanted)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    assert select_class_logits(x[:0], *weights, channel[:0]).shape == (0, 6, 6)


def test_predict_puts_grids_over_the_boxes(features: dict[str, Tensor], samples: Samples) -> None:
    module = head(paste_mode="torchvision", interpolation="bicubic", threshold=0.4)
    own = samples.foreground()
    detections = Regions(own.boxes, own.image_index, torch.ones(8), own.labels)
    with torch.no_grad():
        found = module.predict(features, detections, torch.tensor(SIZES))
        logits = module(features, own.boxes, own.image_index, own.labels)
    assert isinstance(found.masks, MaskGrids)
    assert torch.equal(found.masks.grids, logits.sigmoid())
    assert torch.equal(found.masks.grid_boxes, own.boxes)
    assert found.masks.frames.tolist() == [list(SIZES[i]) for i in own.image_index.tolist()]
    assert (found.masks.paste_mode, found.masks.interpolation, found.masks.threshold) == (
        "torchvision",
        "bicubic",
        0.4,
    )
    assert torch.equal(found.boxes, own.boxes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [None, "GN", "BN", "FrozenBN"])
@pytest.mark.parametrize("rule", TARGET_MODES)
def test_without_foreground_the_graph_is_whole(
    features: dict[str, Tensor],
    samples: Samples,
    unreached: Callable[[nn.Module], list[str]],
    rule: str,
    norm: str | None,
    training: bool,
) -> None:
    module = head(target_mode=rule, norm=norm).train(training)
    leaves = {k: v.requires_grad_() for k, v in features.items()}
    rows = torch.tensor([0, 5])
    few = Samples(
        samples.boxes[rows],
        samples.image_index[rows],
        samples.labels[rows],
        samples.matched_gt[rows],
        K,
        samples.targets,
        samples.seeds,
    )
    loss = module.losses(leaves, few)["mask"]
    assert loss.item() == 0
    loss.backward()
    assert unreached(module) == []
    assert all(v.grad is not None for v in leaves.values())
    assert all(torch.isfinite(b).all() for b in module.buffers())


@pytest.mark.parametrize("norm", [None, "GN", "BN"])
def test_zero_detections(features: dict[str, Tensor], norm: str | None) -> None:
    nothing = Regions(
        torch.zeros((0, 4)),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.int64),
    )
    found = head(norm=norm).eval().predict(features, nothing, torch.tensor(SIZES))
    assert found.masks is not None
    assert len(found.masks) == len(found) == 0
    assert found.masks.to_rle() == []
    assert found.masks.boxes().shape == (0, 4)


def test_layers_and_norm() -> None:
    module = MaskHead(MultiLevelRoIAlign({"p2": 4}, 14), K, CHANNELS, 32, layers=3, norm="GN")
    assert [(c[0].in_channels, c[0].out_channels, c[0].bias) for c in module.convs] == [
        (8, 32, None),
        (32, 32, None),
        (32, 32, None),
    ]
    assert sum(isinstance(m, nn.GroupNorm) for m in module.modules()) == 3
    bare = MaskHead(MultiLevelRoIAlign({"p2": 4}, 7), K, CHANNELS, 32, layers=0)
    logits = bare(
        {"p2": torch.zeros((1, CHANNELS, 8, 8))},
        torch.tensor([[0.0, 0.0, 9.0, 9.0]]),
        torch.tensor([0]),
        torch.tensor([1]),
    )
    assert logits.shape == (1, 14, 14)


def test_wrong_settings_are_named(
    features: dict[str, Tensor], samples: Samples, make_targets: Callable[..., Targets]
) -> None:
    with pytest.raises(UserError, match="target_mode must be crop or roi_align, not 'paste'"):
        head(target_mode="paste")
    with pytest.raises(UserError, match="no paste_mode 'detectron2'"):
        head(paste_mode="detectron2")
    with pytest.raises(UserError, match="interpolation 'nearest'"):
        head(interpolation="nearest")
    boxes_only = make_targets(TRUTH, SIZES, masks=False)
    without = Samples(
        samples.boxes,
        samples.image_index,
        samples.labels,
        samples.matched_gt,
        K,
        boxes_only,
        samples.seeds,
    )
    with pytest.raises(UserError, match="ground truth masks, but the data has boxes only"):
        head().losses(features, without)


def test_the_start_of_the_weights() -> None:
    """He initialization by fan-out, as in torchvision and detectron2."""
    head = MaskHead(nn.Identity(), 3, in_channels=16, channels=64, layers=1)
    (first,) = (m for m in head.convs.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)
