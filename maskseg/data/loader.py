"""Batches from loader processes, and what is said when one of them dies or hangs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from maskseg.data.shared_memory import Packed, Parcel
from maskseg.errors import UserError
from maskseg.structures import Batch

_GRACE = 30  # seconds after SIGTERM until a loader process ends by itself
_HEAP = 31 << 20  # bytes, just below glibc's highest threshold for memory of its own


class BatchLoader:
    """torch's DataLoader, whose failures name the data set and the process. Its iterators draw from no stream but their own.

    name: of the data set, for messages; sampler: the items of each batch; timeout: seconds after which a process that gives nothing is an error.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset[Any],
        sampler: Sampler[list[Any]] | Sequence[list[Any]],
        collate: Callable[[list[Any]], Batch],
        num_workers: int,
        timeout: float,
        pin: bool = False,
    ) -> None:
        self.name, self.num_workers, self.timeout = name, num_workers, timeout
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=Packed(collate) if num_workers else collate,
            pin_memory=pin,
            timeout=timeout if num_workers else 0,
            worker_init_fn=_begin,
            generator=torch.Generator(),  # its own: an iterator must not draw from the stream that a resume restores
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        """Raises UserError where a loader process died, hung, or found an image that cannot be read."""
        iterator = iter(self.loader)
        while True:
            try:
                batch = next(iterator, None)
            except RuntimeError as error:
                raise loader_error(error, self.name, self.timeout, iterator) from error
            if batch is None:
                return
            yield batch.open() if isinstance(batch, Parcel) else batch


def loader_error(error: RuntimeError, name: str, timeout: float, iterator: Any = None) -> Exception:
    """What torch says of a loader process, in one line that names the data; any other error as it is.

    torch says it wherever the main process happens to be, in the middle of a step for example, where there is no `iterator` at hand. name: of the
    data set; timeout: in seconds.
    """
    text = str(error)
    workers = list(getattr(iterator, "_workers", []))
    dead = [(i, w) for i, w in enumerate(workers) if w.exitcode]
    if "DataLoader worker" in text and (
        "exited unexpectedly" in text or "killed by signal" in text
    ):
        which = ", ".join(f"{i} (process {w.pid}, {_ending(w.exitcode)})" for i, w in dead) or text
        hint = "out of memory? fewer data.num_workers need less; data.num_workers=0 loads in the main process and shows its error"
        return UserError(f"{name}: loader worker {which} died; {hint}")
    if "timed out" in text and iterator is not None:
        _end(iterator, workers)
        waiting = getattr(iterator, "_task_info", {}).get(
            getattr(iterator, "_rcvd_idx", -1), ("?",)
        )[0]
        return UserError(
            f"{name}: loader worker {waiting} has given nothing for data.timeout={timeout:g} seconds; is the disk there? "
            "data.num_workers=0 loads in the main process"
        )
    return error


def _end(iterator: Any, workers: Sequence[Any]) -> None:
    """One that hangs would hold up the end, too. torch watches its processes, and must not take this for another failure."""
    if getattr(iterator, "_worker_pids_set", False):
        torch._C._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    for worker in workers:
        worker.kill()


def keep_pages() -> None:
    """This process keeps up to 62 MB of the memory it frees, so that a picture needs no new pages from the kernel, a sixth of the time.

    glibc keeps twice the largest block that was ever given back (up to its limit); elsewhere this does nothing.
    """
    torch.empty(_HEAP, dtype=torch.uint8)


def _begin(_: int) -> None:
    """What a loader process does first.

    Ctrl-C, and a cluster's SIGTERM, reach the loader processes too: they go on while the main process finishes its step, saves, and ends them.
    """
    keep_pages()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
