"""Semantic maps: a one-channel PNG beside each image whose pixels are category ids (COCO-stuff's way)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.images import MAX_PIXELS, safe_join
from maskseg.errors import UserError

_MODES = {"L": 255, "P": 255, "I;16": 65535}  # the value that stands for no category


class SemanticMaps:
    """The maps of a folder: that of `a/b.jpg` is `a/b.png` there. Raises UserError where there is no such folder."""

    def __init__(self, folder: Path | str, key: str, max_pixels: int = MAX_PIXELS, ids: Sequence[int] | None = None) -> None:
        """key: what messages call the folder; ids: of label 0, 1 ..., where the maps are to have labels instead of ids."""
        self.folder, self.max_pixels, self.ids = Path(folder), max_pixels, ids
        if not self.folder.is_dir():
            raise UserError(f"{key}={folder}: no such folder of semantic maps")

    def of(self, file_name: str, height: int, width: int) -> Tensor:
        """The map of an image: i16 [height, width], -1 where a pixel has no category, or one that has no label. Raises UserError."""
        path = safe_join(self.folder, str(PurePosixPath(file_name).with_suffix(".png")))
        try:
            with Image.open(path, formats=("PNG",)) as image:
                if image.size != (width, height) or width * height > self.max_pixels:
                    raise UserError(f"{path}: the semantic map is {image.size[1]} x {image.size[0]} (height x width), the image {height} x {width}")
                if image.mode not in _MODES:
                    raise UserError(f"{path}: a semantic map has one channel of category ids, this one is of mode {image.mode}")
                none, ids = _MODES[image.mode], np.asarray(image).astype(np.int64)
        except UserError:
            raise
        except Exception as error:  # decoders raise almost anything on damaged data
            raise UserError(f"{path}: the semantic map cannot be read ({error})") from error
        ids[ids == none] = -1
        if ids.max() > np.iinfo(np.int16).max:
            raise UserError(f"{path}: category id {ids.max()} of the semantic map is above {np.iinfo(np.int16).max}")
        return torch.from_numpy((ids if self.ids is None else self._labels(ids)).astype(np.int16))

    def _labels(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        label = np.full(max(int(ids.max()), *(self.ids or [0])) + 2, -1, dtype=np.int64)  # the last one: id -1
        label[list(self.ids or ())] = np.arange(len(self.ids or ()))
        return label[ids]
