"""Data that passes between the stages: the shape, dtype, unit and frame of every field.

Letters in shapes throughout the project: N images, G ground truths, R regions, D detections,
K classes, P keypoints, A anchors, C channels, H x W pixels, S the side of a grid.

Boxes are xyxy in continuous pixel coordinates (width = x2 - x1; pixel i covers [i, i + 1)). Labels
are 0..K-1, background is K. Batches are flat: `image_index` is the image of each row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Self, TypeVar

import torch
from torch import Tensor

from maskseg.masks.base import Masks
from maskseg.values import Size

# Parts of keypoint names that say the side: left_eye, eye_l, leftEye.
_SIDE = re.compile(r"(?<![a-z])(left|right|l|r)(?![a-z])")
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}
_CAMEL_CASE_BORDER = re.compile(r"(?<=[a-z])(?=[A-Z])")


T = TypeVar("T")
Features = dict[str, Tensor]  # level name -> [N, C, H / stride, W / stride], finest first
Losses = dict[str, Tensor]  # term -> scalar; the terms are summed
Edges = tuple[tuple[int, int], ...]  # pairs of keypoints


@dataclass(frozen=True)
class FeatureSpec:
    """Stride, channels and first cell centre (in continuous pixels) of one feature level.

    The centre is that of the receptive field of the first cell.
    """

    stride: Size
    centre: float
    channels: Size


@dataclass(frozen=True)
class Categories:
    """The classes of a dataset: label k has the name `names[k]` and, in files, the id `ids[k]`.

    keypoints: names of the keypoints of each class, () for a class without;
    skeletons: for each class, pairs of its keypoints (from 0) that an edge joins. Both may be
    omitted if no class has keypoints.
    num_stuff: number of stuff classes (regions without instances), which are the last.

    Raises ValueError for duplicate ids or lengths that do not match.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    keypoints: tuple[tuple[str, ...], ...] = ()
    skeletons: tuple[Edges, ...] = ()
    num_stuff: int = 0

    def __post_init__(self) -> None:
        if len(self.names) != len(self.ids) or len(set(self.ids)) != len(self.ids):
            raise ValueError(
                f"categories need one distinct id per name, got {len(self.names)} names and ids "
                f"{self.ids}"
            )
        for part in ("keypoints", "skeletons"):
            if not any(getattr(self, part)):
                object.__setattr__(self, part, ((),) * len(self.names))
            count = len(getattr(self, part))
            if count != len(self.names):
                raise ValueError(
                    f"categories need {part} for each of {len(self.names)} classes, got {count}"
                )

    @property
    def num_things(self) -> int:
        """Number of classes with instances, which are the first."""
        return len(self.names) - self.num_stuff

    def with_stuff(self, names: Sequence[str], ids: Sequence[int]) -> Categories:
        """These classes, followed by stuff classes with other ids."""
        empty: tuple[tuple[()], ...] = ((),) * len(ids)
        return Categories(
            names=(*self.names, *names),
            ids=(*self.ids, *ids),
            keypoints=(*self.keypoints, *empty),
            skeletons=(*self.skeletons, *empty),
            num_stuff=len(ids),
        )

    def thing_categories(self) -> Categories:
        """The classes with instances."""
        n = self.num_things
        return Categories(self.names[:n], self.ids[:n], self.keypoints[:n], self.skeletons[:n])

    @cached_property
    def point_ranges(self) -> tuple[tuple[int, int], ...]:
        """Range (start, stop) of each class's keypoints among the P points of all classes.

        Classes with the same keypoint names share a range.
        """
        starts: dict[tuple[str, ...], int] = {(): 0}
        for points in self.keypoints:
            starts.setdefault(points, sum(map(len, starts)))
        return tuple((starts[points], starts[points] + len(points)) for points in self.keypoints)

    @property
    def num_points(self) -> int:
        """P, the number of keypoints of all classes."""
        return max((stop for _, stop in self.point_ranges), default=0)

    @cached_property
    def skeleton_edges(self) -> tuple[Edges, ...]:
        """Skeleton of each class as pairs of the P points."""
        skeletons = []
        for (start, _), edges in zip(self.point_ranges, self.skeletons, strict=True):
            skeletons.append(tuple((start + a, start + b) for a, b in edges))
        return tuple(skeletons)

    def flip_indices(self, pairs: Sequence[Sequence[str]] | None = None) -> list[int]:
        """For each of the P points, the index of the point that a horizontal flip makes it.

        pairs: pairs of names to exchange; None: `left_x` and `right_x` (or `x_left`, `l_x`, ...).
        Raises ValueError for a pair that no class has.
        """
        if pairs is None:
            return self._flip_indices_by_name()
        order = list(range(self.num_points))
        for pair in pairs:
            for a, b in self._locate_pair(pair):
                order[a] = b
                order[b] = a
        return order

    def _locate_pair(self, pair: Sequence[str]) -> list[tuple[int, int]]:
        """Indices of a pair of names among the P points, for each class that has it."""
        located = []
        for (start, _), points in zip(self.point_ranges, self.keypoints, strict=True):
            if len(pair) == 2 and set(pair) <= set(points):
                located.append((start + points.index(pair[0]), start + points.index(pair[1])))
        if not located:
            names = ", ".join(name for points in self.keypoints for name in points)
            raise ValueError(f"{list(pair)} is not a pair of keypoints of a class ({names})")
        return located

    def _flip_indices_by_name(self) -> list[int]:
        """`flip_indices` from the sides in the names."""
        order = list(range(self.num_points))
        for (start, _), points in zip(self.point_ranges, self.keypoints, strict=True):
            index_of_name = {
                _CAMEL_CASE_BORDER.sub("_", name).lower(): start + i
                for i, name in enumerate(points)
            }
            for name, i in index_of_name.items():
                flipped_name = _SIDE.sub(lambda match: _OTHER_SIDE[match[0]], name)
                order[i] = index_of_name.get(flipped_name, i)
        return order

    def __len__(self) -> int:
        return len(self.names)

    def to_dict(self) -> dict[str, object]:
        """The categories as plain values, for checkpoints and JSON."""
        values: dict[str, object] = {"names": list(self.names), "ids": list(self.ids)}
        if self.num_points:
            values["keypoints"] = [list(points) for points in self.keypoints]
            values["skeletons"] = [[list(edge) for edge in edges] for edges in self.skeletons]
        if self.num_stuff:
            values["num_stuff"] = self.num_stuff
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Categories:
        """The inverse of `to_dict`.

        Raises TypeError or ValueError for invalid values, KeyError if names or ids are missing.
        """
        points = tuple(_typed_tuple(names, str) for names in _items(values.get("keypoints", ())))
        skeletons = tuple(_edges(edges) for edges in _items(values.get("skeletons", ())))
        names = _typed_tuple(values["names"], str)
        ids = _typed_tuple(values["ids"], int)
        num_stuff = _check_type(values.get("num_stuff", 0), int)
        if not 0 <= num_stuff <= len(names):
            raise ValueError(f"num_stuff must be in 0..{len(names)}, not {num_stuff}")
        if any(abs(i) >= 2**63 for i in ids):
            raise ValueError("ids must fit into 64 bits")
        return cls(names, ids, points, skeletons, num_stuff)


