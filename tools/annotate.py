"""Masks from boxes or image labels: python tools/annotate.py data.val_json=BOXES.json ..."""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("annotate"))
