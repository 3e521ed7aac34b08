"""What is read with an image beside its pixels and annotations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from maskseg.data.coco.file import ImageRecord
from maskseg.data.datasets.semantic_maps import SemanticMaps
from maskseg.data.proposal_file import ProposalFile
from maskseg.data.sample import Sample
from maskseg.data.transforms import Transform
from maskseg.structures import Categories


class Reader(Protocol):
    """Adds to a sample what belongs to its image. Called before the transforms."""

    def __call__(self, sample: Sample) -> Sample: ...


class ReadProposals:
    """Adds the proposals of a file: boxes f32 [R, 4] and scores f32 [R]."""

    def __init__(self, file: ProposalFile) -> None:
        self.file = file

    def __call__(self, sample: Sample) -> Sample:
        return replace(sample, proposals=self.file.load(sample.image_id, *sample.original_size))


class ReadSemanticMap:
    """Adds the semantic map of the image: i16 [H, W], -1 where a pixel has no class."""

    def __init__(self, maps: SemanticMaps) -> None:
        self.maps = maps

    def __call__(self, sample: Sample) -> Sample:
        return replace(sample, semantic=self.maps.load(sample.file_name, *sample.original_size))


class SegmentData(Protocol):
    """Segment proposals of a dataset, for variants that classify segments."""

    folders: dict[str, str | None]  # by split

    def reader(self, split: str, records: Sequence[ImageRecord]) -> Reader:
        """What reads the segments of a split that has a folder."""

    def transform(self, categories: Categories, training: bool) -> Transform:
        """What draws the segments that are learnt from, after the other transforms."""

    def make_missing(
        self, source: Any, split: str, method: Any, context: Any, may_make: bool
    ) -> None:
        """Make the segments of a split that its folder lacks.

        source: the `CocoSource` that this belongs to; method: the config of what makes segments;
        context: the `DistributedContext`; may_make: otherwise UserError for missing segments.
        """
