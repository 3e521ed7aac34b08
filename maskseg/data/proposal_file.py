"""Proposals of a data set in one file: boxes and scores of each image, a few bytes each, shared by the loader's processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.files.torch_files import read_torch

FORMAT = "maskseg proposals 1"
_STEPS = (
    65535  # of a coordinate over the side of its image, and of a score over 1: 0.02 pixels of 1333
)


@dataclass(frozen=True)
class ImageProposals:
    """What was proposed for one image: boxes f32 [R, 4] in its file's pixels, scores f32 [R] in [0, 1], descending."""

    image_id: int
    height: int
    width: int
    boxes: Tensor
    scores: Tensor


def write_proposals(path: Path, images: Iterable[ImageProposals], about: str) -> int:
    """Writes the file, whole or not at all. about: where they are from, for messages. -> how many proposals. Raises UserError."""
    ids, sizes, counts, boxes, scores = [], [], [], [], []
    for image in images:
        sides = torch.tensor([image.width, image.height] * 2, dtype=torch.float64)
        ids.append(image.image_id)
        sizes.append((image.height, image.width))
        counts.append(len(image.boxes))
        boxes.append(_packed(image.boxes.cpu().double() / sides))
        scores.append(_packed(image.scores.cpu().double()))
    empty = np.zeros((0, 4), dtype=np.uint16)
    content = {
        "format": FORMAT,
        "about": about,
        "image_ids": torch.tensor(ids, dtype=torch.int64),
        "sizes": torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        "starts": torch.tensor([0, *np.cumsum(counts).tolist()], dtype=torch.int64),
        "boxes": torch.from_numpy(np.concatenate([empty, *boxes])),
        "scores": torch.from_numpy(np.concatenate([empty[:, 0], *scores])),
    }
    with replacing(path, "the proposals") as file:
        torch.save(content, file)
    return sum(counts)


def _packed(shares: Tensor) -> Any:
    return (shares.clamp(0, 1) * _STEPS).round().numpy().astype(np.uint16)


class ProposalFile:
    """A file of `write_proposals`, mapped into memory, not read.

    images: id, height and width of those that are asked for; each must be there. Raises UserError for a file that is none, or of another data set.
    """

    def __init__(self, path: Path | str, images: Iterable[tuple[int, int, int]]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file of proposals; tools/propose.py makes one")
        content = read_torch(
            self.path, "a file of proposals", "; tools/propose.py makes it again", mmap=True
        )
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path}: not a file of proposals ({FORMAT})")
        self.about = (
            content["about"] if isinstance(content.get("about"), str) else "an unknown data set"
        )
        self.starts, self.boxes, self.scores = (
            content["starts"],
            content["boxes"],
            content["scores"],
        )
        sizes = content["sizes"].tolist()
        self.rows = {number: row for row, number in enumerate(content["image_ids"].tolist())}
        wanted = list(images)
        missing = [number for number, _, _ in wanted if number not in self.rows]
        if missing:
            raise UserError(
                f"{path} is of another data set ({self.about}): it lacks image {missing[0]} ({len(missing)} of {len(wanted)} are missing)"
            )
        other = [(i, h, w) for i, h, w in wanted if sizes[self.rows[i]] != [h, w]]
        if other:
            number, height, width = other[0]
            stated = " x ".join(map(str, sizes[self.rows[number]]))
            raise UserError(
                f"{path} is of another data set ({self.about}): image {number} is {stated} there, not {height} x {width}"
            )

    def of(self, image_id: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Boxes f32 [R, 4] in the image's pixels and scores f32 [R], the best first."""
        row = self.rows[image_id]
        here = slice(int(self.starts[row]), int(self.starts[row + 1]))
        boxes, scores = (
            torch.from_numpy(t[here].numpy().astype(np.float32) / _STEPS)
            for t in (self.boxes, self.scores)
        )
        return boxes * torch.tensor([width, height] * 2, dtype=torch.float32), scores
