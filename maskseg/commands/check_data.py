"""Reads COCO files as the training would, checks them whole, and prints a table of their classes. Exit code 2 and a report where they can't be used.

python tools/check_data.py data=custom data.train_json=TRAIN.json data.val_json=VAL.json data.images=DIR
python tools/check_data.py data=custom data.val_json=VAL.json data.images=DIR
python tools/check_data.py data=coco data.root=DIR
python tools/check_data.py data=custom data.train_json=TRAIN.json data.images=DIR data.check_images=false
python tools/check_data.py data=scenes
"""

from __future__ import annotations

from typing import Any

from maskseg import config as configs
from maskseg.config.restore import open_data
from maskseg.data.datasets.coco import CocoSource
from maskseg.errors import UserError


def describe(source: CocoSource) -> str:
    """The per-class table and the warnings of each split. Raises UserError for data that cannot be used."""
    parts = []
    for split in source.splits():
        file = source.file(split)
        parts.append(f"{split}: {file.path}\n{file.class_table()}")
        if file.report.warnings:
            parts.append(file.report.text())
    return "\n\n".join(parts)


def check_data(config: Any) -> str:
    """Reads and checks both files. -> what to print. Raises UserError with the report."""
    source = open_data(config)
    if not source.splits():
        raise UserError("nothing to check: set data.train_json or data.val_json")
    problems = []
    for split in source.splits():
        try:
            source.file(split)
        except UserError as error:
            problems.append(str(error))
            if split == "train":
                source.known = None
                source.json["train"] = None
    if problems:
        raise UserError("\n\n".join(problems))
    _ = source.categories
    return describe(source)


def main(arguments: list[str]) -> None:
    """Entry point of `tools/check_data.py`."""
    print(check_data(configs.compose("check_data", arguments)))
