"""Proposed masks reviewed in a browser: python tools/review.py file=MASKS.json images=DIR"""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("review"))
