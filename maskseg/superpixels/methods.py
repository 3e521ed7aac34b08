"""Superpixel methods, the adjacency of superpixels, and connected components of label maps."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from maskseg.superpixels.opencv import opencv
from maskseg.values import BlurSigma, IterationCount, PositiveFloat, PositiveInt, check_arguments

Labels = NDArray[np.int32]  # [H, W], superpixel 0..S-1 of each pixel, each number used
Image = NDArray[np.uint8]  # RGB [H, W, 3]

# Largest side of SLIC's cells, in shorter sides of the image. The image is padded to at least one
# cell, so that this limits the memory for very narrow images.
MAX_CELL_RATIO = 16
# SLIC merges pieces smaller than this percentage of the mean superpixel into a neighbor.
MIN_SIZE_PERCENT = 25


class Superpixels(Protocol):
    """Segments an image into superpixels.

    Superpixels are 4-connected and numbered by first appearance, row by row. Equal images have
    equal superpixels.
    """

    def __call__(self, image: Image) -> Labels: ...


class SLIC:
    """Simple linear iterative clustering by OpenCV: k-means of color and position.

    Each cluster searches its own neighborhood (Achanta et al., "SLIC Superpixels", TPAMI 2012).

    count: approximate number of superpixels per image, whatever its size. They start on a grid of
    the nearest number; disconnected or small pieces (below a quarter of the mean, or below 4
    pixels) are merged into a neighbor. An image with at most `count` pixels has one superpixel per
    pixel. An image narrower than a 16th of a superpixel's side has more than `count` superpixels.
    compactness: the paper's m, the weight of the distance in space relative to the distance in CIE
    Lab color (lightness 0..100); a higher value gives more compact superpixels.
    iterations: number of k-means iterations.

    Colors are compared as floats: in OpenCV's 8-bit Lab, chroma counts 2.5 times less than
    lightness. A 3 x 3 blur first removes noise that would disconnect superpixels.

    Raises UserError for parameters out of range.
    """

    def __init__(
        self,
        count: PositiveInt = 200,
        compactness: PositiveFloat = 10.0,
        iterations: IterationCount = 10,
    ) -> None:
        check_arguments(
            SLIC.__init__, "SLIC", count=count, compactness=compactness, iterations=iterations
        )
        self.count = count
        self.compactness = compactness
        self.iterations = iterations

    def __call__(self, image: Image) -> Labels:
        """Segment an image. Raises ValueError for anything but uint8 RGB [H, W, 3]."""
        cv2 = opencv()
        height, width = _check_image(image)
        if height * width <= self.count:
            return np.arange(height * width, dtype=np.int32).reshape(height, width)
        side = _grid_side(height, width, self.count)
        # OpenCV places no seeds (and divides by zero) if the image is narrower than a cell.
        below = max(0, side - height)
        right = max(0, side - width)
        padded = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
        blurred = cv2.GaussianBlur(padded, (3, 3), 0).astype(np.float32) / 255
        lab = cv2.cvtColor(blurred, cv2.COLOR_RGB2Lab)
        slic = cv2.ximgproc.createSuperpixelSLIC(lab, cv2.ximgproc.SLIC, side, self.compactness)
        slic.iterate(self.iterations)
        slic.enforceLabelConnectivity(MIN_SIZE_PERCENT)
        labels = slic.getLabels()
        if below or right:
            # A superpixel that is connected through the padding may not be without it.
            return label_components(labels[:height, :width])
        return relabel(labels)


class Felzenszwalb:
    """Efficient graph-based segmentation (EGS) by OpenCV.

    (Felzenszwalb & Huttenlocher, "Efficient Graph-Based Image Segmentation", IJCV 2004.)

    Two regions are merged if the edge between them is no stronger than each region's strongest
    inner edge + scale / number of its pixels. Edges join 4 neighbors (8 in the paper), and are
    distances in RGB, so that the order of the channels does not matter. The number of regions
    depends on the image.

    sigma: standard deviation of the Gaussian blur before, in pixels, 0 for none;
    scale: the paper's k; a higher value gives larger regions;
    min_size: regions of fewer pixels are merged into a neighbor.

    Raises UserError for parameters out of range.
    """

    def __init__(
        self, sigma: BlurSigma = 1.0, scale: PositiveFloat = 100.0, min_size: PositiveInt = 20
    ) -> None:
        check_arguments(
            Felzenszwalb.__init__, "Felzenszwalb", sigma=sigma, scale=scale, min_size=min_size
        )
        self.sigma = sigma
        self.scale = scale
        self.min_size = min_size

    def __call__(self, image: Image) -> Labels:
        """Segment an image. Raises ValueError for anything but uint8 RGB [H, W, 3]."""
        _check_image(image)
        segmentation = opencv().ximgproc.segmentation.createGraphSegmentation(
            self.sigma, self.scale, self.min_size
        )
        return relabel(segmentation.processImage(image))


def _check_image(image: Image) -> tuple[int, int]:
    """Check shape and dtype of an image; returns its height and width."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"superpixels need uint8 RGB [H, W, 3], not {image.dtype} {list(image.shape)}"
        )
    return image.shape[0], image.shape[1]


def _grid_side(height: int, width: int, count: int) -> int:
    """Side in pixels of the square cells of which OpenCV's grid has the number nearest to `count`.

    At least 2: superpixels of one pixel would all be too small, and would be merged.
    """
    sides = np.arange(2, min(max(height, width), MAX_CELL_RATIO * min(height, width)) + 1)
    rows = np.maximum(1, np.floor(height / sides + 0.5))
    columns = np.maximum(1, np.floor(width / sides + 0.5))
    return int(sides[np.abs(rows * columns - count).argmin()])


def relabel(labels: NDArray[np.integer]) -> Labels:
    """Renumber labels to 0..S-1 in order of first appearance; labels: integers of any shape."""
    if labels.min(initial=0) < 0 or labels.max(initial=0) > labels.size:
        labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    flat = labels.ravel()
    first = np.full(int(flat.max(initial=-1)) + 1, flat.size)
    # Of multiple values assigned to one place, the last stays: reversed, the first position.
    first[flat[::-1]] = np.arange(flat.size)[::-1]
    number = np.empty(len(first), dtype=np.int32)
    number[np.argsort(first, kind="stable")] = np.arange(len(first))
    return np.take(number, labels)


def neighbours(labels: Labels) -> NDArray[np.int64]:
    """Pairs of superpixels (a < b) that share a pixel's side, ascending, without duplicates.

    labels: [H, W]. Returns i64 [E, 2].
    """
    count = int(labels.max()) + 1
    keys = []
    for first, second in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        differ = first != second
        a = first[differ].astype(np.int64)
        b = second[differ]
        keys.append(np.minimum(a, b) * count + np.maximum(a, b))
    return np.stack(np.divmod(np.unique(np.concatenate(keys)), count), axis=1)


def label_components(labels: NDArray[np.integer]) -> Labels:
    """Number the 4-connected components of equal labels [H, W] in order of first appearance."""
    height, width = labels.shape
    # One point per pixel and one between each two neighbors, set if they are equal: OpenCV finds
    # the components of all labels in one pass.
    points = np.zeros((2 * height - 1, 2 * width - 1), dtype=np.uint8)
    points[::2, ::2] = 1
    points[::2, 1::2] = labels[:, :-1] == labels[:, 1:]
    points[1::2, ::2] = labels[:-1] == labels[1:]
    return relabel(opencv().connectedComponents(points, connectivity=4)[1][::2, ::2])
