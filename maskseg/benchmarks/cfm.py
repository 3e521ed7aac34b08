"""Suite `cfm`: the cost of convolutional feature masking (CFM) of a thousand segments.

It is compared with the backbone's forward pass and with one forward pass per segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.benchmarks.measure import case, in_turn, machine
from maskseg.benchmarks.results import Case, SuiteResult
from maskseg.config import Config
from maskseg.config.restore import open_data
from maskseg.data.collate import segment_regions
from maskseg.data.datasets.coco_segments import CocoSegments
from maskseg.data.single_image import SingleImage
from maskseg.masks.superpixel import SegmentMasks, SegmentProposals
from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.fuse import for_inference
from maskseg.structures import Batch, Regions
from maskseg.variants.cfm.classifier import CFMClassifier
from maskseg.variants.cfm.hierarchy import HierarchicalGrouping
from maskseg.variants.cfm.mask_nms import nms_by_mask_iou, paste_labels
from maskseg.variants.cfm.net import CFMNet
from maskseg.variants.cfm.proposer import DrawnSegments, SegmentProposer
from maskseg.variants.cfm.pyramid_ops import pool_pyramid
from maskseg.variants.cfm.settings import MaskingSettings
from maskseg.visualization.layout import RGBImage

CLASSES = 80
LEVELS = {"p2-p5": ["p2", "p3", "p4", "p5"], "c4": ["c4"]}
DESIGNS = ("full_map", "pool_first")
CROP = 224  # pixels per side of a segment's crop


@torch.no_grad()
def cfm(
    config: Config, proposals: int = 1000, crops: int = 8, height: int = 480, width: int = 640
) -> SuiteResult:
    """Time CFM on the first validation image of `config.data`, resized, on the CPU.

    It is split into the forward pass of `trunk` (with FPN or alone) and everything after it, from
    projecting the segments to the semantic map, with random weights. The alternative masks segments
    in the pixels, crops them and sends each through the trunk (SDS, R-CNN). Computing the segments
    is not timed.

    Args:
        config: with `data`, `trunk` and `rounds`.
        proposals: number of segments.
        crops: number of segments that are cropped; their time is scaled to all segments.
        height: of the image in pixels.
        width: of the image in pixels.

    Returns the suite's cases; agreement: number of detected segments, time after the backbone over
    that of the backbone, seconds of all crops, and those over CFM with its backbone; also:
    milliseconds of each part. Raises UserError.
    """
    device = torch.device("cpu")
    config.data.val_segments = None
    source = open_data(config)
    pixels = CocoSegments(source).image("val", 0)
    image = np.asarray(
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(
            (width, height), Image.Resampling.BICUBIC
        )
    )
    segments = make_proposals(image, proposals)
    batch = replace(
        SingleImage()(torch.from_numpy(image.copy()).permute(2, 0, 1)), proposals=segments
    )
    crop_images = crop_segments(image, segments[torch.linspace(0, len(segments) - 1, crops).long()])
    cases: list[Case] = []
    also: dict[str, float] = {}
    for levels in LEVELS:
        for design in DESIGNS:
            net = _net(config.trunk, LEVELS[levels], design)
            features = net.features(batch)
            trunk = net.backbone.trunk if isinstance(net.backbone, FPN) else net.backbone
            separate = f"{crops} segments by themselves"
            runs: dict[str, Callable[[], object]] = {
                "backbone": partial(net.features, batch),
                "CFM after it": partial(net.build_outputs, features, segments, batch),
                separate: partial(trunk, crop_images),
            }
            name = f"{config.trunk}, {levels}, {design}"
            result = case(
                f"{name}: {width} x {height}, {len(segments)} segments",
                runs,
                config.rounds,
                device,
            )
            seconds = {label: result["seconds"][label] for label in runs}
            alone = seconds[separate] * len(segments) / crops
            result["agreement"] = {
                "segments found": len(net.build_outputs(features, segments, batch).detections),
                "CFM after it over backbone": 1 / result["times_faster"]["CFM after it"],
                f"{len(segments)} segments by themselves, s (scaled)": alone,
                "by themselves over backbone and CFM": alone
                / (seconds["backbone"] + seconds["CFM after it"]),
            }
            cases.append(result)
            also |= {
                f"{name}, {part}, ms": 1000 * value
                for part, value in _parts(net, features, segments, batch, config.rounds).items()
            }
    return {"suite": "cfm", "machine": machine(device), "cases": cases, "also": also}


def make_proposals(image: RGBImage, count: int) -> Regions:
    """Compute `count` segment proposals of a uint8 RGB [H, W, 3] image.

    If there are fewer, random unions of two proposals are added.
    """
    segments = HierarchicalGrouping(max_proposals=count)(image)
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, len(segments), (count - len(segments), 2))
    members = np.concatenate(
        [segments.members, segments.members[pairs[:, 0]] | segments.members[pairs[:, 1]]]
    )
    return segment_regions(SegmentProposals(segments.labels, members))


def crop_segments(image: RGBImage, segments: Regions) -> Tensor:
    """Crop each segment from a gray background, resized and normalized.

    Returns f32 [n, 3, 224, 224], channels_last.
    """
    assert isinstance(segments.masks, SegmentMasks)
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    std = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    normalized = (torch.from_numpy(np.array(image)).permute(2, 0, 1) - mean) / std
    labels = torch.from_numpy(segments.masks.maps[0]).long()
    crops = []
    for (x0, y0, x1, y1), members in zip(
        segments.boxes.int().tolist(), segments.masks.members, strict=True
    ):
        crop = (normalized * members[labels])[None, :, y0:y1, x0:x1]
        crops.append(F.interpolate(crop, size=(CROP, CROP), mode="bilinear", antialias=True))
    return torch.cat(crops).contiguous(memory_format=torch.channels_last)


def _net(trunk: str, levels: list[str], design: str) -> CFMNet:
    """Build a network whose random class scores vary enough for detections."""
    torch.manual_seed(0)
    resnet = ResNet(trunk, norm="BN")
    backbone = FPN(resnet) if levels[0][0] == "p" else resnet
    classifier = CFMClassifier(levels, backbone.levels, CLASSES, masking=MaskingSettings(design))
    nn.init.normal_(classifier.scores.weight, std=0.3)
    net = CFMNet(
        CLASSES,
        backbone=backbone,
        proposer=SegmentProposer(HierarchicalGrouping()),
        sampler=DrawnSegments(CLASSES),
        classifier=classifier,
    )
    return for_inference(net.eval())


def _parts(
    net: CFMNet, features: dict[str, Tensor], segments: Regions, batch: Batch, rounds: int
) -> dict[str, float]:
    """Median seconds of each part after the backbone."""
    model = net.classifier
    assert segments.masks is not None
    level = model.assign_levels(segments.boxes)
    pool_boxes = partial(model.pool_boxes, features, segments.boxes, segments.image_index, level)

    def pool_masked() -> list[Tensor]:
        assert segments.masks is not None
        rest = segments.image_index, level, model.mask_at_cells(features, segments.masks)
        return model.pool_masked(features, segments.boxes, *rest, torch.arange(len(segments)))

    bins = pool_boxes()
    path = next(iter(model.layers))
    scores = model.class_scores(
        model(features, segments.boxes, segments.image_index, segments.masks)
    )
    row, label = torch.nonzero(scores > model.score_threshold).unbind(1)
    candidates = replace(segments[row], scores=scores[row, label], labels=label)
    kept = candidates[nms_by_mask_iou(candidates, model.nms_threshold)]
    pooled = pool_pyramid(bins, model.pooler.pyramid)
    runs: dict[str, Callable[[], object]] = {"pooling of boxes": pool_boxes}
    if model.masking.design == "full_map":
        runs = {"projection, pooling of boxes and masks": pool_masked}
    runs |= {
        "pyramid of a path": partial(pool_pyramid, bins, model.pooler.pyramid),
        f"connected layers of a path (of {len(model.layers)})": partial(model.layers[path], pooled),
        f"NMS of {len(candidates)} candidates": partial(
            nms_by_mask_iou, candidates, model.nms_threshold
        ),
        "pasting": partial(paste_labels, kept, batch.sizes, *batch.images.shape[2:]),
    }
    return {
        label: median(values)
        for label, values in in_turn(runs, rounds, torch.device("cpu")).items()
    }
