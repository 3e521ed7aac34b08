"""GrabCut: masks from boxes, class activation maps or painted strokes, with OpenCV.

Rother et al., "GrabCut: Interactive Foreground Extraction using Iterated Graph Cuts", SIGGRAPH
2004. A map in [0, 1] is quantized to a trimap: each pixel is sure or probable background, probable
or sure foreground ("Using Deep Features for Segmentation Annotations"). A box alone also defines a
trimap: its outside is background and the middle of its inscribed ellipse is foreground.

Boxes are xyxy in continuous pixels. Results are deterministic: OpenCV's random number generator is
reset for every call.
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
Trimap = NDArray[np.uint8]  # [H, W] of the four values below

# OpenCV's GC_BGD, GC_FGD, GC_PR_BGD, GC_PR_FGD; the foreground values are odd.
BACKGROUND = 0
FOREGROUND = 1
MAYBE_BACKGROUND = 2
MAYBE_FOREGROUND = 3

# Background around the possible foreground, as a fraction of its sides. A larger margin makes the
# background model less specific to the object's surroundings.
MARGIN = 0.05
SIDE = 192  # px of the longer side of a crop when it is segmented
# Maximum enlargement of small crops. GrabCut smooths over a few pixels, a lot for a small object.
MAX_UPSCALE = 4.0
# `ellipse_map` from this value on is sure foreground. Without such seeds, GrabCut of a box often
# loses the object.
SURE_FG_THRESHOLD = 0.8
# `ellipse_map` below this value is probable background: the only background to learn from if the
# box is as large as the image.
MAYBE_BG_THRESHOLD = 0.1
# A result smaller than this fraction of the fallback mask has lost the object.
MIN_AREA_FRACTION = 0.25


@dataclass(frozen=True)
class GrabCutResult:
    """mask: bool [H, W]; fallback_reason: why the mask is a fallback, "" if it is GrabCut's."""

    mask: Bools
    fallback_reason: str = ""


