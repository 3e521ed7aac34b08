"""Class activation maps of a data set's classes for one image at a time, as input for GrabCut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from maskseg.annotation.cam import ActivationModel, CAMModel, merge_classes
from maskseg.visualization.cam import resample_to_pixels

STRIDE = 32  # px; the sides of the network's input are multiples of it


Side = int | tuple[int, int] | None
ScoredMap = tuple[float, NDArray[np.float32]]  # score in [0, 1], map [H, W] of any values


class ActivationMapper(Protocol):
    """Computes scores and activation maps of classes for an image."""

    def __call__(self, image: NDArray[np.uint8], labels: Sequence[int]) -> list[ScoredMap | None]:
        """image: uint8 RGB [H, W, 3]; labels: n class indices.

        Returns n scores and maps, None for a class without a map.
        """


@dataclass(frozen=True)
class ClassActivationMaps:
    """Activation maps of a classifier, which is built once in each process.

    build: builds the classifier in evaluation mode; equal builders (frozen dataclasses) share it.
    members: for each class of the data set the classifier's classes whose union it is, () if the
    classifier does not know it.
    side: input size of the network, see `network_input_size`.
    device: a torch device name.

    Inference uses a single thread: the results must not depend on the number of threads.
    """

    build: Callable[[], ActivationModel]
    members: tuple[tuple[int, ...], ...]
    side: Side = 448
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8], labels: Sequence[int]) -> list[ScoredMap | None]:
        known = [label for label in labels if self.members[label]]
        if not known:
            return [None] * len(labels)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            maps = self._compute(image, known)
        finally:
            torch.set_num_threads(threads)
        return [maps.get(label) for label in labels]

    def _compute(self, image: NDArray[np.uint8], labels: Sequence[int]) -> dict[int, ScoredMap]:
        """Scores and maps of classes that the classifier knows, by class index."""
        height, width = image.shape[:2]
        model = build_classifier(self.build, self.device)
        input_size = network_input_size(height, width, self.side)
        channels_first = np.ascontiguousarray(image.transpose(2, 0, 1))
        pixels = torch.from_numpy(channels_first)[None].to(self.device)
        pixels = F.interpolate(pixels.float(), input_size, mode="bilinear", antialias=True)
        logits, maps = model.activation(model.normalise(pixels))
        _, class_maps, scores = merge_classes(
            logits, maps, model.probabilities(logits), [self.members[label] for label in labels]
        )
        cell_maps = class_maps[0].float().cpu()
        image_maps = resample_to_pixels(cell_maps, model.level, input_size, (height, width))
        scored_maps = {}
        for label, score, image_map in zip(
            labels, scores[0].tolist(), np.asarray(image_maps.numpy(), np.float32), strict=True
        ):
            scored_maps[label] = (score, image_map)
        return scored_maps


@dataclass(frozen=True)
class TorchvisionClassifier:
    """Builder of a torchvision classifier.

    name, weights: see `CAMModel`; checksum: of a weights file, so that builders of different
    contents differ.
    """

    name: str
    weights: str
    checksum: str = ""

    def __call__(self) -> CAMModel:
        return CAMModel(self.name, self.weights)

    def side(self) -> Side:
        """The default input size.

        Larger than the 224 px of the training: maps become finer, and objects in these images are
        smaller than in ImageNet's.
        """
        return 448


def network_input_size(height: int, width: int, side: Side) -> tuple[int, int]:
    """Input size (height, width) of the network for an image; multiples of STRIDE, at least one.

    side: px of the longer side, or (px of the shorter side, maximum of the longer side); None keeps
    the image's size. The aspect ratio is preserved up to rounding.
    """
    scale = 1.0
    if isinstance(side, int):
        scale = side / max(height, width)
    elif side is not None:
        scale = min(side[0] / min(height, width), side[1] / max(height, width))
    rows = max(1, round(height * scale / STRIDE))
    columns = max(1, round(width * scale / STRIDE))
    return rows * STRIDE, columns * STRIDE


@cache
def build_classifier(build: Callable[[], ActivationModel], device: str) -> ActivationModel:
    """Build the classifier on a device; cached, once per process."""
    model = build()
    if isinstance(model, torch.nn.Module):
        model.to(device)
    return model
