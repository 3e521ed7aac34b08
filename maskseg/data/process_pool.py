"""Work that is shared out over processes, and that goes on after a kill only as it was begun."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from maskseg.data.image_files import MAX_PIXELS, load_image, safe_join
from maskseg.errors import Interrupted, UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def differences(found: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Where the settings of an earlier run (flat, plain values) are others than this one's, in words; "" where nowhere."""
    differ = [key for key in sorted({*own, *found}) if own.get(key) != found.get(key)]
    return "; ".join(f"{key}={found.get(key)!r} there, {own.get(key)!r} here" for key in differ)


def pooled(
    make: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Generator[Result, None, None]:
    """The results as they come. Few jobs are under way at a time, so that they may be large; when it is closed, those are finished."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    pending: set[Future[Result]] = set()
    try:
        with hidden_main(), _one_thread():
            for job in jobs:
                pending.add(pool.submit(make, job))
                if len(pending) >= 4 * workers:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process has died, perhaps for want of memory: fewer workers take less; the next run goes on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    """A worker leaves signals to the process that started it, and ends with it, however that ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that are started here compute with one thread each: there is one a CPU."""
    before = {
        name: os.environ.get(name)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    }
    os.environ.update(dict.fromkeys(before, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Interrupted, so that workers and files are left in order."""

    def stop(number: int, _: object) -> None:
        raise Interrupted(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Hides the caller's script from spawned workers: they would import it again, torch and all, main guard or not."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@dataclass(frozen=True)
class ImageJob:
    """An image file, for methods that look at pixels."""

    image_id: int
    height: int
    width: int
    root: str
    file_name: str
    max_pixels: int = MAX_PIXELS

    def load(self) -> NDArray[np.uint8]:
        """uint8 RGB [height, width, 3]."""
        path = safe_join(self.root, self.file_name)
        return np.ascontiguousarray(
            load_image(path, self.max_pixels, (self.height, self.width)).permute(1, 2, 0).numpy()
        )
