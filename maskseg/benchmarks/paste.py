"""Suite `paste`: soft masks of an image's detections to RLE."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.results import SuiteResult
from maskseg.config import Config
from maskseg.masks.base import Rle, rle_to_bitmaps
from maskseg.masks.predicted import MaskGrids


def paste(
    config: Config, detections: int = 100, height: int = 800, width: int = 1333
) -> SuiteResult:
    """Paste the 28 x 28 soft masks of `detections` in one image, on the CPU.

    Both peers fill full-size canvases and encode them with pycocotools. Each is compared with
    maskseg's implementation of the same paste rule.

    config: with `rounds`.

    Returns the suite's cases; agreement: the fraction of the mask pixels in which the two differ.
    """
    device = torch.device("cpu")
    cases = []
    peers = {
        "torchvision": (torchvision_rles, "torchvision"),
        "continuous": (detectron2_rles, "detectron2's way"),
    }
    for rule, (peer, label) in peers.items():
        masks = soft_masks(detections, height, width, torch.Generator().manual_seed(0), rule)
        runs: dict[str, Callable[[], object]] = {
            f"{label} + pycocotools": partial(peer, masks),
            "maskseg": masks.to_rle,
        }
        name = f"rule {rule}: {detections} masks, {width} x {height}"
        cases.append(
            case(
                name,
                runs,
                config.rounds,
                device,
                {"pixels that differ": _difference(peer(masks), masks.to_rle())},
            )
        )
    return {"suite": "paste", "machine": machine(device), "cases": cases}


def soft_masks(
    n: int, height: int, width: int, generator: torch.Generator, rule: str = "continuous"
) -> MaskGrids:
    """Generate blobs with ragged borders.

    The sides of their boxes are log-uniform between 10 pixels and three quarters of the image's
    shorter side.
    """
    frame = torch.tensor([width, height], dtype=torch.float32)
    largest = 0.75 * min(height, width)
    extent = torch.exp(
        torch.empty(n, 2).uniform_(math.log(10), math.log(largest), generator=generator)
    )
    low = torch.rand(n, 2, generator=generator) * (frame - extent)
    axis = torch.linspace(-1, 1, 28)
    coarse = torch.randn(n, 1, 7, 7, generator=generator)
    noise = F.interpolate(coarse, size=28, mode="bicubic")[:, 0]
    grids = torch.sigmoid(4 * (0.8 - (axis[:, None] ** 2 + axis**2).sqrt()) + noise)
    return MaskGrids(
        grids,
        torch.cat([low, low + extent], dim=1),
        torch.tensor([[height, width]]).expand(n, 2),
        rule,
    )


def torchvision_rles(masks: MaskGrids) -> list[Rle]:
    """Encode the masks of one image as torchvision does.

    That is `paste_masks_in_image`, then the threshold and pycocotools, as in
    `references/detection`.
    """
    height, width = masks.frames[0].tolist()
    canvases = paste_masks_in_image(masks.grids[:, None], masks.grid_boxes, (height, width))
    return [_encode(canvas[0]) for canvas in canvases > masks.threshold]


def detectron2_rles(masks: MaskGrids) -> list[Rle]:
    """Encode the masks of one image as detectron2 does on a CPU.

    `_do_paste_mask` with skip_empty resamples each mask with `grid_sample` in the part of the image
    that the box covers, and writes it into a boolean canvas. pycocotools encodes the canvases as in
    `instances_to_coco_json`.
    """
    height, width = masks.frames[0].tolist()
    canvases = torch.zeros(len(masks), height, width, dtype=torch.bool)
    for canvas, grid, box in zip(canvases, masks.grids, masks.grid_boxes, strict=True):
        left, top = (box[:2].floor() - 1).clamp(min=0).int().tolist()
        right = min(math.ceil(box[2]) + 1, width)
        bottom = min(math.ceil(box[3]) + 1, height)
        x = (torch.arange(left, right) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (torch.arange(top, bottom) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        points = torch.stack([x.expand(len(y), len(x)), y[:, None].expand(len(y), len(x))], dim=2)
        values = F.grid_sample(grid[None, None], points[None], align_corners=False)[0, 0]
        canvas[top:bottom, left:right] = values >= masks.threshold
    return [_encode(canvas) for canvas in canvases]


def _encode(mask: Tensor) -> Rle:
    rle = coco_mask.encode(np.array(mask[:, :, None], order="F", dtype=np.uint8))[0]
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _difference(first: list[Rle], second: list[Rle]) -> float:
    """Fraction of the pixels of the union in which the masks differ."""
    different = 0
    union = 0
    for one, other in zip(first, second, strict=True):
        a = rle_to_bitmaps([one])
        b = rle_to_bitmaps([other])
        different += int((a != b).sum())
        union += int((a | b).sum())
    return different / max(union, 1)
