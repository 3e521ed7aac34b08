"""Images that people have divided into segments: a data set as the tools for segments see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskseg.data.datasets.coco import check_numbers
from maskseg.data.image_files import MAX_PIXELS, image_size, load_image
from maskseg.errors import UserError

SegmentMap = NDArray[
    np.int32
]  # [H, W], the number of each pixel's segment, -1 where it is unlabelled


class SegmentedSource(Protocol):
    """A data set with maps of segments. The methods raise UserError, which names the file."""

    def prepare(self) -> None:
        """Makes what can be made before the files are read."""

    def splits(self) -> list[str]: ...
    def names(self, split: str) -> list[str]:
        """The images of a split, in the order of their indices."""

    def image(self, split: str, index: int) -> Tensor:
        """uint8 RGB [3, H, W]."""

    def truths(self, split: str, index: int) -> list[SegmentMap]:
        """The map of each annotator, all of the image's size."""


class SegmentedFiles(ABC):
    """What data sets of the user's own files have in common.

    split: the one that is asked for where none is named; max_images: only the first so many of each split; test_transforms, divisor and the
    numbers of classes and points: for a network that looks at the images (see `data.source`), unused here.
    """

    def __init__(
        self,
        root: str,
        split: str,
        max_pixels: int = MAX_PIXELS,
        max_images: int | None = None,
        test_transforms: Sequence[Any] = (),
        divisor: int = 32,
        num_classes: int | None = None,
        num_things: int | None = None,
        point_ranges: Sequence[Sequence[int]] | None = None,
    ) -> None:
        check_numbers(
            {"max_pixels": 1, "max_images": 1, "divisor": 1},
            max_pixels=max_pixels,
            max_images=max_images,
            divisor=divisor,
        )
        self.root, self.split, self.max_pixels, self.max_images = (
            root,
            split,
            max_pixels,
            max_images,
        )
        self.test_transforms, self.divisor, self.num_classes = (
            list(test_transforms),
            divisor,
            num_classes,
        )
        self.num_things, self.point_ranges = num_things, point_ranges
        self._names: dict[str, list[str]] = {}

    def prepare(self) -> None:  # noqa: B027 - a subclass may have something to make
        """Nothing: the files are the user's own."""

    @abstractmethod
    def splits(self) -> list[str]:
        """The splits there are. Raises UserError where there is none."""

    @abstractmethod
    def truths(self, split: str, index: int) -> list[SegmentMap]:
        """The map of each annotator. Raises UserError for files that are missing or damaged, or of another size than the image."""

    @abstractmethod
    def _list(self, split: str) -> list[str]:
        """The names of all images of a split that there is, sorted."""

    @abstractmethod
    def _files(self, split: str, name: str) -> tuple[Path, Path]:
        """An image's file and that of its truth."""

    def names(self, split: str) -> list[str]:
        """The images of a split, sorted. Raises UserError for a split that there is not, without an image, or with one that has no truth."""
        if split not in self._names:
            if split not in self.splits():
                raise UserError(f"split={split}: {self.root} has {', '.join(self.splits())}")
            names = self._list(split)[: self.max_images]
            missing = [
                path
                for path in (self._files(split, name)[1] for name in names)
                if not path.is_file()
            ]
            if missing:
                raise UserError(
                    f"{missing[0]}: no such file, but there is the image ({len(missing)} of {len(names)} images have no segmentation)"
                )
            self._names[split] = names
        return self._names[split]

    def image(self, split: str, index: int) -> Tensor:
        """uint8 RGB [3, H, W]. Raises UserError for a file that cannot be read."""
        return load_image(self._files(split, self.names(split)[index])[0], self.max_pixels)

    def _check_size(self, path: Path, image: Path, shape: Sequence[int]) -> None:
        size = image_size(image, self.max_pixels)
        if tuple(shape) != size:
            told = " x ".join(map(str, shape))
            raise UserError(
                f"{path}: the segmentation is {told} (height x width), its image {size[0]} x {size[1]}"
            )


def names_in(folder: Path, ending: str) -> list[str]:
    """The names, without the ending, of the files in a folder, sorted. Raises UserError where there is none."""
    names = sorted(path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))
    if not names:
        raise UserError(f"{folder}: no file *{ending} in this folder")
    return names


def found_root(root: str, nested: Sequence[str], marks: Sequence[str], told: str) -> Path:
    """Of the folder and those that its archive unpacks to, the first that has all of `marks`. Raises UserError, with `told`, where none has."""
    folders = [Path(root), *(Path(root) / name for name in nested)]
    for folder in folders:
        if all(any(folder.glob(mark)) for mark in marks):
            return folder
    raise UserError(
        f"data.root={root}: {'no such folder' if not folders[0].is_dir() else 'not found there'}: {told}"
    )
