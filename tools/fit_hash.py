"""A hash layer for a backbone, without labels: python tools/fit_hash.py checkpoint=..."""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("fit_hash"))
