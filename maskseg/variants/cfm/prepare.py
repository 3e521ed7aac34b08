"""The segments that a training needs and that are missing are made before it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from maskseg import config as configs
from maskseg.data.coco.checks import ImageRecord
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.process_pool import ImageJob
from maskseg.engine.distributed import Group
from maskseg.errors import UserError
from maskseg.variants.cfm.store import (
    SegmentStore,
    check_settings,
    missing,
    store_settings,
    write_store,
)

BEAT = 60.0  # seconds after which processes that wait hear that others are still at work


def prepare_segments(
    model: nn.Module,
    source: CocoSource,
    splits: Sequence[str],
    config: Any,
    group: Group,
    words: Sequence[str] | None = None,
) -> None:
    """Makes what is missing of the segments that the model takes, in one process of each machine. Raises UserError where no folder is named, or
    the data lacks something else.

    words: the command line, where the config is a checkpoint's. What is missing is then made only in a folder that the command line names, or
    below the working directory: whoever made the checkpoint does not choose what is written elsewhere.
    """
    proposer = getattr(model, "proposer", None)
    if getattr(proposer, "needs", None) != "segments":
        return
    if source.segment_sampler is None:
        raise UserError(
            "nothing says which segments are learnt from: data.segment_sampler is not set"
        )
    for split in splits:
        folder = source.segments[split]
        if folder is None:
            raise UserError(
                f"the model takes segments from a folder: data.{split}_segments is not set (what is missing there is made)"
            )
        may_make = (
            words is None
            or configs.names_data(words, f"data.{split}_segments")
            or Path(folder).resolve().is_relative_to(Path.cwd())
        )
        once_a_machine(
            group, partial(ensure, source, split, folder, config.model.proposer.method, may_make)
        )
        source.dataset(split)  # what it needs is there


def once_a_machine(group: Group, make: Callable[[], None], beat: float = BEAT) -> None:
    """Calls `make` in one process of each machine. The others wait as long as it takes, which may be longer than a message may: in a thread of
    its own, each of those that work says every `beat` seconds that it still does. After an error in `make` nobody is told."""
    if group.world == 1:
        make()
        return
    done = threading.Event()

    def tell() -> None:
        while group.any(not done.wait(beat))[0]:
            pass

    if not group.local_main:
        done.set()
        tell()
        return
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    make()
    done.set()
    teller.join()


def ensure(
    source: CocoSource, split: str, folder: Path | str, method: Any, may_make: bool = True
) -> None:
    """Makes the segments of a split that are missing in the folder, one process a CPU; says nothing where there are all of them.

    method: the config of what makes them. A folder that came of a file of masks is taken as it is, if it is whole. Raises UserError for one of other
    settings or another data set.
    """
    folder, records = Path(folder), source.records(split)
    found = store_settings(folder) or {}
    if "input" in found:
        check_settings(
            folder,
            settings_of(source, split)
            | {key: found.get(key) for key in ("input", "max_proposals")},
        )
        SegmentStore(folder, sizes_of(records))
        return
    settings = settings_of(source, split, method)
    check_settings(folder, settings)
    lacking = set(missing(folder, (record.id for record in records))[0])
    if lacking and not may_make:
        raise UserError(
            f"data.{split}_segments={folder} lacks the segments of {len(lacking)} images: name the folder on the command line to make them"
        )
    if lacking:
        print(
            f"{folder}: making the segments of {len(lacking)} images, once for all trainings",
            flush=True,
        )
        jobs = jobs_of(source, split, [record for record in records if record.id in lacking])
        write_store(folder, jobs, configs.build(method, configs.FROM_CHECKPOINT), settings, 0)


def sizes_of(records: Sequence[ImageRecord]) -> list[tuple[int, int, int]]:
    """Id, height and width of each image."""
    return [(record.id, record.height, record.width) for record in records]


def jobs_of(source: CocoSource, split: str, records: Sequence[ImageRecord]) -> list[ImageJob]:
    """The images' files."""
    folder = source.images[split] or ""
    return [
        ImageJob(r.id, r.height, r.width, folder, r.file_name, source.max_pixels) for r in records
    ]


def settings_of(source: CocoSource, split: str, method: Any = None) -> dict[str, Any]:
    """What the results follow from, flat: the file of the data set, how many images it has and a hash of what it says of them, and the keys of the
    method."""
    keys = (
        {}
        if method is None
        else configs.flat(yaml.safe_load(configs.to_yaml(method, resolve=True)), "method.")
    )
    file = source.file(split)
    rows = sorted((r.id, r.height, r.width, r.file_name) for r in file.images)
    return {
        "data": file.path.name,
        "images": f"{len(rows)}, {hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}",
        **keys,
    }
