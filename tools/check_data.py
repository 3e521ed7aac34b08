"""Checks a data set without training: python tools/check_data.py data=... key=value"""

from __future__ import annotations

import sys

from maskseg import cli, config, pipeline

USAGE = """
Reads COCO files as the training would, checks them whole, and prints a table of their classes. Exit code 2 and a report where they can't be used.

  python tools/check_data.py data=custom data.train_json=TRAIN.json data.val_json=VAL.json data.images=DIR
  python tools/check_data.py data=custom data.val_json=VAL.json data.images=DIR
  python tools/check_data.py data=coco data.root=DIR
  python tools/check_data.py data=custom data.train_json=TRAIN.json data.images=DIR data.check_images=false
  python tools/check_data.py data=scenes
"""


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(_check, USAGE, argv)


def _check(words: list[str]) -> None:
    print(pipeline.check_data(config.compose("check_data", words)))


if __name__ == "__main__":
    sys.exit(main())
