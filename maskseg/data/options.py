"""The settings of a dataset: its splits, how they are read, and how batches are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maskseg.data.coco.parse import CROWDS, Crowds
from maskseg.data.image_files import MAX_PIXELS
from maskseg.data.transforms import Transform
from maskseg.errors import UserError


def check_numbers(minima: Mapping[str, int], **values: int | None) -> None:
    """Raise UserError for a data key that is no integer or is below its minimum.

    `max_images` may be None: no limit.
    """
    for name, value in values.items():
        if value is None and name == "max_images":
            continue
        if type(value) is not int or value < minima[name]:
            minimum = minima[name]
            raise UserError(
                f"data.{name} must be a whole number of at least {minimum}, not {value!r}"
            )


@dataclass(frozen=True)
class Split:
    """One split of a dataset, and the files that belong to it.

    name: `train` or `val`, as in the keys `data.<name>_json`.
    json: the COCO file, or several that are read as one; None where the dataset has no such split.
    images: the folder that file names in the JSON are relative to.
    transforms: the training transforms, or those of the validation.
    proposals: a file of `tools/propose.py`; semantic: a folder of semantic maps.
    """

    name: str
    json: str | Sequence[str] | None = None
    images: str | None = None
    transforms: Sequence[Transform] = ()
    proposals: str | None = None
    semantic: str | None = None

    @property
    def key(self) -> str:
        """The command-line key and value of the JSON, for messages."""
        if self.json is None or isinstance(self.json, str):
            return f"data.{self.name}_json={self.json}"
        return f"data.{self.name}_json=[{','.join(self.json)}]"

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
    """

    keep_empty: bool = True
    check_images: bool = True
    max_pixels: int = MAX_PIXELS
    skip_bad: int = 0
    max_images: int | None = None
    crowds: Crowds = "ignore"

    def __post_init__(self) -> None:
        if self.crowds not in CROWDS:
            raise UserError(f"data.crowds must be {' or '.join(CROWDS)}, not {self.crowds!r}")
        minima = {"max_images": 1, "skip_bad": 0}
        check_numbers(minima, max_images=self.max_images, skip_bad=self.skip_bad)


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

    num_workers: int = 2
    timeout: float = 120.0
    divisor: int = 32
    group_by_aspect: bool = True
    repeat_threshold: float = 0.0

    def __post_init__(self) -> None:
        minima = {"num_workers": 0, "divisor": 1}
        check_numbers(minima, num_workers=self.num_workers, divisor=self.divisor)


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

    num_classes: int | None = None
    num_things: int | None = None
    point_ranges: Sequence[Sequence[int]] | None = None
    flip_pairs: Sequence[Sequence[str]] | None = None
    stuff_json: str | None = None
    semantic_encoding: str = "ids"