def pixel_window(box: Sequence[float], height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels whose centers lie in a box.

    At least one pixel for a box that overlaps the image, empty for a box outside.
    """
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
    """Mask of the pixels in a box."""
    mask = np.zeros((height, width), dtype=bool)
    mask[pixel_window(box, height, width)] = True
    return mask


def ellipse_mask(box: Sequence[float], height: int, width: int) -> Bools:
    """Mask of the ellipse inscribed in a box; of the box if no pixel center lies in the ellipse."""
    rows, columns = pixel_window(box, height, width)
    inside = _squared_distance(box, rows, columns) <= 0.25
    mask = np.zeros((height, width), dtype=bool)
    mask[rows, columns] = inside if inside.any() else True
    return mask


def ellipse_map(box: Sequence[float], height: int, width: int) -> Map:
    """1 in the center of a box, 0.5 on its inscribed ellipse, near 0 in its corners, 0 outside."""
    rows, columns = pixel_window(box, height, width)
    values = np.zeros((height, width), dtype=np.float32)
    values[rows, columns] = (1 - 2 * _squared_distance(box, rows, columns)).clip(0, 1)
    return values


def normalise_map(
    scores: NDArray[np.floating], height: int, width: int, box: Sequence[float] | None = None
) -> Map:
    """Resize a map [h, w] of any values to the image and scale it to [0, 1].

    0 and 1 are its minimum and maximum, in the box if there is one; values outside that range are
    clipped. Zeros if the map is constant or has values that are not finite.
    """
    resized = opencv().resize(
        np.asarray(scores, dtype=np.float32), (width, height), interpolation=opencv().INTER_LINEAR
    )
    reference = resized if box is None else resized[pixel_window(box, height, width)]
    low = 0.0
    high = 0.0
    if reference.size:
        low = float(reference.min())
        high = float(reference.max())
    if not (np.isfinite(resized).all() and high > low):
        return np.zeros((height, width), dtype=np.float32)
    return np.asarray(((resized - low) / (high - low)).clip(0, 1), dtype=np.float32)


def make_trimap(
    scores: Map, t0: float, t1: float, t2: float, box: Sequence[float] | None = None
) -> Trimap:
    """Quantize a map in [0, 1] to a trimap.

    Below t0: background; below t1: probable background; below t2: probable foreground; from t2 on:
    foreground. t2 = 1 means no sure foreground. With a box, everything outside is background.
    Raises ValueError unless 0 <= t0 < t1 < t2 <= 1.
    """
    if not 0 <= t0 < t1 < t2 <= 1:
        raise ValueError(f"thresholds must be 0 <= t0 < t1 < t2 <= 1, not {t0}, {t1}, {t2}")
    order = np.array([BACKGROUND, MAYBE_BACKGROUND, MAYBE_FOREGROUND, FOREGROUND], dtype=np.uint8)
    trimap = order[np.digitize(scores, [t0, t1, t2 if t2 < 1 else np.inf])]
    if box is None:
        return trimap
    return np.where(box_mask(box, *scores.shape), trimap, np.uint8(BACKGROUND))


def grabcut(
    image: Image,
    trimap: Trimap,
    iterations: int = 1,
    margin: float = MARGIN,
    side: int = SIDE,
    fallback: Bools | None = None,
    full_image: bool = False,
) -> GrabCutResult:
    """Segment the foreground of an image from a trimap.

    Works on a crop around everything that is not sure background, scaled to `side` px on its
    longer side. Sure pixels keep their label at any scale.

    Args:
        image: RGB [H, W, 3].
        trimap: [H, W].
        iterations: of GrabCut.
        margin: of the crop, as a fraction of its sides.
        side: px of the crop's longer side; 0 keeps its resolution.
        fallback: mask to return if there is no foreground or no background to learn from, if the
            result is empty, smaller than a quarter of the fallback, or fills the image. None: the
            foreground of the trimap, sure or probable.
        full_image: use the whole image at its resolution instead of a scaled crop.
    """
    possible = (trimap & 1).astype(bool)
    if fallback is None:
        fallback = possible
    if not possible.any():
        return GrabCutResult(fallback, "no foreground seeds")
    if full_image:
        area = (slice(None), slice(None))
    else:
        area = _bounding_window(trimap != BACKGROUND, margin)
    if possible[area].all():
        return GrabCutResult(fallback, "no background seeds")
    crop = np.ascontiguousarray(image[area])
    mask = np.zeros_like(possible)
    mask[area] = _segment_crop(crop, trimap[area], iterations, 0 if full_image else side)
    # Scaling a crop moves the borders of its seeds, so sure pixels are set again.
    mask = (mask & (trimap != BACKGROUND)) | (trimap == FOREGROUND)
    if mask.sum() < max(MIN_AREA_FRACTION * fallback.sum(), 1):
        return GrabCutResult(fallback, "the cut collapsed")
    if mask.all():
        return GrabCutResult(fallback, "the cut filled the image")
    return GrabCutResult(mask)


def refine_with_strokes(
    image: Image,
    box: Sequence[float] | None,
    definite_foreground: Bools,
    definite_background: Bools,
    iterations: int = 1,
) -> GrabCutResult:
    """Segment the object in a box (None: the whole image), constrained by painted strokes.

    Painted pixels keep their label; pixels painted with both are background. The middle of the box
    is assumed to be foreground unless a part of it is painted as background. If foreground is
    painted outside the box, the search area is extended by the strokes' bounding box plus a margin
    of its own size.
    """
    height, width = image.shape[:2]
    if box is None:
        box = (0, 0, width, height)
    foreground = definite_foreground & ~definite_background
    search_box = box
    outside = foreground & ~box_mask(box, height, width)
    if outside.any():
        rows, columns = _bounding_window(outside, 1)
        search_box = (
            min(box[0], columns.start),
            min(box[1], rows.start),
            max(box[2], columns.stop),
            max(box[3], rows.stop),
        )
    prior = ellipse_map(box, height, width)
    middle_is_painted = (definite_background & (prior >= SURE_FG_THRESHOLD)).any()
    sure_threshold = 1 if middle_is_painted else SURE_FG_THRESHOLD
    trimap = make_trimap(prior, 0, MAYBE_BG_THRESHOLD, sure_threshold, search_box)
    trimap[foreground] = FOREGROUND
    trimap[definite_background] = BACKGROUND
    fallback = (ellipse_mask(box, height, width) | foreground) & ~definite_background
    return grabcut(image, trimap, iterations, fallback=fallback)


def _segment_crop(image: Image, trimap: Trimap, iterations: int, side: int) -> Bools:
    """Run OpenCV's GrabCut on a crop that has foreground and background seeds.

    side: px of the longer side at which the crop is segmented; 0 keeps its resolution.
    """
    cv2 = opencv()
    height, width = trimap.shape
    scale = min(MAX_UPSCALE, side / max(height, width)) if side else 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size != (width, height):
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        image = cv2.resize(image, size, interpolation=interpolation)
        trimap = cv2.resize(trimap, size, interpolation=cv2.INTER_NEAREST)
        if len(np.unique(trimap & 1)) < 2:  # thin seeds of one kind vanished
            return np.full((height, width), bool(trimap[0, 0] & 1))
    cv2.setRNGSeed(0)
    labels, _, _ = cv2.grabCut(
        cv2.cvtColor(image, cv2.COLOR_RGB2BGR),
        trimap.copy(),
        None,
        np.zeros((1, 65)),
        np.zeros((1, 65)),
        iterations,
        cv2.GC_INIT_WITH_MASK,
    )
    mask = (labels & 1).astype(np.float32)
    interpolation = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    resized = cv2.resize(mask, (width, height), interpolation=interpolation)
    return np.asarray(resized >= 0.5)


def _bounding_window(mask: Bools, margin: float) -> tuple[slice, slice]:
    """Rows and columns of a mask's bounding box, extended by a fraction of its sides.

    The extension is rounded up to whole pixels.
    """
    spans = []
    for axis, size in ((1, mask.shape[0]), (0, mask.shape[1])):
        occupied = np.flatnonzero(mask.any(axis=axis))
        first = int(occupied[0])
        last = int(occupied[-1]) + 1
        extension = int(np.ceil(margin * (last - first)))
        spans.append(slice(max(0, first - extension), min(size, last + extension)))
    return spans[0], spans[1]


def _squared_distance(box: Sequence[float], rows: slice, columns: slice) -> NDArray[np.float64]:
    """Squared distance of pixels from a box's center, in units of its sides.

    0.25 on the inscribed ellipse.
    """
    y, x = np.ogrid[rows, columns]
    across = (x + 0.5 - (box[0] + box[2]) / 2) / (box[2] - box[0])
    down = (y + 0.5 - (box[1] + box[3]) / 2) / (box[3] - box[1])
    return np.asarray(across**2 + down**2)
