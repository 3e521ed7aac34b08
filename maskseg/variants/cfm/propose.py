"""Segment proposals of a data set in a folder, as `tools/propose.py` makes them without a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config.restore import open_data
from maskseg.data.coco.file import CocoFile
from maskseg.data.region_map import MIN_STUFF
from maskseg.errors import UserError
from maskseg.masks.annotated import FileMasks
from maskseg.masks.base import rle_to_bitmaps
from maskseg.masks.superpixel import SegmentProposals
from maskseg.superpixels.methods import connected
from maskseg.variants.cfm.hierarchy import best_ious
from maskseg.variants.cfm.prepare import jobs_of, settings_of, sizes_of
from maskseg.variants.cfm.rle_import import RleFile, from_runs
from maskseg.variants.cfm.store import SegmentStore, write_store

Bools = NDArray[np.bool_]
RECALL_AT = (0.5, 0.7)


def propose(words: list[str]) -> None:
    """What `tools/propose.py` does with key=value words that name no checkpoint. Raises UserError before anything is written where the data, the
    file of masks or the keys are wrong."""
    config = configs.compose("propose_segments", words)
    configs.require(config, "output")
    if config.workers < 0:
        raise UserError(f"workers must be at least 0, not {config.workers}")
    source, output, split = open_data(config), Path(config.output), config.split
    file = source.file(split)
    source.keep_empty = True  # training may keep images without objects, or not
    records, recall = source.records(split), SegmentRecall()
    if config.input is None:
        settings = settings_of(source, split, config.method)
        written = write_store(
            output,
            jobs_of(source, split, records),
            configs.build(config.method),
            settings,
            config.workers,
        )
    else:
        most, path = config.method.max_proposals, Path(config.input)
        settings = settings_of(source, split) | {
            "input": str(path.resolve()),
            "max_proposals": most,
        }
        rles = RleFile(path, records, file.images, most, source.max_pixels)
        written = write_store(output, rles, from_runs, settings, config.workers)
    maps, store = source.semantic_maps(split), SegmentStore(output, sizes_of(records))
    things = (
        range(source.categories.num_things) if source.labelled else file.categories.ids
    )  # maps have labels, or ids
    for record in tqdm(records, desc="recall", disable=None):
        semantic = (
            None if maps is None else maps.of(record.file_name, record.height, record.width).numpy()
        )
        found = store.of(record.id, record.height, record.width)
        recall.add(
            found, thing_masks(file, file.index_of[record.id]), stuff_masks(semantic, things)
        )
    took = (
        f" ({written.made} made now, {written.seconds:.2f} s of a CPU an image)"
        if written.made
        else " (all were there)"
    )
    print(f"{output}: segments of {len(records)} images{took}\n{recall.text()}")


class SegmentRecall:
    """How well the masks of proposals cover those of the truth, over a data set."""

    def __init__(self) -> None:
        self.images, self.proposals, self.superpixels = 0, 0, 0
        self.best: dict[str, list[float]] = {"things": [], "stuff regions": []}

    def add(self, found: SegmentProposals, things: Bools, stuff: Bools) -> None:
        """The proposals of an image [H, W] and the true masks of its things and its stuff, bool [n, H, W] each."""
        self.images += 1
        self.proposals += len(found)
        self.superpixels += found.members.shape[1]
        for kind, truths in (("things", things), ("stuff regions", stuff)):
            self.best[kind] += (
                best_ious(found, truths).tolist() if len(found) else [0.0] * len(truths)
            )

    def shares(self) -> dict[str, list[float]]:
        """Of things and of stuff regions, where there are any: the share that some proposal overlaps with each IoU of RECALL_AT or more."""
        return {
            kind: [float((np.array(best) >= least).mean()) for least in RECALL_AT]
            for kind, best in self.best.items()
            if best
        }

    def text(self) -> str:
        """A line of the numbers, and one for each kind."""
        images = max(self.images, 1)
        lines = [
            f"{self.proposals / images:.1f} proposals of {self.superpixels / images:.1f} superpixels an image"
        ]
        for kind, shares in self.shares().items():
            told = (
                f"{share:.3f} at IoU {least}"
                for share, least in zip(shares, RECALL_AT, strict=True)
            )
            lines.append(f"recall of {len(self.best[kind])} {kind}: {', '.join(told)}")
        return "\n".join(lines)


def thing_masks(file: CocoFile, index: int) -> Bools:
    """The masks of the objects of an image that have one, crowds left out, bool [G, H, W]; [0, 0, 0] where there is none."""
    record, truth = file.images[index], file.annotations(index)
    shapes = [
        shape
        for shape, crowd in zip(truth.shapes, truth.crowd, strict=True)
        if shape is not None and not crowd
    ]
    return rle_to_bitmaps(FileMasks.from_file(shapes, record.height, record.width).to_rle())


def stuff_masks(semantic: NDArray[np.int16] | None, things: Sequence[int]) -> Bools:
    """The connected pieces of stuff of a map of category ids or labels [H, W] (-1: none), bool [n, H, W]: of those that are no things', without
    specks."""
    if semantic is None:
        return np.zeros((0, 0, 0), dtype=bool)
    stuff = np.where(np.isin(semantic, things), -1, semantic)
    pieces = connected(stuff)
    _, first, sizes = np.unique(pieces, return_index=True, return_counts=True)
    wanted = np.flatnonzero((sizes >= MIN_STUFF) & (stuff.ravel()[first] >= 0))
    return np.asarray(pieces == wanted[:, None, None])
