"""Semantic maps: beside each image, a one-channel PNG whose pixels say a category id, in one of the ways that data sets have."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.image_files import MAX_PIXELS, safe_join
from maskseg.errors import UserError

_MODES = ("L", "P", "I;16")
_TOPS = (255, 65535)  # the highest values of 8 and 16 bits
HIGHEST = int(np.iinfo(np.int16).max)
_WRONG = -2  # in a table: no value of the encoding


@dataclass(frozen=True)
class Encoding:
    """How the values of a map stand for category ids: `value + shift` for one of `values`, nothing for one of `none` (without any: for the highest
    that the file can hold). No other value may occur.

    stuff: the ids that classes of stuff have, None for any; other: the id that a pixel has instead of one that no class has, None for none.
    """

    values: range
    none: tuple[int, ...] = ()
    shift: int = 0
    stuff: range | None = None
    other: int | None = None

    def told(self) -> str:
        """The values, for messages."""
        return f"{self.values.start} to {self.values.stop - 1}" + "".join(
            f", {value} for none" for value in self.none
        )


_COCO_STUFF = range(92, 183)
ENCODINGS = {
    "ids": Encoding(range(HIGHEST + 1)),
    "stuffthing": Encoding(
        range(182), (255,), 1, _COCO_STUFF
    ),  # COCO-stuff's maps of things and stuff
    "pixelmaps": Encoding(
        _COCO_STUFF, (0, 183), 0, _COCO_STUFF
    ),  # its maps of stuff alone; 183 is any thing
    "voc": Encoding(range(21), (255,)),  # 0 is background, 255 void
}


def encoding_of(name: str) -> Encoding:
    """The one of that name. Raises UserError."""
    if name not in ENCODINGS:
        raise UserError(f"data.semantic_encoding={name}: there are {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


class SemanticMaps:
    """The maps of a folder: that of `a/b.jpg` is `a/b.png` there. Raises UserError where there is no such folder."""

    suffix = ".png"

    def __init__(
        self,
        folder: Path | str,
        key: str,
        max_pixels: int = MAX_PIXELS,
        ids: Sequence[int] | None = None,
        encoding: Encoding = ENCODINGS["ids"],
    ) -> None:
        """key: what messages call the folder; ids: of label 0, 1 ..., where the maps are to have labels instead of ids."""
        self.folder, self.max_pixels, self.ids, self.encoding = (
            Path(folder),
            max_pixels,
            ids,
            encoding,
        )
        if not self.folder.is_dir():
            raise UserError(f"{key}={folder}: no such folder of semantic maps")
        self._tables = {top: self._table(top) for top in _TOPS}

    def of(self, file_name: str, height: int, width: int) -> Tensor:
        """The map of an image: i16 [height, width], -1 where a pixel has no category, or one that has no label. Raises UserError."""
        path = safe_join(self.folder, str(PurePosixPath(file_name).with_suffix(self.suffix)))
        values = self._values(path, height, width)
        found = self._tables[int(np.iinfo(values.dtype).max)][values]
        if found.min(initial=0) == _WRONG:
            wrong = int(values[found == _WRONG].max())
            if self.encoding == ENCODINGS["ids"]:
                raise UserError(
                    f"{path}: category id {wrong} of the semantic map is above {HIGHEST}"
                )
            raise UserError(
                f"{path}: {wrong} is no value of such a semantic map ({self.encoding.told()})"
            )
        return torch.from_numpy(found)

    def _values(self, path: Path, height: int, width: int) -> NDArray[Any]:
        """uint8 or uint16 [height, width], as the file has them. Raises UserError."""
        return read_values(path, height, width, self.max_pixels)

    def _table(self, top: int) -> NDArray[np.int16]:
        """What each value 0..top becomes."""
        encoding, table = self.encoding, np.full(top + 1, _WRONG, dtype=np.int16)
        found = [value + encoding.shift for value in encoding.values if value <= top]
        if self.ids is not None:
            label = {number: label for label, number in enumerate(self.ids)}
            other = -1 if encoding.other is None else label.get(encoding.other, -1)
            found = [label.get(number, other) for number in found]
        table[encoding.values.start : encoding.values.start + len(found)] = found
        table[list(encoding.none or (top,))] = -1
        return table


def read_values(
    path: Path, height: int, width: int, max_pixels: int, what: str = "semantic map"
) -> NDArray[Any]:
    """The values of a one-channel PNG, uint8 or uint16 [height, width], the indices of one with a palette. Raises UserError."""
    return read_png(
        path, height, width, max_pixels, what, _MODES, "has one channel of category ids"
    )


def read_png(
    path: Path,
    height: int,
    width: int,
    max_pixels: int,
    what: str,
    modes: Collection[str],
    told: str,
) -> NDArray[Any]:
    """The values of a PNG of one of Pillow's `modes`; told: what others lack. Raises UserError."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            check_header(image, path, height, width, max_pixels, what)
            if image.mode not in modes:
                raise UserError(f"{path}: a {what} {told}, this one is of mode {image.mode}")
            return np.array(image)
    except UserError:
        raise
    except Exception as error:  # decoders raise almost anything on damaged data
        raise UserError(f"{path}: the {what} cannot be read ({error})") from error


def check_header(
    image: Image.Image,
    path: Path,
    height: int,
    width: int,
    max_pixels: int,
    what: str = "semantic map",
) -> None:
    """Raises UserError for a map of another size than its image, or too large to decode."""
    if image.size != (width, height) or width * height > max_pixels:
        raise UserError(
            f"{path}: the {what} is {image.size[1]} x {image.size[0]} (height x width), the image {height} x {width}"
        )
