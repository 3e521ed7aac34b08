"""What a model finds in one image: boxes, masks, keypoints, and ways to draw and convert them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.image_files import MAX_PIXELS, load_image
from maskseg.errors import UserError
from maskseg.evaluation.coco_results import Row, image_rows, segment_rows, write_results
from maskseg.files import replacing
from maskseg.files.outputs import check_outputs
from maskseg.inference.class_filter import ClassChoice, find_labels
from maskseg.masks.base import Rle, decode_crop, rle_areas, rle_to_bitmaps
from maskseg.masks.polygons import TOLERANCE, mask_to_polygons
from maskseg.masks.superpixel import SegmentMasks
from maskseg.structures import Categories, Regions
from maskseg.visualization.detections import draw_detections
from maskseg.visualization.keypoints import Keypoints
from maskseg.visualization.layout import RGBImage
from maskseg.visualization.segments import draw_segments
from maskseg.visualization.semantic import draw_semantic

if TYPE_CHECKING:
    import pandas
    import supervision

PLOT_MIN_SCORE = 0.5  # of the objects that are drawn, where nothing else is asked for
PLOTS = ("objects", "segments", "classes")
_MAX_NAMED = 4  # classes in a `repr`
_IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}

Index = int | slice | Sequence[int] | Sequence[bool] | NDArray[np.generic] | Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """The objects that a model finds in an image, in the pixels of the image, by falling score.

    `len` is the number D of objects; an index, slice or mask selects some of them as another
    `Prediction`, and iterating yields one for each object. Masks are kept as RLE.

    detections: boxes, scores, labels and keypoints; size: (height, width) of the image;
    rles: the masks, None for a model without masks; source: the image file, or the pixels that
    were read, uint8 RGB [H, W, 3], for plots;
    segment_regions: the segments of a model that cuts images into segments, the largest first;
    classes: i64 [H, W], the label of each pixel, -1 for none, of a model that labels pixels;
    image_scores: f32 [K] of an image classifier;
    plot_min_score: score of the objects that are drawn, at least; max_pixels: limit of image files.
    """

    detections: Regions
    categories: Categories
    size: tuple[int, int]
    rles: tuple[Rle, ...] | None = None
    source: str | Path | RGBImage | None = None
    segment_regions: Regions | None = None
    classes: Tensor | None = None
    image_scores: Tensor | None = None
    plot_min_score: float = PLOT_MIN_SCORE
    max_pixels: int = MAX_PIXELS

    @property
    def boxes(self) -> Tensor:
        """f32 [D, 4], xyxy in continuous pixels."""
        return self.detections.boxes

    @property
    def scores(self) -> Tensor:
        """f32 [D], descending."""
        return self.detections.scores

    @property
    def labels(self) -> Tensor:
        """i64 [D], in 0..K-1; `categories` has the names and the ids of the data."""
        assert self.detections.labels is not None
        return self.detections.labels

    @property
    def names(self) -> list[str]:
        """The class names of the D objects."""
        return [self.categories.names[label] for label in self.labels.tolist()]

    @property
    def keypoints(self) -> Tensor | None:
        """f32 [D, P, 3], x, y, score; zeros for keypoints that the class does not have.

        None for a model without keypoints.
        """
        return self.detections.keypoints

    @property
    def masks(self) -> Tensor:
        """bool [D, H, W], decoded at each access: D bytes for each pixel of the image.

        `prediction[i].masks[0]` decodes one mask; `areas`, `polygons` and `rles` need none. Raises
        UserError for a model without masks.
        """
        if not len(self):
            return torch.zeros((0, *self.size), dtype=torch.bool)
        return torch.from_numpy(rle_to_bitmaps(self._masks()))

    @property
    def areas(self) -> Tensor:
        """i64 [D], number of pixels of each mask. Raises UserError for a model without masks."""
        return torch.from_numpy(rle_areas(self._masks()))

    @property
    def segments(self) -> Tensor | None:
        """i32 [H, W], the segment of each pixel, the largest first; None without segments."""
        if self.segment_regions is None:
            return None
        assert isinstance(self.segment_regions.masks, SegmentMasks)
        return torch.from_numpy(self.segment_regions.masks.label_maps()[0])

    @property
    def image(self) -> RGBImage:
        """The image, uint8 RGB [H, W, 3], a copy; read again where it was given as a path.

        Raises UserError for a file that cannot be read, and without a `source`.
        """
        if self.source is None:
            raise UserError("the prediction has no image: it was made without its source")
        if isinstance(self.source, np.ndarray):
            return self.source.copy()
        pixels = load_image(self.source, self.max_pixels)
        if tuple(pixels.shape[1:]) != self.size:
            raise UserError(f"{self._name()}: the image has changed since the prediction")
        return to_rgb_array(pixels)

    @property
    def path(self) -> Path | None:
        """The image file, None for an image that was given otherwise."""
        return Path(self.source) if isinstance(self.source, str | Path) else None

    def __len__(self) -> int:
        return len(self.detections)

    def __getitem__(self, index: Index) -> Prediction:
        """Select objects by a number, a slice, numbers, or one bool for each object.

        Raises IndexError for a number or a length that does not fit.
        """
        positions = torch.arange(len(self))
        if isinstance(index, slice):  # torch has no negative steps
            rows = torch.tensor(range(len(self))[index], dtype=torch.int64)
        else:
            selector = torch.as_tensor(index).cpu()
            if not selector.numel():
                selector = selector.to(torch.int64)
            rows = positions[selector].reshape(-1)
        rles = None if self.rles is None else tuple(self.rles[i] for i in rows.tolist())
        return replace(self, detections=self.detections[rows], rles=rles)

    def __iter__(self) -> Iterator[Prediction]:
        for i in range(len(self)):
            yield self[i]

    def __repr__(self) -> str:
        height, width = self.size
        names = self.names
        counts = {name: names.count(name) for name in dict.fromkeys(names)}
        shown = [f"{count} {name}" for name, count in counts.items()][:_MAX_NAMED]
        more = ["..."] if len(counts) > _MAX_NAMED else []
        objects = f"{len(self)} object{'s' if len(self) != 1 else ''}"
        found = f"{objects}: {', '.join([*shown, *more])}" if shown else objects
        return f"Prediction({self._name()}, {height} x {width}, {found})"

    def filter(
        self, min_score: float | None = None, classes: ClassChoice | None = None
    ) -> Prediction:
        """Select the objects of at least `min_score` and of some classes.

        classes: names, or category ids of the data. Plots then show objects from `min_score` on.
        Raises UserError for a class that the model does not know.
        """
        keep = torch.ones(len(self), dtype=torch.bool)
        if min_score is not None:
            keep &= self.scores >= min_score
        if classes is not None:
            labels = find_labels(classes, self.categories)
            keep &= torch.isin(self.labels, torch.tensor(labels, dtype=torch.int64))
        selected = self[keep]
        return selected if min_score is None else replace(selected, plot_min_score=min_score)

    def polygons(self, tolerance: float = TOLERANCE) -> list[list[NDArray[np.float64]]]:
        """The outlines of the D masks, each a list of f64 [points, 2] (x, y), the largest first.

        In continuous pixels, with holes filled. tolerance: see `masks.polygons`; 0 is exact.
        Raises UserError for a model without masks.
        """
        polygons = []
        for rle in self._masks():
            crop, left, top = decode_crop(rle)
            offset = np.array([left, top])
            polygons.append([outline + offset for outline in mask_to_polygons(crop, tolerance)])
        return polygons

    def plot(self, what: str = "objects", min_score: float | None = None) -> Image.Image:
        """Draw the prediction over the image.

        what: `objects` (masks, boxes, keypoints, names and scores), `segments`, or `classes` (of
            pixels, with a legend).
        min_score: of the objects that are drawn; by default that of `filter` or `maskseg.load`,
            else that of `tools/predict.py`.
        A small image is enlarged, so that labels are legible. Raises UserError for what the model
        does not predict, and for an image that cannot be read.
        """
        if what not in PLOTS:
            raise UserError(f"plot: there are {', '.join(PLOTS)}, not {what!r}")
        if what == "segments":
            segments = self.segments
            if segments is None:
                raise UserError("plot: the model predicts no segments")
            return Image.fromarray(draw_segments(self.image, segments.numpy()))
        if what == "classes":
            if self.classes is None:
                raise UserError("plot: the model does not label pixels")
            names = self.categories.names
            return Image.fromarray(draw_semantic(self.image, self.classes.numpy(), names))
        keypoints = None
        if self.keypoints is not None:
            keypoints = Keypoints(self.keypoints, self.categories.skeleton_edges)
        drawing = draw_detections(
            self.image,
            self.boxes,
            self.labels,
            self.scores,
            self.rles,
            self.categories.names,
            min_score=self.plot_min_score if min_score is None else min_score,
            keypoints=keypoints,
        )
        return Image.fromarray(drawing)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the plot (.png, .jpg, .webp) or all objects as COCO results (.json). -> the path.

        Raises UserError for another suffix, and for a file that exists, unless `overwrite` is set.
        The image itself is never replaced.
        """
        path = Path(path)
        image_format = _IMAGE_FORMATS.get(path.suffix.lower())
        if image_format is None and path.suffix.lower() != ".json":
            suffixes = ", ".join(_IMAGE_FORMATS)
            raise UserError(f"save: {path} is no name of a plot ({suffixes}) or of results (.json)")
        if not overwrite or (self.path is not None and path.resolve() == self.path.resolve()):
            check_outputs([path], [self.path], key="save")
        if image_format is None:
            write_results(path, self.to_coco())
            return path
        drawing = self.plot()
        with replacing(path, "the plot") as file:
            drawing.save(file, format=image_format)
        return path

    def to_coco(self, image_id: int = 1) -> list[Row]:
        """The objects as rows of COCO's result format, with category ids of the data."""
        return image_rows(image_id, self.detections, self.categories, self.rles)

    def segments_to_coco(self, image_id: int = 1) -> list[Row]:
        """The segments as rows of COCO's result format, without a class; [] without segments."""
        if self.segment_regions is None:
            return []
        return segment_rows(image_id, self.segment_regions)

    def to_pandas(self) -> pandas.DataFrame:
        """The objects as a table.

        Columns: name, score, x1, y1, x2, y2, label, category_id, and area in pixels for a model
        with masks. Raises UserError without the package pandas.
        """
        columns: dict[str, object] = {"name": self.names, "score": self.scores.numpy()}
        for i, column in enumerate(("x1", "y1", "x2", "y2")):
            columns[column] = self.boxes[:, i].numpy()
        columns["label"] = self.labels.numpy()
        columns["category_id"] = [self.categories.ids[label] for label in self.labels.tolist()]
        if self.rles is not None:
            columns["area"] = self.areas.numpy()
        return _import("pandas", "to_pandas").DataFrame(columns)

    def to_supervision(self) -> supervision.Detections:
        """The objects as `supervision.Detections`, with masks [D, H, W] and `class_name`.

        `class_id` is the label. Raises UserError without the package supervision.
        """
        package = _import("supervision", "to_supervision")
        return package.Detections(
            xyxy=self.boxes.numpy().astype(np.float32).reshape(-1, 4),
            mask=None if self.rles is None else self.masks.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def _masks(self) -> tuple[Rle, ...]:
        if self.rles is None and len(self):
            raise UserError("the model predicts no masks, only boxes")
        return self.rles or ()

    def _name(self) -> str:
        """The name of the image in messages."""
        return "image" if self.path is None else self.path.name


def to_rgb_array(pixels: Tensor) -> RGBImage:
    """Convert an image, uint8 RGB [3, H, W], to an array [H, W, 3]."""
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _import(package: str, method: str) -> ModuleType:
    """Import an optional package. Raises UserError if it is absent."""
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(
            f"{method}() needs the package {package}: pip install {package} ({error})"
        ) from error
