"""Runs a trained model on pictures: python tools/predict.py checkpoint=... input=... output=DIR"""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("predict"))
