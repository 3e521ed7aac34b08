"""Process-pool helpers. A resumed job must have the settings it was started with."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import ModuleType
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from maskseg.data.image_files import MAX_PIXELS, load_image, safe_join
from maskseg.errors import Interrupted, UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

_JOBS_PER_WORKER = 4  # submitted at a time; jobs may be large


def describe_differences(stored: Mapping[str, object], current: Mapping[str, object]) -> str:
    """Describe how the settings of an earlier run differ from the current ones, "" if equal.

    Both are flat mappings of plain values.
    """
    keys = [key for key in sorted({*current, *stored}) if current.get(key) != stored.get(key)]
    return "; ".join(f"{key}={stored.get(key)!r} there, {current.get(key)!r} here" for key in keys)


def run_pool(
    function: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Generator[Result, None, None]:
    """Run a function on jobs in worker processes; yield the results as they arrive.

    Jobs are taken from `jobs` as they are needed, a few per worker. Closing the generator waits
    for the jobs that are running. Raises UserError if a worker dies.
    """
    died = UserError(
        "a worker process has died, possibly out of memory: use fewer workers; "
        "running the command again resumes"
    )
    pending: set[Future[Result]] = set()
    with open_pool(workers, died) as pool, hidden_main(), _one_thread_per_worker():
        for job in jobs:
            pending.add(pool.submit(function, job))
            if len(pending) >= _JOBS_PER_WORKER * workers:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


@contextlib.contextmanager
def open_pool(workers: int, died: Exception) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of worker processes, which end with this process; at the end, wait for them.

    died: raised if a worker dies.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _init_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise died from error
    finally:
        pool.shutdown(cancel_futures=True)


def _init_worker() -> None:
    """Ignore signals, which the parent process handles, and exit when the parent exits."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # sys.exit would end this thread only


@contextlib.contextmanager
def _one_thread_per_worker() -> Iterator[None]:
    """Let processes that are started here compute with one thread each: there is one per CPU."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    previous = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(previous, "1"))
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def sigterm_as_exception() -> Iterator[None]:
    """Raise Interrupted on SIGTERM, so that workers and files are cleaned up.

    No effect outside the main thread, where Python does not allow signal handlers.
    """

    def interrupt(number: int, _: object) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Hide the main script from spawned workers.

    They would import it, and with it torch, even if it has a main guard.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@dataclass(frozen=True)
class ImageJob:
    """An image file to process. height, width: in pixels, as the annotations state them."""

    image_id: int
    height: int
    width: int
    root: str
    file_name: str
    max_pixels: int = MAX_PIXELS

    def load(self) -> NDArray[np.uint8]:
        """Read the image, uint8 RGB [height, width, 3]."""
        path = safe_join(self.root, self.file_name)
        image = load_image(path, self.max_pixels, (self.height, self.width))
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
