"""Compares training runs: python tools/compare.py RUN_A RUN_B ... output=compare.png"""

from __future__ import annotations

import sys

from maskseg import cli
from maskseg.inference.compare import compare

USAGE = """
Prints the numbers of runs beside each other and the config keys in which they differ, and draws their curves over each other.
A run is the folder that a training wrote, with its metrics.jsonl and config.yaml.

  python tools/compare.py runs/scenes_r18/TIME_A runs/scenes_r18/TIME_B
  python tools/compare.py runs/scenes_r18/*
  python tools/compare.py runs/nuclei_r18/* runs/scenes_r18/* output=all.png
  python tools/compare.py runs/scenes_r18/TIME
  python tools/compare.py baseline longer augmented output=docs/three_runs.png

The one key is output, the PNG to write (compare.png).
"""


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(compare, USAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
