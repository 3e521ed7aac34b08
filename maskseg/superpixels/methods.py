"""Superpixels: an image as a few hundred connected pieces that keep to its edges, and which of them touch."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from maskseg.errors import UserError
from maskseg.superpixels.opencv import opencv

Labels = NDArray[np.int32]  # [H, W], the superpixel 0..S-1 of each pixel, each number used
Image = NDArray[np.uint8]  # RGB [H, W, 3]
THINNEST = 16  # cells are at most this many times as wide as the image: it is padded to one cell, which must not fill the memory
SMALLEST = (
    25  # a piece of less than this share of the mean superpixel, in percent, goes to a neighbour
)


class Superpixels(Protocol):
    """Cuts images into superpixels: 4-connected, numbered as they first appear, row by row; equal images give equal ones."""

    def __call__(self, image: Image) -> Labels: ...


class SLIC:
    """k-means of colour and place, each cluster within its own surroundings (Achanta et al., "SLIC Superpixels", TPAMI 2012), by OpenCV.

    count: superpixels of an image, about, whatever its size: they start on a grid of the nearest number, then pieces that are cut off or too
    small (below a quarter of the mean, or below 4 pixels) go to a neighbour. Where an image has no more pixels than that, each is a superpixel.
    A line of pixels, of less than a 16th of a superpixel's side across, gets more of them.
    ruler: the paper's m, how much place counts against colour, in units of CIE Lab (lightness 0..100); more gives more compact ones.

    Colours are compared in float: in OpenCV's Lab of 8 bits, chroma counts 2.5 times less than lightness. A blur of 3 x 3 pixels takes the
    noise away that would cut superpixels into pieces.
    """

    def __init__(self, count: int = 200, ruler: float = 10.0, iterations: int = 10) -> None:
        if not (count >= 1 and ruler > 0 and iterations >= 1):
            raise UserError(
                f"SLIC: count and iterations must be at least 1 and ruler above 0, not {count}, {iterations} and {ruler}"
            )
        self.count, self.ruler, self.iterations = count, ruler, iterations

    def __call__(self, image: Image) -> Labels:
        """Raises ValueError for anything but uint8 RGB [H, W, 3]."""
        cv2, (height, width) = opencv(), _size(image)
        if height * width <= self.count:
            return np.arange(height * width, dtype=np.int32).reshape(height, width)
        side = _grid_side(height, width, self.count)
        # OpenCV finds no place for seeds (and divides by zero) where the image is narrower than a cell.
        below, right = max(0, side - height), max(0, side - width)
        padded = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_REPLICATE)
        lab = cv2.cvtColor(
            cv2.GaussianBlur(padded, (3, 3), 0).astype(np.float32) / 255, cv2.COLOR_RGB2Lab
        )
        slic = cv2.ximgproc.createSuperpixelSLIC(lab, cv2.ximgproc.SLIC, side, self.ruler)
        slic.iterate(self.iterations)
        slic.enforceLabelConnectivity(SMALLEST)
        labels = slic.getLabels()
        # What holds together through the padding may not without it.
        return connected(labels[:height, :width]) if below or right else renumbered(labels)


class GraphSegments:
    """Pieces grown over the graph of pixels, EGS (Felzenszwalb & Huttenlocher, "Efficient Graph-Based Image Segmentation", IJCV 2004), by OpenCV.

    Two pieces become one where the edge between them is no stronger than each one's strongest inner edge + k / its pixels: more k, larger
    pieces. sigma: of the Gaussian blur before, in pixels, 0 for none; min_size: pixels below which a piece goes to a neighbour. How many there
    are depends on the image. Edges join 4 neighbours (the paper's 8) and are distances in RGB, so that the order of the channels doesn't matter.
    """

    def __init__(self, sigma: float = 1.0, k: float = 100.0, min_size: int = 20) -> None:
        if not (sigma >= 0 and k > 0 and min_size >= 1):
            raise UserError(
                f"graph segments: sigma must not be negative, k above 0, min_size at least 1, not {sigma}, {k} and {min_size}"
            )
        self.sigma, self.k, self.min_size = sigma, k, min_size

    def __call__(self, image: Image) -> Labels:
        """Raises ValueError for anything but uint8 RGB [H, W, 3]."""
        _size(image)
        segmentation = opencv().ximgproc.segmentation.createGraphSegmentation(
            self.sigma, self.k, self.min_size
        )
        return renumbered(segmentation.processImage(image))


def _size(image: Image) -> tuple[int, int]:
    """Height and width of what is an image."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"superpixels are of uint8 RGB [H, W, 3], not of {image.dtype} {list(image.shape)}"
        )
    return image.shape[0], image.shape[1]


def _grid_side(height: int, width: int, count: int) -> int:
    """The side of the square cells, in pixels, of which OpenCV's grid has the number nearest to `count`.

    At least 2: superpixels of one pixel would all be too small, and be joined.
    """
    sides = np.arange(2, min(max(height, width), THINNEST * min(height, width)) + 1)
    cells = np.maximum(1, np.floor(height / sides + 0.5)) * np.maximum(
        1, np.floor(width / sides + 0.5)
    )
    return int(sides[np.abs(cells - count).argmin()])


def renumbered(labels: NDArray[np.integer]) -> Labels:
    """The same pieces with numbers 0..S-1 in order of first appearance; labels: any integers, of any shape."""
    if labels.min(initial=0) < 0 or labels.max(initial=0) > labels.size:
        labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    flat = labels.ravel()
    first = np.full(int(flat.max(initial=-1)) + 1, flat.size)
    first[flat[::-1]] = np.arange(flat.size)[
        ::-1
    ]  # of several values for one place, the last stays
    number = np.empty(len(first), dtype=np.int32)
    number[np.argsort(first, kind="stable")] = np.arange(len(first))
    return np.take(number, labels)


def neighbours(labels: Labels) -> NDArray[np.int64]:
    """The pairs of superpixels (a < b) that touch along a pixel's side, each once, ascending. [H, W] -> i64 [E, 2]."""
    count = int(labels.max()) + 1
    keys = []
    for one, other in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        differ = one != other
        a, b = one[differ].astype(np.int64), other[differ]
        keys.append(np.minimum(a, b) * count + np.maximum(a, b))
    return np.stack(np.divmod(np.unique(np.concatenate(keys)), count), axis=1)


def connected(labels: NDArray[np.integer]) -> Labels:
    """Each 4-connected component of equal labels [H, W] with a number of its own, in order of first appearance."""
    height, width = labels.shape
    # A point for each pixel and one between each two neighbours, set where they are equal: one pass for all labels.
    points = np.zeros((2 * height - 1, 2 * width - 1), dtype=np.uint8)
    points[::2, ::2] = 1
    points[::2, 1::2] = labels[:, :-1] == labels[:, 1:]
    points[1::2, ::2] = labels[:-1] == labels[1:]
    return renumbered(opencv().connectedComponents(points, connectivity=4)[1][::2, ::2])
