"""Many trainings in search of the best numbers: python tools/sweep.py --multirun key=a,b"""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("sweep"))
