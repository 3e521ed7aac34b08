"""The regions of a COCO data set, things and stuff, as one label map an image: truth for segments without classes."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from maskseg.data.collate import collate
from maskseg.data.dataset import CocoDataset
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.region_map import MIN_STUFF, region_map


class CocoSegments:
    """A `SegmentedSource` of a COCO one: each instance is a segment, and so is each connected piece of stuff where there are semantic maps."""

    def __init__(self, source: CocoSource) -> None:
        self.source = source
        self._datasets: dict[str, CocoDataset] = {}

    def prepare(self) -> None:
        """As of the source."""
        self.source.prepare()

    def splits(self) -> list[str]:
        """Those that have a file."""
        return self.source.splits()

    def names(self, split: str) -> list[str]:
        """File names. Raises UserError for a split that is not there."""
        return [self._dataset(split).file.images[i].file_name for i in self._dataset(split).images]

    def image(self, split: str, index: int) -> Tensor:
        """uint8 RGB [3, H, W]. Raises UserError."""
        return self._dataset(split)[(0, index, 0)].image.contiguous()

    def truths(self, split: str, index: int) -> list[NDArray[Any]]:
        """One map i64 [H, W], -1 where the truth does not say."""
        batch = collate([self._dataset(split)[(0, index, 0)]], divisor=1)
        return [region_map(batch, 0, split_stuff=MIN_STUFF)]

    def _dataset(self, split: str) -> CocoDataset:
        if split not in self._datasets:
            dataset = self.source.dataset(split)
            dataset.transforms, dataset.superpixels, dataset.skip_bad = [], None, 0
            self._datasets[split] = dataset
        return self._datasets[split]
