"""Batches from loader processes, and error messages for processes that die or hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from threading import Thread

import torch
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader, Dataset, Sampler

from maskseg.data.sample import Sample
from maskseg.data.samplers import Item
from maskseg.data.shared_memory import SharedBatch, SharedCollate
from maskseg.errors import UserError
from maskseg.structures import Batch

_GRACE = 30  # seconds between SIGTERM and the end of a loader process, without sigwaitinfo
_SIGBUS: int | None = getattr(signal, "SIGBUS", None)  # a write to shared memory that is full
_SHARED_FILE = "</torch_"  # a file in shared memory, in torch's error if there is no space for it
_WARM_UP_BYTES = 31 << 20  # just below the largest block that glibc keeps after it is freed


class BatchLoader:
    """torch's DataLoader with errors that name the dataset and the process.

    name: name of the dataset, for messages; sampler: the items of each batch;
    timeout: seconds without a batch after which a loader process counts as hung;
    pin: copy the batches to page-locked memory.

    Iterators have their own random generator; they draw from no other stream.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset[Sample],
        sampler: Sampler[list[Item]] | Sequence[list[Item]],
        collate: Callable[[list[Sample]], Batch],
        num_workers: int,
        timeout: float,
        pin: bool = False,
    ) -> None:
        self.name = name
        self.num_workers = num_workers
        self.timeout = timeout
        self.loader: DataLoader[Sample] = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=SharedCollate(collate) if num_workers else collate,
            pin_memory=pin,
            timeout=timeout if num_workers else 0,
            worker_init_fn=_init_worker,
            # An iterator must not draw from the global stream, which a resume restores.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches.

        Raises UserError if a loader process died, hung, or read an unreadable image.
        """
        with _sigterm_blocked():
            iterator = iter(self.loader)
        while True:
            try:
                batch = next(iterator, None)
            except RuntimeError as error:
                raise loader_error(error, self.name, self.timeout, iterator) from error
            if batch is None:
                return
            yield batch.unpack() if isinstance(batch, SharedBatch) else batch


def loader_error(
    error: RuntimeError, name: str, timeout: float, iterator: object = None
) -> Exception:
    """Convert torch's error about a loader process into a UserError; return others unchanged.

    name: name of the dataset; timeout: in seconds; iterator: torch's iterator over the batches,
    None if the error was raised elsewhere: torch reports a dead worker from a signal handler,
    wherever the main process happens to be, for example in the middle of a step.
    """
    text = str(error)
    # torch has no public access to its workers and to the batch that it waits for.
    workers: list[BaseProcess] = list(getattr(iterator, "_workers", []))
    if "DataLoader worker" in text and (
        "exited unexpectedly" in text or "killed by signal" in text
    ):
        return _dead_worker_error(text, name, workers)
    if _SHARED_FILE in text:
        return _shared_memory_error(name)
    if "timed out" in text and iterator is not None:
        _kill_workers(iterator, workers)
        tasks = getattr(iterator, "_task_info", {})
        waiting_for = tasks.get(getattr(iterator, "_rcvd_idx", -1), ("?",))[0]
        return UserError(
            f"{name}: loader worker {waiting_for} has returned nothing for "
            f"data.timeout={timeout:g} seconds; is the disk available? "
            "data.num_workers=0 loads in the main process"
        )
    return error


def _dead_worker_error(text: str, name: str, workers: Sequence[BaseProcess]) -> UserError:
    """text: of torch's error."""
    codes = [worker.exitcode for worker in workers]
    if "Bus error" in text or (_SIGBUS is not None and -_SIGBUS in codes):
        return _shared_memory_error(name)
    dead = [
        f"{i} (process {worker.pid}, {_exit_reason(worker.exitcode)})"
        for i, worker in enumerate(workers)
        if worker.exitcode
    ]
    return UserError(
        f"{name}: loader worker {', '.join(dead) or text} died; out of memory? "
        "Reduce data.num_workers to use less; data.num_workers=0 loads in the main process "
        "and shows its error"
    )


def _shared_memory_error(name: str) -> UserError:
    return UserError(
        f"{name}: the loader workers have no shared memory left: make /dev/shm larger "
        "(docker run --shm-size=8g), or reduce batch_size or data.num_workers; data.num_workers=0 "
        "loads in the main process and needs none"
    )


def _kill_workers(iterator: object, workers: Sequence[BaseProcess]) -> None:
    """Kill the workers: a hung one would block the exit of the main process.

    Detaches torch's watchdog first, which would report the kill as a crash.
    """
    if getattr(iterator, "_worker_pids_set", False):
        _remove_worker_pids(id(iterator))
        vars(iterator)["_worker_pids_set"] = False
    for worker in workers:
        worker.kill()


def warm_up_malloc() -> None:
    """Let this process keep up to 62 MB of freed memory.

    glibc raises its thresholds to the largest block that was freed (up to a limit), and keeps
    twice that much. New images then reuse memory instead of requesting pages from the kernel,
    which takes a sixth of their time. No effect with other C libraries.
    """
    torch.empty(_WARM_UP_BYTES, dtype=torch.uint8)


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Delay SIGTERM: the processes that are started meanwhile block it until they handle it."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _init_worker(_: int) -> None:
    """Set up a loader process.

    Ctrl-C and a cluster's SIGTERM reach the loader processes too. They must continue while the
    main process finishes its step and saves, however long that takes, and then ends them.
    """
    warm_up_malloc()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_wait_for_sigterm, daemon=True).start()


def _wait_for_sigterm() -> None:
    """End this process at a SIGTERM of the main process, or at anybody's once that is gone.

    The main process need not be the parent: with the start method `forkserver`, the server is. The
    exit code is 0, as torch's own handler has it: other codes count as a crash.
    """
    main = multiprocessing.parent_process()
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if main is None or sender == main.pid or not main.is_alive():
            os._exit(0)


def _end_later(*_: object) -> None:
    """End this process after a grace period: the sender of the signal is not known."""
    if hasattr(signal, "alarm"):
        signal.alarm(_GRACE)


def _exit_reason(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
