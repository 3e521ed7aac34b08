"""What all tools share: help, one line for an error, exit codes. Each tool is a module of `maskseg.commands` with a function `main`."""

from __future__ import annotations

import ast
import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from maskseg.errors import Interrupted, UserError
from maskseg.files.configs import experiments

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

    Of several processes (torchrun) the first one reports; another one, if it alone has something to report.
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
            time.sleep(
                _OTHERS_FIRST
            )  # an error of all is told by the first, whose end ends this process too
        print(
            f"error: {error}" if rank == "0" else f"error in process {rank}: {error}",
            file=sys.stderr,
            flush=True,
        )
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


def help_text(tool: str) -> str:
    """The help of a tool: the docstring of its module, read without importing it, which would import torch."""
    source = Path(__file__).parent / "commands" / f"{tool}.py"
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return text.replace("{experiments}", ", ".join(experiments()))


def run_tool(tool: str, argv: Sequence[str] | None = None) -> int:
    """Runs `maskseg.commands.<tool>` with the command line's arguments. -> the exit code (`run`)."""

    def main(arguments: list[str]) -> None:
        import_module(f"maskseg.commands.{tool}").main(arguments)

    return run(main, help_text(tool), argv)


# The console scripts of pyproject.toml.
annotate = partial(run_tool, "annotate")
benchmark = partial(run_tool, "benchmark")
check_data = partial(run_tool, "check_data")
compare = partial(run_tool, "compare")
convert = partial(run_tool, "convert")
evaluate = partial(run_tool, "evaluate")
fit_hash = partial(run_tool, "fit_hash")
fit_svm = partial(run_tool, "fit_svm")
predict = partial(run_tool, "predict")
propose = partial(run_tool, "propose")
review = partial(run_tool, "review")
sweep = partial(run_tool, "sweep")
train = partial(run_tool, "train")
