"""MSRC's photographs of objects, each with one map of segments in the colours of their classes (Shotton et al. 2006)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from maskseg.data.datasets.segmentation_source import (
    SegmentedFiles,
    SegmentMap,
    found_root,
    names_in,
)
from maskseg.data.image_files import load_image, safe_join
from maskseg.errors import UserError
from maskseg.superpixels.opencv import scipy

ALL = "all"
_LISTS = {"train": "Train.txt", "val": "Validation.txt", "test": "Test.txt"}
_NESTED = (
    "MSRC_ObjCategImageDatabase_v2",
    "MSRC_ObjCategImageDatabase_v1",
)  # as the archives unpack
_LAYOUT = "a folder with Images/NAME.bmp and GroundTruth/NAME_GT.bmp, or with NAME.bmp and NAME_GT.bmp side by side"
_MOST_COLOURS = 256  # the data set has 24; a map that was saved as JPEG has thousands


class MsrcSource(SegmentedFiles):
    """MSRC v2 (folders `Images` and `GroundTruth`) or v1 (all files in one folder) as they are distributed.

    The split `all` is every image; `train`, `val` and `test` are there where their lists (Train.txt, Validation.txt, Test.txt, a file name a line)
    lie beside the images. Other keys: `SegmentedFiles`.

    Black is unlabelled. A colour says of what class a pixel is, not of which object: each connected piece of a colour, corners included, is a
    segment of its own. Two cows that stand apart would else be one segment, which nothing that grows from neighbouring pixels can find; and
    BSDS's segments are connected too. Objects of one class that touch stay one segment.
    """

    def __init__(self, root: str, split: str = ALL, **keys: Any) -> None:
        super().__init__(root, split, **keys)

    @cached_property
    def folder(self) -> Path:
        """Where the files, or their two folders, are. Raises UserError."""
        if any((Path(self.root) / name / "GroundTruth").is_dir() for name in (".", *_NESTED)):
            return found_root(self.root, _NESTED, ("Images", "GroundTruth"), _LAYOUT)
        return found_root(self.root, _NESTED, ("*_GT.bmp",), _LAYOUT)

    def splits(self) -> list[str]:
        """`all`, and those that have a list."""
        return [ALL, *(split for split, name in _LISTS.items() if (self.folder / name).is_file())]

    def _folders(self) -> tuple[Path, Path]:
        """That of the images and that of the maps."""
        nested = (self.folder / "GroundTruth").is_dir()
        return (
            (self.folder / "Images", self.folder / "GroundTruth")
            if nested
            else (self.folder, self.folder)
        )

    def _list(self, split: str) -> list[str]:
        names = [name for name in names_in(self._folders()[0], ".bmp") if not name.endswith("_GT")]
        return names if split == ALL else self._listed(self.folder / _LISTS[split], names)

    def _listed(self, path: Path, names: list[str]) -> list[str]:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as text ({error})") from error
        wanted = {
            line.strip().removesuffix(".bmp"): number
            for number, line in enumerate(lines, 1)
            if line.strip()
        }
        unknown = sorted(wanted.keys() - set(names), key=wanted.__getitem__)
        if unknown or not wanted:
            told = (
                f"line {wanted[unknown[0]]} names {unknown[0]!r}, which is no image of {self._folders()[0]}"
                if unknown
                else "no file name in it"
            )
            raise UserError(f"{path}: {told}")
        return sorted(wanted)

    def _files(self, split: str, name: str) -> tuple[Path, Path]:  # noqa: ARG002 - all splits share the folders
        images, maps = self._folders()
        return safe_join(images, f"{name}.bmp"), safe_join(maps, f"{name}_GT.bmp")

    def truths(self, split: str, index: int) -> list[SegmentMap]:
        """One map. Raises UserError for a file that is missing, damaged, of another size than the image, or not of few colours."""
        image, path = self._files(split, self.names(split)[index])
        red, green, blue = load_image(path, self.max_pixels).numpy().astype(np.int32)
        self._check_size(path, image, red.shape)
        codes = (red << 16) | (green << 8) | blue
        colours = np.unique(codes)
        if len(colours) > _MOST_COLOURS:
            raise UserError(
                f"{path}: {len(colours)} colours; a map has one for each class and must be saved without loss (BMP, not JPEG)"
            )
        return [_pieces(codes, colours[colours > 0])]


def _pieces(codes: SegmentMap, colours: SegmentMap) -> SegmentMap:
    """Connected pieces of each of the colours, numbered on from colour to colour."""
    segments = np.full(codes.shape, -1, dtype=np.int32)
    first = 0
    for colour in colours:
        numbers, count = scipy("ndimage").label(
            codes == colour, structure=np.ones((3, 3), dtype=bool)
        )
        np.copyto(segments, numbers + (first - 1), where=numbers > 0)
        first += count
    return segments
