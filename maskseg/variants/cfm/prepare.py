"""Compute the segments that a folder lacks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from maskseg import config as configs
from maskseg.config import Config
from maskseg.data.coco.checks import ImageRecord
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.process_pool import ImageJob
from maskseg.engine.distributed import DistributedContext, run_while_others_wait
from maskseg.errors import UserError
from maskseg.variants.cfm.store import (
    SegmentStore,
    check_settings,
    missing_images,
    store_settings,
    write_store,
)


def run_on_local_rank_zero(
    group: DistributedContext, make: Callable[[], None], heartbeat: float | None = None
) -> None:
    """Run `make` on local rank 0 of each machine; the other ranks wait as long as it takes.

    heartbeat: as in `run_while_others_wait`.
    """
    run_while_others_wait(group, group.local_main, make, heartbeat)


def make_missing_segments(
    source: CocoSource, split: str, folder: Path | str, method: Config, may_write: bool = True
) -> None:
    """Compute the segments of a split that the folder lacks, with one process per CPU.

    Prints nothing if the folder is complete. A folder that was imported from a file of masks is
    used if it is complete, whatever the method.

    method: config of the segmentation method.

    Raises UserError for a folder with other settings or of another dataset.
    """
    folder = Path(folder)
    records = source.records(split)
    stored = store_settings(folder) or {}
    if "input" in stored:
        imported = {key: stored.get(key) for key in ("input", "max_proposals")}
        check_settings(folder, segment_settings(source, split) | imported)
        SegmentStore(folder, image_sizes(records))
        return
    settings = segment_settings(source, split, method)
    check_settings(folder, settings)
    absent = set(missing_images(folder, (record.id for record in records))[0])
    if not absent:
        return
    if not may_write:
        raise UserError(
            f"data.{split}_segments={folder} lacks the segments of {len(absent)} images: name the"
            " folder on the command line to create them"
        )
    print(
        f"{folder}: computing the segments of {len(absent)} images; later runs reuse them",
        flush=True,
    )
    jobs = image_jobs(source, split, [record for record in records if record.id in absent])
    write_store(folder, jobs, configs.build(method, configs.CHECKPOINT_TARGETS), settings, 0)


def image_sizes(records: Sequence[ImageRecord]) -> list[tuple[int, int, int]]:
    """Return id, height and width of each image."""
    return [(record.id, record.height, record.width) for record in records]


def image_jobs(source: CocoSource, split: str, records: Sequence[ImageRecord]) -> list[ImageJob]:
    """Return a job for each image, which loads its file."""
    folder = source.split(split).images or ""
    max_pixels = source.reading.max_pixels
    return [
        ImageJob(record.id, record.height, record.width, folder, record.file_name, max_pixels)
        for record in records
    ]


def segment_settings(
    source: CocoSource, split: str, method: Config | None = None
) -> dict[str, object]:
    """Return what the results depend on, as a flat mapping.

    These are the name of the dataset's file, the number of its images and a hash of their records,
    and the keys of the method.
    """
    method_keys: dict[str, object] = {}
    if method is not None:
        values = yaml.safe_load(configs.to_yaml(method, resolve=True))
        method_keys = configs.flatten(values, "method.")
    file = source.file(split)
    rows = sorted((r.id, r.height, r.width, r.file_name) for r in file.images)
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return {"data": file.path.name, "images": f"{len(rows)}, {digest}", **method_keys}
