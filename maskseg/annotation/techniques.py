"""Ways from a box or a class activation map to a mask, by the names of "Using Deep Features for Segmentation Annotations"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskseg.annotation.grabcut import (
    CORE,
    CORNERS,
    MARGIN,
    MAYBE_FOREGROUND,
    SIDE,
    Bools,
    Codes,
    Cut,
    Image,
    Map,
    box_mask,
    ellipse_map,
    ellipse_mask,
    grabcut,
    normalised,
    seeds,
)
from maskseg.errors import UserError

DELTA = 0.01  # the width of a bin that the paper has but does not name
OF_BOXES = ("box", "ellipse", "grabcut", "gcellipse")
OF_MAPS = ("cam", "gccam_pf_pb", "gccam_f_pf", "gccam_f_pb")
NAMES = (*OF_BOXES, *OF_MAPS)
WITH_THRESHOLD = ("gcellipse", *OF_MAPS)
USUAL = dict.fromkeys(WITH_THRESHOLD, 0.5) | {"gcellipse": CORE, "cam": 0.2}  # thresholds
_LOWEST = {"gccam_f_pf": DELTA, "gcellipse": CORNERS}  # thresholds lie above; 0 of the others
_HIGHEST = {"gccam_pf_pb": 0.99, "gccam_f_pb": 1 - DELTA}  # 1 of the others


@dataclass(frozen=True)
class Technique:
    """(image, box or None, map or None) -> `Cut`. All values are plain: it can be sent to other processes and written down.

    name: `box` and `ellipse` fill them; `grabcut` cuts the box; `gcellipse` does, and takes the middle of its ellipse, where `ellipse_map` is at
    least `threshold`, for foreground; `cam` takes the map from `threshold` on; `gccam_*` cut by seeds from the map: from `threshold` on perhaps
    foreground, below perhaps background (`pf_pb`); foreground, perhaps foreground (`f_pf`); foreground, perhaps background (`f_pb`).
    threshold: in 0..1, of those that have one. iterations, margin, side: of GrabCut. normalise: maps are scaled to 0..1 in the `box`, where there is
    one, or in the `image`. Raises UserError for other values.
    """

    name: str
    threshold: float | None = None
    iterations: int = 1
    margin: float = MARGIN
    side: int = SIDE
    normalise: str = "box"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise UserError(f"technique must be one of {', '.join(NAMES)}, not {self.name!r}")
        if (self.threshold is None) == (self.name in WITH_THRESHOLD):
            raise UserError(
                f"technique {self.name} {'needs a' if self.threshold is None else 'has no'} threshold"
            )
        if self.threshold is not None and not fits(self.name, self.threshold):
            low, high = limits(self.name)
            raise UserError(
                f"threshold must be above {low} and at most {high} for technique {self.name}, not {self.threshold}"
            )
        if self.normalise not in ("box", "image"):
            raise UserError(f"normalise must be box or image, not {self.normalise!r}")
        if not (self.iterations >= 1 and self.margin > 0 and self.side >= 0):
            raise UserError(
                f"iterations must be at least 1, margin above 0 and side not negative, not {self.iterations}, {self.margin} and {self.side}"
            )

    @property
    def needs_map(self) -> bool:
        """Whether it looks at a class activation map."""
        return self.name in OF_MAPS

    @property
    def text(self) -> str:
        """The name and the threshold."""
        return self.name if self.threshold is None else f"{self.name} {self.threshold:g}"

    def thresholds(self) -> tuple[float, float, float] | None:
        """t0, t1, t2 of `seeds`, of those that digitise a map."""
        t = self.threshold or 0.0
        return {
            "gccam_pf_pb": (0.0, t, 1.0),
            "gccam_f_pf": (0.0, DELTA, t),
            "gccam_f_pb": (0.0, t, t + DELTA),
            "gcellipse": (0.0, CORNERS, t),
        }.get(self.name)

    def values(self) -> dict[str, Any]:
        """All fields, as plain values."""
        return asdict(self)

    def map(
        self,
        box: Sequence[float] | None,
        scores: NDArray[np.floating] | None,
        height: int,
        width: int,
    ) -> Map | None:
        """What is digitised, in [0, 1]; None for techniques without, and where they have no scores to look at."""
        if self.name == "gcellipse":
            return ellipse_map(_whole(box, height, width), height, width)
        if not self.needs_map or scores is None:
            return None
        return normalised(scores, height, width, box if self.normalise == "box" else None)

    def codes(
        self, box: Sequence[float] | None, values: Map | None, height: int, width: int
    ) -> Codes | None:
        """The seeds of GrabCut; None for techniques without. values: as `map` gives them."""
        bins = self.thresholds()
        if self.name == "grabcut":
            return np.where(
                box_mask(_whole(box, height, width), height, width),
                np.uint8(MAYBE_FOREGROUND),
                np.uint8(0),
            )
        return None if bins is None or values is None else seeds(values, *bins, box)

    def __call__(
        self, image: Image, box: Sequence[float] | None, scores: NDArray[np.floating] | None = None
    ) -> Cut:
        """The mask of the object in the box, or of a class in the image (box None), by the class' map of any numbers [h, w].

        Where GrabCut finds none, it is the box's ellipse; without a box, the map from its threshold on. Where a map is needed and there is none, or a
        constant one, it is the box's ellipse; without a box, it is empty.
        """
        height, width = image.shape[:2]
        around, values = _whole(box, height, width), self.map(box, scores, height, width)
        ellipse = ellipse_mask(around, height, width)
        if not ellipse.any():
            return Cut(ellipse, "the box lies outside the image")
        if self.name == "box":
            return Cut(box_mask(around, height, width))
        if self.name == "ellipse":
            return Cut(ellipse)
        instead = ellipse
        if self.needs_map:
            inside = box_mask(around, height, width)
            if values is None or not values[inside].any():
                return Cut(
                    np.zeros_like(ellipse) if box is None else ellipse,
                    "no class map" if values is None else "the map is constant",
                )
            mapped: Bools = (values >= _known(self.threshold)) & inside
            if self.name == "cam":
                return (
                    Cut(mapped)
                    if mapped.any()
                    else Cut(ellipse, "nothing in the box reaches the threshold")
                )
            instead = mapped if box is None else ellipse
        return grabcut(
            image,
            _known(self.codes(box, values, height, width)),
            self.iterations,
            self.margin,
            self.side,
            instead,
        )


def _whole(box: Sequence[float] | None, height: int, width: int) -> Sequence[float]:
    return (0, 0, width, height) if box is None else box


def _known(value: Any) -> Any:
    assert value is not None
    return value


def limits(name: str) -> tuple[float, float]:
    """Thresholds of a technique lie above the first and go to the second."""
    return _LOWEST.get(name, 0.0), _HIGHEST.get(name, 1.0)


def fits(name: str, threshold: float) -> bool:
    """Whether a technique can have this threshold."""
    low, high = limits(name)
    return low < threshold <= high


def at_all(thresholds: Sequence[float], maps: bool, **keys: Any) -> list[Technique]:
    """Every technique, at each of the thresholds that it can have. maps: also those of class activation maps; keys: the other fields."""
    names = NAMES if maps else OF_BOXES
    return [
        Technique(name, threshold, **keys)
        for name in names
        for threshold in (thresholds if name in WITH_THRESHOLD else (None,))
        if threshold is None or fits(name, threshold)
    ]
