"""Write the segment proposals of a dataset to a folder and measure their recall."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config.restore import open_data
from maskseg.data.coco.file import CocoFile
from maskseg.data.region_map import MIN_STUFF_PIXELS
from maskseg.masks.annotated import AnnotatedMasks
from maskseg.masks.superpixel import SegmentProposals
from maskseg.superpixels.methods import label_components
from maskseg.variants.cfm.hierarchy import best_ious
from maskseg.variants.cfm.prepare import image_jobs, image_sizes, segment_settings
from maskseg.variants.cfm.rle_import import RleFile, segments_from_masks
from maskseg.variants.cfm.store import SegmentStore, write_store

Bools = NDArray[np.bool_]
RECALL_THRESHOLDS = (0.5, 0.7)


def propose(overrides: list[str]) -> None:
    """Write segment proposals and print their recall: `tools/propose.py` without a checkpoint.

    overrides: key=value arguments. Raises UserError, before anything is written, if the data, the
    file of masks or a key is invalid.
    """
    config = configs.compose("propose_segments", overrides)
    configs.require_keys(config, "output")
    # A training may use images without objects. Datasets of segments only have no such key, and
    # `open_data` rejects them.
    if "keep_empty" in config.data:
        config.data.keep_empty = True
    source = open_data(config)
    output = Path(config.output)
    split = config.split
    file = source.file(split)
    records = source.records(split)
    if config.input is None:
        settings = segment_settings(source, split, config.method)
        jobs = image_jobs(source, split, records)
        method = configs.build(config.method)
        summary = write_store(output, jobs, method, settings, config.workers)
    else:
        max_proposals = config.method.max_proposals
        path = Path(config.input)
        settings = segment_settings(source, split)
        settings |= {"input": str(path.resolve()), "max_proposals": max_proposals}
        rles = RleFile(path, records, file.images, max_proposals, source.reading.max_pixels)
        summary = write_store(output, rles, segments_from_masks, settings, config.workers)

    recall = SegmentRecall()
    maps = source.semantic_maps(split)
    store = SegmentStore(output, image_sizes(records))
    # Semantic maps contain labels or category ids.
    if source.has_semantic_labels:
        things: Sequence[int] = range(source.categories.num_things)
    else:
        things = file.categories.ids
    for record in tqdm(records, desc="recall", disable=None):
        semantic = None
        if maps is not None:
            semantic = maps.load(record.file_name, record.height, record.width).numpy()
        proposals = store.load(record.id, record.height, record.width)
        thing_bitmaps = thing_masks(file, file.index_of[record.id])
        recall.add(proposals, thing_bitmaps, stuff_masks(semantic, things))
    if summary.num_written:
        written = f"{summary.num_written} computed now, {summary.seconds:.2f} CPU s per image"
    else:
        written = "all existed"
    print(f"{output}: segments of {len(records)} images ({written})\n{recall.summary()}")


class SegmentRecall:
    """Recall of ground-truth masks by proposals, over a dataset."""

    def __init__(self) -> None:
        self.images = 0
        self.proposals = 0
        self.superpixels = 0
        self.best: dict[str, list[float]] = {"things": [], "stuff regions": []}

    def add(self, proposals: SegmentProposals, things: Bools, stuff: Bools) -> None:
        """Add an image [H, W]. things, stuff: ground-truth masks, bool [n, H, W]."""
        self.images += 1
        self.proposals += len(proposals)
        self.superpixels += proposals.members.shape[1]
        for kind, masks in (("things", things), ("stuff regions", stuff)):
            if len(proposals):
                self.best[kind] += best_ious(proposals, masks).tolist()
            else:
                self.best[kind] += [0.0] * len(masks)

    def recalls(self) -> dict[str, list[float]]:
        """Return the recall at each of RECALL_THRESHOLDS, by kind, for kinds that have masks."""
        recalls = {}
        for kind, ious in self.best.items():
            if ious:
                best = np.array(ious)
                recalls[kind] = [float((best >= minimum).mean()) for minimum in RECALL_THRESHOLDS]
        return recalls

    def summary(self) -> str:
        """Format one line with counts, and one line per kind of region."""
        images = max(self.images, 1)
        lines = [
            f"{self.proposals / images:.1f} proposals of {self.superpixels / images:.1f}"
            " superpixels per image"
        ]
        for kind, recalls in self.recalls().items():
            values = ", ".join(
                f"{recall:.3f} at IoU {minimum}"
                for recall, minimum in zip(recalls, RECALL_THRESHOLDS, strict=True)
            )
            lines.append(f"recall of {len(self.best[kind])} {kind}: {values}")
        return "\n".join(lines)


def thing_masks(file: CocoFile, index: int) -> Bools:
    """Return the masks of an image's objects, without crowds and objects without a mask.

    -> bool [G, H, W]; [0, 0, 0] if there are none.
    """
    record = file.images[index]
    truth = file.annotations(index)
    shapes = [
        shape
        for shape, is_crowd in zip(truth.shapes, truth.crowd, strict=True)
        if shape is not None and not is_crowd
    ]
    return AnnotatedMasks.from_file(shapes, record.height, record.width).to_bitmaps()


def stuff_masks(semantic: NDArray[np.int16] | None, things: Sequence[int]) -> Bools:
    """Return the connected regions of stuff of a semantic map, without specks.

    semantic: category ids or labels [H, W], -1 for none; things: the ids or labels that are not
    stuff. -> bool [n, H, W].
    """
    if semantic is None:
        return np.zeros((0, 0, 0), dtype=bool)
    stuff = np.where(np.isin(semantic, things), -1, semantic)
    components = label_components(stuff)
    _, first, sizes = np.unique(components, return_index=True, return_counts=True)
    is_region = (sizes >= MIN_STUFF_PIXELS) & (stuff.ravel()[first] >= 0)
    return np.asarray(components == np.flatnonzero(is_region)[:, None, None])
