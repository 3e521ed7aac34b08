"""Settings of the parts of a CFM classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maskseg.errors import UserError

DESIGNS = ("full_map", "pool_first")
PATHS = ("segment", "box")


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

    size: int = 6
    pyramid: Sequence[int] = (6, 3, 2, 1)
    sampling_ratio: int = 2
    canonical_size: float = 224.0

    def __post_init__(self) -> None:
        divides = all(side >= 1 and self.size % side == 0 for side in self.pyramid)
        if not self.pyramid or not divides:
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
    masked_sides: Sequence[int] = (6,)
    statistic: str = "mean"
    threshold: float = 0.5

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

    width: int = 512
    layers: int = 2
    dropout: float = 0.0
    weights: str | None = None

    def __post_init__(self) -> None:
        if not (self.layers >= 1 and self.width >= 1 and 0 <= self.dropout < 1):
            raise UserError(
                "cfm: mlp.width and mlp.layers must be at least 1 and mlp.dropout in [0, 1), not"
                f" {self.width}, {self.layers} and {self.dropout}"
            )
