"""Precomputed proposals (Fast R-CNN): read and transformed by the data pipeline."""

from __future__ import annotations

from torch import nn

from maskseg.errors import UserError
from maskseg.ops.nms import top_per_group
from maskseg.structures import Batch, Features, Losses, Regions
from maskseg.values import PositiveInt


class FileProposer(nn.Module):
    """The best proposals of each image in the batch, without losses.

    train_limit, test_limit: maximum number of proposals per image.
    """

    needs = "proposals"

    def __init__(self, train_limit: PositiveInt = 1000, test_limit: PositiveInt = 1000) -> None:
        super().__init__()
        self.train_limit = train_limit
        self.test_limit = test_limit

    def forward(
        self,
        features: Features,  # noqa: ARG002 - in the signature of `Proposer`
        batch: Batch,
    ) -> tuple[Regions, Losses]:
        """Return the proposals, best first within an image.

        Raises UserError for a batch without proposals.
        """
        proposals = batch.proposals
        if proposals is None:
            raise UserError(
                "the model takes its proposals from a file: set data.train_proposals and "
                "data.val_proposals (tools/propose.py writes them)"
            )
        limit = self.train_limit if self.training else self.test_limit
        return proposals[top_per_group(proposals.scores, proposals.image_index, limit)], {}
