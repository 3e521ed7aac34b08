"""Weights of torchvision and detectron2 -> checkpoints, and back: python tools/convert.py ..."""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("convert"))
