"""All that a run is at a step, so that it can go on as if it had never stopped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from maskseg.engine.checkpoint import Checkpoint
from maskseg.engine.distributed import Group
from maskseg.errors import UserError


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """A copy whose weights and buffers follow the model's as an exponential moving average.

    The decay grows to `decay` as (1 + n) / (10 + n) over the first n updates, so that the noise at the start is soon forgotten.
    """

    def average(
        ours: Sequence[Tensor] | Iterable[Tensor],
        new: Sequence[Tensor] | Iterable[Tensor],
        updates: Tensor | int,
    ) -> None:
        n = int(updates)
        share = 1 - min(decay, (1 + n) / (10 + n))
        for mine, its in zip(ours, new, strict=True):
            if mine.is_floating_point():
                mine.lerp_(its, share)
            else:
                mine.copy_(its)

    copy = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    copy.module.requires_grad_(False)
    return copy


class State:
    """Weights, their moving average, optimiser, schedule, loss scale, counters and random numbers."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        scaler: torch.amp.GradScaler,
        ema: AveragedModel | None,
        about: Checkpoint,
        group: Group,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.scaler = (
            model,
            optimizer,
            scheduler,
            scaler,
        )
        self.ema, self.about, self.group = ema, about, group
        self.step, self.best, self.metrics = 0, None, {}  # type: int, float | None, dict[str, float]
        self.evaluated = 0  # the step of the last evaluation
        self.stale = 0  # evaluations since the best one

    def evaluation_model(self) -> nn.Module:
        """The model whose weights count: the average where there is one."""
        return self.model if self.ema is None else self.ema.module

    def checkpoint(self) -> Checkpoint:
        """Everything, as plain data. All processes must call it: each adds its random state; rank 0's is the one to write."""
        rng = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        return {
            **self.about,
            "step": self.step,
            "best": self.best,
            "metrics": self.metrics,
            "evaluated": self.evaluated,
            "stale": self.stale,
            "model": self.model.state_dict(),
            "ema": None
            if self.ema is None
            else {"model": self.ema.module.state_dict(), "updates": int(self.ema.n_averaged)},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {
                k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"
            },
            "scaler": self.scaler.state_dict(),
            "rng": self.group.gather(rng),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Raises UserError for a checkpoint that lacks something."""
        try:
            self._load(checkpoint)
        except KeyError as error:
            raise UserError(
                f"the checkpoint has no {error}: it cannot be resumed, only started from by trainer.init"
            ) from error

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Whether the kernel is fused is this run's choice, not the checkpoint's: the optimiser was built for it."""
        fused = [group.get("fused") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, own in zip(self.optimizer.param_groups, fused, strict=True):
            if "fused" in group:
                group["fused"] = own
            for parameter in group["params"] if own else ():
                count = self.optimizer.state.get(parameter, {}).get("step")
                if isinstance(count, Tensor):  # a fused kernel counts on the device
                    self.optimizer.state[parameter]["step"] = count.to(parameter.device)

    def _load(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self._load_optimizer(deepcopy(checkpoint["optimizer"]))
        self.scheduler.load_state_dict(
            {**checkpoint["scheduler"], "lr_lambdas": [None] * len(self.optimizer.param_groups)}
        )
        if checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema is not None:
            average: Any = checkpoint["ema"] or {
                "model": checkpoint["model"],
                "updates": 0,
            }  # switched on later: starts from the weights
            self.ema.module.load_state_dict(average["model"])
            self.ema.n_averaged.fill_(average["updates"])
        streams = checkpoint["rng"]
        own = streams[self.group.rank % len(streams)]
        torch.set_rng_state(own["cpu"])
        if torch.cuda.is_available() and own["cuda"] is not None:
            torch.cuda.set_rng_state(own["cuda"])
        self.step, self.best, self.metrics = (
            int(checkpoint["step"]),
            checkpoint["best"],
            dict(checkpoint["metrics"]),
        )
        self.evaluated, self.stale = int(checkpoint["evaluated"]), int(checkpoint["stale"])
