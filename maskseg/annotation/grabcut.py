"""GrabCut: a mask from a box, a class activation map or painted strokes (Rother et al., "GrabCut", SIGGRAPH 2004), by OpenCV.

A map in [0, 1] becomes seeds: pixels that are surely or perhaps background, perhaps or surely foreground ("Using Deep Features for
Segmentation Annotations"). A box may stand in for the map: everything outside is background, and the middle of its ellipse foreground.
Boxes are xyxy in continuous pixels. Equal arguments give equal masks: OpenCV's random numbers start anew for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskseg.superpixels.opencv import opencv

Image = NDArray[np.uint8]  # RGB [H, W, 3]
Bools = NDArray[np.bool_]  # [H, W]
Map = NDArray[np.float32]  # [H, W] in [0, 1]
Codes = NDArray[np.uint8]  # [H, W] of the four below, which are OpenCV's

BACKGROUND, FOREGROUND, MAYBE_BACKGROUND, MAYBE_FOREGROUND = 0, 1, 2, 3
MARGIN = 0.05  # of background around what may be foreground, as a share of its sides: more of it knows less of the object's surroundings
SIDE = 192  # pixels of the longer side at which crops are cut
ENLARGED = 4.0  # small crops, at most: the cut is smooth over a few pixels, which in a small object are much
CORE = 0.8  # of `ellipse_map`, from where on it is foreground: the cut of a box without such seeds often loses the object
CORNERS = 0.1  # of `ellipse_map`, below which it perhaps is background: all there is to learn from where the box is as large as the image
COLLAPSED = 0.25  # a cut of less than this share of what stands in for it has lost the object


@dataclass(frozen=True)
class Cut:
    """mask: bool [H, W]; fallback: why it is not GrabCut's, "" where it is."""

    mask: Bools
    fallback: str = ""


