"""The proposals of a dataset in one file: boxes and scores of each image, 10 bytes per proposal.

The file is memory-mapped, so that loader processes share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.files.torch_files import read_torch

FORMAT = "maskseg proposals 1"
# Steps of a coordinate along a side of its image, and of a score from 0 to 1. The rounding error of
# a coordinate is at most 0.01 pixels in an image of 1333.
_STEPS = 65535


@dataclass(frozen=True)
class ImageProposals:
    """The proposals of one image.

    boxes: f32 [R, 4], xyxy in pixels of the image file; scores: f32 [R] in [0, 1], descending.
    """

    image_id: int
    height: int
    width: int
    boxes: Tensor
    scores: Tensor


def write_proposals(path: Path, images: Iterable[ImageProposals], source: str) -> int:
    """Write the file atomically and return the number of proposals.

    source: dataset and model that the proposals are from, for messages. Raises UserError if the
    file cannot be written.
    """
    ids = []
    sizes = []
    counts = []
    boxes = []
    scores = []
    for image in images:
        sides = torch.tensor([image.width, image.height] * 2, dtype=torch.float64)
        ids.append(image.image_id)
        sizes.append((image.height, image.width))
        counts.append(len(image.boxes))
        boxes.append(_quantize(image.boxes.cpu().double() / sides))
        scores.append(_quantize(image.scores.cpu().double()))
    empty = np.zeros((0, 4), dtype=np.uint16)
    content = {
        "format": FORMAT,
        "about": source,
        "image_ids": torch.tensor(ids, dtype=torch.int64),
        "sizes": torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        "starts": torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int64),
        "boxes": torch.from_numpy(np.concatenate([empty, *boxes])),
        "scores": torch.from_numpy(np.concatenate([empty[:, 0], *scores])),
    }
    with replacing(path, "the proposals") as file:
        torch.save(content, file)
    return sum(counts)


def _quantize(fractions: Tensor) -> NDArray[np.uint16]:
    """Round values in [0, 1] to 16 bits."""
    steps: NDArray[np.float64] = (fractions.clamp(0, 1) * _STEPS).round().numpy()
    return steps.astype(np.uint16)


class ProposalFile:
    """A file of `write_proposals`, memory-mapped.

    images: id, height and width in pixels of the images that will be requested.

    Raises UserError if the file is not a proposal file, lacks one of the images, or has it with
    another size.
    """

    def __init__(self, path: Path | str, images: Iterable[tuple[int, int, int]]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file of proposals; tools/propose.py creates one")
        content = read_torch(
            self.path, "a file of proposals", "; tools/propose.py creates it again", mmap=True
        )
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path}: not a file of proposals ({FORMAT})")
        source = content.get("about")
        self.source = source if isinstance(source, str) else "an unknown dataset"
        self.starts = self._read_tensor(content, "starts", torch.int64, 1)
        self.boxes = self._read_tensor(content, "boxes", torch.uint16, 2)
        self.scores = self._read_tensor(content, "scores", torch.uint16, 1)
        image_ids = self._read_tensor(content, "image_ids", torch.int64, 1)
        sizes = self._read_tensor(content, "sizes", torch.int64, 2)
        self.rows = {image_id: row for row, image_id in enumerate(image_ids.tolist())}
        self._check_lengths(len(image_ids), sizes)
        self._check_images(list(images), sizes.tolist())

    def _read_tensor(
        self, content: dict[str, object], key: str, dtype: torch.dtype, dimensions: int
    ) -> Tensor:
        """Return a tensor of the file. Raises UserError if it is missing or of another kind."""
        if key not in content:
            raise self._damaged(f"{key} is missing")
        value = content[key]
        if not isinstance(value, Tensor) or value.dtype != dtype or value.ndim != dimensions:
            stored = type(value).__name__
            if isinstance(value, Tensor):
                stored = f"{value.dtype} {list(value.shape)}"
            raise self._damaged(f"{key} is {stored}, not {dtype} with {dimensions} dimensions")
        if not value.is_contiguous():
            raise self._damaged(f"{key} is not stored in order")
        return value

    def _check_lengths(self, count: int, sizes: Tensor) -> None:
        """Raise UserError unless each image has a size and a range of the boxes and scores."""
        total = len(self.boxes)
        if tuple(self.boxes.shape) != (total, 4) or len(self.scores) != total:
            raise self._damaged(
                f"there are {len(self.scores)} scores for boxes {list(self.boxes.shape)}"
            )
        if len(self.rows) != count:
            raise self._damaged("an image occurs twice")
        if tuple(sizes.shape) != (count, 2) or len(self.starts) != count + 1:
            raise self._damaged(
                f"there are {count} images, {list(sizes.shape)} sizes and {len(self.starts)} starts"
            )
        starts = self.starts
        is_ordered = bool((starts[1:] >= starts[:-1]).all())
        if int(starts[0]) != 0 or int(starts[-1]) != total or not is_ordered:
            raise self._damaged(f"starts does not divide the {total} boxes")

    def _damaged(self, problem: str) -> UserError:
        return UserError(
            f"{self.path}: the file of proposals is damaged: {problem}; tools/propose.py creates "
            "it again"
        )

    def _check_images(self, images: list[tuple[int, int, int]], sizes: list[list[int]]) -> None:
        """Raise UserError unless the file has all images; sizes: those of its rows."""
        mismatch = f"{self.path} is of another dataset ({self.source})"
        missing = [image_id for image_id, _, _ in images if image_id not in self.rows]
        if missing:
            raise UserError(
                f"{mismatch}: it lacks image {missing[0]} "
                f"({len(missing)} of {len(images)} are missing)"
            )
        for image_id, height, width in images:
            stored_height, stored_width = sizes[self.rows[image_id]]
            if (stored_height, stored_width) != (height, width):
                raise UserError(
                    f"{mismatch}: image {image_id} is {stored_height} x {stored_width} there, "
                    f"not {height} x {width}"
                )

    def load(self, image_id: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return boxes f32 [R, 4] in pixels of the image, and scores f32 [R], descending."""
        row = self.rows[image_id]
        proposals = slice(int(self.starts[row]), int(self.starts[row + 1]))
        boxes = _dequantize(self.boxes[proposals])
        scores = _dequantize(self.scores[proposals])
        return boxes * torch.tensor([width, height] * 2, dtype=torch.float32), scores


def _dequantize(steps: Tensor) -> Tensor:
    return torch.from_numpy(steps.numpy().astype(np.float32) / _STEPS)