def _check_type(value: object, kind: type[T]) -> T:
    """`value`, which must have exactly the type `kind` (a bool is no int)."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} instead of a {kind.__name__}")
    return value


def _items(values: object) -> tuple[object, ...]:
    """The items of a list or tuple. Raises TypeError for another value."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"a {type(values).__name__} instead of a list")
    return tuple(values)


def _typed_tuple(values: object, kind: type[T]) -> tuple[T, ...]:
    """`values` as a tuple, all of exactly the type `kind`."""
    return tuple(_check_type(value, kind) for value in _items(values))


def _edges(edges: object) -> Edges:
    """`edges` as a tuple of pairs of int."""
    pairs = []
    for edge in _items(edges):
        start, end = _typed_tuple(edge, int)
        pairs.append((start, end))
    return tuple(pairs)


class _TensorRows:
    """Base class of the flat structures: all fields are indexed and moved together."""

    def _map(self, tensors: Callable[[Tensor], Tensor], masks: Callable[[Masks], Masks]) -> Self:
        """A copy with one function applied to tensors and another to masks."""
        changed: dict[str, Tensor | Masks] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = tensors(value)
            elif isinstance(value, Masks):
                changed[f.name] = masks(value)
        return replace(self, **changed)  # type: ignore[type-var]

    def __getitem__(self, index: Tensor) -> Self:
        """Select rows of all fields by an index or boolean tensor."""
        return self._map(lambda t: t[index.to(t.device)], lambda m: m[index])

    def to(self, device: torch.device | str) -> Self:
        """Copy all tensors to `device`, asynchronously if it is not the CPU."""
        non_blocking = _is_async(device)
        return self._map(lambda t: t.to(device, non_blocking=non_blocking), lambda m: m.to(device))

    def pin_memory(self) -> Self:
        """Copy all tensors to page-locked memory (called by the data loader)."""
        return self._map(lambda t: t.pin_memory(), lambda m: m)


def _is_async(device: torch.device | str) -> bool:
    """Whether copies to `device` may be asynchronous.

    Not to the CPU: its memory would be read before the copy is complete.
    """
    return torch.device(device).type != "cpu"


@dataclass(frozen=True)
class Targets(_TensorRows):
    """The ground truths of a batch, flat.

    boxes: f32 [G, 4] in the frame of the padded batch; labels: i64 [G]; image_index: i64 [G];
    iscrowd: bool [G], crowd regions: they are never matched, and regions that they cover are
    ignored instead of being negatives;
    masks: G masks in the same frame, if the data has masks;
    keypoints: f32 [G, P, 3], x, y, visibility (0: not labeled), if the data has keypoints.
    """

    boxes: Tensor
    labels: Tensor
    image_index: Tensor
    iscrowd: Tensor
    masks: Masks | None = None
    keypoints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass(frozen=True)
