"""The regions of a COCO dataset, things and stuff, as one label map an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.data.collate import collate
from maskseg.data.dataset import CocoDataset
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.region_map import MIN_STUFF_PIXELS, region_map


class CocoSegments:
    """The ground truth of class-agnostic segmentation, from a COCO dataset (a `SegmentedSource`).

    Each object is a segment, and so is each connected region of stuff where there are semantic
    maps.
    """

    def __init__(self, source: CocoSource) -> None:
        self.source = source
        self._datasets: dict[str, CocoDataset] = {}

    def prepare(self) -> None:
        """Make what the source makes before its files are read."""
        self.source.prepare()

    def splits(self) -> list[str]:
        """The names of the splits that have a file."""
        return self.source.splits()

    def names(self, split: str) -> list[str]:
        """The file names of the images. Raises UserError for a split that is not there."""
        dataset = self._dataset(split)
        return [dataset.file.images[index].file_name for index in dataset.images]

    def image(self, split: str, index: int) -> Tensor:
        """uint8 RGB [3, H, W]. Raises UserError."""
        return self._dataset(split)[(0, index, 0)].image.contiguous()

    def ground_truths(self, split: str, index: int) -> list[NDArray[np.int64]]:
        """One map i64 [H, W], -1 where a pixel belongs to no region."""
        batch = collate([self._dataset(split)[(0, index, 0)]], divisor=1)
        return [region_map(batch, 0, split_stuff=MIN_STUFF_PIXELS)]

    def _dataset(self, split: str) -> CocoDataset:
        if split not in self._datasets:
            self._datasets[split] = self.source.dataset_with(split, [])
        return self._datasets[split]
