"""Evaluates a trained model: python tools/evaluate.py checkpoint=... output=DIR"""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("evaluate"))
