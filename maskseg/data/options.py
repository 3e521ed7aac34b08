"""The settings of a dataset: its splits, how they are read, and how batches are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from maskseg.data.coco.parse import CROWDS, Crowds
from maskseg.data.image_files import MAX_PIXELS
from maskseg.data.transforms import Transform
from maskseg.errors import UserError
from maskseg.values import (
    Divisor,
    Fraction,
    NonNegativeInt,
    PositiveInt,
    Range,
    WorkerCount,
    check_fields,
)


@dataclass(frozen=True)
class Split:
    """One split of a dataset, and the files that belong to it.

    name: `train` or `val`, as in the keys `data.<name>_json`.
    json: the COCO file, or several that are read as one; None where the dataset has no such split.
    images: the folder that file names in the JSON are relative to.
    transforms: the training transforms, or those of the validation.
    proposals: a file of `tools/propose.py`; semantic: a folder of semantic maps.
    part_of: the split whose files these are, where both splits are parts of one file.
    """

    name: str
    json: str | Sequence[str] | None = None
    images: str | None = None
    transforms: Sequence[Transform] = ()
    proposals: str | None = None
    semantic: str | None = None
    part_of: str | None = None

    @property
    def json_key(self) -> str:
        """The command-line key of the JSON."""
        return f"data.{self.part_of or self.name}_json"

    @property
    def key(self) -> str:
        """The command-line key and value of the JSON, for messages."""
        if self.json is None or isinstance(self.json, str):
            return f"{self.json_key}={self.json}"
        return f"{self.json_key}=[{','.join(self.json)}]"

    @property
    def files(self) -> list[str]:
        """The COCO files, none where the dataset has no such split."""
        if self.json is None:
            return []
        return [self.json] if isinstance(self.json, str) else list(self.json)

    def single_file(self) -> str:
        """The only COCO file. Raises UserError if there are several or none."""
        if len(self.files) != 1:
            raise UserError(f"{self.key}: this needs exactly one file, not {len(self.files)}")
        return self.files[0]


@dataclass(frozen=True)
class ReadOptions:
    """How the images of a split are read.

    keep_empty: train on images without objects too (crowds do not count as objects).
    check_images: read the header of every image before the first step.
    max_pixels: larger images are refused.
    skip_bad: at most this many unreadable training images are replaced by others in a run.
    max_images: use only the first images of each split, at most this many.
    crowds: how annotations with iscrowd=1 are read: `ignore`, as regions that are neither learned
        nor counted as wrong, or `objects`.
    val_fraction: share of the images of the training file that are validation images instead, where
        the dataset has no validation file (`maskseg.data.coco.split`); None: no such split.
    """

    keep_empty: bool = True
    check_images: bool = True
    max_pixels: PositiveInt = MAX_PIXELS
    skip_bad: NonNegativeInt = 0
    max_images: PositiveInt | None = None
    crowds: Crowds = "ignore"
    val_fraction: Annotated[float, Range(gt=0, lt=1)] | None = None

    def __post_init__(self) -> None:
        if self.crowds not in CROWDS:
            raise UserError(f"data.crowds must be {' or '.join(CROWDS)}, not {self.crowds!r}")
        check_fields(self, "data")


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are loaded.

    num_workers: loader processes; their number changes the speed and nothing else.
    timeout: seconds without a batch after which a loader process counts as hung.
    divisor: batches are padded to a multiple of this number of pixels.
    group_by_aspect: portrait and landscape images never share a batch.
    repeat_threshold: images of classes that occur in a smaller share of all images are
        repeated (LVIS: 0.001; Gupta et al., "LVIS", CVPR 2019); 0 repeats none.
    """

    num_workers: WorkerCount = 2
    timeout: Annotated[float, Range(gt=0, le=604_800)] = 120.0
    divisor: Divisor = 32
    group_by_aspect: bool = True
    repeat_threshold: Fraction = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "data")


@dataclass(frozen=True)
class ClassOptions:
    """What is known about the classes, and what names the classes of stuff.

    num_classes, num_things, point_ranges: read from the data where they are None. A number of
        classes or ranges of keypoints that differ from the data are an error.
    flip_pairs: pairs of keypoint names that change places when an image is flipped; None: those
        with `left` and `right` in their names.
    stuff_json: a file that names classes of stuff, which follow the classes of things.
    semantic_encoding: what the values of semantic maps mean, one of `semantic_maps.ENCODINGS`.
    """

    num_classes: PositiveInt | None = None
    num_things: NonNegativeInt | None = None
    point_ranges: Sequence[Sequence[NonNegativeInt]] | None = None
    flip_pairs: Sequence[Sequence[str]] | None = None
    stuff_json: str | None = None
    semantic_encoding: str = "ids"