class Regions(_TensorRows):
    """Regions of a batch, flat: proposals or detections.

    Proposals have boxes and scores, and masks if they are segments. Detections have labels too, and
    what the heads add.

    boxes: f32 [R, 4]; image_index: i64 [R], ascending;
    scores: f32 [R] in [0, 1], descending within an image; labels: i64 [R] in 0..K-1;
    masks: R masks; keypoints: f32 [R, P, 3], x, y, score.
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
    """Regions sampled for the losses of the region heads.

    boxes: f32 [R, 4]; image_index: i64 [R]; labels: i64 [R] in 0..K (K is background);
    matched_gt: i64 [R], row of `targets` that a foreground region is matched to, 0 for background;
    num_classes: K; targets: the ground truths;
    seeds: i64 [N], of the images (`Batch.seeds_or_zeros`), for heads that sample regions again;
    masks: R masks, if the regions are segments.
    """

    boxes: Tensor
    image_index: Tensor
    labels: Tensor
    matched_gt: Tensor
    num_classes: int
    targets: Targets
    seeds: Tensor
    masks: Masks | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def foreground(self) -> Samples:
        """The regions that are matched to an object."""
        keep = torch.nonzero(self.labels < self.num_classes).squeeze(1)
        return replace(
            self,
            boxes=self.boxes[keep],
            image_index=self.image_index[keep],
            labels=self.labels[keep],
            matched_gt=self.matched_gt[keep],
            masks=None if self.masks is None else self.masks[keep],
        )


@dataclass(frozen=True)
class Batch:
    """N images padded to one size, with their ground truths if there are any.

    images: uint8 RGB [N, 3, H, W], padded at the right and the bottom;
    sizes: i64 [N, 2] (height, width) without the padding;
    original_sizes: i64 [N, 2] (height, width) of the files;
    image_ids: N ids of the dataset (any integers);
    file_names: N file names, for messages and plots;
    read_errors: messages about unreadable images that were replaced by others;
    seeds: i64 [N], from which all random samples of an image follow (None: zeros);
    proposals: those of a file, if there is one;
    superpixels: i32 [N, H, W], numbered from 0 in each image, -1 in the padding, if the model needs
    them;
    semantic: i16 [N, H, W], category id of each pixel, -1 for none, if the data has such maps.
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    image_ids: list[int]
    file_names: list[str]
    targets: Targets | None = None
    read_errors: list[str] = field(default_factory=list)
    seeds: Tensor | None = None
    proposals: Regions | None = None
    superpixels: Tensor | None = None
    semantic: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def seeds_or_zeros(self) -> Tensor:
        """The seeds of the images, i64 [N]; zeros on the device of the images if there are none."""
        if self.seeds is None:
            return torch.zeros(len(self), dtype=torch.int64, device=self.images.device)
        return self.seeds

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`. Superpixels and semantic maps stay: only the CPU reads them."""
        non_blocking = _is_async(device)
        seeds = self.seeds
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            sizes=self.sizes.to(device, non_blocking=non_blocking),
            original_sizes=self.original_sizes.to(device, non_blocking=non_blocking),
            targets=None if self.targets is None else self.targets.to(device),
            seeds=None if seeds is None else seeds.to(device, non_blocking=non_blocking),
            proposals=None if self.proposals is None else self.proposals.to(device),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by the data loader)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            targets=None if self.targets is None else self.targets.pin_memory(),
            proposals=None if self.proposals is None else self.proposals.pin_memory(),
        )


@dataclass(frozen=True)
class Outputs:
    """The predictions of a model for a batch; a model fills the fields that it predicts.

    detections: instances in the frame of the padded batch;
    segments: class-agnostic segments of a segmenter;
    semantic: per-pixel maps of semantic heads by name; `classes` is the label of each pixel,
    i64 [N, H, W], -1 for none;
    image_scores: f32 [N, K] in [0, 1], image classification: probability that the class is present;
    image_maps: f32 [N, K, h, w], class activation maps (`annotation.cam`) at the cells of the
    classifier's `level`.
    """

    detections: Regions
    segments: Regions | None = None
    semantic: dict[str, Tensor] = field(default_factory=dict)
    image_scores: Tensor | None = None
    image_maps: Tensor | None = None


def no_detections(batch: Batch) -> Regions:
    """Empty detections on the device of the batch."""
    rows = torch.zeros(0, dtype=torch.int64, device=batch.images.device)
    return Regions(batch.images.new_zeros((0, 4), dtype=torch.float32), rows, rows.float(), rows)


def class_presence(targets: Targets, images: int, num_classes: int) -> Tensor:
    """Whether each image shows each class, crowds included, bool [N, K]."""
    presence = torch.zeros((images, num_classes), dtype=torch.bool, device=targets.labels.device)
    presence[targets.image_index, targets.labels] = True
    return presence
