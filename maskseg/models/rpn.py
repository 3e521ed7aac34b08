"""Region Proposal Network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.models.anchors import AnchorGenerator
from maskseg.ops import boxes as box_ops
from maskseg.ops import matching
from maskseg.ops.losses import mean_count, smooth_l1_sum
from maskseg.ops.nms import nms_per_group, top_per_group
from maskseg.ops.random_keys import box_places, random_keys
from maskseg.structures import Batch, Features, Losses, Regions, Targets

WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class RPNHead(nn.Module):
    """A 3x3 convolution, then objectness and box deltas of each anchor, shared by all levels (Faster R-CNN, section 3.1)."""

    def __init__(self, channels: int = 256, per_cell: int = 3, layers: int = 1) -> None:
        super().__init__()
        self.per_cell = per_cell
        self.convs = nn.ModuleList(
            [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)]
        )
        self.objectness = nn.Conv2d(channels, per_cell, 1)
        self.deltas = nn.Conv2d(channels, per_cell * 4, 1)
        for layer in [*self.convs, self.objectness, self.deltas]:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> logits [N, H * W * per_cell], deltas [N, H * W * per_cell, 4], both f32, in the anchors' order."""
        for layer in self.convs:
            feature = F.relu(layer(feature))
        logits, deltas = self.objectness(feature), self.deltas(feature)
        n, _, h, w = deltas.shape
        deltas = deltas.view(n, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4)
        return logits.permute(0, 2, 3, 1).reshape(n, -1).float(), deltas.float()


@dataclass(frozen=True)
class Limits:
    """How many proposals are kept: the best of each level before NMS, the best of an image after it."""

    per_level: int
    per_image: int


