"""What every tool shares: help, one line for an error, exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from maskseg.errors import UserError

# Read when torch is imported, so the tools import this module first. By default OpenMP's threads spin while they wait for each other; as soon
# as one core is busy with something else, a loader's process for example, a step takes up to ten times longer. Spinning briefly, then sleeping,
# costs nothing where all cores are free. See docs/decisions/0003-threads.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def run(main: Callable[[list[str]], None], usage: str, argv: Sequence[str] | None = None) -> int:
    """Calls `main` with the command line's key=value words. -> 0, or 2 after an error of the user's, which is printed in one message."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(usage.strip())
        return 0
    try:
        main(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
