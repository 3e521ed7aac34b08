"""Trains a model: python tools/train.py experiment=... key=value"""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("train"))
