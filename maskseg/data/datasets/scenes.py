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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskseg.data.datasets import scenes_draw as draw
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.process_pool import hidden_main
from maskseg.errors import UserError
from maskseg.files import parse_json

# Category ids have gaps on purpose, as COCO's have: code that takes an id for a label fails here first.
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
JOINTS = ("head", *(f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
                    for side in ("left", "right")))  # fmt: skip
BONES = (("head", "left_shoulder"), ("head", "right_shoulder"), ("left_shoulder", "right_shoulder"),
         ("left_shoulder", "left_elbow"), ("left_elbow", "left_wrist"), ("right_shoulder", "right_elbow"),
         ("right_elbow", "right_wrist"), ("left_shoulder", "left_hip"), ("right_shoulder", "right_hip"),
         ("left_hip", "right_hip"), ("left_hip", "left_knee"), ("left_knee", "left_ankle"),
         ("right_hip", "right_knee"), ("right_knee", "right_ankle"))  # fmt: skip
UNLABELLED = 255
SPLITS = ("train", "val")
VERSION = 1  # raise it when the same arguments give other pictures

EMPTY, CROWDED = 0.03, 0.06  # of the pictures
MIN_VISIBLE_PART, MIN_VISIBLE_AREA = (
    0.45,
    45,
)  # a place that leaves less (pixels) of any thing to be seen is not taken


@dataclass(frozen=True)
class Placed:
    """A thing in the picture: full area in pixels (with what is hidden or outside), joints [P, 2] xy, pixels."""

    name: str
    full_area: int
    joints: NDArray[np.floating[Any]]
    crowd: bool


@dataclass(frozen=True)
class Scene:
    """image uint8 [S, S, 3]; stuff uint8 [S, S]: indices into STUFF; owner int16 [S, S]: the index in things of the
    thing that is seen at a pixel, -1 where stuff is seen."""

    image: NDArray[np.uint8]
    stuff: NDArray[np.uint8]
    owner: NDArray[np.int16]
    things: list[Placed]


def draw_scene(rng: np.random.Generator, size: int) -> Scene:
    """One picture of size x size pixels: stuff, then things from back to front, then light and noise."""
    image, stuff = draw.background(size, rng)
    margin = max(
        int(0.4 * size) + 30, 110
    )  # room for what stands out of the picture, as half a crowd: pixels whose owner is -2
    canvas = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    owner, things = (
        np.pad(np.full((size, size), -1, np.int16), margin, constant_values=-2),
        list[Placed](),
    )
    light = rng.uniform(0, 2 * np.pi)  # the direction that shadows fall in
    if rng.random() >= EMPTY:
        shapes = [
            draw.random_shape(size, rng) for _ in range(2 + min(int(rng.geometric(0.22)) - 1, 10))
        ]
        if rng.random() < CROWDED / (1 - EMPTY):
            shapes.insert(0, draw.crowd(rng))
        for shape in shapes:
            window = _place(shape, owner, things, margin, rng)
            if window is not None:
                draw.paint(canvas[window], shape, light, rng)
    image, owner = canvas[margin:-margin, margin:-margin], owner[margin:-margin, margin:-margin]
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    strength = np.float32(rng.uniform(0, 0.2))
    image *= (1 + strength * (np.cos(light) * ramp[None] + np.sin(light) * ramp[:, None]))[
        ..., None
    ]
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 7))
    return Scene(np.clip(image, 0, 255).astype(np.uint8), stuff, owner, things)


