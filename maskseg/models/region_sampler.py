"""Sampling of the proposals that the region heads are trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from maskseg.ops import boxes as box_ops
from maskseg.ops import matching
from maskseg.ops.random_keys import hash_boxes, random_keys
from maskseg.structures import Regions, Samples, Targets
from maskseg.values import Fraction, PositiveInt


class RegionSampler:
    """Matches proposals to ground truths and samples them (Fast R-CNN, section 2.3).

    num_classes: K, the label of background. num_samples: maximum number of regions per image.
    positive_fraction: maximum fraction of foreground regions among them.
    positive_iou: a region with at least this IoU is foreground and matches the ground truth with
    the highest IoU; other regions are background.
    append_truth: add the ground truth boxes to the proposals, as torchvision and detectron2 do.
    crowd_overlap: regions covered by a crowd region by more than this fraction are ignored instead
    of background.
    """

    def __init__(
        self,
        num_classes: PositiveInt,
        num_samples: PositiveInt = 512,
        positive_fraction: Fraction = 0.25,
        positive_iou: Fraction = 0.5,
        append_truth: bool = True,
        crowd_overlap: Fraction = 0.5,
    ) -> None:
        self.num_classes = num_classes
        self.num_samples = num_samples
        self.positive_fraction = positive_fraction
        self.positive_iou = positive_iou
        self.append_truth = append_truth
        self.crowd_overlap = crowd_overlap

    @torch.no_grad()
    def __call__(self, proposals: Regions, targets: Targets, seeds: Tensor) -> Samples:
        """Return at most `num_samples` regions per image, in the proposals' order.

        seeds: i64 [N].
        """
        num_images = len(seeds)
        boxes = proposals.boxes
        image = proposals.image_index
        if self.append_truth:
            is_object = ~targets.iscrowd
            boxes = torch.cat([boxes, targets.boxes[is_object]])
            image = torch.cat([image, targets.image_index[is_object]])
        truths = matching.pad_targets(
            targets.boxes, targets.image_index, ~targets.iscrowd, num_images
        )
        iou = box_ops.iou(boxes[:, None], truths.boxes[image])[:, 0]
        best_iou, best_truth = iou.masked_fill(~truths.valid[image], -1.0).max(dim=1)
        label = (best_iou >= self.positive_iou).long()
        if targets.iscrowd.any():
            crowds = matching.pad_targets(
                targets.boxes, targets.image_index, targets.iscrowd, num_images
            )
            in_crowd = matching.max_crowd_ioa(boxes, image, crowds) > self.crowd_overlap
            label[(label == matching.NEGATIVE) & in_crowd] = matching.IGNORED
        key = random_keys(seeds[image], hash_boxes(boxes))
        sampled = matching.subsample_labels(
            label, image, key, num_images, self.num_samples, self.positive_fraction
        )
        boxes = boxes[sampled]
        image = image[sampled]
        foreground = label[sampled] == matching.POSITIVE
        matched_gt = torch.where(foreground, truths.row[image, best_truth[sampled]], 0)
        labels = torch.full_like(matched_gt, self.num_classes)
        labels[foreground] = targets.labels[matched_gt[foreground]]
        return Samples(boxes, image, labels, matched_gt, self.num_classes, targets, seeds)
