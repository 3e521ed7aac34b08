"""Suite `cfm`: what convolutional feature masking of a thousand segments adds to the backbone's pass, and what a pass of each segment takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.benchmarks.measure import case, in_turn, machine
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
from maskseg.variants.cfm.mask_nms import nms_of_masks, pasted
from maskseg.variants.cfm.net import CFMNet
from maskseg.variants.cfm.proposer import DrawnSegments, SegmentProposer
from maskseg.variants.cfm.pyramid_ops import pooled_pyramid

CLASSES = 80
LEVELS = {"p2-p5": ["p2", "p3", "p4", "p5"], "c4": ["c4"]}
DESIGNS = ("full_map", "pool_first")
CROP = 224  # pixels a side of what a segment's own pass sees


@torch.no_grad()
def cfm(
    config: Any, proposals: int = 1000, crops: int = 8, height: int = 480, width: int = 640
) -> dict[str, Any]:
    """The first validation picture of `config.data`, resized, on the CPU: `trunk`'s forward pass (with its pyramid, or alone), and all that follows
    it, from projecting the segments to the map of classes, with random weights. Beside it as many segments as `crops`, masked in the pixels, cut out
    and sent through the trunk one by one (SDS, R-CNN). The segments are made before.

    config: with `data`, `trunk` and `rounds`. -> the suite's cases; agreement: segments that are found, the time after the backbone as a share of
    the backbone's, the seconds of all segments by themselves, scaled from `crops`, and how many times those of CFM with its backbone they are;
    also: milliseconds of each part. Raises UserError.
    """
    device = torch.device("cpu")
    source = open_data(config)
    source.segments["val"] = None
    pixels = CocoSegments(source).image("val", 0)
    image = np.asarray(
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(
            (width, height), Image.Resampling.BICUBIC
        )
    )
    segments = made(image, proposals)
    batch = replace(
        SingleImage()(torch.from_numpy(image.copy()).permute(2, 0, 1)), proposals=segments
    )
    cut = cut_out(image, segments[torch.linspace(0, len(segments) - 1, crops).long()])
    cases: list[dict[str, Any]] = []
    also: dict[str, float] = {}
    for levels in LEVELS:
        for design in DESIGNS:
            net = _net(config.trunk, LEVELS[levels], design)
            features = net.features(batch)
            trunk = net.backbone.trunk if isinstance(net.backbone, FPN) else net.backbone
            own = f"{crops} segments by themselves"
            things: dict[str, Callable[[], object]] = {
                "backbone": partial(net.features, batch),
                "CFM after it": partial(net._outputs, features, segments, batch),
                own: partial(trunk, cut),
            }
            name = f"{config.trunk}, {levels}, {design}"
            found = case(
                f"{name}: {width} x {height}, {len(segments)} segments",
                things,
                config.rounds,
                device,
            )
            seconds = {label: found["seconds"][label] for label in things}
            alone = seconds[own] * len(segments) / crops
            found["agreement"] = {
                "segments found": len(net._outputs(features, segments, batch).detections),
                "CFM after it over backbone": 1 / found["times_faster"]["CFM after it"],
                f"{len(segments)} segments by themselves, s (scaled)": alone,
                "by themselves over backbone and CFM": alone
                / (seconds["backbone"] + seconds["CFM after it"]),
            }
            cases.append(found)
            also |= {
                f"{name}, {part}, ms": 1000 * value
                for part, value in _parts(net, features, segments, batch, config.rounds).items()
            }
    return {"suite": "cfm", "machine": machine(device), "cases": cases, "also": also}


def made(image: np.ndarray[Any, np.dtype[np.uint8]], count: int) -> Regions:
    """Segment proposals of uint8 RGB [H, W, 3], `count` of them: the best, and unions of two where there are fewer."""
    found = HierarchicalGrouping(max_proposals=count)(image)
    pairs = np.random.default_rng(0).integers(0, len(found), (count - len(found), 2))
    members = np.concatenate(
        [found.members, found.members[pairs[:, 0]] | found.members[pairs[:, 1]]]
    )
    return segment_regions(SegmentProposals(found.labels, members))


def cut_out(image: np.ndarray[Any, np.dtype[np.uint8]], segments: Regions) -> Tensor:
    """Each segment's pixels in a grey image, cut out and resized: normalised, f32 [n, 3, 224, 224], channels_last."""
    assert isinstance(segments.masks, SegmentMasks)
    mean, std = (
        torch.tensor([123.675, 116.28, 103.53])[:, None, None],
        torch.tensor([58.395, 57.12, 57.375])[:, None, None],
    )
    normalised = (torch.from_numpy(np.array(image)).permute(2, 0, 1) - mean) / std
    labels, found = torch.from_numpy(segments.masks.maps[0]).long(), []
    for (x0, y0, x1, y1), members in zip(
        segments.boxes.int().tolist(), segments.masks.members, strict=True
    ):
        own = (normalised * members[labels])[None, :, y0:y1, x0:x1]
        found.append(F.interpolate(own, size=(CROP, CROP), mode="bilinear", antialias=True))
    return torch.cat(found).contiguous(memory_format=torch.channels_last)


def _net(trunk: str, levels: list[str], design: str) -> CFMNet:
    """With scores that differ: as many segments as there are stand out by one class."""
    torch.manual_seed(0)
    resnet = ResNet(trunk, norm="BN")
    backbone = FPN(resnet) if levels[0][0] == "p" else resnet
    classifier = CFMClassifier(levels, backbone.levels, CLASSES, design)
    nn.init.normal_(classifier.scores.weight, std=0.3)
    stages: dict[str, Any] = {
        "backbone": backbone,
        "proposer": SegmentProposer(HierarchicalGrouping()),
        "sampler": DrawnSegments(CLASSES),
        "classifier": classifier,
    }
    return for_inference(CFMNet(CLASSES, **stages).eval())


def _parts(
    net: CFMNet, features: dict[str, Tensor], segments: Regions, batch: Batch, rounds: int
) -> dict[str, float]:
    """Seconds of each part of what follows the backbone, medians."""
    model = cast(CFMClassifier, net.classifier)
    assert segments.masks is not None
    level = model._assign(segments.boxes)
    boxed = partial(model._pooled, features, segments.boxes, segments.image_index, level)

    def masked() -> list[Tensor]:
        assert segments.masks is not None
        rest = segments.image_index, level, model._inside(features, segments.masks)
        return model._masked(features, segments.boxes, *rest, torch.arange(len(segments)))

    bins, kind = boxed(), next(iter(model.layers))
    scores = model.class_scores(
        model(features, segments.boxes, segments.image_index, segments.masks)
    )
    row, label = torch.nonzero(scores > model.score_threshold).unbind(1)
    candidates = replace(segments[row], scores=scores[row, label], labels=label)
    kept = candidates[nms_of_masks(candidates, model.nms_threshold)]
    pooled = pooled_pyramid(bins, model.pyramid)
    things: dict[str, Callable[[], object]] = {"pooling of boxes": boxed}
    if model.design == "full_map":
        things = {"projection, pooling of boxes and masks": masked}
    things |= {
        "pyramid of a path": partial(pooled_pyramid, bins, model.pyramid),
        f"connected layers of a path (of {len(model.layers)})": partial(model.layers[kind], pooled),
        f"NMS of {len(candidates)} candidates": partial(
            nms_of_masks, candidates, model.nms_threshold
        ),
        "pasting": partial(pasted, kept, batch.sizes, *batch.images.shape[2:]),
    }
    return {
        label: median(values)
        for label, values in in_turn(things, rounds, torch.device("cpu")).items()
    }
