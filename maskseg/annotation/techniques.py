"""Techniques that turn a box or a class activation map into a mask.

The names are those of "Using Deep Features for Segmentation Annotations".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TypedDict, TypeVar, Unpack

import numpy as np
from numpy.typing import NDArray

from maskseg.annotation.grabcut import (
    MARGIN,
    MAYBE_BG_THRESHOLD,
    MAYBE_FOREGROUND,
    SIDE,
    SURE_FG_THRESHOLD,
    Bools,
    GrabCutResult,
    Image,
    Map,
    Trimap,
    box_mask,
    ellipse_map,
    ellipse_mask,
    grabcut,
    make_trimap,
    normalise_map,
)
from maskseg.errors import UserError

T = TypeVar("T")

BIN_WIDTH = 0.01  # of a bin that the paper uses without giving its width
BOX_TECHNIQUES = ("box", "ellipse", "grabcut", "gcellipse")
CAM_TECHNIQUES = ("cam", "gccam_pf_pb", "gccam_f_pf", "gccam_f_pb")
TECHNIQUES = (*BOX_TECHNIQUES, *CAM_TECHNIQUES)
WITH_THRESHOLD = ("gcellipse", *CAM_TECHNIQUES)
DEFAULT_THRESHOLDS = dict.fromkeys(WITH_THRESHOLD, 0.5) | {
    "gcellipse": SURE_FG_THRESHOLD,
    "cam": 0.2,
}
# Thresholds are greater than the lower limit (default 0) and at most the upper one (default 1).
_LOWER_LIMITS = {"gccam_f_pf": BIN_WIDTH, "gcellipse": MAYBE_BG_THRESHOLD}
_UPPER_LIMITS = {"gccam_pf_pb": 0.99, "gccam_f_pb": 1 - BIN_WIDTH}


class TechniqueFields(TypedDict, total=False):
    """The fields of `Technique` but for its name and threshold."""

    iterations: int
    margin: float
    side: int
    normalise: str


@dataclass(frozen=True)
class Technique:
    """Function (image, box or None, map or None) -> `GrabCutResult`; picklable, JSON-serializable.

    Args:
        name:
            `box`, `ellipse`: the box, or its inscribed ellipse;
            `grabcut`: GrabCut of the box;
            `gcellipse`: the same, with `ellipse_map` >= threshold as sure foreground;
            `cam`: the class activation map >= threshold;
            `gccam_*`: GrabCut with a trimap from the map: probable foreground from the threshold on
            and probable background below (`pf_pb`), foreground and probable foreground (`f_pf`),
            foreground and probable background (`f_pb`).
        threshold: in 0..1, for the techniques in WITH_THRESHOLD.
        iterations, margin, side: see `grabcut`.
        normalise: maps are scaled to 0..1 in the `box`, if there is one, or in the `image`.

    Raises UserError for invalid values.
    """

    name: str
    threshold: float | None = None
    iterations: int = 1
    margin: float = MARGIN
    side: int = SIDE
    normalise: str = "box"

    def __post_init__(self) -> None:
        if self.name not in TECHNIQUES:
            raise UserError(f"technique must be one of {', '.join(TECHNIQUES)}, not {self.name!r}")
        if (self.threshold is None) == (self.name in WITH_THRESHOLD):
            problem = "needs a" if self.threshold is None else "has no"
            raise UserError(f"technique {self.name} {problem} threshold")
        if self.threshold is not None and not is_valid_threshold(self.name, self.threshold):
            low, high = threshold_range(self.name)
            raise UserError(
                f"threshold must be above {low} and at most {high} for technique {self.name}, "
                f"not {self.threshold}"
            )
        if self.normalise not in ("box", "image"):
            raise UserError(f"normalise must be box or image, not {self.normalise!r}")
        if not (self.iterations >= 1 and self.margin > 0 and self.side >= 0):
            raise UserError(
                "iterations must be at least 1, margin above 0 and side not negative, "
                f"not {self.iterations}, {self.margin} and {self.side}"
            )

    @property
    def needs_map(self) -> bool:
        """Whether the technique uses a class activation map."""
        return self.name in CAM_TECHNIQUES

    @property
    def label(self) -> str:
        """Name and threshold, for display."""
        return self.name if self.threshold is None else f"{self.name} {self.threshold:g}"

    def thresholds(self) -> tuple[float, float, float] | None:
        """t0, t1, t2 of `make_trimap`; None if the technique does not quantize a map."""
        t = self.threshold or 0.0
        return {
            "gccam_pf_pb": (0.0, t, 1.0),
            "gccam_f_pf": (0.0, BIN_WIDTH, t),
            "gccam_f_pb": (0.0, t, t + BIN_WIDTH),
            "gcellipse": (0.0, MAYBE_BG_THRESHOLD, t),
        }.get(self.name)

    def to_dict(self) -> dict[str, object]:
        """All fields, as plain values."""
        return asdict(self)

    def foreground_map(
        self,
        box: Sequence[float] | None,
        scores: NDArray[np.floating] | None,
        height: int,
        width: int,
    ) -> Map | None:
        """The map in [0, 1] that is quantized or thresholded.

        scores: class activation map [h, w] of any values. None if the technique uses no map, or if
        it needs scores and there are none.
        """
        if self.name == "gcellipse":
            return ellipse_map(_box_or_image(box, height, width), height, width)
        if not self.needs_map or scores is None:
            return None
        return normalise_map(scores, height, width, box if self.normalise == "box" else None)

    def trimap(
        self, box: Sequence[float] | None, values: Map | None, height: int, width: int
    ) -> Trimap | None:
        """The trimap for GrabCut; None for techniques without. values: from `foreground_map`."""
        if self.name == "grabcut":
            inside = box_mask(_box_or_image(box, height, width), height, width)
            return np.where(inside, np.uint8(MAYBE_FOREGROUND), np.uint8(0))
        thresholds = self.thresholds()
        if thresholds is None or values is None:
            return None
        return make_trimap(values, *thresholds, box)

    def __call__(
        self, image: Image, box: Sequence[float] | None, scores: NDArray[np.floating] | None = None
    ) -> GrabCutResult:
        """Compute the mask of the object in a box, or of a class in the image (box None).

        scores: class activation map of the class, [h, w] of any values. If GrabCut fails, the
        fallback is the ellipse in the box, or without a box the thresholded map. If a map is needed
        but missing or constant, the fallback is the ellipse, or without a box an empty mask.
        """
        height, width = image.shape[:2]
        area = _box_or_image(box, height, width)
        ellipse = ellipse_mask(area, height, width)
        if not ellipse.any():
            return GrabCutResult(ellipse, "the box lies outside the image")
        if self.name == "box":
            return GrabCutResult(box_mask(area, height, width))
        if self.name == "ellipse":
            return GrabCutResult(ellipse)
        values = self.foreground_map(box, scores, height, width)
        fallback = ellipse
        if self.needs_map:
            inside = box_mask(area, height, width)
            if values is None or not values[inside].any():
                reason = "no class map" if values is None else "the map is constant"
                mask = np.zeros_like(ellipse) if box is None else ellipse
                return GrabCutResult(mask, reason)
            thresholded: Bools = (values >= not_none(self.threshold)) & inside
            if self.name == "cam":
                if thresholded.any():
                    return GrabCutResult(thresholded)
                return GrabCutResult(ellipse, "nothing in the box reaches the threshold")
            if box is None:
                fallback = thresholded
        trimap = not_none(self.trimap(box, values, height, width))
        return grabcut(image, trimap, self.iterations, self.margin, self.side, fallback)


def _box_or_image(box: Sequence[float] | None, height: int, width: int) -> Sequence[float]:
    """The box, or the box of the whole image if there is none."""
    return (0, 0, width, height) if box is None else box


def not_none(value: T | None) -> T:
    """Narrow the type of a value that cannot be None."""
    assert value is not None
    return value


def threshold_range(name: str) -> tuple[float, float]:
    """Limits of a technique's threshold: greater than the first, at most the second."""
    return _LOWER_LIMITS.get(name, 0.0), _UPPER_LIMITS.get(name, 1.0)


def is_valid_threshold(name: str, threshold: float) -> bool:
    """Whether a threshold is within the limits of a technique."""
    low, high = threshold_range(name)
    return low < threshold <= high


def all_techniques(
    thresholds: Sequence[float], maps: bool, **fields: Unpack[TechniqueFields]
) -> list[Technique]:
    """Every technique, with each of the thresholds that are valid for it.

    maps: include the techniques that need class activation maps; fields: of `Technique`.
    """
    techniques = []
    for name in TECHNIQUES if maps else BOX_TECHNIQUES:
        if name not in WITH_THRESHOLD:
            techniques.append(Technique(name, None, **fields))
            continue
        valid = [threshold for threshold in thresholds if is_valid_threshold(name, threshold)]
        techniques += [Technique(name, threshold, **fields) for threshold in valid]
    return techniques