def _place(
    shape: draw.Shape,
    owner: NDArray[np.int16],
    things: list[Placed],
    margin: int,
    rng: np.random.Generator,
) -> tuple[slice, slice] | None:
    """Finds a place where the shape and all that it covers stay visible enough, and enters it into owner and things.

    Returns the window of owner that the shape's grid takes, or None when many draws found no place.
    """
    inside = shape.level < 0
    (h, w), full, size = inside.shape, int(inside.sum()), len(owner) - 2 * margin
    seen = np.bincount(owner.ravel() + 2, minlength=len(things) + 2)[2:]
    areas = np.array([*(thing.full_area for thing in things), full])
    for _ in range(30):
        x, y = (margin + rng.uniform(0.04, 0.96, 2) * size - (w / 2, h / 2)).astype(int)
        window = np.s_[y : y + h, x : x + w]
        here = inside & (owner[window] > -2)
        covered = np.bincount(owner[window][here] + 1, minlength=len(things) + 1)[1:]
        left = np.append(seen - covered, here.sum())
        if (left >= np.maximum(MIN_VISIBLE_PART * areas, MIN_VISIBLE_AREA)).all():
            owner[window][here] = len(things)
            things.append(
                Placed(
                    shape.name, full, shape.joints + np.array([x - margin, y - margin]), shape.crowd
                )
            )
            return window
    return None


