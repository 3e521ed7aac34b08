"""What flows between the stages: every field's shape, dtype, unit and frame.

Letters used in shapes throughout the project:
N images, G ground truths, R regions, D detections, K classes, P keypoints, A anchors, C channels, H x W pixels, S the side of a grid.

Boxes are xyxy in continuous pixel coordinates (width = x2 - x1; pixel i covers [i, i + 1)). Labels are 0..K-1, background is K.
Batches are flat: `image_index` says which image of the batch a row belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from maskseg.masks.base import Masks

_SIDE = re.compile(r"(?<![a-z])(left|right|l|r)(?![a-z])")
_WORDS = re.compile(r"(?<=[a-z])(?=[A-Z])")  # leftEye
_OTHER = {"left": "right", "right": "left", "l": "r", "r": "l"}


T = TypeVar("T")
Features = dict[str, Tensor]  # level name -> [N, C, H / stride, W / stride], finest first
Losses = dict[str, Tensor]  # term -> scalar, to be summed


@dataclass(frozen=True)
class FeatureSpec:
    """What a feature map says of itself. `centre`: where the receptive field of its first cell is centred, in continuous pixels."""

    stride: int
    centre: float
    channels: int


@dataclass(frozen=True)
class Categories:
    """The classes of a data set: label k has the name `names[k]` and, in the files, the id `ids[k]`.

    keypoints: the names of the points of each class, () for one without; skeletons: of each class, the pairs of points, from 0, that a line
    joins. Left out where no class has points. num_stuff: the last so many classes are stuff: regions without instances.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    keypoints: tuple[tuple[str, ...], ...] = ()
    skeletons: tuple[tuple[tuple[int, int], ...], ...] = ()
    num_stuff: int = 0

    def __post_init__(self) -> None:
        if len(self.names) != len(self.ids) or len(set(self.ids)) != len(self.ids):
            raise ValueError(
                f"categories need one distinct id a name, got {len(self.names)} names and ids {self.ids}"
            )
        for part in ("keypoints", "skeletons"):
            if not any(getattr(self, part)):
                object.__setattr__(self, part, ((),) * len(self.names))
            if len(getattr(self, part)) != len(self.names):
                raise ValueError(
                    f"categories need {part} for each of {len(self.names)} classes, got {len(getattr(self, part))}"
                )

    @property
    def num_things(self) -> int:
        """How many classes, the first ones, have instances."""
        return len(self.names) - self.num_stuff

    def with_stuff(self, names: Sequence[str], ids: Sequence[int]) -> Categories:
        """These classes and, behind them, stuff of other ids."""
        none: tuple[tuple[()], ...] = ((),) * len(ids)
        return Categories(
            (*self.names, *names),
            (*self.ids, *ids),
            (*self.keypoints, *none),
            (*self.skeletons, *none),
            len(ids),
        )

    def things(self) -> Categories:
        """Those with instances alone."""
        n = self.num_things
        return Categories(self.names[:n], self.ids[:n], self.keypoints[:n], self.skeletons[:n])

    @cached_property
    def point_ranges(self) -> tuple[tuple[int, int], ...]:
        """Which of all P points are those of each class, (first, past the last). Classes with the same names share them."""
        starts: dict[tuple[str, ...], int] = {(): 0}
        for points in self.keypoints:
            starts.setdefault(points, sum(map(len, starts)))
        return tuple((starts[points], starts[points] + len(points)) for points in self.keypoints)

    @property
    def num_points(self) -> int:
        """P, the points of all classes together."""
        return max((stop for _, stop in self.point_ranges), default=0)

    @cached_property
    def lines(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Of each class, the skeleton as pairs of the P points."""
        starts = (start for start, _ in self.point_ranges)
        return tuple(
            tuple((start + a, start + b) for a, b in edges)
            for start, edges in zip(starts, self.skeletons, strict=True)
        )

    def mirrored(self, pairs: Sequence[Sequence[str]] | None = None) -> list[int]:
        """Which of the P points each point is in a mirror: those of `pairs` of names change places, or, without any, `left_x` and `right_x` (or
        `x_left`, `l_x`, ...). Raises ValueError for a pair that is none of a class."""
        order = list(range(self.num_points))
        for pair in pairs or ():
            found = [
                (start, points)
                for (start, _), points in zip(self.point_ranges, self.keypoints, strict=True)
                if set(pair) <= set(points)
            ]
            if len(pair) != 2 or not found:
                raise ValueError(
                    f"{list(pair)} is not a pair of keypoints of a class ({', '.join(n for p in self.keypoints for n in p)})"
                )
            for start, points in found:
                a, b = (start + points.index(name) for name in pair)
                order[a], order[b] = b, a
        if pairs is not None:
            return order
        for (start, _), points in zip(self.point_ranges, self.keypoints, strict=True):
            place = {_WORDS.sub("_", name).lower(): start + i for i, name in enumerate(points)}
            for name, i in place.items():
                order[i] = place.get(_SIDE.sub(lambda m: _OTHER[m[0]], name), i)
        return order

    def __len__(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and JSON."""
        points = {
            "keypoints": [list(p) for p in self.keypoints],
            "skeletons": [[list(e) for e in s] for s in self.skeletons],
        }
        stuff = {"num_stuff": self.num_stuff} if self.num_stuff else {}
        return {
            "names": list(self.names),
            "ids": list(self.ids),
            **(points if self.num_points else {}),
            **stuff,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Categories:
        """The inverse of `to_dict`. Raises TypeError or ValueError for values of other types, KeyError where names or ids are missing."""
        points = tuple(
            tuple(_typed(n, str) for n in names) for names in values.get("keypoints", ())
        )
        skeletons = tuple(
            tuple((_typed(a, int), _typed(b, int)) for a, b in edges)
            for edges in values.get("skeletons", ())
        )
        names, ids = (
            tuple(_typed(n, str) for n in values["names"]),
            tuple(_typed(i, int) for i in values["ids"]),
        )
        num_stuff = _typed(values.get("num_stuff", 0), int)
        if not 0 <= num_stuff <= len(names) or any(abs(i) >= 2**63 for i in ids):
            raise ValueError("a number of classes or an id that cannot be")
        return cls(names, ids, points, skeletons, num_stuff)


def _typed(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} instead of a {kind.__name__}")
    return value


class _TensorRows:
    """Rows that can be indexed and moved as one: shared by the flat structures below."""

    def _map(self, tensors: Callable[[Tensor], Tensor], masks: Callable[[Masks], Masks]) -> Self:
        changed: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = tensors(value)
            elif isinstance(value, Masks):
                changed[f.name] = masks(value)
        return replace(self, **changed)  # type: ignore[type-var]

    def __getitem__(self, index: Tensor) -> Self:
        """Rows by an index or boolean tensor; every field follows."""
        return self._map(lambda t: t[index.to(t.device)], lambda m: m[index])

    def to(self, device: torch.device | str) -> Self:
        """All tensors on `device`; a copy from pinned memory to a GPU is not waited for (one to the CPU is: it is read there at once)."""
        free = torch.device(device).type != "cpu"
        return self._map(lambda t: t.to(device, non_blocking=free), lambda m: m.to(device))

    def pin_memory(self) -> Self:
        """All tensors in page-locked memory (called by the data loader)."""
        return self._map(lambda t: t.pin_memory(), lambda m: m)


@dataclass(frozen=True)
class Targets(_TensorRows):
    """The ground truths of a batch, flat.

    boxes: f32 [G, 4] in the frame of the padded batch; labels: i64 [G]; image_index: i64 [G];
    crowd: bool [G] (never matched, only regions that are not negatives); masks: G masks in the same frame, where the data has them;
    keypoints: f32 [G, P, 3], x, y, visibility (0: not there), where the data has them.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    crowd: Tensor
    masks: Masks | None = None
    keypoints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class Regions(_TensorRows):
    """Regions of a batch, flat: proposals (boxes and scores; segments have masks) and detections (labels too, then what the heads add).

    boxes: f32 [R, 4]; image_index: i64 [R], ascending; scores: f32 [R] in [0, 1], descending within an image;
    labels: i64 [R] in 0..K-1; masks: R masks; keypoints: f32 [R, P, 3], x, y, score.
    """

    boxes: Tensor
    image_index: Tensor
    scores: Tensor
    labels: Tensor | None = None
    masks: Masks | None = None
    keypoints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class Samples:
    """Regions drawn for the losses of the region heads.

    boxes: f32 [R, 4]; image_index: i64 [R]; labels: i64 [R] in 0..K (K is background);
    matched: i64 [R], the row of `targets` that a foreground region stands for (0 for background);
    seeds: i64 [N], of the images (`Batch.draw_seeds`), for heads that draw among the regions; masks: R masks, of regions that are segments.
    """

    boxes: Tensor
    image_index: Tensor
    labels: Tensor
    matched: Tensor
    num_classes: int
    targets: Targets
    seeds: Tensor
    masks: Masks | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def foreground(self) -> Samples:
        """Only the regions that stand for an object."""
        keep = torch.nonzero(self.labels < self.num_classes).squeeze(1)
        return replace(
            self,
            boxes=self.boxes[keep],
            image_index=self.image_index[keep],
            labels=self.labels[keep],
            matched=self.matched[keep],
            masks=None if self.masks is None else self.masks[keep],
        )


@dataclass(frozen=True)
class Batch:
    """N images padded to one size, with their truth where there is one.

    images: uint8 RGB [N, 3, H, W], padded at the right and the bottom; sizes: i64 [N, 2] (height, width) without the padding;
    original_sizes: i64 [N, 2] (height, width) of the files; image_ids: N ids of the data set (any integers);
    names: N file names, for messages and pictures; skipped: messages of unreadable images that others stand in for;
    seeds: i64 [N], from which follows what a stage draws at random of each image (None: zeros); proposals: those of a file, where there is one;
    superpixels: i32 [N, H, W], numbered from 0 in each image, -1 in the padding, where the model asks for them; semantic: i16 [N, H, W], the
    category id of each pixel, -1 where it has none, where the data has such maps.
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    image_ids: list[int]
    names: list[str]
    targets: Targets | None = None
    skipped: list[str] = field(default_factory=list)
    seeds: Tensor | None = None
    proposals: Regions | None = None
    superpixels: Tensor | None = None
    semantic: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def draw_seeds(self) -> Tensor:
        """i64 [N], on the device of the images."""
        return (
            torch.zeros(len(self), dtype=torch.int64, device=self.images.device)
            if self.seeds is None
            else self.seeds
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the sizes too. Maps of pixels that only the CPU looks at stay there."""
        free = torch.device(device).type != "cpu"
        here = (f.name for f in fields(self) if f.name not in ("superpixels", "semantic"))
        tensors = {
            name: value.to(device, non_blocking=free)
            for name in here
            if isinstance(value := getattr(self, name), Tensor)
        }
        parts = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), _TensorRows)
        }
        changed: dict[str, Any] = {**tensors, **parts}
        return replace(self, **changed)

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by the data loader)."""
        parts: dict[str, Any] = {
            f.name: v.pin_memory()
            for f in fields(self)
            if isinstance(v := getattr(self, f.name), _TensorRows)
        }
        return replace(self, images=self.images.pin_memory(), **parts)


@dataclass(frozen=True)
class Outputs:
    """What a model predicts for a batch; a model fills what it has.

    detections: instances in the frame of the padded batch; segments: class-agnostic segments of a segmenter;
    semantic: per-pixel maps of dense heads by name, each [N, K, H, W]; image_scores: f32 [N, K] in [0, 1], of a classifier of images: is the class
    there; image_maps: f32 [N, K, h, w], where (`variants.cam`), at the cells of the classifier's `level`.
    """

    detections: Regions
    segments: Regions | None = None
    semantic: dict[str, Tensor] = field(default_factory=dict)
    image_scores: Tensor | None = None
    image_maps: Tensor | None = None


def no_detections(batch: Batch) -> Regions:
    rows = torch.zeros(0, dtype=torch.int64, device=batch.images.device)
    return Regions(batch.images.new_zeros((0, 4), dtype=torch.float32), rows, rows.float(), rows)


def present(targets: Targets, images: int, num_classes: int) -> Tensor:
    """Which classes each image shows, crowds too: bool [N, K]."""
    found = torch.zeros((images, num_classes), dtype=torch.bool, device=targets.labels.device)
    found[targets.image_index, targets.labels] = True
    return found
