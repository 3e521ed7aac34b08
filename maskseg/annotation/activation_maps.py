"""Class activation maps of a data set's classes, image by image, for GrabCut's seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from maskseg.annotation.cam import ActivationModel, CAMModel, translated
from maskseg.visualization.cam import at_pixels

STRIDE = 32  # networks see images whose sides are multiples of it


Side = int | tuple[int, int] | None
ClassMap = tuple[float, NDArray[np.float32]]  # a score in [0, 1] and a map of any numbers [H, W]


class Maps(Protocol):
    """Where an image shows classes."""

    def __call__(self, image: NDArray[np.uint8], labels: Sequence[int]) -> list[ClassMap | None]:
        """image: uint8 RGB [H, W, 3]; labels: n classes. -> n scores and maps, None for a class that has none."""


@dataclass(frozen=True)
class ClassMaps:
    """The maps of a classifier, which is built in each process that asks for one.

    build: -> the classifier, in evaluation mode; equal ones (a frozen dataclass) build it once; members: for each class of the data set, the
    classifier's classes that it is the union of, none of a class that it does not know; side: how large the network sees images, see `seen_size`;
    device: as torch names it. It computes with one thread: the results must not hang on their number.
    """

    build: Callable[[], ActivationModel]
    members: tuple[tuple[int, ...], ...]
    side: Side = 448
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8], labels: Sequence[int]) -> list[ClassMap | None]:
        height, width = image.shape[:2]
        known = [label for label in labels if self.members[label]]
        if not known:
            return [None] * len(labels)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            model, seen = built(self.build, self.device), seen_size(height, width, self.side)
            pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(
                self.device
            )
            pixels = F.interpolate(pixels.float(), seen, mode="bilinear", antialias=True)
            logits, maps = model.activation(model.normalised(pixels))
            _, own, scores = translated(
                logits, maps, model.probabilities(logits), [self.members[label] for label in known]
            )
            large = at_pixels(own[0].float().cpu(), model.level, seen, (height, width))
            found = dict(
                zip(
                    known,
                    zip(
                        scores[0].tolist(), np.asarray(large.numpy(), dtype=np.float32), strict=True
                    ),
                    strict=True,
                )
            )
            return [found.get(label) for label in labels]
        finally:
            torch.set_num_threads(threads)


@dataclass(frozen=True)
class Published:
    """Builds torchvision's classifier of a name. weights: as `CAMModel` takes them; mark: what changes with the content of a file of weights."""

    name: str
    weights: str
    mark: str = ""

    def __call__(self) -> CAMModel:
        return CAMModel(self.name, self.weights)

    def side(self) -> Side:
        """A larger one than the 224 pixels of the training: maps get finer, and objects are smaller in these images than in ImageNet's."""
        return 448


def seen_size(height: int, width: int, side: Side) -> tuple[int, int]:
    """An image's size as the network sees it, about in its own shape: multiples of STRIDE, at least one.

    side: pixels of the longer side; or of the shorter one, and at most of the longer; None: as it is.
    """
    scale = 1.0
    if isinstance(side, int):
        scale = side / max(height, width)
    elif side is not None:
        scale = min(side[0] / min(height, width), side[1] / max(height, width))
    return max(1, round(height * scale / STRIDE)) * STRIDE, max(
        1, round(width * scale / STRIDE)
    ) * STRIDE


@cache
def built(build: Callable[[], ActivationModel], device: str) -> ActivationModel:
    """The classifier on a device, once in a process."""
    model = build()
    if isinstance(model, torch.nn.Module):
        model.to(device)
    return model
