"""Applies a trained model to images: one, several, a folder, or a stream of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from io import IOBase
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from maskseg.data.sample import Sample
from maskseg.data.single_image import AnyImage
from maskseg.errors import UserError
from maskseg.evaluation.coco_results import to_original
from maskseg.inference.class_filter import ClassChoice, find_labels
from maskseg.inference.image_folder import find_images
from maskseg.inference.prediction import PLOT_MIN_SCORE, Prediction
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.structures import Batch, Categories, Outputs, Regions

BATCH_SIZE = 4  # images of a list, folder or stream that go through the model together

ImageT = TypeVar("ImageT", bound=AnyImage)


@runtime_checkable
class PredictingModel(Protocol):
    """A model that makes predictions, with or without losses."""

    def predict(self, batch: Batch) -> Outputs: ...


class Prepare(Protocol):
    """Loads and transforms images as in the evaluation (`data.single_image.SingleImage`)."""

    max_pixels: int

    def read(self, image: AnyImage) -> Tensor: ...

    def transform(self, pixels: Tensor, image_id: int = 0, file_name: str = "") -> Sample: ...

    def padded_size(self, sample: Sample) -> tuple[int, int]: ...

    def collate(self, samples: Sequence[Sample]) -> Batch: ...

    def __call__(self, pixels: Tensor, image_id: int = 0, file_name: str = "") -> Batch: ...


def original_segments(batch: Batch, outputs: Outputs, index: int = 0) -> Regions | None:
    """The segments of an image of a batch, in the frame of its file; None for models without."""
    if outputs.segments is None:
        return None
    size = batch.sizes[index].tolist()
    original_size = batch.original_sizes[index].tolist()
    return to_original(outputs.segments.to("cpu"), index, size, original_size)


def original_classes(batch: Batch, outputs: Outputs, index: int = 0) -> Tensor | None:
    """The semantic labels of an image of a batch, in the frame of its file, i64 [H, W].

    None for models without them.
    """
    if "classes" not in outputs.semantic:
        return None
    height, width = batch.sizes[index].tolist()
    original_height, original_width = batch.original_sizes[index].tolist()
    labels = outputs.semantic["classes"][index, :height, :width].cpu().numpy()
    resize = AxisAlignedTransform.resize(height, width, original_height, original_width)
    return torch.from_numpy(resize.sample(labels, -1))


class Predictor:
    """Applies a model as the evaluation does: with the same transforms, padding and pasting.

    min_score: objects below it are dropped; None keeps all that the model returns.
    classes: names or category ids of the classes to keep; None keeps all. Both are applied after
        the model's own suppression and limits.
    plot_min_score: of the objects that plots of the predictions show, where `min_score` is None.
    """

    def __init__(
        self,
        model: nn.Module,
        categories: Categories,
        prepare: Prepare,
        device: torch.device | str = "cpu",
        min_score: float | None = None,
        classes: ClassChoice | None = None,
        plot_min_score: float = PLOT_MIN_SCORE,
    ) -> None:
        model = model.to(device).eval()
        if not isinstance(model, PredictingModel):
            raise TypeError(f"a {type(model).__name__} makes no predictions")
        if min_score is not None and not 0 <= min_score <= 1:
            raise UserError(f"min_score must be in 0..1, not {min_score}")
        self.model: PredictingModel = model
        self.categories = categories
        self.prepare = prepare
        self.device = torch.device(device)
        self.min_score = min_score
        self.plot_min_score = plot_min_score if min_score is None else min_score
        self.labels = None if classes is None else find_labels(classes, categories)

    @overload
    def __call__(
        self, images: Image.Image | NDArray[np.generic] | Tensor, batch_size: int = ...
    ) -> Prediction: ...
    @overload
    # It is a list if the path is a folder. `Any` spares all other callers a check.
    def __call__(self, images: str | Path, batch_size: int = ...) -> Prediction | Any: ...
    @overload
    def __call__(
        self, images: list[ImageT] | tuple[ImageT, ...], batch_size: int = ...
    ) -> list[Prediction]: ...
    @overload
    def __call__(
        self, images: Iterator[AnyImage], batch_size: int = ...
    ) -> Iterator[Prediction]: ...
    def __call__(
        self, images: AnyImage | Iterable[AnyImage], batch_size: int = BATCH_SIZE
    ) -> Prediction | list[Prediction] | Iterator[Prediction]:
        """Predict on one image or on many.

        images: an image, as a path, a PIL image, an array or a tensor (`data.single_image` has the
            rules for shapes and values), gives a `Prediction`. A list of images, or a folder, whose
            images are taken in the order of their names, gives a list. An iterator, such as a
            generator, gives an iterator in the same order, which reads at most `batch_size` images
            ahead.
        batch_size: at most this many images of one padded size go through the model together.

        Raises UserError for what is no image, and for files that cannot be read.
        """
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, not {batch_size}")
        # Unlike `Path.is_dir`, this raises no error for names that are too long.
        if isinstance(images, str | Path) and os.path.isdir(images):  # noqa: PTH112
            return list(self._predict_all(find_images(Path(images)), batch_size))
        if isinstance(images, list | tuple):
            return list(self._predict_all(images, batch_size))
        if isinstance(images, Iterator) and not isinstance(images, IOBase):
            return self._predict_all(images, batch_size)
        if isinstance(images, str | Path | Image.Image | np.ndarray | Tensor):
            return self._predict([images])[0]
        raise UserError(
            "an image is a path, a PIL image, an array or a tensor, and several are a list, a "
            f"folder or an iterator of them, not a {type(images).__name__}"
        )

    def _predict_all(self, images: Iterable[AnyImage], batch_size: int) -> Iterator[Prediction]:
        """Predict on images in their order, `batch_size` at a time."""
        iterator = iter(images)
        start = 0
        while window := list(islice(iterator, batch_size)):
            yield from self._predict(window, start)
            start += len(window)

    def _predict(self, images: Sequence[AnyImage], start: int | None = None) -> list[Prediction]:
        """Predict on a few images. start: the number of the first one among many, for messages."""
        samples = []
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            number = None if start is None else start + i
            sample = self.prepare.transform(self._read(image, number))
            samples.append(sample)
            # Padding to the size of another image could change the result.
            groups.setdefault(self.prepare.padded_size(sample), []).append(i)
        predictions: dict[int, Prediction] = {}
        for rows in groups.values():
            batch = self.prepare.collate([samples[i] for i in rows]).to(self.device)
            outputs = self.model.predict(batch)
            outputs = replace(outputs, detections=outputs.detections.to("cpu"))
            for index, i in enumerate(rows):
                predictions[i] = self.convert(batch, outputs, index, images[i])
        return [predictions[i] for i in range(len(images))]

    def _read(self, image: AnyImage, number: int | None) -> Tensor:
        """Read an image. number: of one among many, for messages about one without a name."""
        try:
            return self.prepare.read(image)
        except UserError as error:
            if number is None or isinstance(image, str | Path):
                raise
            raise UserError(f"image {number}: {error}") from error

    def convert(
        self, batch: Batch, outputs: Outputs, index: int = 0, source: AnyImage | None = None
    ) -> Prediction:
        """The prediction for an image of a batch, in the pixels of its file.

        source: the image, for plots.
        """
        height, width = batch.original_sizes[index].tolist()
        detections = to_original(
            outputs.detections.to("cpu"), index, batch.sizes[index].tolist(), (height, width)
        )
        detections = self._select(detections)
        rles = None if detections.masks is None else tuple(detections.masks.to_rle())
        scores = outputs.image_scores
        return Prediction(
            replace(detections, masks=None),
            self.categories,
            (height, width),
            rles,
            source,
            original_segments(batch, outputs, index),
            original_classes(batch, outputs, index),
            None if scores is None else scores[index].cpu(),
            self.plot_min_score,
            self.prepare.max_pixels,
        )

    def _select(self, detections: Regions) -> Regions:
        """The detections of enough score and of the chosen classes."""
        keep = torch.ones(len(detections), dtype=torch.bool)
        if self.min_score is not None:
            keep &= detections.scores >= self.min_score
        if self.labels is not None:
            assert detections.labels is not None
            keep &= torch.isin(detections.labels, torch.tensor(self.labels, dtype=torch.int64))
        return detections if keep.all() else detections[keep]

    def outputs(
        self, pixels: Tensor, image_id: int = 0, file_name: str = ""
    ) -> tuple[Batch, Outputs]:
        """Run the model on one image.

        pixels: uint8 RGB [3, H, W]. -> the batch of that image as the model saw it, the outputs.
        """
        batch = self.prepare(pixels, image_id, file_name).to(self.device)
        return batch, self.model.predict(batch)
