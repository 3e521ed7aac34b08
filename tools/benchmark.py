"""Measures side by side: python tools/benchmark.py suite=... key=value"""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("benchmark"))
