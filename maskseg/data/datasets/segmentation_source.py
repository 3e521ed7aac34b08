"""Datasets of images with label maps of segments, as the segmentation tools use them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.data.image_files import MAX_PIXELS, image_size, load_image
from maskseg.data.transforms import Transform
from maskseg.errors import UserError
from maskseg.values import Divisor, NonNegativeInt, PositiveInt, check_arguments

SegmentMap = NDArray[np.int32]  # [H, W], the number of each pixel's segment, -1 for unlabelled


class SegmentedSource(Protocol):
    """A dataset with label maps of segments. The methods raise UserError, which names the file."""

    def prepare(self) -> None:
        """Create what has to exist before the files are read."""

    def splits(self) -> list[str]:
        """Return the names of the splits."""

    def names(self, split: str) -> list[str]:
        """Return the images of a split, in the order of their indices."""

    def image(self, split: str, index: int) -> Tensor:
        """Return an image, uint8 RGB [3, H, W]."""

    def ground_truths(self, split: str, index: int) -> list[SegmentMap]:
        """Return one label map per annotator, each of the image's size."""


class FileOptions(TypedDict, total=False):
    """The arguments of `SegmentedFiles` but for `root` and `split`."""

    max_pixels: PositiveInt
    max_images: PositiveInt | None
    test_transforms: Sequence[Transform]
    divisor: Divisor
    num_classes: PositiveInt | None
    num_things: NonNegativeInt | None
    point_ranges: Sequence[Sequence[NonNegativeInt]] | None


class SegmentedFiles(ABC):
    """Base class of the datasets that are read from the files as distributed.

    split: the default split; max_images: use only the first images of each split, at most this
    many. test_transforms, divisor, num_classes, num_things and point_ranges configure a network
    that runs on the images (see `maskseg.data.datasets.coco`); they are not used here.
    """

    def __init__(
        self,
        root: str,
        split: str,
        max_pixels: PositiveInt = MAX_PIXELS,
        max_images: PositiveInt | None = None,
        test_transforms: Sequence[Transform] = (),
        divisor: Divisor = 32,
        num_classes: PositiveInt | None = None,
        num_things: NonNegativeInt | None = None,
        point_ranges: Sequence[Sequence[NonNegativeInt]] | None = None,
    ) -> None:
        check_arguments(
            SegmentedFiles.__init__,
            "data",
            max_pixels=max_pixels,
            max_images=max_images,
            divisor=divisor,
        )
        self.root = root
        self.split = split
        self.max_pixels = max_pixels
        self.max_images = max_images
        self.test_transforms = list(test_transforms)
        self.divisor = divisor
        self.num_classes = num_classes
        self.num_things = num_things
        self.point_ranges = point_ranges
        self._names: dict[str, list[str]] = {}

    def prepare(self) -> None:  # noqa: B027 - optional for subclasses
        """Do nothing: the files are the user's."""

    @abstractmethod
    def splits(self) -> list[str]:
        """Return the splits that exist. Raises UserError if there are none."""

    @abstractmethod
    def ground_truths(self, split: str, index: int) -> list[SegmentMap]:
        """Return one label map per annotator.

        Raises UserError for files that are missing, damaged, or of another size than the image.
        """

    @abstractmethod
    def _list(self, split: str) -> list[str]:
        """Return the names of all images of an existing split, sorted."""

    @abstractmethod
    def _files(self, split: str, name: str) -> tuple[Path, Path]:
        """Return the image file and the ground-truth file of an image."""

    def names(self, split: str) -> list[str]:
        """Return the images of a split, sorted.

        Raises UserError for a split that does not exist or has no images, and for images without
        ground truth.
        """
        if split not in self._names:
            if split not in self.splits():
                raise UserError(f"split={split}: {self.root} has {', '.join(self.splits())}")
            names = self._list(split)[: self.max_images]
            ground_truth_files = [self._files(split, name)[1] for name in names]
            missing = [path for path in ground_truth_files if not path.is_file()]
            if missing:
                raise UserError(
                    f"{missing[0]}: no such file, but the image exists "
                    f"({len(missing)} of {len(names)} images have no segmentation)"
                )
            self._names[split] = names
        return self._names[split]

    def image(self, split: str, index: int) -> Tensor:
        """Return an image, uint8 RGB [3, H, W]. Raises UserError if it cannot be read."""
        return load_image(self._files(split, self.names(split)[index])[0], self.max_pixels)

    def _check_size(self, path: Path, image: Path, shape: Sequence[int]) -> None:
        """Raise UserError if a segmentation's shape differs from the size of its image."""
        size = image_size(image, self.max_pixels)
        if tuple(shape) != size:
            stated = " x ".join(map(str, shape))
            raise UserError(
                f"{path}: the segmentation is {stated} (height x width), "
                f"its image {size[0]} x {size[1]}"
            )


def list_stems(folder: Path, suffix: str) -> list[str]:
    """Return the names, without the suffix, of the files in a folder, sorted.

    Raises UserError if there are none.
    """
    names = sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))
    if not names:
        raise UserError(f"{folder}: no file *{suffix} in this folder")
    return names


def find_root(root: str, nested: Sequence[str], patterns: Sequence[str], layout_hint: str) -> Path:
    """Find the folder of a dataset, which may be nested where its archive was unpacked.

    nested: the folders below `root` to try after `root` itself; patterns: globs that all must
    match in the folder; layout_hint: the expected layout, for the message. Raises UserError if no
    folder matches.
    """
    folders = [Path(root), *(Path(root) / name for name in nested)]
    for folder in folders:
        if all(any(folder.glob(pattern)) for pattern in patterns):
            return folder
    problem = "not found there" if folders[0].is_dir() else "no such folder"
    raise UserError(f"data.root={root}: {problem}: {layout_hint}")
