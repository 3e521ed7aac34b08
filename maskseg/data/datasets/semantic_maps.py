"""Semantic maps: one-channel PNG files, one per image, whose values encode category ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.image_files import MAX_PIXELS, safe_join
from maskseg.errors import UserError

_MODES = ("L", "P", "I;16")
_MAX_VALUES = (255, 65535)  # of 8 and 16 bits
MAX_ID = int(np.iinfo(np.int16).max)
_INVALID = -2  # marks values that the encoding does not have


@dataclass(frozen=True)
class Encoding:
    """How the values of a map encode category ids. Other values than those named are errors.

    values: values of labelled pixels; the category id is `value + shift`;
    ignore_values: values of unlabelled pixels; if empty, the highest value of the file's dtype;
    stuff: the ids of stuff classes, None for any;
    background_id: the id given to pixels of categories without a label, None to leave them
    unlabelled.
    """

    values: range
    ignore_values: tuple[int, ...] = ()
    shift: int = 0
    stuff: range | None = None
    background_id: int | None = None

    def describe(self) -> str:
        """Describe the values, for messages."""
        parts = [f"{self.values.start} to {self.values.stop - 1}"]
        parts += [f"{value} for unlabelled" for value in self.ignore_values]
        return ", ".join(parts)


_COCO_STUFF = range(92, 183)
ENCODINGS = {
    "ids": Encoding(range(MAX_ID + 1)),
    # COCO-Stuff's maps of things and stuff.
    "stuffthing": Encoding(range(182), (255,), shift=1, stuff=_COCO_STUFF),
    # COCO-Stuff's maps of stuff alone; 183 is any thing.
    "pixelmaps": Encoding(_COCO_STUFF, (0, 183), stuff=_COCO_STUFF),
    # 0 is background, 255 void.
    "voc": Encoding(range(21), (255,)),
}


def encoding_of(name: str) -> Encoding:
    """Return the encoding of this name. Raises UserError for an unknown name."""
    if name not in ENCODINGS:
        raise UserError(f"data.semantic_encoding={name}: there are {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


class SemanticMaps:
    """The semantic maps of a folder; the map of the image `a/b.jpg` is `a/b.png` there.

    key: name of the folder in messages; ids: the category id of each label, to convert ids to
    labels; None: keep the ids. Raises UserError if the folder does not exist.
    """

    suffix = ".png"

    def __init__(
        self,
        folder: Path | str,
        key: str,
        max_pixels: int = MAX_PIXELS,
        ids: Sequence[int] | None = None,
        encoding: Encoding = ENCODINGS["ids"],
    ) -> None:
        self.folder = Path(folder)
        self.max_pixels = max_pixels
        self.ids = ids
        self.encoding = encoding
        if not self.folder.is_dir():
            raise UserError(f"{key}={folder}: no such folder of semantic maps")
        self._tables = {max_value: self._lookup_table(max_value) for max_value in _MAX_VALUES}

    def load(self, file_name: str, height: int, width: int) -> Tensor:
        """Read the map of an image: i16 [height, width], -1 for pixels without category or label.

        Raises UserError.
        """
        path = safe_join(self.folder, str(PurePosixPath(file_name).with_suffix(self.suffix)))
        values = self._read_values(path, height, width)
        semantic = self._tables[int(np.iinfo(values.dtype).max)][values]
        if semantic.min(initial=0) == _INVALID:
            invalid = int(values[semantic == _INVALID].max())
            if self.encoding == ENCODINGS["ids"]:
                raise UserError(
                    f"{path}: category id {invalid} of the semantic map is above {MAX_ID}"
                )
            raise UserError(
                f"{path}: {invalid} is not a value of such a semantic map "
                f"({self.encoding.describe()})"
            )
        return torch.from_numpy(semantic)

    def _read_values(self, path: Path, height: int, width: int) -> NDArray[np.unsignedinteger]:
        """Return the values as in the file, uint8 or uint16 [height, width]. Raises UserError."""
        return read_values(path, height, width, self.max_pixels)

    def _lookup_table(self, max_value: int) -> NDArray[np.int16]:
        """Return the id or label of each value 0..max_value, i16 [max_value + 1]."""
        encoding = self.encoding
        table = np.full(max_value + 1, _INVALID, dtype=np.int16)
        entries = [value + encoding.shift for value in encoding.values if value <= max_value]
        if self.ids is not None:
            label_of_id = {category_id: label for label, category_id in enumerate(self.ids)}
            background = -1
            if encoding.background_id is not None:
                background = label_of_id.get(encoding.background_id, -1)
            entries = [label_of_id.get(category_id, background) for category_id in entries]
        start = encoding.values.start
        table[start : start + len(entries)] = entries
        table[list(encoding.ignore_values or (max_value,))] = -1
        return table


def read_values(
    path: Path, height: int, width: int, max_pixels: int, kind: str = "semantic map"
) -> NDArray[np.unsignedinteger]:
    """Read a one-channel PNG, uint8 or uint16 [height, width]; of palette images the indices.

    kind: what the file is, for messages. Raises UserError.
    """
    expected = "has one channel of category ids"
    return read_png(path, height, width, max_pixels, kind, _MODES, expected)


def read_png(
    path: Path,
    height: int,
    width: int,
    max_pixels: int,
    kind: str,
    modes: Collection[str],
    expected: str,
) -> NDArray[np.unsignedinteger]:
    """Read a PNG of one of Pillow's `modes`.

    kind: what the file is; expected: what such a file has; both for messages. Raises UserError.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            check_header(image, path, height, width, max_pixels, kind)
            if image.mode not in modes:
                raise UserError(f"{path}: a {kind} {expected}, this file is of mode {image.mode}")
            return np.array(image)
    except UserError:
        raise
    except Exception as error:  # decoders raise many types of errors on damaged data
        raise UserError(f"{path}: the {kind} cannot be read ({error})") from error


def check_header(
    image: Image.Image,
    path: Path,
    height: int,
    width: int,
    max_pixels: int,
    kind: str = "semantic map",
) -> None:
    """Raise UserError for a map of another size than its image, or too large to decode."""
    if image.size != (width, height) or width * height > max_pixels:
        raise UserError(
            f"{path}: the {kind} is {image.size[1]} x {image.size[0]} (height x width), "
            f"the image {height} x {width}"
        )
