"""Image size, anchors and limits that suit the objects of a dataset.

The rule is in docs/training.md. It depends on the training file alone: on the boxes of its objects,
without crowds, and on the sizes of its images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.file import CocoFile
from maskseg.data.transforms import MAX_RATIO

SMALL_QUANTILE = 0.1  # this share of the objects may be smaller than what is called small
LARGE_QUANTILE = 0.99
MIN_PIXELS = 16.0  # side of small objects that the image size aims at, in pixels
SIZE_STEP = 32  # image sizes are multiples of this, in pixels
FIRST_ANCHORS = (4, 8, 16, 32)  # sizes of the anchors of the finest level, in pixels
# An anchor of this many times the side of a square object still covers it with an IoU of 0.39, and
# its IoU with an object of its own side is 1.
ANCHOR_RATIO = 1.6
MIN_DETECTIONS = 100
MAX_DETECTIONS = 2000
DETECTION_STEP = 50
DETECTION_RESERVE = 1.25  # detections for each object of the fullest image
PROPOSALS_PER_DETECTION = 3


@dataclass(frozen=True)
class ObjectSizes:
    """The objects of the training images.

    sides: f64 [A], square roots of the areas of the boxes, in pixels of an image that is resized to
        a size of 1.
    most: the number of objects in the fullest image.
    """

    sides: NDArray[np.float64]
    most: int

    def quantile(self, share: float) -> float:
        """The side that this share of the objects is smaller than."""
        return float(np.quantile(self.sides, share))


def measure_objects(file: CocoFile) -> ObjectSizes:
    """Measure the objects of a file, without crowds."""
    sides, image_index = file.object_sides()
    shapes = np.array([(image.height, image.width) for image in file.images], dtype=np.float64)
    shapes = shapes.reshape(-1, 2)
    scales = np.minimum(1 / shapes.min(axis=1), MAX_RATIO / shapes.max(axis=1))
    counts = np.bincount(image_index, minlength=1)
    return ObjectSizes(sides * scales[image_index], int(counts.max()))


def choose_size(objects: ObjectSizes, lowest: int, highest: int) -> tuple[int, str]:
    """The image size, and why: the smallest one at which few objects have too few pixels."""
    small = objects.quantile(SMALL_QUANTILE)
    needed = SIZE_STEP * math.ceil(MIN_PIXELS / small / SIZE_STEP)
    size = min(max(needed, lowest), highest)
    if size >= needed:
        share = 100 - round(100 * SMALL_QUANTILE)
        return size, f"{share}% of the objects have a side of at least {small * size:.0f} pixels"
    below = float((objects.sides * size < MIN_PIXELS).mean())
    return size, (
        f"the largest of data.size_range; {below:.0%} of the objects have a side of less than "
        f"{MIN_PIXELS:g} pixels: data.size={needed}, or images that are cut into tiles, would help"
    )


def choose_anchors(objects: ObjectSizes, size: float, levels: int) -> tuple[list[list[int]], str]:
    """The size of the anchors of each level, finest first, and why.

    size: of the images.
    """
    small = objects.quantile(SMALL_QUANTILE) * size
    large = objects.quantile(LARGE_QUANTILE) * size
    fitting = [anchor for anchor in FIRST_ANCHORS if anchor <= ANCHOR_RATIO * small]
    first = max(fitting, default=FIRST_ANCHORS[0])
    last = first * 2 ** (levels - 1)
    if large > last:  # the levels are then further apart than a factor of two
        last = min(2 ** round(math.log2(large)), FIRST_ANCHORS[-1] * 2 ** (levels - 1))
        last = max(last, first * 2 ** (levels - 1))
    sizes = np.geomspace(first, last, levels).round().astype(int).tolist()
    text = f"sides of objects from {small:.0f} (10%) to {large:.0f} pixels (99%)"
    return [[anchor] for anchor in sizes], text


def choose_detections(objects: ObjectSizes) -> tuple[int, str]:
    """The maximum number of detections of an image, and why."""
    steps = math.ceil(DETECTION_RESERVE * objects.most / DETECTION_STEP)
    number = min(max(DETECTION_STEP * steps, MIN_DETECTIONS), MAX_DETECTIONS)
    text = f"at most {objects.most} objects in an image"
    if objects.most > number:
        text += ", more than can be found"
    return number, text


def choose_proposals(detections: int, fewest: int) -> tuple[int, str]:
    """The number of proposals of an image, and why. fewest: whatever the objects are."""
    number = max(PROPOSALS_PER_DETECTION * detections, fewest)
    return number, f"{PROPOSALS_PER_DETECTION} for each detection, at least {fewest}"


def few_samples(objects: ObjectSizes, samples: int, positive_fraction: float) -> str:
    """A warning where a training step sees fewer regions of objects than an image has objects."""
    positives = int(samples * positive_fraction)
    if objects.most <= positives:
        return ""
    if positive_fraction == 0:
        return (
            "a training step learns from no region of an object: "
            "model.sampler.positive_fraction is 0"
        )
    return (
        f"a training step learns from at most {positives} regions of objects of an image, the "
        f"fullest image has {objects.most} objects: model.sampler.num_samples="
        f"{round_up(objects.most / positive_fraction)} learns from all, and needs more memory"
    )


def round_up(value: float) -> int:
    """A number as the next multiple of 64."""
    return 64 * math.ceil(value / 64)


def format_sizes(sizes: Sequence[Sequence[int]]) -> str:
    """Anchor sizes as on a command line."""
    return "[" + ",".join(f"[{','.join(map(str, level))}]" for level in sizes) + "]"
