"""The segment proposals of a dataset: read from folders, and drawn from for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypedDict, Unpack

from maskseg.config import Config
from maskseg.data.coco.file import ImageRecord
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.sample import Sample
from maskseg.engine.distributed import DistributedContext
from maskseg.structures import Categories
from maskseg.values import Fraction, PositiveFraction, PositiveInt
from maskseg.variants.cfm.draw import DrawSegments
from maskseg.variants.cfm.prepare import image_sizes, make_missing_segments, run_on_local_rank_zero
from maskseg.variants.cfm.sampling import SegmentSampler
from maskseg.variants.cfm.settings import SamplerSettings
from maskseg.variants.cfm.store import SegmentStore


class SamplerOptions(TypedDict, total=False):
    """The fields of `SamplerSettings`."""

    num_samples: PositiveInt
    thing_fraction: Fraction
    stuff_fraction: Fraction
    positive_iou: PositiveFraction
    negative_iou: tuple[Fraction, Fraction]
    min_purity: PositiveFraction
    max_negative_purity: Fraction
    overlap: Fraction
    stuff_rule: str
    append_truth: bool
    crowd_overlap: Fraction


class ReadSegments:
    """Adds the segments of a store to a sample."""

    def __init__(self, store: SegmentStore) -> None:
        self.store = store

    def __call__(self, sample: Sample) -> Sample:
        return replace(sample, segments=self.store.load(sample.image_id, *sample.original_size))


class FolderSegments:
    """Segment proposals in one folder a split (`maskseg.data.readers.SegmentData`).

    folders: by split; None where a split has none.
    sampler: fields of `SamplerSettings`.

    Raises UserError for values out of range.
    """

    def __init__(
        self, folders: Mapping[str, str | None], **sampler: Unpack[SamplerOptions]
    ) -> None:
        self.folders = dict(folders)
        self.sampler = SamplerSettings(**sampler)

    def make_sampler(self, num_things: int, num_classes: int) -> SegmentSampler:
        """The sampler for this many classes, the things first."""
        return SegmentSampler(num_things, num_classes, self.sampler)

    def reader(self, split: str, records: Sequence[ImageRecord]) -> ReadSegments:
        """What reads the segments of a split that has a folder.

        Raises UserError for a folder that lacks the segments of an image.
        """
        folder = self.folders[split]
        assert folder is not None
        return ReadSegments(SegmentStore(folder, image_sizes(records)))

    def transform(self, categories: Categories, training: bool) -> DrawSegments:
        """The draw of the segments that are learnt from."""
        sampler = self.make_sampler(categories.num_things, len(categories))
        return DrawSegments(sampler, training)

    def make_missing(
        self,
        source: CocoSource,
        split: str,
        method: Config,
        context: DistributedContext,
        may_make: bool,
    ) -> None:
        """Make the segments that the folder of a split lacks, in one process of each machine.

        method: the config of what makes segments. may_make: otherwise, raise UserError for
        missing ones. Raises UserError for a folder that was made with other settings.
        """
        folder = self.folders[split]
        assert folder is not None
        make = partial(make_missing_segments, source, split, folder, method, may_make)
        run_on_local_rank_zero(context, make)
