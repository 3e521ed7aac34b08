"""What every tool shares: help, one line for an error, exit codes."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence

from maskseg.errors import Interrupted, UserError

# Read when torch is imported, so the tools import this module first. By default OpenMP's threads spin while they wait for each other; as soon
# as one core is busy with something else, a loader's process for example, a step takes up to ten times longer. Spinning briefly, then sleeping,
# costs nothing where all cores are free. See docs/decisions/0003-threads.md.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# NumPy's products have threads of their own, in each of the loader's processes as many as there are cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_memory() -> bool:
    """Lets glibc's malloc keep what is freed, at most 1 GiB at the heap's end and no block from 256 MiB on (32 MiB in an old glibc), for the next
    step, which needs as much. -> whether that holds: not where there is another C library or malloc was set up by the environment. See
    docs/decisions/0014-memory-is-kept.md.
    """
    if "GLIBC_TUNABLES" in os.environ or any(key.startswith("MALLOC_") for key in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no such function, or Windows
        return False
    blocks = any(mallopt(M_MMAP_THRESHOLD, size) == 1 for size in (2**28, 2**25))
    return blocks and mallopt(M_TRIM_THRESHOLD, 2**30) == 1


keep_memory()
_OTHERS_FIRST = 3.0  # seconds


def run(main: Callable[[list[str]], None], usage: str, argv: Sequence[str] | None = None) -> int:
    """Calls `main` with the command line's key=value words. -> 0; 2 after an error of the user's, which is printed in one message; 143 after
    SIGTERM and 130 after Ctrl-C.

    Of several processes (torchrun) the first one tells; another one, if it alone has something to tell.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in words):
        print(usage.strip())
        return 0
    try:
        _recorded(main)(words)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(_OTHERS_FIRST)  # an error of all is told by the first, whose end ends this process too
        print(f"error: {error}" if rank == "0" else f"error in process {rank}: {error}", file=sys.stderr, flush=True)
        return 2
    except Interrupted as stop:
        return stop.code
    except KeyboardInterrupt:
        return 130
    return 0


def _recorded(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Under torchrun, what a process fails with is in torchrun's own summary too."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return main
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(main)
