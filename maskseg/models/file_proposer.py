"""Proposals that were made before (Fast R-CNN): read by the data pipeline, moved with the image, and taken from the batch."""

from __future__ import annotations

from torch import nn

from maskseg.errors import UserError
from maskseg.ops.nms import top_per_group
from maskseg.structures import Batch, Features, Losses, Regions


class FileProposer(nn.Module):
    """The best proposals of each image in the batch, without losses. train_limit, test_limit: at most so many an image."""

    needs = "proposals"  # of the data

    def __init__(self, train_limit: int = 1000, test_limit: int = 1000) -> None:
        super().__init__()
        self.train_limit, self.test_limit = train_limit, test_limit

    def forward(self, features: Features, batch: Batch) -> tuple[Regions, Losses]:  # noqa: ARG002 - the slot's signature
        """-> proposals, best first within an image."""
        if batch.proposals is None:
            raise UserError(
                "the model takes its proposals from a file: set data.train_proposals and data.val_proposals (tools/propose.py makes them)"
            )
        found, limit = batch.proposals, self.train_limit if self.training else self.test_limit
        return found[top_per_group(found.scores, found.image_index, limit)], {}
