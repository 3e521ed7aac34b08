"""The built-in data set "scenes": synthetic pictures, written to disk as COCO JSON, JPEG files and a stuff map.

Things of eight classes (one of them with keypoints) overlap on two to four kinds of stuff; every mask is exact, with
what is hidden taken out. Some pictures hold a crowd, some hold no thing at all. It needs no download, takes seconds to
make, and is hard enough that boxes filled to the brim are no masks (`filled_box_ap`).
"""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskseg.data import scenes_draw as draw

# Category ids have gaps on purpose, as COCO's have: code that takes an id for a label fails here first.
THINGS = {"disc": 1, "box": 2, "triangle": 4, "star": 5, "ring": 7, "crescent": 9, "cross": 10, "figure": 13}
STUFF = {"sky": 92, "water": 93, "grass": 95, "sand": 96, "rock": 98, "brick": 101, "tiles": 102, "field": 105}
UNLABELLED = 255
SPLITS = ("train", "val")
VERSION = 1  # raise it when the same arguments give other pictures

EMPTY, CROWDED = 0.03, 0.06  # of the pictures


@dataclass(frozen=True)
class Placed:
    """A thing in the picture: full area in pixels (with what is hidden or outside), joints [P, 2] xy, pixels."""

    name: str
    full_area: int
    joints: NDArray[np.float32]
    crowd: bool


@dataclass(frozen=True)
class Scene:
    """image uint8 [S, S, 3]; stuff uint8 [S, S]: indices into STUFF; owner int16 [S, S]: the index in things of the
    thing that is seen at a pixel, -1 where stuff is seen."""

    image: NDArray[np.uint8]
    stuff: NDArray[np.uint8]
    owner: NDArray[np.int16]
    things: list[Placed]
