"""Compares training runs: python tools/compare.py RUN_A RUN_B ... output=compare.png"""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("compare"))
