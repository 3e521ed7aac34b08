"""Segment proposals as the proposer of a model, and the sampler that selects labeled segments."""

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
from maskseg.values import PositiveInt

Method = Callable[[NDArray[np.uint8]], SegmentProposals]


class SegmentProposer(nn.Module):
    """Return the segments of the batch or, for images without them, compute segments.

    method: uint8 RGB [H, W, 3] -> segments; called for batches whose data pipeline read none.
    limit: at most this many segments per image, the best by score.
    """

    needs = "segments"  # of the data

    def __init__(self, method: Method, limit: PositiveInt = 2000) -> None:
        super().__init__()
        self.method = method
        self.limit = limit

    def forward(
        self,
        features: Features,  # noqa: ARG002 - in the signature of `Proposer`
        batch: Batch,
    ) -> tuple[Regions, Losses]:
        """Return proposals with masks, best first within an image, and no losses.

        In training, the proposals are those that the data pipeline drew, with labels. Raises
        UserError for proposals without masks.
        """
        proposals = self._compute(batch) if batch.proposals is None else batch.proposals
        if proposals.masks is None:
            raise UserError(
                "the model needs segments, but data.train_proposals or data.val_proposals provides"
                " boxes: set data.train_segments or data.val_segments instead"
            )
        best = top_per_group(proposals.scores, proposals.image_index, self.limit)
        return proposals[best], {}

    def _compute(self, batch: Batch) -> Regions:
        """Compute the segments of each image of the batch from its pixels."""
        regions = []
        for index, (height, width) in enumerate(batch.sizes.tolist()):
            image = batch.images[index, :, :height, :width]
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
            regions.append(segment_regions(self.method(pixels), index))
        return concatenate_regions(regions).to(batch.images.device)


class DrawnSegments:
    """Select the segments that the data pipeline drew: those with a label >= 0. A `Sampler`.

    num_classes: K; label K is background.
    """

    def __init__(self, num_classes: PositiveInt) -> None:
        self.num_classes = num_classes

    def __call__(self, proposals: Regions, targets: Targets, seeds: Tensor) -> Samples:
        """Return the labeled proposals. Raises UserError for proposals without labels."""
        if proposals.labels is None:
            raise UserError(
                "the proposals have no labels; the data pipeline draws and labels segments:"
                " data.segment_sampler is not set"
            )
        drawn = proposals[torch.nonzero(proposals.labels >= 0).squeeze(1)]
        labels = torch.zeros(0, dtype=torch.int64) if drawn.labels is None else drawn.labels
        return Samples(
            drawn.boxes,
            drawn.image_index,
            labels,
            torch.zeros_like(labels),
            self.num_classes,
            targets,
            seeds,
            drawn.masks,
        )
