"""Reads COCO files as a training would, checks them, and prints a table of their classes.

Exit code 2 and a report where the data cannot be used.

  python tools/check_data.py data=custom data.train_json=TRAIN.json data.val_json=VAL.json \\
      data.images=DIR
  python tools/check_data.py data=custom data.train_json=ALL.json data.images=DIR \\
      data.val_fraction=0.2
  python tools/check_data.py data=custom data.val_json=VAL.json data.images=DIR
  python tools/check_data.py data=coco data.root=DIR
  python tools/check_data.py data=custom data.train_json=TRAIN.json data.images=DIR \\
      data.check_images=false
  python tools/check_data.py data=custom data.train_json=TRAIN.json data.images=DIR fix=MENDED.json
  python tools/check_data.py data=scenes

fix: a new file, to which a repaired copy is written; every change is listed.
"""

from __future__ import annotations

import json
from pathlib import Path

from maskseg import config as configs
from maskseg.config import Config
from maskseg.config.restore import open_data
from maskseg.data.coco.file import check_coco, read_coco
from maskseg.data.coco.parse import UNREADABLE
from maskseg.data.coco.repair import RepairOptions, repair_coco, without_nan
from maskseg.data.datasets.coco import CocoSource
from maskseg.errors import UserError
from maskseg.files import replacing
from maskseg.files.outputs import check_outputs, record_outputs


def main(arguments: list[str]) -> None:
    """Entry point of `tools/check_data.py`."""
    config = configs.compose("check_data", arguments)
    print(check_data(config) if config.fix is None else fix_data(config))


def describe(source: CocoSource) -> str:
    """The per-class table and the warnings of each split. Raises UserError for unusable data."""
    parts = []
    for split in source.splits():
        file = source.file(split)
        parts.append(f"{split}: {file.name}\n{file.class_table()}")
        if file.report.warnings:
            parts.append(file.report.text())
    return "\n\n".join(parts)


def check_data(config: Config) -> str:
    """Read and check both files. -> the text to print. Raises UserError with the reports."""
    source = open_data(config)
    splits = source.splits()
    if not splits:
        raise UserError("nothing to check: set data.train_json or data.val_json")
    problems = []
    for split in splits:
        try:
            source.file(split)
        except UserError as error:
            problems.append(str(error))
            if split == "train":
                if source.divides_file:
                    break
                # The validation file is then checked with its own classes.
                config.data.train_json = None
                source = open_data(config)
    if problems:
        if type(source) is CocoSource and all(map(_can_be_repaired, problems)):
            problems.append("fix=OUT.json writes a repaired copy of one file")
        raise UserError("\n\n".join(problems))
    _ = source.categories  # raises UserError where the config contradicts them
    return "\n\n".join(filter(None, (describe(source), source.shared_images())))


def _can_be_repaired(problem: str) -> bool:
    """Whether a problem is a report on a COCO dataset, not on a file that is none."""
    is_report = "\n" in problem
    return is_report and not any(kind in problem for kind in UNREADABLE)


def fix_data(config: Config) -> str:
    """Write a repaired copy of the only JSON to `config.fix`. -> the report and the changes.

    Raises UserError, before anything is written, if the file exists, if the data has more than
    one JSON, or if nothing can be repaired.
    """
    output = Path(config.fix)
    if "val_fraction" in config.data:
        config.data.val_fraction = None  # the file is repaired as a whole
    source = open_data(config)
    splits = source.splits()
    if len(splits) != 1:
        raise UserError("fix=... repairs one file: set either data.train_json or data.val_json")
    split = source.split(splits[0])
    path = Path(split.single_file())
    check_outputs([output], [path], "fix", "check_data", config.overwrite)
    if not output.parent.is_dir():
        raise UserError(f"fix={output}: there is no folder {output.parent}")
    if not split.images:
        raise UserError("data.images is not set: the folder of the images")
    reading = source.reading
    root = Path(split.images)
    problems = check_coco(
        path,
        image_root=root if reading.check_images else None,
        max_pixels=reading.max_pixels,
        crowds=reading.crowds,
    )
    options = RepairOptions(root, reading.check_images, reading.max_pixels, reading.crowds)
    content, changes = repair_coco(path, options)
    text = json.dumps(without_nan(content), allow_nan=False)
    with record_outputs([output], "check_data"), replacing(output, "the repaired file") as file:
        file.write(text.encode())
    mended = read_coco(
        output,
        image_root=root,
        check_images=reading.check_images,
        max_pixels=reading.max_pixels,
    )
    changed = changes.text("change") if changes.warnings else "nothing had to be changed"
    parts = [problems.text(), changed, f"{output}\n{mended.class_table()}"]
    return "\n\n".join(parts)
