"""BSDS500: photographs, each segmented by several annotators (Arbelaez et al. 2011)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Unpack

import numpy as np

from maskseg.data.datasets.matlab import MatArray, MatError, read_mat
from maskseg.data.datasets.segmentation_source import (
    FileOptions,
    SegmentedFiles,
    SegmentMap,
    find_root,
    list_stems,
)
from maskseg.data.image_files import safe_join
from maskseg.errors import UserError

_SPLITS = ("train", "val", "test")
_NESTED = ("data", "BSDS500/data", "BSR/BSDS500/data")  # the folders in the distributed archives
_LAYOUT = "a folder with images/{train,val,test}/NAME.jpg and groundTruth/{train,val,test}/NAME.mat"


class BsdsSource(SegmentedFiles):
    """BSDS500 as distributed.

    root: the folder with `images` and `groundTruth`, or the one its archive was unpacked to. Other
    keys: `SegmentedFiles`.

    Segments have the numbers of the files minus 1; number 0 in a file is unlabelled.
    """

    def __init__(self, root: str, split: str = "val", **keys: Unpack[FileOptions]) -> None:
        super().__init__(root, split, **keys)

    @cached_property
    def folder(self) -> Path:
        """The folder of `images` and `groundTruth`. Raises UserError."""
        return find_root(self.root, _NESTED, ("images", "groundTruth"), _LAYOUT)

    def splits(self) -> list[str]:
        """Return those of train, val and test that have a folder of images.

        Raises UserError if there are none.
        """
        images = self.folder / "images"
        splits = [split for split in _SPLITS if (images / split).is_dir()]
        if not splits:
            raise UserError(f"{images}: none of the folders {', '.join(_SPLITS)} exists")
        return splits

    def _list(self, split: str) -> list[str]:
        return list_stems(self.folder / "images" / split, ".jpg")

    def _files(self, split: str, name: str) -> tuple[Path, Path]:
        image = safe_join(self.folder / "images" / split, f"{name}.jpg")
        ground_truth = safe_join(self.folder / "groundTruth" / split, f"{name}.mat")
        return image, ground_truth

    def ground_truths(self, split: str, index: int) -> list[SegmentMap]:
        """Return one map per annotator.

        Raises UserError for a file that is missing, damaged, or of another size than the image.
        """
        image, path = self._files(split, self.names(split)[index])
        try:
            maps = _read_segmentations(path)
            for array in maps:
                self._check_size(path, image, array.shape)
            return [_to_segments(array) for array in maps]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        except MatError as error:
            raise UserError(f"{path}: not a segmentation of BSDS, or damaged ({error})") from error


def _read_segmentations(path: Path) -> list[MatArray]:
    """Return the array of each annotator. Raises OSError and MatError."""
    variables = read_mat(path)
    if "groundTruth" not in variables:
        names = ", ".join(variables) or "none at all"
        raise MatError(f"it has no variable groundTruth ({names})"[:200])
    maps = [cell.field("Segmentation") for cell in variables["groundTruth"].cells()]
    if not maps:
        raise MatError("groundTruth has no segmentation")
    return maps


def _to_segments(array: MatArray) -> SegmentMap:
    numbers = array.numbers()
    # Comparisons with NaN are false, which rejects NaN.
    is_valid = (
        numbers.size
        and numbers.min() >= 0
        and numbers.max() <= np.iinfo(np.int32).max
        and (numbers == np.floor(numbers)).all()
    )
    if not is_valid:
        raise MatError("its segments are not numbered from 1 on (0: unlabelled)")
    return np.ascontiguousarray(numbers.astype(np.int32) - 1)
