"""MSRC: photographs of objects, each with one color-coded class map (Shotton et al. 2006)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Unpack

import numpy as np

from maskseg.data.datasets.segmentation_source import (
    FileOptions,
    SegmentedFiles,
    SegmentMap,
    find_root,
    list_stems,
)
from maskseg.data.image_files import load_image, safe_join
from maskseg.errors import UserError
from maskseg.superpixels.opencv import scipy

ALL = "all"
_LISTS = {"train": "Train.txt", "val": "Validation.txt", "test": "Test.txt"}
_NESTED = (  # the folders in the distributed archives
    "MSRC_ObjCategImageDatabase_v2",
    "MSRC_ObjCategImageDatabase_v1",
)
_LAYOUT = (
    "a folder with Images/NAME.bmp and GroundTruth/NAME_GT.bmp, "
    "or with NAME.bmp and NAME_GT.bmp side by side"
)
_MAX_COLOURS = 256  # the dataset has 24; a map that was saved as JPEG has thousands


class MsrcSource(SegmentedFiles):
    """MSRC v2 (folders `Images` and `GroundTruth`) or v1 (all files in one folder).

    The split `all` is every image; `train`, `val` and `test` exist if their lists (Train.txt,
    Validation.txt, Test.txt, one file name per line) lie beside the images. Other keys:
    `SegmentedFiles`.

    Black is unlabelled. A color is a class, not an object. Each connected region of a color
    (8-connected) is a segment. If it was not split, two separate cows would be one segment, which
    no method that merges neighboring pixels can find; the segments of BSDS are connected too.
    Objects of one class that touch stay one segment.
    """

    def __init__(self, root: str, split: str = ALL, **keys: Unpack[FileOptions]) -> None:
        super().__init__(root, split, **keys)

    @cached_property
    def folder(self) -> Path:
        """The folder of the files, or of their two folders. Raises UserError."""
        if any((Path(self.root) / name / "GroundTruth").is_dir() for name in (".", *_NESTED)):
            return find_root(self.root, _NESTED, ("Images", "GroundTruth"), _LAYOUT)
        return find_root(self.root, _NESTED, ("*_GT.bmp",), _LAYOUT)

    def splits(self) -> list[str]:
        """Return `all` and the splits that have a list."""
        return [ALL, *(split for split, name in _LISTS.items() if (self.folder / name).is_file())]

    def _folders(self) -> tuple[Path, Path]:
        """Return the folders of the images and of the maps."""
        if (self.folder / "GroundTruth").is_dir():
            return self.folder / "Images", self.folder / "GroundTruth"
        return self.folder, self.folder

    def _list(self, split: str) -> list[str]:
        stems = list_stems(self._folders()[0], ".bmp")
        names = [name for name in stems if not name.endswith("_GT")]
        return names if split == ALL else self._read_list(self.folder / _LISTS[split], names)

    def _read_list(self, path: Path, names: list[str]) -> list[str]:
        """Return the names in a list file, sorted. Raises UserError unless all are in `names`."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as text ({error})") from error
        line_numbers = {}
        for line_number, line in enumerate(lines, 1):
            if line.strip():
                line_numbers[line.strip().removesuffix(".bmp")] = line_number
        if not line_numbers:
            raise UserError(f"{path}: no file name in it")
        unknown = line_numbers.keys() - set(names)
        if unknown:
            first = min(unknown, key=line_numbers.__getitem__)
            raise UserError(
                f"{path}: line {line_numbers[first]} names {first!r}, "
                f"which is not an image of {self._folders()[0]}"
            )
        return sorted(line_numbers)

    def _files(self, split: str, name: str) -> tuple[Path, Path]:  # noqa: ARG002 - shared by splits
        images, maps = self._folders()
        return safe_join(images, f"{name}.bmp"), safe_join(maps, f"{name}_GT.bmp")

    def ground_truths(self, split: str, index: int) -> list[SegmentMap]:
        """Return one map.

        Raises UserError for a file that is missing, damaged, of another size than the image, or
        has too many colors.
        """
        image, path = self._files(split, self.names(split)[index])
        red, green, blue = load_image(path, self.max_pixels).numpy().astype(np.int32)
        self._check_size(path, image, red.shape)
        codes = (red << 16) | (green << 8) | blue
        colours = np.unique(codes)
        if len(colours) > _MAX_COLOURS:
            raise UserError(
                f"{path}: {len(colours)} colors; a map has one for each class and must be saved "
                "without loss (BMP, not JPEG)"
            )
        return [_label_regions(codes, colours[colours > 0])]


def _label_regions(codes: SegmentMap, colours: SegmentMap) -> SegmentMap:
    """Number the connected regions of all colors, color by color."""
    segments = np.full(codes.shape, -1, dtype=np.int32)
    first = 0
    for colour in colours:
        numbers, count = scipy("ndimage").label(
            codes == colour, structure=np.ones((3, 3), dtype=bool)
        )
        np.copyto(segments, numbers + (first - 1), where=numbers > 0)
        first += count
    return segments
