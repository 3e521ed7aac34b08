"""Settings of the parts of a CFM classifier, and of the choice of the segments it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from maskseg.errors import UserError
from maskseg.values import (
    BinCount,
    Decay,
    Fraction,
    Length,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Range,
    SamplingRatio,
    Size,
    check_fields,
)

DESIGNS = ("full_map", "pool_first")
PATHS = ("segment", "box")
STUFF_RULES = ("pursuit", "random")


@dataclass(frozen=True)
class PoolerSettings:
    """Spatial pyramid pooling of segments.

    RoIAlign of the box to `size` x `size` bins, then max pooling to side x side bins for each side
    of `pyramid`.

    size: bins per side of RoIAlign.
    pyramid: bins per side of each level of the spatial pyramid; each divides `size`.
    sampling_ratio: sampling points per bin and direction of RoIAlign.
    canonical_size: side in pixels of a box that is read from stride 16.

    Raises UserError for a pyramid that does not divide `size`.
    """

    size: BinCount = 6
    pyramid: Annotated[Sequence[BinCount], Length(1)] = (6, 3, 2, 1)
    sampling_ratio: SamplingRatio = 2
    canonical_size: PositiveFloat = 224.0

    def __post_init__(self) -> None:
        check_fields(self, "pooler")
        if any(self.size % side for side in self.pyramid):
            raise UserError(
                f"cfm: each of pooler.pyramid must divide pooler.size={self.size}, not"
                f" {list(self.pyramid)}"
            )


@dataclass(frozen=True)
class MaskingSettings:
    """How the mask of a segment is applied to its features.

    design: "full_map" (section 3.3a): the mask is projected to the cells of the feature map
        (`projection`), the masked map is pooled, and the result passes through fully connected
        layers; the unmasked features of the box pass through separate layers beside them.
        "pool_first" (section 3.3b): the bins of the box are masked after pooling, and a single path
        of layers sees all of them.
    paths: which of "segment" and "box" are used by "full_map".
    masked_sides: the levels of the pyramid, by their bins per side, that "pool_first" masks.
    statistic, threshold: of the projection of masks to cells, see `projection`.

    Raises UserError for an unknown design or path.
    """

    design: str = "full_map"
    paths: Sequence[str] = PATHS
    masked_sides: Sequence[BinCount] = (6,)
    statistic: str = "mean"
    threshold: Fraction = 0.5

    def __post_init__(self) -> None:
        is_known = self.design in DESIGNS and len(self.paths) > 0 and set(self.paths) <= set(PATHS)
        if not is_known or (self.design == "pool_first" and "segment" not in self.paths):
            raise UserError(
                f"cfm: masking.design must be one of {DESIGNS} and masking.paths some of {PATHS},"
                f" pool_first with segment, not {self.design!r}, {list(self.paths)}"
            )

    def uses(self, path: str) -> bool:
        """Whether the design "full_map" is set and uses this path."""
        return self.design == "full_map" and path in self.paths

    def layer_paths(self) -> list[str]:
        """The names of the paths of fully connected layers, in the order of their outputs."""
        if self.design == "pool_first":
            return ["both"]
        return [path for path in PATHS if path in self.paths]


@dataclass(frozen=True)
class MLPSettings:
    """Fully connected layers of each path, see `layers.build_paths`.

    width: outputs of each layer. layers: their number. dropout: probability, after each layer.
    weights: name or file of torchvision's VGG-16 weights that the layers start from, or None.

    Raises UserError for values out of range.
    """

    width: Size = 512
    layers: Annotated[int, Range(ge=1, le=100)] = 2
    dropout: Decay = 0.0
    weights: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "mlp")


@dataclass(frozen=True)
class SamplerSettings:
    """Which segments of an image a classifier learns from, see `sampling.SegmentSampler`.

    num_samples: maximum number per image.
    thing_fraction, stuff_fraction: at most these shares of `num_samples` are things and stuff;
        negatives fill the rest.
    positive_iou: mask IoU with a thing, of its positives.
    negative_iou: (low, high) of the highest mask IoU of negatives with things.
    min_purity: of the positives of stuff, see `sampling.stuff_purity`.
    max_negative_purity: the purity of negatives for all stuff is lower.
    overlap: see `sampling.segment_pursuit`.
    stuff_rule: how stuff is drawn, "pursuit" or "random".
    append_truth: the ground-truth masks of things are positives, too; they are rows of
        `sampling.append_ground_truth`.
    crowd_overlap: proposals that crowds cover by a larger share are no negatives.

    Raises UserError for values out of range.
    """

    num_samples: PositiveInt = 128
    thing_fraction: Fraction = 0.25
    stuff_fraction: Fraction = 0.25
    positive_iou: PositiveFraction = 0.5
    negative_iou: tuple[Fraction, Fraction] = (0.1, 0.3)
    min_purity: PositiveFraction = 0.6
    max_negative_purity: Fraction = 0.3
    overlap: Fraction = 0.2
    stuff_rule: str = "pursuit"
    append_truth: bool = True
    crowd_overlap: Fraction = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "segment_sampler")
        self._check_fractions()
        self._check_thresholds()

    def _check_fractions(self) -> None:
        if self.stuff_rule not in STUFF_RULES:
            raise UserError(
                f"sampler: stuff_rule must be one of {', '.join(STUFF_RULES)}, not"
                f" {self.stuff_rule}"
            )
        if self.thing_fraction + self.stuff_fraction > 1:
            raise UserError(
                "sampler: the sum of thing_fraction and stuff_fraction must be at most 1, not"
                f" {self.thing_fraction} + {self.stuff_fraction}"
            )

    def _check_thresholds(self) -> None:
        low, high = self.negative_iou
        if not low <= high <= self.positive_iou:
            raise UserError(
                "sampler: negative_iou and positive_iou must ascend, not"
                f" {low}, {high} and {self.positive_iou}"
            )
        if self.max_negative_purity > self.min_purity:
            raise UserError(
                "sampler: max_negative_purity must be at most min_purity, not"
                f" {self.max_negative_purity} and {self.min_purity}"
            )