def _annotation(scene: Scene, index: int) -> dict[str, Any]:
    """The COCO row of one thing, without its ids."""
    thing, mask = scene.things[index], scene.owner == index
    code = rle.encode(np.asfortranarray(mask, np.uint8))
    row: dict[str, Any] = {
        "category_id": THINGS[thing.name],
        "bbox": [float(number) for number in rle.toBbox(code)],
        "area": float(rle.area(code)),
        "iscrowd": int(thing.crowd),
        "segmentation": {"size": list(code["size"]), "counts": code["counts"].decode("ascii")},
    }
    if thing.crowd:
        row["segmentation"]["counts"] = _run_lengths(mask)
    if thing.name == "figure":
        row["keypoints"], row["num_keypoints"] = _keypoints(thing, mask)
    return row


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed RLE: lengths of runs down the columns, the first of zeros."""
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *counts] if flat[0] else counts


def _keypoints(thing: Placed, mask: NDArray[np.bool_]) -> tuple[list[int], int]:
    """[x, y, v] * P as pixel indices (v: 0 outside the picture, 1 hidden, 2 visible) and how many have v > 0."""
    if thing.crowd:
        return [0] * (3 * len(JOINTS)), 0
    x, y = np.floor(thing.joints).astype(int).T
    inside = (x >= 0) & (x < mask.shape[1]) & (y >= 0) & (y < mask.shape[0])
    seen = np.zeros_like(inside)
    seen[inside] = mask[y[inside], x[inside]]
    rows = np.stack([x, y, 1 + seen], axis=1) * inside[:, None]
    return rows.ravel().tolist(), int(inside.sum())


def _write_picture(
    split_and_index: tuple[str, int], *, root: Path, size: int, seed: int
) -> list[dict[str, Any]]:
    """Draws one picture into the folders of root; returns its annotations, without ids. Runs in a worker."""
    split, index = split_and_index
    scene = draw_scene(
        np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index])), size
    )
    name = f"{split}_{index:06d}"
    Image.fromarray(scene.image).save(root / "images" / f"{name}.jpg", quality=95)
    of_thing = [UNLABELLED if thing.crowd else THINGS[thing.name] for thing in scene.things]
    labels = np.array([*of_thing, 0], np.uint8)[scene.owner]  # owner -1, stuff, takes the last one
    stuff = np.array([STUFF[look] for look in draw.LOOKS], np.uint8)[scene.stuff]
    Image.fromarray(np.where(scene.owner < 0, stuff, labels)).save(root / "stuff" / f"{name}.png")
    return [_annotation(scene, thing) for thing in range(len(scene.things))]


def _categories() -> list[dict[str, Any]]:
    skeleton = [[JOINTS.index(joint) + 1 for joint in bone] for bone in BONES]
    rows: list[dict[str, Any]] = [
        {"id": THINGS[name], "name": name, "supercategory": "shape"} for name in THINGS
    ]
    rows[-1] |= {"supercategory": "being", "keypoints": list(JOINTS), "skeleton": skeleton}
    return rows


def _dataset(split: str, size: int, pictures: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """The COCO file of a split, from the annotations of its pictures in order. All ids count from 1."""
    numbered = enumerate(
        ((image, row) for image, rows in enumerate(pictures, 1) for row in rows), 1
    )
    images = [f"{split}_{number:06d}.jpg" for number in range(1, len(pictures) + 1)]
    return {
        "info": {"description": f"maskseg scenes, {split}", "version": str(VERSION)},
        "images": [
            {"id": i, "file_name": n, "width": size, "height": size}
            for i, n in enumerate(images, 1)
        ],
        "annotations": [
            {"id": number, "image_id": image, **row} for number, (image, row) in numbered
        ],
        "categories": _categories(),
        "stuff_categories": [{"id": number, "name": name} for name, number in STUFF.items()],
    }


def _already_made(root: Path, arguments: dict[str, int]) -> bool:
    """Whether root is this very data set. Raises ValueError if something else is there."""
    if not root.exists():
        return False
    advice = "delete the folder or choose another data.root"
    try:
        found = parse_json((root / "scenes.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{root} exists and is no finished scenes data set: {advice}") from None
    if found != arguments:
        raise ValueError(f"{root} holds scenes made with {found}, not {arguments}: {advice}")
    if missing := [
        name for name in ("train.json", "val.json", "images", "stuff") if not (root / name).exists()
    ]:
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
    """Writes the data set to the folder root, or returns at once if it is there already.

    Makes {train,val}.json, images/train_000001.jpg ..., stuff/train_000001.png ... (category id of each pixel, 255 in
    crowds) and scenes.json (the arguments). A picture depends on (seed, split, index) and size only: neither on
    num_workers (None: one a CPU; 0 or 1: this process) nor on num_train. root appears whole, by a rename at the end;
    in a distributed run one process makes it and the others wait.

    Raises ValueError if root holds anything else, or if an argument is out of range.
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
    if _already_made(root, arguments):
        return
    work = root.with_name(f".{root.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)  # what a killed run left
    for folder in ("images", "stuff"):
        (work / folder).mkdir(parents=True)
    jobs = [
        (split, 1 + i)
        for split, count in zip(SPLITS, (num_train, num_val), strict=True)
        for i in range(count)
    ]
    write = partial(_write_picture, root=work, size=size, seed=seed)
    workers = min((os.cpu_count() or 1) if num_workers is None else num_workers, len(jobs) // 16)
    if workers < 2:
        rows = [write(job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            with hidden_main():  # all workers start as the jobs come in
                results = pool.map(write, jobs, chunksize=8)
            rows = list(results)
    for split, part in zip(SPLITS, (rows[:num_train], rows[num_train:]), strict=True):
        (work / f"{split}.json").write_text(json.dumps(_dataset(split, size, part)))
    (work / "scenes.json").write_text(json.dumps(arguments))
    work.rename(root)


def filled_box_ap(annotation_file: Path) -> float:
    """Segm AP of perfect, perfectly classified boxes, each filled to the brim: what a detector gets without masks."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotation_file))
        rows = []
        for row in truth.dataset["annotations"]:
            if not row["iscrowd"]:
                x, y, w, h = (int(number) for number in row["bbox"])
                filled = np.zeros(row["segmentation"]["size"], np.uint8, order="F")
                filled[y : y + h, x : x + w] = 1
                row = {"image_id": row["image_id"], "category_id": row["category_id"], "score": 1.0}
                rows.append(row | {"segmentation": rle.encode(filled)})
        evaluation = COCOeval(truth, truth.loadRes(rows), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


class ScenesSource(CocoSource):
    """The embedded data set: made under `root` where it is missing. Other keys: `CocoSource`."""

    def __init__(
        self,
        root: str,
        num_train: int = 1500,
        num_val: int = 150,
        size: int = 256,
        scenes_seed: int = 0,
        **keys: Any,
    ) -> None:
        super().__init__(root=root, **keys)
        self.arguments: dict[str, int] = {
            "num_train": num_train,
            "num_val": num_val,
            "size": size,
            "seed": scenes_seed,
        }

    def prepare(self) -> None:
        """Writes the pictures (seconds) unless they are there. Raises UserError for a folder that holds something else."""
        try:
            make_scenes(str(self.root), **self.arguments)
        except ValueError as error:
            raise UserError(str(error)) from error