def window(box: Sequence[float], height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels whose centres a box holds; at least one pixel of a box that meets the image, none of one that doesn't."""
    spans = []
    for low, high, size in ((box[1], box[3], height), (box[0], box[2], width)):
        if not (high > low and high > 0 and low < size):
            return slice(0, 0), slice(0, 0)
        first = int(np.clip(np.ceil(low - 0.5), 0, size))
        last = int(np.clip(np.ceil(high - 0.5), 0, size))
        if last <= first:
            first = min(int(max(low, 0)), size - 1)
            last = first + 1
        spans.append(slice(first, last))
    return spans[0], spans[1]


def box_mask(box: Sequence[float], height: int, width: int) -> Bools:
    """The pixels in the box."""
    mask = np.zeros((height, width), dtype=bool)
    mask[window(box, height, width)] = True
    return mask


def ellipse_mask(box: Sequence[float], height: int, width: int) -> Bools:
    """The pixels in the ellipse that touches the box's sides; those of the box where no centre lies in it."""
    rows, columns = window(box, height, width)
    inside = _far(box, rows, columns) <= 0.25
    mask = np.zeros((height, width), dtype=bool)
    mask[rows, columns] = inside if inside.any() else True
    return mask


def ellipse_map(box: Sequence[float], height: int, width: int) -> Map:
    """1 in the middle of the box, 0.5 on the ellipse that touches its sides, towards 0 in its corners; 0 outside."""
    rows, columns = window(box, height, width)
    values = np.zeros((height, width), dtype=np.float32)
    values[rows, columns] = (1 - 2 * _far(box, rows, columns)).clip(0, 1)
    return values


def normalised(
    scores: NDArray[np.floating], height: int, width: int, box: Sequence[float] | None = None
) -> Map:
    """A map of any numbers [h, w], resized to the image, then scaled so that its least and greatest values (in the box, where there is one; what
    lies beyond is cut off) are 0 and 1. Zeros where all are equal or some are no numbers."""
    large = opencv().resize(
        np.asarray(scores, dtype=np.float32), (width, height), interpolation=opencv().INTER_LINEAR
    )
    seen = large if box is None else large[window(box, height, width)]
    low, high = (float(seen.min()), float(seen.max())) if seen.size else (0.0, 0.0)
    if not (np.isfinite(large).all() and high > low):
        return np.zeros((height, width), dtype=np.float32)
    return np.asarray(((large - low) / (high - low)).clip(0, 1), dtype=np.float32)


def seeds(
    scores: Map, t0: float, t1: float, t2: float, box: Sequence[float] | None = None
) -> Codes:
    """A map in [0, 1], digitised: below t0 background, below t1 perhaps background, below t2 perhaps foreground, from there to 1 foreground.

    t2 = 1: no foreground that is sure. Outside the box, where there is one, all is background. Raises ValueError unless 0 <= t0 < t1 < t2 <= 1.
    """
    if not 0 <= t0 < t1 < t2 <= 1:
        raise ValueError(f"thresholds must be 0 <= t0 < t1 < t2 <= 1, not {t0}, {t1}, {t2}")
    order = np.array([BACKGROUND, MAYBE_BACKGROUND, MAYBE_FOREGROUND, FOREGROUND], dtype=np.uint8)
    codes = order[np.digitize(scores, [t0, t1, t2 if t2 < 1 else np.inf])]
    return (
        codes
        if box is None
        else np.where(box_mask(box, *scores.shape), codes, np.uint8(BACKGROUND))
    )


def grabcut(
    image: Image,
    codes: Codes,
    iterations: int = 1,
    margin: float = MARGIN,
    side: int = SIDE,
    instead: Bools | None = None,
    whole: bool = False,
) -> Cut:
    """The foreground of an image by its seeds.

    Only what is not surely background is looked at, with a margin of that share of its sides, scaled so that the longer side has `side` pixels
    (0: as it is); seeds that are sure stay as they are at any scale. Where there is no foreground or no background to learn from, where nothing is
    left (or less than a quarter of `instead`), or all of the image, the mask is `instead` (None: what the seeds say, sure or not). whole: no crop and
    no scaling.
    """
    hopeful = (codes & 1).astype(bool)  # of OpenCV's numbers, those of foreground are odd
    instead = hopeful if instead is None else instead
    if not hopeful.any():
        return Cut(instead, "no foreground seeds")
    area = (slice(None), slice(None)) if whole else _around(codes != BACKGROUND, margin)
    if hopeful[area].all():
        return Cut(instead, "no background seeds")
    mask = np.zeros_like(hopeful)
    mask[area] = _cut(
        np.ascontiguousarray(image[area]), codes[area], iterations, 0 if whole else side
    )
    mask = (mask & (codes != BACKGROUND)) | (
        codes == FOREGROUND
    )  # a crop that was scaled has lost the borders of its seeds
    if mask.sum() < max(COLLAPSED * instead.sum(), 1):
        return Cut(instead, "the cut collapsed")
    return Cut(instead, "the cut filled the image") if mask.all() else Cut(mask)


def recut(
    image: Image,
    box: Sequence[float] | None,
    definite_foreground: Bools,
    definite_background: Bools,
    iterations: int = 1,
) -> Cut:
    """The mask of the object in a box (None: anywhere), mended by painted strokes: what is painted is as it is painted; background where twice.

    Its middle is taken for foreground, unless some of it is painted as background. Where foreground is painted outside, the box is widened to as far
    around that as it is long and wide.
    """
    height, width = image.shape[:2]
    box = (0, 0, width, height) if box is None else box
    painted, wide = definite_foreground & ~definite_background, box
    if (outside := painted & ~box_mask(box, height, width)).any():
        rows, columns = _around(outside, 1)
        wide = (
            min(box[0], columns.start),
            min(box[1], rows.start),
            max(box[2], columns.stop),
            max(box[3], rows.stop),
        )
    prior = ellipse_map(box, height, width)
    codes = seeds(
        prior, 0, CORNERS, 1 if (definite_background & (prior >= CORE)).any() else CORE, wide
    )
    codes[painted], codes[definite_background] = FOREGROUND, BACKGROUND
    ellipse = ellipse_mask(box, height, width)
    return grabcut(image, codes, iterations, instead=(ellipse | painted) & ~definite_background)


def _cut(image: Image, codes: Codes, iterations: int, side: int) -> Bools:
    """OpenCV's GrabCut of a crop that has seeds of both kinds, at the scale at which its longer side has `side` pixels (0: as it is)."""
    cv2, (height, width) = opencv(), codes.shape
    scale = min(ENLARGED, side / max(height, width)) if side else 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size != (width, height):
        image = cv2.resize(
            image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        )
        codes = cv2.resize(codes, size, interpolation=cv2.INTER_NEAREST)
        if len(np.unique(codes & 1)) < 2:  # one kind of seeds was so thin that it went
            return np.full((height, width), bool(codes[0, 0] & 1))
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    found, _, _ = cv2.grabCut(
        cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
        codes.copy(),
        None,
        *models,
        iterations,
        cv2.GC_INIT_WITH_MASK,
    )
    mask = (found & 1).astype(np.float32)
    return np.asarray(
        cv2.resize(
            mask, (width, height), interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
        )
        >= 0.5
    )


def _around(mask: Bools, margin: float) -> tuple[slice, slice]:
    """Rows and columns around what is set, with a margin of a share of its sides, at least a pixel where there is a share."""
    spans = []
    for axis, size in ((1, mask.shape[0]), (0, mask.shape[1])):
        seen = np.flatnonzero(mask.any(axis=axis))
        first, last = int(seen[0]), int(seen[-1]) + 1
        more = int(np.ceil(margin * (last - first)))
        spans.append(slice(max(0, first - more), min(size, last + more)))
    return spans[0], spans[1]


def _far(box: Sequence[float], rows: slice, columns: slice) -> NDArray[np.float64]:
    """How far pixels lie from the middle of the box, squared, in its sides: 0.25 on the ellipse that touches them."""
    y, x = np.ogrid[rows, columns]
    across, down = (
        (x + 0.5 - (box[0] + box[2]) / 2) / (box[2] - box[0]),
        (y + 0.5 - (box[1] + box[3]) / 2) / (box[3] - box[1]),
    )
    return np.asarray(across**2 + down**2)