class RPN(nn.Module):
    """Proposals from anchors, and the two losses that train them.

    strides: of the levels it reads, by name. Assignment and sampling as Faster R-CNN, section 3.1.2-3.1.3. Crowd regions: an anchor of which one
    covers more than `crowd_overlap` is no negative.
    beta: of the smooth L1 loss (1/9 in torchvision, 0 in detectron2). divide_by: both losses are divided by the anchors that were `drawn`
    (torchvision) or by the full `quota` of `num_samples` an image (detectron2); they differ only where anchors are scarce.
    min_size: proposals with a shorter side are dropped, in pixels (1e-3 in torchvision, 0 in detectron2).
    """

    def __init__(
        self,
        head: nn.Module,
        anchors: AnchorGenerator,
        strides: Mapping[str, int],
        train_limits: Mapping[str, int] | None = None,
        test_limits: Mapping[str, int] | None = None,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        num_samples: int = 256,
        positive_fraction: float = 0.5,
        nms_threshold: float = 0.7,
        min_size: float = 0.0,
        beta: float = 0.0,
        divide_by: str = "drawn",
        crowd_overlap: float = 0.5,
    ) -> None:
        super().__init__()
        if divide_by not in ("drawn", "quota"):
            raise UserError(f"proposer.divide_by must be drawn or quota, not {divide_by!r}")
        if getattr(head, "per_cell", anchors.per_cell) != anchors.per_cell:
            raise UserError(
                f"proposer.head.per_cell must be {anchors.per_cell}: the sizes of a level times the aspect ratios of proposer.anchors"
            )
        self.head, self.anchors, self.strides = head, anchors, dict(strides)
        self.train_limits = Limits(**(train_limits or {"per_level": 2000, "per_image": 1000}))
        self.test_limits = Limits(**(test_limits or {"per_level": 1000, "per_image": 1000}))
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.num_samples, self.positive_fraction = num_samples, positive_fraction
        self.nms_threshold, self.min_size = nms_threshold, min_size
        self.beta, self.divide_by, self.crowd_overlap = beta, divide_by, crowd_overlap

    def forward(self, features: Features, batch: Batch) -> tuple[Regions, Losses]:
        """-> proposals of all images, best first within an image, and, where the batch has targets, `rpn_objectness` and `rpn_box`."""
        maps = [features[name] for name in self.strides]
        height, width = batch.images.shape[-2:]
        shapes = [(m.shape[-2], m.shape[-1]) for m in maps]
        anchors = self.anchors(shapes, list(self.strides.values()), (height, width), maps[0].device)
        predicted = [self.head(m) for m in maps]
        logits, deltas = [p[0] for p in predicted], [p[1] for p in predicted]
        with torch.no_grad():
            proposals = self.select(logits, deltas, anchors, batch.sizes)
        if batch.targets is None:
            return proposals, {}
        return proposals, self.losses(
            torch.cat(logits, 1),
            torch.cat(deltas, 1),
            torch.cat(anchors),
            batch.targets,
            batch.draw_seeds(),
        )

    def select(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor
    ) -> Regions:
        """Top-k of each level -> decode -> clip -> NMS within level and image -> best of each image."""
        limits = self.train_limits if self.training else self.test_limits
        boxes_, scores_, level_, finite_ = [], [], [], []
        for i, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
            best, index = logit.topk(min(limits.per_level, logit.shape[1]), dim=1)
            chosen = delta.gather(1, index[..., None].expand(-1, -1, 4))
            boxes_.append(box_ops.decode(chosen, anchor[index], WEIGHTS))
            scores_.append(best.sigmoid())
            finite_.append(
                torch.isfinite(best)
            )  # of the logit: the sigmoid of an infinite one is 0 or 1
            level_.append(torch.full_like(index, i))
        boxes, scores, level, finite = (
            torch.cat(boxes_, 1),
            torch.cat(scores_, 1),
            torch.cat(level_, 1),
            torch.cat(finite_, 1),
        )
        num_images, per_image = scores.shape
        image = torch.arange(num_images, device=boxes.device).repeat_interleave(per_image)
        boxes, scores, level = (
            box_ops.clip(boxes.reshape(-1, 4), sizes[image]),
            scores.ravel(),
            level.ravel(),
        )
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = (
            (sides > 0).all(1)
            & (sides >= self.min_size).all(1)
            & torch.isfinite(boxes).all(1)
            & finite.ravel()
        )
        boxes, scores, level, image = boxes[keep], scores[keep], level[keep], image[keep]
        kept = nms_per_group(boxes, scores, image * len(anchors) + level, self.nms_threshold)
        kept = kept[top_per_group(scores[kept], image[kept], limits.per_image)]
        return Regions(boxes[kept], image[kept], scores[kept])

    def losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, targets: Targets, seeds: Tensor
    ) -> Losses:
        """logits: [N, A]; deltas: [N, A, 4]; anchors: [A, 4]; seeds: i64 [N]."""
        num_images, num_anchors = logits.shape
        with torch.no_grad():
            truth = matching.pad_by_image(
                targets.boxes, targets.image_index, ~targets.crowd, num_images
            )
            best, label = matching.label_by_iou(
                truth, anchors, self.negative_iou, self.positive_iou, low_quality=True
            )
            if targets.crowd.any():
                crowds = matching.pad_by_image(
                    targets.boxes, targets.image_index, targets.crowd, num_images
                )
                cover = box_ops.covered(anchors, crowds.boxes).max(dim=2).values
                label[(label == matching.NEGATIVE) & (cover > self.crowd_overlap)] = (
                    matching.IGNORED
                )
            image = torch.arange(num_images, device=logits.device).repeat_interleave(num_anchors)
            label = label.ravel()
            key = random_keys(seeds[:, None], box_places(anchors)).ravel()
            drawn = matching.draw(
                label, image, key, num_images, self.num_samples, self.positive_fraction
            )
            positive = drawn[label[drawn] == matching.POSITIVE]
            matched = truth.boxes[image[positive], best.ravel()[positive]]
            wanted = box_ops.encode(matched, anchors[positive % num_anchors], WEIGHTS)
        divisor = (
            mean_count(len(drawn), logits)
            if self.divide_by == "drawn"
            else self.num_samples * num_images
        )
        objectness = F.binary_cross_entropy_with_logits(
            logits.ravel()[drawn], label[drawn].float(), reduction="sum"
        )
        box = smooth_l1_sum(deltas.reshape(-1, 4)[positive], wanted, self.beta)
        return {"rpn_objectness": objectness / divisor, "rpn_box": box / divisor}
