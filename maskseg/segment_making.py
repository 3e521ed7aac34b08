"""The segments that a training needs and that are missing are made before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from maskseg import config as configs
from maskseg.data.checks import ImageRecord
from maskseg.data.segment_store import ImageJob, SegmentStore, check_settings, missing, store_settings, write_store
from maskseg.data.source import CocoSource
from maskseg.engine.distributed import Group
from maskseg.errors import UserError


def prepare_segments(model: nn.Module, source: CocoSource, splits: Sequence[str], config: Any, group: Group) -> None:
    """Makes what is missing of the segments that the model takes, in one process of each machine. Raises UserError where no folder is named, or
    the data lacks something else."""
    proposer = getattr(model, "proposer", None)
    if getattr(proposer, "needs", None) != "segments":
        return
    if source.segment_sampler is None:
        raise UserError("nothing says which segments are learnt from: data.segment_sampler is not set")
    for split in splits:
        folder = source.segments[split]
        if folder is None:
            raise UserError(f"the model takes segments from a folder: data.{split}_segments is not set (what is missing there is made)")
        if group.local_main:
            ensure(source, split, folder, config.model.proposer.method)
        group.wait()
        source.dataset(split)  # what it needs is there


def ensure(source: CocoSource, split: str, folder: Path | str, method: Any) -> None:
    """Makes the segments of a split that are missing in the folder, one process a CPU; says nothing where there are all of them.

    method: the config of what makes them. A folder that came of a file of masks is taken as it is, if it is whole. Raises UserError for one of other
    settings or another data set.
    """
    folder, records = Path(folder), source.records(split)
    found = store_settings(folder) or {}
    if "input" in found:
        check_settings(folder, settings_of(source, split) | {key: found.get(key) for key in ("input", "max_proposals")})
        SegmentStore(folder, sizes_of(records))
        return
    settings = settings_of(source, split, method)
    check_settings(folder, settings)
    lacking = set(missing(folder, (record.id for record in records))[0])
    if lacking:
        print(f"{folder}: making the segments of {len(lacking)} images, once for all trainings", flush=True)
        jobs = jobs_of(source, split, [record for record in records if record.id in lacking])
        write_store(folder, jobs, configs.build(method), settings, 0)


def sizes_of(records: Sequence[ImageRecord]) -> list[tuple[int, int, int]]:
    """Id, height and width of each image."""
    return [(record.id, record.height, record.width) for record in records]


def jobs_of(source: CocoSource, split: str, records: Sequence[ImageRecord]) -> list[ImageJob]:
    """The images' files."""
    folder = source.images[split] or ""
    return [ImageJob(r.id, r.height, r.width, folder, r.file_name, source.max_pixels) for r in records]


def settings_of(source: CocoSource, split: str, method: Any = None) -> dict[str, Any]:
    """What the results follow from, flat: the data set and the keys of the method."""
    keys = {} if method is None else configs.flat(yaml.safe_load(configs.to_yaml(method, resolve=True)), "method.")
    return {"data": str(Path(source.json[split] or "").resolve()), **keys}
