"""The built-in synthetic dataset "scenes": COCO JSON, JPEG images and maps of stuff.

Things of eight classes (one of them with keypoints) overlap on two to four kinds of stuff. Every
mask is exact and excludes hidden parts. Some images contain a crowd, some contain no thing. The
dataset needs no download, is generated in seconds, and is hard enough that filled boxes are poor
masks (`filled_box_ap`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskseg.data.coco.documents import (
    CocoAnnotation,
    CocoCategory,
    CocoDocument,
    CocoImage,
    CocoObject,
    UncompressedRle,
)
from maskseg.data.datasets import scenes_draw as draw
from maskseg.data.datasets.coco import CocoSource, SourceParts
from maskseg.data.process_pool import hidden_main, open_pool, sigterm_as_exception
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.files.locks import lock
from maskseg.masks.base import Rle
from maskseg.values import NonNegativeInt, Range, Seed

# Category ids have gaps, as COCO's have: code that confuses ids with labels fails here first.
THINGS = {
    "disc": 1,
    "box": 2,
    "triangle": 4,
    "star": 5,
    "ring": 7,
    "crescent": 9,
    "cross": 10,
    "figure": 13,
}
STUFF = {
    "sky": 92,
    "water": 93,
    "grass": 95,
    "sand": 96,
    "rock": 98,
    "brick": 101,
    "tiles": 102,
    "field": 105,
}
JOINTS = (
    "head",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
BONES = (
    ("head", "left_shoulder"),
    ("head", "right_shoulder"),
    ("left_shoulder", "right_shoulder"),
    ("left_shoulder", "left_elbow"),
    ("left_elbow", "left_wrist"),
    ("right_shoulder", "right_elbow"),
    ("right_elbow", "right_wrist"),
    ("left_shoulder", "left_hip"),
    ("right_shoulder", "right_hip"),
    ("left_hip", "right_hip"),
    ("left_hip", "left_knee"),
    ("left_knee", "left_ankle"),
    ("right_hip", "right_knee"),
    ("right_knee", "right_ankle"),
)
UNLABELLED = 255
SPLITS = ("train", "val")
VERSION = 1  # increase it if the same arguments yield other images

# Fractions of the images.
EMPTY_FRACTION = 0.03
CROWD_FRACTION = 0.06

# A thing is not placed where less than this of itself or of any other thing would be visible.
MIN_VISIBLE_FRACTION = 0.45
MIN_VISIBLE_AREA = 45  # pixels

# Values of `owner` without a thing.
_STUFF_VISIBLE = -1
_OUTSIDE = -2


@dataclass(frozen=True)
class PlacedThing:
    """A thing in the image.

    full_area: pixels, including those that are hidden or outside; joints: [P, 2], xy, pixels.
    """

    name: str
    full_area: int
    joints: NDArray[np.floating]
    crowd: bool


@dataclass(frozen=True)
class Scene:
    """An image of S x S pixels with its ground truth.

    image: uint8 RGB [S, S, 3]; stuff: uint8 [S, S], indices into STUFF;
    owner: int16 [S, S], index into `things` of the thing that is visible at a pixel, -1 for stuff.
    """

    image: NDArray[np.uint8]
    stuff: NDArray[np.uint8]
    owner: NDArray[np.int16]
    things: list[PlacedThing]


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """Draw an image of size x size pixels: stuff, things from back to front, light and noise."""
    image, stuff = draw.random_background(size, rng)
    # Room for things that extend beyond the image, such as half a crowd.
    margin = max(int(0.4 * size) + 30, 110)
    canvas = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    owner = np.full((size, size), _STUFF_VISIBLE, np.int16)
    owner = np.pad(owner, margin, constant_values=_OUTSIDE)
    things: list[PlacedThing] = []
    light = rng.uniform(0, 2 * np.pi)  # the direction that shadows fall in
    for shape in _draw_shapes(rng, size):
        window = _place(shape, owner, things, margin, rng)
        if window is not None:
            draw.paint(canvas[window], shape, light, rng)
    image = canvas[margin:-margin, margin:-margin]
    owner = owner[margin:-margin, margin:-margin]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    strength = np.float32(rng.uniform(0, 0.2))
    gradient = np.cos(light) * ramp[None] + np.sin(light) * ramp[:, None]
    image *= (1 + strength * gradient)[..., None]
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 7))
    return Scene(np.clip(image, 0, 255).astype(np.uint8), stuff, owner, things)


def _draw_shapes(rng: np.random.Generator, size: int) -> list[draw.Shape]:
    """Draw the things of an image, from back to front, before they are placed."""
    if rng.random() < EMPTY_FRACTION:
        return []
    count = 2 + min(int(rng.geometric(0.22)) - 1, 10)
    shapes = [draw.random_shape(size, rng) for _ in range(count)]
    if rng.random() < CROWD_FRACTION / (1 - EMPTY_FRACTION):
        shapes.insert(0, draw.random_crowd(rng))
    return shapes


def _place(
    shape: draw.Shape,
    owner: NDArray[np.int16],
    things: list[PlacedThing],
    margin: int,
    rng: np.random.Generator,
) -> tuple[slice, slice] | None:
    """Find a place where the shape and everything it covers stay visible enough.

    Adds the thing to `owner` and `things`. Returns the window of `owner` that the shape's grid
    takes, or None if no place was found after many draws.
    """
    inside = shape.level < 0
    height, width = inside.shape
    full_area = int(inside.sum())
    size = len(owner) - 2 * margin
    # Adding 2 shifts the values from -2 (outside) on to non-negative counts.
    visible_areas = np.bincount(owner.ravel() + 2, minlength=len(things) + 2)[2:]
    full_areas = np.array([*(thing.full_area for thing in things), full_area])
    for _ in range(30):
        centre = margin + rng.uniform(0.04, 0.96, 2) * size
        x, y = (centre - (width / 2, height / 2)).astype(int)
        window = np.s_[y : y + height, x : x + width]
        visible = inside & (owner[window] > _OUTSIDE)
        covered = np.bincount(owner[window][visible] + 1, minlength=len(things) + 1)[1:]
        areas_left = np.append(visible_areas - covered, visible.sum())
        min_areas = np.maximum(MIN_VISIBLE_FRACTION * full_areas, MIN_VISIBLE_AREA)
        if (areas_left >= min_areas).all():
            owner[window][visible] = len(things)
            joints = shape.joints + np.array([x - margin, y - margin])
            things.append(PlacedThing(shape.name, full_area, joints, shape.crowd))
            return window
    return None


def _to_annotation(scene: Scene, index: int) -> CocoObject:
    """Return the COCO annotation of a thing, without its ids."""
    thing = scene.things[index]
    mask = scene.owner == index
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    size = [int(side) for side in rle["size"]]
    segmentation: Rle | UncompressedRle
    if thing.crowd:
        segmentation = {"size": size, "counts": run_lengths(mask)}
    else:
        segmentation = {"size": size, "counts": rle["counts"].decode("ascii")}
    row: CocoObject = {
        "category_id": THINGS[thing.name],
        "bbox": [float(number) for number in coco_mask.toBbox(rle)],
        "area": float(coco_mask.area(rle)),
        "iscrowd": int(thing.crowd),
        "segmentation": segmentation,
    }
    if thing.name == "figure":
        row["keypoints"], row["num_keypoints"] = _keypoints(thing, mask)
    return row


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Return COCO's uncompressed RLE: run lengths along the columns, zeros first."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *counts] if flat[0] else counts


def _keypoints(thing: PlacedThing, mask: NDArray[np.bool_]) -> tuple[list[float], int]:
    """Return [x, y, v] * P as pixel indices, and the number of keypoints with v > 0.

    v: 0 outside the image, 1 hidden, 2 visible.
    """
    if thing.crowd:
        return [0] * (3 * len(JOINTS)), 0
    x, y = np.floor(thing.joints).astype(int).T
    inside = (x >= 0) & (x < mask.shape[1]) & (y >= 0) & (y < mask.shape[0])
    visible = np.zeros_like(inside)
    visible[inside] = mask[y[inside], x[inside]]
    rows = np.stack([x, y, 1 + visible], axis=1) * inside[:, None]
    return rows.ravel().tolist(), int(inside.sum())


def _write_image(
    split_and_index: tuple[str, int], *, root: Path, size: int, seed: int
) -> list[CocoObject]:
    """Draw an image into the folders of `root`; return its annotations without ids.

    Runs in a worker.
    """
    split, index = split_and_index
    sequence = np.random.SeedSequence([seed, SPLITS.index(split), index])
    scene = draw_scene(np.random.default_rng(sequence), size)
    name = f"{split}_{index:06d}"
    Image.fromarray(scene.image).save(root / "images" / f"{name}.jpg", quality=95)
    thing_ids = [UNLABELLED if thing.crowd else THINGS[thing.name] for thing in scene.things]
    # Pixels of stuff have owner -1, which selects the entry at the end.
    things = np.array([*thing_ids, 0], np.uint8)[scene.owner]
    stuff = np.array([STUFF[texture] for texture in draw.TEXTURES], np.uint8)[scene.stuff]
    labels = np.where(scene.owner < 0, stuff, things)
    Image.fromarray(labels).save(root / "stuff" / f"{name}.png")
    return [_to_annotation(scene, thing) for thing in range(len(scene.things))]


def _categories() -> list[CocoCategory]:
    rows: list[CocoCategory] = [
        {"id": category_id, "name": name, "supercategory": "shape"}
        for name, category_id in THINGS.items()
    ]
    skeleton = [[JOINTS.index(start) + 1, JOINTS.index(end) + 1] for start, end in BONES]
    rows[-1].update({"supercategory": "being", "keypoints": list(JOINTS), "skeleton": skeleton})
    return rows


def _to_coco(split: str, size: int, image_annotations: list[list[CocoObject]]) -> CocoDocument:
    """Return the COCO file of a split from the annotations of its images. Ids count from 1."""
    images: list[CocoImage] = []
    annotations: list[CocoAnnotation] = []
    for image_id, rows in enumerate(image_annotations, 1):
        file_name = f"{split}_{image_id:06d}.jpg"
        images.append({"id": image_id, "file_name": file_name, "width": size, "height": size})
        for row in rows:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **row})
    return {
        "info": {"description": f"maskseg scenes, {split}", "version": str(VERSION)},
        "images": images,
        "annotations": annotations,
        "categories": _categories(),
        "stuff_categories": [
            {"id": category_id, "name": name} for name, category_id in STUFF.items()
        ],
    }


def _exists(root: Path, arguments: dict[str, int]) -> bool:
    """Return whether `root` is this dataset. Raises ValueError if it is something else."""
    if not root.exists():
        return False
    advice = "delete the folder or choose another data.root"
    try:
        stored = parse_json((root / "scenes.json").read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"{root} exists and is not a finished scenes dataset: {advice}") from None
    if stored != arguments:
        raise ValueError(f"{root} holds scenes made with {stored}, not {arguments}: {advice}")
    parts = ("train.json", "val.json", "images", "stuff")
    missing = [name for name in parts if not (root / name).exists()]
    if missing:
        raise ValueError(f"{root} lacks {', '.join(missing)}: {advice}")
    return True


def make_scenes(
    root: str | Path,
    *,
    num_train: int = 1500,
    num_val: int = 150,
    size: int = 256,
    seed: int = 0,
    num_workers: int | None = None,
) -> None:
    """Generate the dataset in the folder `root`, unless it exists already.

    Writes {train,val}.json, images/train_000001.jpg ..., stuff/train_000001.png ... (category id of
    each pixel, 255 in crowds) and scenes.json (the arguments).

    num_workers: None for one per CPU; 0 or 1 for this process alone.

    An image depends only on (seed, split, index) and size, not on num_workers or num_train. `root`
    appears complete, by a rename at the end. In a distributed run, one process generates the
    dataset and the others wait.

    Raises ValueError if `root` holds anything else, or if an argument is out of range.
    """
    arguments = {
        "version": VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "size": size,
        "seed": seed,
    }
    if min(num_train, num_val, seed) < 0 or size < 128:
        raise ValueError(f"want num_train, num_val, seed >= 0 and size >= 128, got {arguments}")
    root = Path(root).expanduser().absolute()
    if _exists(root, arguments):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    lock_path = root.with_name(f".{root.name}.lock")

    def report_wait() -> None:
        print(f"{root}: waiting for another process that generates it", flush=True)

    with lock(lock_path, f"{lock_path}: in use", report_wait):
        if not _exists(root, arguments):
            _generate(root, arguments, num_workers)


def _generate(root: Path, arguments: dict[str, int], num_workers: int | None) -> None:
    """Write the dataset to a folder beside `root`, and rename it at the end."""
    num_train = arguments["num_train"]
    work = root.with_name(f".{root.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)  # left by a run that was killed
    for folder in ("images", "stuff"):
        (work / folder).mkdir(parents=True)
    jobs = [("train", index) for index in range(1, num_train + 1)]
    jobs += [("val", index) for index in range(1, arguments["num_val"] + 1)]
    write = partial(_write_image, root=work, size=arguments["size"], seed=arguments["seed"])
    rows = _run_jobs(write, jobs, num_workers)
    for split, split_rows in (("train", rows[:num_train]), ("val", rows[num_train:])):
        content = json.dumps(_to_coco(split, arguments["size"], split_rows))
        (work / f"{split}.json").write_text(content, encoding="utf-8")
    (work / "scenes.json").write_text(json.dumps(arguments), encoding="utf-8")
    work.rename(root)


def _run_jobs(
    write: partial[list[CocoObject]], jobs: list[tuple[str, int]], num_workers: int | None
) -> list[list[CocoObject]]:
    """Return the results of the jobs in order. Fewer than 32 jobs are not worth a worker."""
    workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    workers = min(workers, len(jobs) // 16)
    if workers < 2:
        return [write(job) for job in jobs]
    died = ValueError(
        "a worker process that generates the scenes has died, possibly out of memory: running "
        "the command again starts over"
    )
    with open_pool(workers, died) as pool, sigterm_as_exception():
        with hidden_main():  # workers start when jobs are submitted
            results = pool.map(write, jobs, chunksize=8)
        return list(results)


def filled_box_ap(annotation_file: Path) -> float:
    """Return the mask AP of filled ground-truth boxes: what a detector without masks can reach."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(annotation_file))
        rows = []
        for annotation in ground_truth.dataset["annotations"]:
            if annotation["iscrowd"]:
                continue
            x, y, width, height = (int(number) for number in annotation["bbox"])
            filled = np.zeros(annotation["segmentation"]["size"], np.uint8, order="F")
            filled[y : y + height, x : x + width] = 1
            rows.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": annotation["category_id"],
                    "score": 1.0,
                    "segmentation": coco_mask.encode(filled),
                }
            )
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(rows), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


class ScenesSource(CocoSource):
    """The built-in synthetic dataset, generated in `root` if it is missing.

    num_train, num_val, size, scenes_seed: arguments of `make_scenes`. Other keys: `CocoSource`.
    """

    def __init__(
        self,
        root: str,
        num_train: NonNegativeInt = 1500,
        num_val: NonNegativeInt = 150,
        size: Annotated[int, Range(ge=128, le=65_536)] = 256,
        scenes_seed: Seed = 0,
        **keys: Unpack[SourceParts],
    ) -> None:
        super().__init__(root=root, **keys)
        self.arguments: dict[str, int] = {
            "num_train": num_train,
            "num_val": num_val,
            "size": size,
            "seed": scenes_seed,
        }

    def prepare(self) -> None:
        """Generate the images (seconds) unless they exist.

        Raises UserError if the folder holds something else.
        """
        try:
            make_scenes(str(self.root), **self.arguments)
        except ValueError as error:
            raise UserError(str(error)) from error
