"""The processes of a run: one alone, or those that torchrun has started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from maskseg.errors import UserError

_PATIENCE = timedelta(minutes=60)  # longer than any one process evaluates alone


@dataclass(frozen=True)
class Group:
    """All processes of the run. What is exchanged here goes through the CPU, so that it works whatever the device of the model is.

    rank: the number of this process, 0 writes; world: how many there are; control: what the messages go through, None for one process;
    local_rank: its number on its machine.
    """

    rank: int = 0
    world: int = 1
    control: Any = None
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def local_main(self) -> bool:
        """Whether this process makes what the processes of its machine share."""
        return self.local_rank == 0

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether some process has it."""
        if self.world == 1:
            return flags
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.control)
        return tuple(bool(v) for v in values.tolist())

    def mean(self, values: Tensor) -> Tensor:
        """f64 [n] on the CPU -> the mean over the processes."""
        if self.world > 1:
            dist.all_reduce(values, group=self.control)
            values = values / self.world
        return values

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank, where rank is 0; elsewhere nothing."""
        if self.world == 1:
            return [value]
        values: list[Any] | None = [None] * self.world if self.main else None
        dist.gather_object(value, values, group=self.control)
        return values or []

    def share(self, value: Any) -> Any:
        """The value that rank 0 has."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def wait(self) -> None:
        """For all of the others."""
        if self.world > 1:
            dist.barrier(group=self.control)

    def share_buffers(self, model: nn.Module) -> None:
        """Running means and the like as rank 0 has them: the others' saw other images."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def split(self, total_batch: int, accumulate: int) -> int:
        """-> images a process and forward pass. Raises UserError where they cannot be shared out evenly."""
        pieces = self.world * accumulate
        if total_batch < 1 or total_batch % pieces:
            raise UserError(
                f"total_batch={total_batch} must be a multiple of {self.world} processes x trainer.accumulate={accumulate}"
            )
        return total_batch // pieces


def launched() -> bool:
    """Whether torchrun (or something that sets the same variables) has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def processes(device: torch.device) -> Iterator[Group]:
    """The group that torchrun's variables describe, else this process alone. After an error nobody is waited for: torchrun stops the others."""
    if not launched() or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        yield Group()
        return
    gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if gpu else "gloo", timeout=_PATIENCE, device_id=device if gpu else None
    )
    control = dist.new_group(backend="gloo", timeout=_PATIENCE) if gpu else dist.group.WORLD
    yield Group(
        dist.get_rank(), dist.get_world_size(), control, int(os.environ.get("LOCAL_RANK", "0"))
    )
    dist.destroy_process_group()
