"""BSDS500: photographs, each divided into segments by several people (Arbelaez et al. 2011)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from maskseg.data.datasets.matlab import MatArray, MatError, read_mat
from maskseg.data.datasets.segmentation_source import (
    SegmentedFiles,
    SegmentMap,
    found_root,
    names_in,
)
from maskseg.data.image_files import safe_join
from maskseg.errors import UserError

_SPLITS = ("train", "val", "test")
_NESTED = ("data", "BSDS500/data", "BSR/BSDS500/data")  # as the archive unpacks
_LAYOUT = "a folder with images/{train,val,test}/NAME.jpg and groundTruth/{train,val,test}/NAME.mat"


class BsdsSource(SegmentedFiles):
    """BSDS500 as it is distributed. root: the folder that holds `images` and `groundTruth`, or what its archive was unpacked to.

    Segments have the files' numbers less one; what the files number 0 is unlabelled. Other keys: `SegmentedFiles`.
    """

    def __init__(self, root: str, split: str = "val", **keys: Any) -> None:
        super().__init__(root, split, **keys)

    @cached_property
    def folder(self) -> Path:
        """Where `images` and `groundTruth` are. Raises UserError."""
        return found_root(self.root, _NESTED, ("images", "groundTruth"), _LAYOUT)

    def splits(self) -> list[str]:
        """Those of train, val and test that have a folder of images. Raises UserError where there is none."""
        found = [split for split in _SPLITS if (self.folder / "images" / split).is_dir()]
        if not found:
            raise UserError(
                f"{self.folder / 'images'}: none of the folders {', '.join(_SPLITS)} is there"
            )
        return found

    def _list(self, split: str) -> list[str]:
        return names_in(self.folder / "images" / split, ".jpg")

    def _files(self, split: str, name: str) -> tuple[Path, Path]:
        return safe_join(self.folder / "images" / split, f"{name}.jpg"), safe_join(
            self.folder / "groundTruth" / split, f"{name}.mat"
        )

    def truths(self, split: str, index: int) -> list[SegmentMap]:
        """The map of each annotator. Raises UserError for a file that is missing, damaged, or of another size than the image."""
        image, path = self._files(split, self.names(split)[index])
        try:
            variables = read_mat(path)
            if "groundTruth" not in variables:
                raise MatError(
                    f"it has no variable groundTruth ({', '.join(variables) or 'none at all'})"[
                        :200
                    ]
                )
            maps = [cell.field("Segmentation") for cell in variables["groundTruth"].cells()]
            if not maps:
                raise MatError("groundTruth has no segmentation")
            for array in maps:
                self._check_size(path, image, array.shape)
            return [_segments(array) for array in maps]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
        except MatError as error:
            raise UserError(f"{path}: not a segmentation of BSDS, or damaged ({error})") from error


def _segments(array: MatArray) -> SegmentMap:
    numbers = array.numbers()
    # A comparison with NaN is false, and so refuses it.
    if not (
        numbers.size
        and numbers.min() >= 0
        and numbers.max() <= np.iinfo(np.int32).max
        and (numbers == np.floor(numbers)).all()
    ):
        raise MatError("its segments are not numbered from 1 on, or from 0 where unlabelled")
    return np.ascontiguousarray(numbers.astype(np.int32) - 1)
