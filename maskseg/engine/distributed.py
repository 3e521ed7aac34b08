"""The processes of a run: a single process, or those that torchrun has started."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from maskseg.errors import UserError

T = TypeVar("T")

TIMEOUT_SECONDS = 600.0  # by default, the time that a process waits for another one
_HEARTBEAT_SECONDS = 60.0  # between the messages that keep collectives from timing out
_GRACE_SECONDS = 10.0  # in which all processes that are running notice that one does not answer


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run, and the collectives that they exchange messages by.

    The messages are sent over a CPU (gloo) group, so that they work on every device.

    rank: index of this process; rank 0 writes the files. world_size: number of processes.
    control: process group of the messages; None for a single process. local_rank: index of this
    process on its machine. timeout: seconds after which a process that does not answer ends the
    others. store: key-value store of all processes; None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    control: dist.ProcessGroup | None = None
    local_rank: int = 0
    timeout: float = TIMEOUT_SECONDS
    store: Store | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    @property
    def local_main(self) -> bool:
        """Whether this process creates the files that all processes of its machine share."""
        return self.local_rank == 0

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank."""
        if self.world_size == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(v) for v in values.tolist())

    def mean(self, values: Tensor) -> Tensor:
        """Average f64 [n] CPU values over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
            values = values / self.world_size
        return values

    def gather(self, value: T) -> list[T]:
        """All ranks' values on rank 0; [] elsewhere."""
        if self.world_size == 1:
            return [value]
        if not self.main:
            dist.gather_object(value, group=self.control)
            return []
        values = [value] * self.world_size  # replaced by those of the ranks
        dist.gather_object(value, values, group=self.control)
        return values

    def broadcast(self, value: T) -> T:
        """Broadcast the value of rank 0 to all ranks; the values of other ranks are ignored."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks have reached this call."""
        if self.world_size > 1:
            dist.barrier(group=self.control)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Broadcast the model's buffers from rank 0.

        Running means differ between the ranks, because each rank has seen other images.
        """
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wrap_model(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the model, or its DistributedDataParallel wrapper if there are several ranks.

        Raises UserError for SyncBN on a CPU.
        """
        if self.world_size == 1:
            return model
        if device.type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            raise UserError(
                "norm SyncBN needs GPUs: with several processes on a CPU use FrozenBN, GN or BN"
            )
        return DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None
        )

    def stalled_error(self, error: RuntimeError) -> Exception:
        """Convert a timeout of a collective into a UserError; return other errors unchanged.

        The message names the processes that have not noticed the timeout themselves: they are
        stopped, or wait for something other than a message.
        """
        if self.store is None or "timed out" not in str(error).lower():
            return error
        silent = self._find_silent_ranks(self.store)
        named = "another process"
        if silent:
            named = f"process {', '.join(map(str, silent))} of {self.world_size}"
        return UserError(
            f"{named} has not answered for trainer.distributed_timeout={self.timeout:g} seconds: "
            "is it stopped, or is its machine or disk not available? trainer.resume=auto resumes "
            "from the last checkpoint"
        )

    def _find_silent_ranks(self, store: Store) -> list[int]:
        """The ranks that do not report to the store; [] if the store does not answer either."""
        try:
            store.set(f"running/{self.rank}", "")
            time.sleep(min(_GRACE_SECONDS, self.timeout))
            ranks = range(self.world_size)
            return [rank for rank in ranks if not store.check([f"running/{rank}"])]
        except RuntimeError:  # the process that holds the store is the one that does not answer
            return []

    def split_batch(self, batch_size: int, accumulate_grad_batches: int) -> int:
        """Number of images per process and forward pass.

        Raises UserError if the total batch cannot be divided evenly.
        """
        parts = self.world_size * accumulate_grad_batches
        if batch_size < 1 or batch_size % parts:
            raise UserError(
                f"batch_size={batch_size} must be a multiple of {self.world_size} processes "
                f"x trainer.accumulate_grad_batches={accumulate_grad_batches}"
            )
        return batch_size // parts


def run_while_others_wait(
    group: DistributedContext,
    works: bool,
    function: Callable[[], None],
    heartbeat: float | None = None,
) -> None:
    """Run a function on some ranks; the other ranks wait as long as it takes.

    A heartbeat thread keeps the other ranks' collectives from timing out: every `heartbeat`
    seconds, each working rank reports that it is not done. The function must not exchange messages
    itself. Errors in it do not propagate to other ranks.

    works: whether this rank runs the function. heartbeat: by default a minute, or a part of a
    shorter timeout.
    """
    if group.world_size == 1:
        function()
        return
    interval = min(_HEARTBEAT_SECONDS, group.timeout / 4) if heartbeat is None else heartbeat
    done = threading.Event()

    def wait_for_all() -> None:
        while group.any_rank(not done.wait(interval))[0]:
            pass

    if not works:
        done.set()
        wait_for_all()
        return
    thread = threading.Thread(target=wait_for_all, daemon=True)
    thread.start()
    function()
    done.set()
    thread.join()


def is_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def init_distributed(
    device: torch.device, timeout: float = TIMEOUT_SECONDS
) -> Iterator[DistributedContext]:
    """Join the process group that torchrun's environment variables describe, if there is one.

    timeout: seconds after which a process that does not answer ends the others, with a UserError
    where the messages are sent over gloo.

    After an error the process group is not destroyed, because that would wait for the other ranks.
    torchrun stops them.
    """
    if not is_launched() or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        yield DistributedContext()
        return
    on_gpu = device.type == "cuda"
    limit = timedelta(seconds=timeout)
    shared, rank, world_size = next(iter(rendezvous("env://", timeout=limit)))
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore("default_pg", shared),
        rank=rank,
        world_size=world_size,
        timeout=limit,
        device_id=device if on_gpu else None,
    )
    control = dist.group.WORLD
    if on_gpu:
        gloo = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(gloo, dist.ProcessGroup)  # a rank outside the group would get -100
        control = gloo
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    store = PrefixStore("maskseg", shared)
    context = DistributedContext(rank, world_size, control, local_rank, timeout, store)
    try:
        yield context
    except RuntimeError as error:
        raise context.stalled_error(error) from error
    dist.destroy_process_group()
