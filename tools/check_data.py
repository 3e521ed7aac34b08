"""Checks a data set without training: python tools/check_data.py data=... key=value"""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("check_data"))
