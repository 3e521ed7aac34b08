"""Proposals that are segments: those of the batch, or made of its pixels; and which of them are learnt from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maskseg.data.collate import concatenate_regions, segment_regions
from maskseg.errors import UserError
from maskseg.masks.superpixel import SegmentProposals
from maskseg.ops.nms import top_per_group
from maskseg.structures import Batch, Features, Losses, Regions, Samples, Targets

Method = Callable[[NDArray[np.uint8]], SegmentProposals]


class SegmentProposer(nn.Module):
    """The segments that the data pipeline has read or, of images that come without, what `method` makes of their pixels (uint8 RGB [H, W, 3]).

    limit: at most so many an image, the best.
    """

    needs = "segments"  # of the data

    def __init__(self, method: Method, limit: int = 2000) -> None:
        super().__init__()
        self.method, self.limit = method, limit

    def forward(self, features: Features, batch: Batch) -> tuple[Regions, Losses]:  # noqa: ARG002 - the slot's signature
        """-> proposals with masks, best first within an image; in training those that were drawn, with labels."""
        found = self._made(batch) if batch.proposals is None else batch.proposals
        if found.masks is None:
            raise UserError(
                "the model takes segments, and data.train_proposals or data.val_proposals has boxes: set data.train_segments instead"
            )
        return found[top_per_group(found.scores, found.image_index, self.limit)], {}

    def _made(self, batch: Batch) -> Regions:
        made = []
        for index, (image, (height, width)) in enumerate(
            zip(batch.images, batch.sizes.tolist(), strict=True)
        ):
            pixels = np.ascontiguousarray(image[:, :height, :width].permute(1, 2, 0).cpu().numpy())
            made.append(segment_regions(self.method(pixels), index))
        return concatenate_regions(made).to(batch.images.device)


class DrawnSegments:
    """A `Sampler` of segments that the data pipeline has drawn: those with a label of at least 0. num_classes: K; label K is background."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, proposals: Regions, targets: Targets, seeds: Tensor) -> Samples:
        """Raises UserError for proposals that nobody has drawn from."""
        if proposals.labels is None:
            raise UserError(
                "segments are drawn by the data pipeline: data.segment_sampler is not set"
            )
        own = proposals[torch.nonzero(proposals.labels >= 0).squeeze(1)]
        labels = torch.zeros(0, dtype=torch.int64) if own.labels is None else own.labels
        return Samples(
            own.boxes,
            own.image_index,
            labels,
            torch.zeros_like(labels),
            self.num_classes,
            targets,
            seeds,
            own.masks,
        )
