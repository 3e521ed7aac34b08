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
from maskseg.ops.random_keys import hash_boxes, random_keys
from maskseg.structures import Batch, Features, Losses, Regions, Targets
from maskseg.values import Fraction, LayerCount, NonNegativeFloat, PositiveInt, Size

BOX_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
NORMALIZERS = ("sampled", "quota")


class RPNHead(nn.Module):
    """3x3 convolutions, then objectness and box deltas of each anchor (Faster R-CNN, section 3.1).

    The weights are shared by all levels. per_cell: anchors per cell; layers: 3x3 convolutions.
    """

    def __init__(self, in_channels: Size = 256, per_cell: Size = 3, layers: LayerCount = 1) -> None:
        super().__init__()
        self.per_cell = per_cell
        self.convs = nn.ModuleList(
            [nn.Conv2d(in_channels, in_channels, 3, padding=1) for _ in range(layers)]
        )
        self.objectness = nn.Conv2d(in_channels, per_cell, 1)
        self.deltas = nn.Conv2d(in_channels, per_cell * 4, 1)
        for layer in [*self.convs, self.objectness, self.deltas]:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and deltas of the anchors of one level [N, C, H, W], in their order.

        Logits f32 [N, H * W * per_cell], deltas f32 [N, H * W * per_cell, 4].
        """
        for layer in self.convs:
            feature = F.relu(layer(feature))
        logits = self.objectness(feature)
        deltas = self.deltas(feature)
        n, _, h, w = deltas.shape
        deltas = deltas.view(n, -1, 4, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 4)
        return logits.permute(0, 2, 3, 1).reshape(n, -1).float(), deltas.float()


@dataclass(frozen=True)
class ProposalLimits:
    """Maximum numbers of proposals, as torchvision and detectron2 name them.

    pre_nms_top_n: of each level before NMS; post_nms_top_n: of each image after NMS.
    """

    pre_nms_top_n: PositiveInt
    post_nms_top_n: PositiveInt


TRAIN_LIMITS = ProposalLimits(pre_nms_top_n=2000, post_nms_top_n=1000)
TEST_LIMITS = ProposalLimits(pre_nms_top_n=1000, post_nms_top_n=1000)


@dataclass(frozen=True)
class SampledAnchors:
    """The anchors that the losses use, of all images.

    index: i64 [S], ascending, image * A + anchor; is_positive: bool [S];
    matched_boxes: f32 [P, 4], ground truth of each positive anchor, in the same order.
    """

    index: Tensor
    is_positive: Tensor
    matched_boxes: Tensor


@dataclass(frozen=True)
class AnchorSampler:
    """Matches anchors to ground truths and samples them (Faster R-CNN, sections 3.1.2 and 3.1.3).

    positive_iou: anchors with at least this IoU, and the best anchors of each ground truth, are
    positive. negative_iou: other anchors below this IoU are negative; the rest is ignored.
    num_samples: maximum number of anchors per image.
    positive_fraction: maximum fraction of positive anchors among them.
    crowd_overlap: anchors covered by a crowd region by more than this fraction are ignored instead
    of negative.
    """

    positive_iou: Fraction = 0.7
    negative_iou: Fraction = 0.3
    num_samples: PositiveInt = 256
    positive_fraction: Fraction = 0.5
    crowd_overlap: Fraction = 0.5

    @torch.no_grad()
    def __call__(self, anchors: Tensor, targets: Targets, seeds: Tensor) -> SampledAnchors:
        """Sample from the anchors [A, 4], which are the same in each image.

        seeds: i64 [N].
        """
        num_images = len(seeds)
        truths, matched_truth, label = self._match(anchors, targets, num_images)
        image = torch.arange(num_images, device=anchors.device).repeat_interleave(len(anchors))
        label = label.ravel()
        key = random_keys(seeds[:, None], hash_boxes(anchors)).ravel()
        sampled = matching.subsample_labels(
            label, image, key, num_images, self.num_samples, self.positive_fraction
        )
        is_positive = label[sampled] == matching.POSITIVE
        positive = sampled[is_positive]
        matched_boxes = truths.boxes[image[positive], matched_truth.ravel()[positive]]
        return SampledAnchors(sampled, is_positive, matched_boxes)

    def _match(
        self, anchors: Tensor, targets: Targets, num_images: int
    ) -> tuple[matching.PaddedTargets, Tensor, Tensor]:
        """Match the anchors [A, 4] to the ground truths of each image.

        Returns the padded ground truths, the best one of each anchor, i64 [N, A], and the anchors'
        labels, i64 [N, A] (`matching.POSITIVE`, ...).
        """
        truths = matching.pad_targets(
            targets.boxes, targets.image_index, ~targets.iscrowd, num_images
        )
        matched_truth, label = matching.match_by_iou(
            truths, anchors, self.negative_iou, self.positive_iou, low_quality=True
        )
        if targets.iscrowd.any():
            crowds = matching.pad_targets(
                targets.boxes, targets.image_index, targets.iscrowd, num_images
            )
            cover = box_ops.ioa(anchors, crowds.boxes).max(dim=2).values
            in_crowd = cover > self.crowd_overlap
            label[(label == matching.NEGATIVE) & in_crowd] = matching.IGNORED
        return truths, matched_truth, label


class RPN(nn.Module):
    """Proposals from anchors, and the two losses that train them.

    strides: of the levels it reads, by name.
    sampler: selects the anchors of the losses; None: an `AnchorSampler` with its defaults.
    train_limits, test_limits: maximum numbers of proposals in training and in evaluation mode.
    min_size: proposals with a shorter side are dropped, in pixels (1e-3 in torchvision, 0 in
    detectron2).
    beta: of the smooth L1 loss (1/9 in torchvision, 0 in detectron2).
    normalize_by: divisor of both losses, the number of anchors that were `sampled` (torchvision) or
    the full `quota` of `sampler.num_samples` per image (detectron2). They differ only if anchors
    are scarce.

    Raises UserError for an unknown `normalize_by` and for a head with another number of anchors.
    """

    needs = None

    def __init__(
        self,
        head: nn.Module,
        anchors: AnchorGenerator,
        strides: Mapping[str, Size],
        sampler: AnchorSampler | None = None,
        train_limits: ProposalLimits = TRAIN_LIMITS,
        test_limits: ProposalLimits = TEST_LIMITS,
        nms_threshold: Fraction = 0.7,
        min_size: NonNegativeFloat = 0.0,
        beta: NonNegativeFloat = 0.0,
        normalize_by: str = "sampled",
    ) -> None:
        super().__init__()
        if normalize_by not in NORMALIZERS:
            raise UserError(f"proposer.normalize_by must be sampled or quota, not {normalize_by!r}")
        if getattr(head, "per_cell", anchors.per_cell) != anchors.per_cell:
            raise UserError(
                f"proposer.head.per_cell must be {anchors.per_cell}: the sizes of a level times "
                "the aspect ratios of proposer.anchors"
            )
        self.head = head
        self.anchors = anchors
        self.strides = dict(strides)
        self.sampler = sampler or AnchorSampler()
        self.train_limits = train_limits
        self.test_limits = test_limits
        self.nms_threshold = nms_threshold
        self.min_size = min_size
        self.beta = beta
        self.normalize_by = normalize_by

    def forward(self, features: Features, batch: Batch) -> tuple[Regions, Losses]:
        """Return the proposals of all images, best first within an image, and the losses.

        The losses are `rpn_objectness` and `rpn_box`; a batch without targets has none.
        """
        maps = [features[name] for name in self.strides]
        height, width = batch.images.shape[-2:]
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in maps]
        anchors = self.anchors(shapes, list(self.strides.values()), (height, width), maps[0].device)
        logits = []
        deltas = []
        for feature in maps:
            level_logits, level_deltas = self.head(feature)
            logits.append(level_logits)
            deltas.append(level_deltas)
        with torch.no_grad():
            proposals = self.select_proposals(logits, deltas, anchors, batch.sizes)
        if batch.targets is None:
            return proposals, {}
        losses = self.losses(
            torch.cat(logits, 1),
            torch.cat(deltas, 1),
            torch.cat(anchors),
            batch.targets,
            batch.seeds_or_zeros(),
        )
        return proposals, losses

    def select_proposals(
        self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor
    ) -> Regions:
        """Top k per level -> decode -> clip -> NMS within level and image -> top k per image.

        Per level, logits: [N, A]; deltas: [N, A, 4]; anchors: [A, 4]. sizes: i64 [N, 2].
        """
        limits = self.train_limits if self.training else self.test_limits
        level_boxes = []
        level_scores = []
        level_numbers = []
        level_finite = []
        for i, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
            top, index = logit.topk(min(limits.pre_nms_top_n, logit.shape[1]), dim=1)
            top_deltas = delta.gather(1, index[..., None].expand(-1, -1, 4))
            level_boxes.append(box_ops.decode(top_deltas, anchor[index], BOX_WEIGHTS))
            level_scores.append(top.sigmoid())
            # Tests the logit: the sigmoid of an infinite logit is 0 or 1.
            level_finite.append(torch.isfinite(top))
            level_numbers.append(torch.full_like(index, i))
        scores = torch.cat(level_scores, 1)
        num_images, num_candidates = scores.shape
        image = torch.arange(num_images, device=scores.device).repeat_interleave(num_candidates)
        boxes = box_ops.clip(torch.cat(level_boxes, 1).reshape(-1, 4), sizes[image])
        scores = scores.ravel()
        level = torch.cat(level_numbers, 1).ravel()
        sides = boxes[:, 2:] - boxes[:, :2]
        valid = (
            (sides > 0).all(1)
            & (sides >= self.min_size).all(1)
            & torch.isfinite(boxes).all(1)
            & torch.cat(level_finite, 1).ravel()
        )
        boxes = boxes[valid]
        scores = scores[valid]
        level = level[valid]
        image = image[valid]
        keep = nms_per_group(boxes, scores, image * len(anchors) + level, self.nms_threshold)
        keep = keep[top_per_group(scores[keep], image[keep], limits.post_nms_top_n)]
        return Regions(boxes[keep], image[keep], scores[keep])

    def losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, targets: Targets, seeds: Tensor
    ) -> Losses:
        """Return `rpn_objectness` and `rpn_box`.

        logits: [N, A]; deltas: [N, A, 4]; anchors: [A, 4]; seeds: i64 [N].
        """
        num_images, num_anchors = logits.shape
        sampled = self.sampler(anchors, targets, seeds)
        positive = sampled.index[sampled.is_positive]
        target_deltas = box_ops.encode(
            sampled.matched_boxes, anchors[positive % num_anchors], BOX_WEIGHTS
        )
        divisor: Tensor | int
        if self.normalize_by == "sampled":
            divisor = mean_count(len(sampled.index), logits)
        else:
            divisor = self.sampler.num_samples * num_images
        objectness = F.binary_cross_entropy_with_logits(
            logits.ravel()[sampled.index], sampled.is_positive.float(), reduction="sum"
        )
        box = smooth_l1_sum(deltas.reshape(-1, 4)[positive], target_deltas, self.beta)
        return {"rpn_objectness": objectness / divisor, "rpn_box": box / divisor}
