"""The JSON documents of COCO, as this package writes them.

What is read from a file is not typed by these: its values are checked one by one (`parse`).
"""

from __future__ import annotations

from typing import NotRequired, TypedDict

from maskseg.masks.base import Rle

PolygonLists = list[list[float]]  # [x0, y0, x1, y1, ...] of each polygon, px


class UncompressedRle(TypedDict):
    """Run lengths as numbers, which COCO's files use for crowds."""

    size: list[int]
    counts: list[int]


class CocoImage(TypedDict):
    """An entry of `images`."""

    id: int
    file_name: str
    height: int
    width: int


class CocoObject(TypedDict):
    """An entry of `annotations`, but for the ids of the annotation and its image.

    bbox: x, y, width, height; segmentation: [] for a box alone; keypoints: x, y and visibility of
    each.
    """

    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    segmentation: PolygonLists | Rle | UncompressedRle
    keypoints: NotRequired[list[float]]
    num_keypoints: NotRequired[int]


class CocoAnnotation(CocoObject):
    """An entry of `annotations`."""

    id: int
    image_id: int


class CocoCategory(TypedDict):
    """An entry of `categories`; the edges of the skeleton count keypoints from 1."""

    id: int
    name: str
    supercategory: NotRequired[str]
    keypoints: NotRequired[list[str]]
    skeleton: NotRequired[list[list[int]]]


class CocoDocument(TypedDict):
    """A whole file."""

    info: NotRequired[dict[str, str]]
    licenses: NotRequired[list[object]]
    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]
    stuff_categories: NotRequired[list[CocoCategory]]
