"""SVMs instead of a trained model's softmax: python tools/fit_svm.py checkpoint=... output=..."""

import sys

from maskseg.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("fit_svm"))
