"""Which proposals the region heads learn from."""

from __future__ import annotations

import torch
from torch import Tensor

from maskseg.ops import boxes as box_ops
from maskseg.ops import matching
from maskseg.ops.random_keys import box_places, random_keys
from maskseg.structures import Regions, Samples, Targets


class RegionSampler:
    """Matches proposals to truth and draws `num_samples` an image, at most `positive_fraction` of them foreground (Fast R-CNN, section 2.3).

    positive_iou: from this IoU on a region stands for the truth that it overlaps most; below, it is background.
    append_truth: the true boxes are proposals too (torchvision and detectron2 do so). Crowd regions: a region of which one covers more than
    `crowd_overlap` is no background.
    """

    def __init__(
        self,
        num_classes: int,
        num_samples: int = 512,
        positive_fraction: float = 0.25,
        positive_iou: float = 0.5,
        append_truth: bool = True,
        crowd_overlap: float = 0.5,
    ) -> None:
        self.num_classes, self.num_samples, self.positive_fraction = (
            num_classes,
            num_samples,
            positive_fraction,
        )
        self.positive_iou, self.append_truth, self.crowd_overlap = (
            positive_iou,
            append_truth,
            crowd_overlap,
        )

    @torch.no_grad()
    def __call__(self, proposals: Regions, targets: Targets, seeds: Tensor) -> Samples:
        """seeds: i64 [N]. -> at most `num_samples` regions of each image, in the proposals' order."""
        num_images = len(seeds)
        boxes, image = proposals.boxes, proposals.image_index
        if self.append_truth:
            own = ~targets.crowd
            boxes, image = (
                torch.cat([boxes, targets.boxes[own]]),
                torch.cat([image, targets.image_index[own]]),
            )
        truth = matching.pad_by_image(
            targets.boxes, targets.image_index, ~targets.crowd, num_images
        )
        overlap = box_ops.iou(boxes[:, None], truth.boxes[image])[:, 0]
        value, best = overlap.masked_fill(~truth.valid[image], -1.0).max(dim=1)
        label = (value >= self.positive_iou).long()
        if targets.crowd.any():
            crowds = matching.pad_by_image(
                targets.boxes, targets.image_index, targets.crowd, num_images
            )
            cover = matching.crowd_cover(boxes, image, crowds)
            label[(label == matching.NEGATIVE) & (cover > self.crowd_overlap)] = matching.IGNORED
        key = random_keys(seeds[image], box_places(boxes))
        drawn = matching.draw(
            label, image, key, num_images, self.num_samples, self.positive_fraction
        )
        boxes, image, foreground = boxes[drawn], image[drawn], label[drawn] == matching.POSITIVE
        matched = torch.where(foreground, truth.row[image, best[drawn]], 0)
        labels = torch.full_like(matched, self.num_classes)
        labels[foreground] = targets.labels[matched[foreground]]
        return Samples(boxes, image, labels, matched, self.num_classes, targets, seeds)
