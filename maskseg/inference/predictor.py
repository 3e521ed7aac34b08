"""Applies a trained model to images: one, several, a folder, or a stream of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from io import IOBase
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, overload, runtime_checkable

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
from maskseg.inference.prediction import PLOT_MIN_SCORE, Prediction, to_rgb_array
from maskseg.ops.geometry import AxisAlignedTransform
from maskseg.structures import Batch, Categories, Outputs, Regions
from maskseg.visualization.layout import RGBImage

BATCH_SIZE = 4  # images of a list, folder or stream that go through the model together

ImageT = TypeVar("ImageT", bound=AnyImage)


@runtime_checkable
class PredictingModel(Protocol):
    """A model that makes predictions, with or without losses."""

    def predict(self, batch: Batch) -> Outputs: ...


class _LoadedImage(NamedTuple):
    """An image that is ready for a batch; source: its file, or the pixels that were read."""

    sample: Sample
    source: str | Path | RGBImage


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
            ahead. Each image is read before the next one is taken, so that all may be one buffer.
        batch_size: at most this many images of one padded size go through the model together.

        Raises UserError for values that are not images, and for files that cannot be read.
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
            return self._predict([self._load(images)])[0]
        raise UserError(
            "an image is a path, a PIL image, an array or a tensor, and several are a list, a "
            f"folder or an iterator of them, not a {type(images).__name__}"
        )

    def _predict_all(self, images: Iterable[AnyImage], batch_size: int) -> Iterator[Prediction]:
        """Predict on images in their order, `batch_size` at a time."""
        window: list[_LoadedImage] = []
        for number, image in enumerate(images):
            # Read it now: the next image may be in the same buffer.
            window.append(self._load(image, number))
            if len(window) == batch_size:
                predictions = self._predict(window)
                window = []
                yield from predictions
        yield from self._predict(window)

    def _predict(self, images: Sequence[_LoadedImage]) -> list[Prediction]:
        """Predict on a few images."""
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            # Padding to the size of another image could change the result.
            groups.setdefault(self.prepare.padded_size(image.sample), []).append(i)
        predictions: dict[int, Prediction] = {}
        for rows in groups.values():
            batch = self.prepare.collate([images[i].sample for i in rows]).to(self.device)
            outputs = self.model.predict(batch)
            outputs = replace(outputs, detections=outputs.detections.to("cpu"))
            for index, i in enumerate(rows):
                predictions[i] = self.convert(batch, outputs, index, images[i].source)
        return [predictions[i] for i in range(len(images))]

    def _load(self, image: AnyImage, number: int | None = None) -> _LoadedImage:
        """Read an image and apply the transforms.

        number: of an image among several, for messages about one without a name.
        """
        try:
            pixels = self.prepare.read(image)
        except UserError as error:
            if number is None or isinstance(image, str | Path):
                raise
            raise UserError(f"image {number}: {error}") from error
        source = image if isinstance(image, str | Path) else to_rgb_array(pixels)
        return _LoadedImage(self.prepare.transform(pixels), source)

    def convert(
        self,
        batch: Batch,
        outputs: Outputs,
        index: int = 0,
        source: str | Path | RGBImage | None = None,
    ) -> Prediction:
        """The prediction for an image of a batch, in the pixels of its file.

        source: the image file, or its pixels as uint8 RGB [H, W, 3], for plots.
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
