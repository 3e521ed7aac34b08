"""Reads COCO files as a training would, checks them, and prints a table of their classes.

Exit code 2 and a report where the data cannot be used.

  python tools/check_data.py data=custom data.train_json=TRAIN.json data.val_json=VAL.json \\
      data.images=DIR
  python tools/check_data.py data=custom data.val_json=VAL.json data.images=DIR
  python tools/check_data.py data=coco data.root=DIR
  python tools/check_data.py data=custom data.train_json=TRAIN.json data.images=DIR \\
      data.check_images=false
  python tools/check_data.py data=scenes
"""

from __future__ import annotations

from maskseg import config as configs
from maskseg.config import Config
from maskseg.config.restore import open_data
from maskseg.data.datasets.coco import CocoSource
from maskseg.errors import UserError


def main(arguments: list[str]) -> None:
    """Entry point of `tools/check_data.py`."""
    print(check_data(configs.compose("check_data", arguments)))


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
                # The validation file is then checked with its own classes.
                config.data.train_json = None
                source = open_data(config)
    if problems:
        raise UserError("\n\n".join(problems))
    _ = source.categories  # raises UserError where the config contradicts them
    return describe(source)
