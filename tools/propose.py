"""Proposals for a data set: python tools/propose.py output=... [checkpoint=...]"""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("propose"))
