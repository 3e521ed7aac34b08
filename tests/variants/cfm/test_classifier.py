"""`CFMClassifier`: masks applied by hand, both designs, no segments, no leak past the mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from maskseg.data.collate import concatenate_regions, segment_regions
from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentMasks, SegmentProposals
from maskseg.structures import Batch, Features, FeatureSpec, Regions, Samples, Targets
from maskseg.superpixels.methods import SLIC
from maskseg.variants.cfm import classifier as cfm
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.net import CFMNet
from maskseg.variants.cfm.projection import project
from maskseg.variants.cfm.proposer import DrawnSegments, SegmentProposer
from maskseg.variants.cfm.settings import MaskingSettings, MLPSettings, PoolerSettings
from maskseg.variants.hash.segmenter import HashSegmenter

CHANNELS = 6
LEVELS = {"p2": FeatureSpec(4, 0.5, CHANNELS), "p3": FeatureSpec(8, 0.5, CHANNELS)}
NONE = torch.zeros(0, dtype=torch.int64)
TARGETS = Targets(torch.zeros(0, 4), NONE, NONE, NONE.bool())


def regions(count: int = 9, seed: int = 0, image: int = 0) -> Regions:
    """Random sets of the 8 x 8-pixel squares of a 64 x 64 image; the first has all."""
    labels = (np.arange(64)[:, None] // 8 * 8 + np.arange(64) // 8).astype(np.int32)
    members = np.random.default_rng(seed).random((count, 64)) < 0.3
    members[0] = True
    return segment_regions(SegmentProposals(labels, members), image)


def maps(images: int = 1) -> Features:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(
            (images, CHANNELS, 64 // level.stride, 64 // level.stride), generator=generator
        )
        for name, level in LEVELS.items()
    }


def classifier(**keys: Any) -> CFMClassifier:
    torch.manual_seed(0)
    return CFMClassifier(
        **{
            "levels": ["p2", "p3"],
            "feature_specs": LEVELS,
            "num_classes": 3,
            "pooler": PoolerSettings(canonical_size=80.0),
            "mlp": MLPSettings(width=16),
            **keys,
        }
    )


def bitmaps(segments: Regions) -> Tensor:
    assert isinstance(segments.masks, SegmentMasks)
    return segments.masks.members[:, torch.from_numpy(segments.masks.maps[0]).long()]


@pytest.mark.parametrize("level", ["p2", "p3"])
def test_masked_pooling_is_that_of_the_masked_map(level: str) -> None:
    segments = regions()
    features = maps()
    model = classifier(levels=[level], masking=MaskingSettings(paths=["segment"]))
    at = LEVELS[level]
    feature = features[level]
    cells = project(bitmaps(segments), (feature.shape[2], feature.shape[3]), at.stride, at.centre)
    assert isinstance(segments.masks, SegmentMasks)
    assert torch.equal(
        model.project_masks(segments.masks, (feature.shape[2], feature.shape[3]), at), cells
    )
    boxes = torch.cat(
        [torch.zeros(len(segments), 1), segments.boxes + 0.5 * at.stride - at.centre], dim=1
    )  # RoIAlign ignores the centers of cells
    pooled = torch.cat(
        [
            roi_align(feature * c, b[None], (6, 6), 1 / at.stride, 2, True)
            for c, b in zip(cells, boxes, strict=True)
        ]
    )
    expected = model.layers["segment"]([F.adaptive_max_pool2d(pooled, s) for s in (6, 3, 2, 1)])
    torch.testing.assert_close(
        model.compute_vectors(features, segments.boxes, segments.image_index, segments.masks),
        expected,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("paths", [["segment", "box"], ["box"], ["segment"]])
def test_equal_boxes_are_pooled_once(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    segments = concatenate_regions(
        [regions(300, image=0), regions(300, image=1)]
    )  # many sets of squares touch all four borders, so that their boxes are equal
    assert segments.masks is not None
    distinct = len(
        torch.unique(torch.cat([segments.image_index[:, None], segments.boxes], dim=1), dim=0)
    )
    assert distinct < 400
    features = maps(2)
    model = classifier(masking=MaskingSettings(paths=paths))
    rows = list[tuple[str, int]]()
    for path in paths:
        model.layers[path].register_forward_pre_hook(
            lambda _, given, path=path: rows.append((path, len(given[0][0])))
        )
    monkeypatch.setattr(cfm, "BLOCK_INPUTS", 2**17)  # multiple blocks
    each, once = (
        model.train(training).compute_vectors(
            features, segments.boxes, segments.image_index, segments.masks
        )
        for training in (True, False)
    )
    torch.testing.assert_close(once, each, atol=1e-5, rtol=1e-5)
    assert len(rows) > 2 * len(paths)
    seen = {path: sum(count for of, count in rows if of == path) for path in paths}
    if "box" in paths:  # equal boxes are separated only at the end of a block
        assert 600 + distinct <= seen["box"] <= 600 + distinct + len(rows)
    if "segment" in paths:
        assert seen["segment"] == 1200


def test_segments_are_read_from_the_level_of_their_box() -> None:
    segments = regions(30)
    features = maps()
    small = (segments.boxes[:, 2:] - segments.boxes[:, :2]).prod(
        dim=1
    ).sqrt() < 40.0  # canonical_size 80 is read from stride 16, half of that from stride 8
    model = classifier()
    alone = {name: classifier(levels=[name]) for name in LEVELS}
    assert segments.masks is not None
    both = model(features, segments.boxes, segments.image_index, segments.masks)
    fine, coarse = (
        alone[name](features, segments.boxes, segments.image_index, segments.masks)
        for name in LEVELS
    )
    torch.testing.assert_close(both, torch.where(small[:, None], fine, coarse))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"masking": MaskingSettings("pool_first")},
        {"masking": MaskingSettings(paths=["segment"])},
    ],
)
def test_segments_of_one_box_differ_only_by_their_masks(keys: dict[str, Any]) -> None:
    labels = (np.arange(64)[:, None] // 8 * 8 + np.arange(64) // 8).astype(np.int32)
    corners = np.zeros((2, 64), dtype=bool)
    corners[:, [0, 63]] = True
    corners[1, 20:40] = True
    segments = segment_regions(SegmentProposals(labels, corners))
    assert torch.equal(segments.boxes[0], segments.boxes[1])
    assert segments.masks is not None
    a, b = classifier(**keys)(maps(), segments.boxes, segments.image_index, segments.masks)
    assert not torch.allclose(a, b)
    box_only = classifier(masking=MaskingSettings(paths=["box"]))
    a, b = box_only(maps(), segments.boxes, segments.image_index, segments.masks)
    torch.testing.assert_close(a, b)


def test_pool_first_masks_the_levels_of_masked() -> None:
    segments, features = regions(1), maps()  # the whole image: the mask has no effect
    assert segments.masks is not None
    rest = features, segments.boxes, segments.image_index, segments.masks
    torch.testing.assert_close(
        classifier(masking=MaskingSettings("pool_first"))(*rest),
        classifier(masking=MaskingSettings("pool_first", masked_sides=[]))(*rest),
    )
    segments = regions(4)[torch.tensor([2])]
    assert segments.masks is not None
    rest = features, segments.boxes, segments.image_index, segments.masks
    outputs = [
        classifier(masking=MaskingSettings("pool_first", masked_sides=sides))(*rest)
        for sides in ([], [6], [6, 3])
    ]
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("keys", [{}, {"masking": MaskingSettings("pool_first")}])
def test_gradients_reach_everything_and_no_segments_keep_the_graph(keys: dict[str, Any]) -> None:
    model = classifier(**keys)
    segments = concatenate_regions([regions(5), regions(4, 1, 1)])
    features = {name: value.requires_grad_() for name, value in maps(2).items()}
    samples = Samples(
        segments.boxes,
        segments.image_index,
        torch.arange(9) % 4,
        NONE.new_zeros(9),
        3,
        TARGETS,
        NONE,
        segments.masks,
    )
    (loss,) = model.losses(features, samples).values()
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert any(value.grad is not None and value.grad.abs().sum() > 0 for value in features.values())
    nothing = segments[NONE]
    empty = Samples(nothing.boxes, nothing.image_index, NONE, NONE, 3, TARGETS, NONE, nothing.masks)
    (loss,) = model.losses(features, empty).values()
    assert loss == 0
    loss.backward()


def test_detections_are_of_things_and_stuff_with_the_segments_as_masks() -> None:
    model = classifier(score_threshold=0.2, nms_threshold=0.9, max_detections=5)
    segments = concatenate_regions([regions(9), regions(6, 1, 1)])
    detections = model.predict(maps(2), segments, torch.tensor([[64, 64], [64, 64]]))
    assert detections.labels is not None
    assert isinstance(detections.masks, SegmentMasks)
    assert detections.image_index.bincount().tolist() == [
        27,
        18,
    ]  # each segment for each class: CFMNet applies `max_detections`, to things only
    assert ((detections.labels >= 0) & (detections.labels < 3)).all()
    for i in range(2):
        scores = detections.scores[detections.image_index == i]
        assert (scores[:-1] >= scores[1:]).all()
    torch.testing.assert_close(detections.masks.boxes(), detections.boxes)
    assert len(model.predict(maps(2), segments[NONE], torch.tensor([[64, 64], [64, 64]]))) == 0


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"masking": MaskingSettings(masked_sides=[5])}, "masked_sides must be some of"),
        ({"pooler": PoolerSettings(pyramid=[3])}, "masked_sides must be some of"),
        (
            {"feature_specs": {"p2": LEVELS["p2"], "p3": FeatureSpec(8, 0.5, 7)}},
            "same number of channels",
        ),
    ],
)
def test_invalid_arguments(keys: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        classifier(**keys)


@pytest.mark.parametrize(
    ("settings", "keys", "part"),
    [
        (MaskingSettings, {"design": "both"}, "design must be one of"),
        (MaskingSettings, {"paths": []}, "paths some of"),
        (
            MaskingSettings,
            {"design": "pool_first", "paths": ["box"]},
            "pool_first with segment",
        ),
        (PoolerSettings, {"pyramid": [6, 4]}, "each of pooler.pyramid must divide pooler.size=6"),
        (
            PoolerSettings,
            {"pyramid": []},
            r"pooler.pyramid=\[\]: expected a list of at least 1 value",
        ),
    ],
)
def test_invalid_settings(settings: type, keys: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        settings(**keys)


def make_batch(proposals: Regions | None) -> Batch:
    images = torch.zeros((2, 3, 64, 64), dtype=torch.uint8)
    images[0, :, :, 30:] = 200
    sizes = torch.tensor([[64, 64], [48, 40]])
    return Batch(images, sizes, sizes, [0, 1], ["a", "b"], proposals=proposals)


def test_the_proposer_returns_segments_of_the_batch_or_computes_them() -> None:
    def quarters(image: np.ndarray) -> SegmentProposals:
        height, width = image.shape[:2]
        labels = (
            2 * (np.arange(height)[:, None] >= height // 2) + (np.arange(width) >= width // 2)
        ).astype(np.int32)
        return SegmentProposals(labels, np.eye(4, dtype=bool))

    computed, losses = SegmentProposer(quarters, limit=3)({}, make_batch(None))
    assert not losses
    assert computed.image_index.tolist() == [0, 0, 0, 1, 1, 1]
    assert computed.boxes[3:].tolist() == [[0, 0, 20, 24], [20, 0, 40, 24], [0, 24, 20, 48]]
    given = concatenate_regions([regions(5), regions(2, 1, 1)])
    selected, _ = SegmentProposer(quarters, limit=4)({}, make_batch(given))
    assert selected.image_index.bincount().tolist() == [4, 2]
    boxes = Regions(given.boxes, given.image_index, given.scores)
    with pytest.raises(UserError, match=r"set data\.train_segments"):
        SegmentProposer(quarters)({}, make_batch(boxes))


def test_the_sampler_selects_labeled_segments() -> None:
    given = concatenate_regions([regions(5), regions(2, 1, 1)])
    drawn = Regions(
        given.boxes,
        given.image_index,
        given.scores,
        torch.tensor([-1, 3, -1, 0, 1, 3, -1]),
        given.masks,
    )
    samples = DrawnSegments(3)(drawn, TARGETS, NONE)
    assert samples.labels.tolist() == [3, 0, 1, 3]
    assert samples.image_index.tolist() == [0, 0, 0, 1]
    assert samples.masks is not None
    torch.testing.assert_close(samples.masks.boxes(), samples.boxes)
    with pytest.raises(UserError, match=r"data\.segment_sampler is not set"):
        DrawnSegments(3)(given, TARGETS, NONE)


def test_segments_of_the_hash_segmenter_are_valid_proposals() -> None:
    pytest.importorskip("cv2")
    torch.manual_seed(2)
    segmenter = HashSegmenter("p2", LEVELS["p2"], SLIC(30), bits=4).eval()
    batch = make_batch(None)
    batch.images[:] = F.interpolate(torch.rand(2, 3, 4, 4) * 255, size=(64, 64)).to(torch.uint8)
    features = maps(2)
    with torch.no_grad():
        segments = segmenter.predict(features, batch)
        detections = (
            classifier(score_threshold=0.0, nms_threshold=0.99, max_detections=1000)
            .eval()
            .predict(features, segments, batch.sizes)
        )
    assert len(segments) >= 4
    assert len(detections) == 3 * len(segments)
    assert detections.masks is not None
    assert float(detections.masks.area().sum()) == 3 * float((batch.sizes.prod(dim=1)).sum())


@pytest.mark.parametrize("levels", [["p3", "p2"], ["p2", "p4"]])
def test_levels_must_have_doubling_strides(levels: list[str]) -> None:
    at = LEVELS | {"p4": FeatureSpec(16, 0.5, CHANNELS)}
    with pytest.raises(
        UserError, match="each of levels must have twice the stride of the one before"
    ):
        CFMClassifier(levels, at, 3)


def test_the_map_is_pasted_from_more_segments_than_detections() -> None:
    labels = (np.arange(64)[:, None] // 8 * 8 + np.arange(64) // 8).astype(np.int32)
    proposals = concatenate_regions(
        [segment_regions(SegmentProposals(labels, np.eye(64, dtype=bool)))]
    )  # 64 squares that do not overlap
    part = classifier(max_detections=5, score_threshold=0.0, nms_threshold=0.9)
    model = CFMNet(
        2, backbone=nn.Identity(), proposer=nn.Identity(), sampler=DrawnSegments(3), classifier=part
    )
    sizes = torch.tensor([[64, 64]])
    with torch.no_grad():
        segments = model.build_outputs(
            maps(),
            proposals,
            Batch(torch.zeros((1, 3, 64, 64), dtype=torch.uint8), sizes, sizes, [0], [""]),
        )
    assert len(segments.detections) == 5
    assert (segments.semantic["classes"] >= 0).all()
