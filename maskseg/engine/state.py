"""Everything a checkpoint stores, so that a resume is exact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from maskseg.engine.checkpoint import Checkpoint, check_weights_fit
from maskseg.engine.distributed import DistributedContext
from maskseg.engine.state_checks import (
    check_optimizer,
    check_scheduler,
    check_training_state,
    check_weights,
)
from maskseg.errors import UserError, describe_error


def build_ema(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy of the model whose weights and buffers follow it as an EMA.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the random initial weights have
    little influence.
    """

    def average(
        averages: Sequence[Tensor] | Iterable[Tensor],
        values: Sequence[Tensor] | Iterable[Tensor],
        updates: Tensor | int,
    ) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        for running, value in zip(averages, values, strict=True):
            if running.is_floating_point():
                running.lerp_(value, weight)
            else:
                running.copy_(value)

    copy = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    copy.module.requires_grad_(False)
    return copy


class TrainState:
    """State of a training run.

    Besides the objects that are handed in, it holds `step`; `best`, the highest value so far of the
    metric that selects `best.pt`; `metrics` of the last evaluation; `last_eval_step`, the step of
    that evaluation; and `evals_since_best`, the number of evaluations since the best one.

    Args:
        model: the model in training.
        optimizer: its optimizer.
        scheduler: learning-rate schedule, advanced once per step.
        scaler: loss scaler, disabled unless the precision is fp16.
        ema: EMA of the weights, or None.
        metadata: further entries of every checkpoint, such as the config and the categories.
        context: the processes of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        scaler: torch.amp.GradScaler,
        ema: AveragedModel | None,
        metadata: Checkpoint,
        context: DistributedContext,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.scaler = scaler
        self.ema = ema
        self.metadata = metadata
        self.context = context
        self.step = 0
        self.best: float | None = None
        self.metrics: dict[str, float] = {}
        self.last_eval_step = 0
        self.evals_since_best = 0

    def evaluation_model(self) -> nn.Module:
        """Return the model to evaluate: the EMA if there is one."""
        return self.model if self.ema is None else self.ema.module

    def checkpoint(self) -> Checkpoint:
        """Return the state as plain data.

        Every rank must call it, because the random states of all ranks are gathered. Only the
        result of rank 0 is complete.
        """
        rng = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }
        ema = None
        if self.ema is not None:
            ema = {"model": self.ema.module.state_dict(), "updates": int(self.ema.n_averaged)}
        scheduler = self.scheduler.state_dict()
        # Functions are not plain data; the schedule is built from the config again.
        scheduler = {k: v for k, v in scheduler.items() if k != "lr_lambdas"}
        return {
            **self.metadata,
            "step": self.step,
            "best": self.best,
            "metrics": self.metrics,
            "evaluated": self.last_eval_step,
            "stale": self.evals_since_best,
            "model": self.model.state_dict(),
            "ema": ema,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": scheduler,
            "scaler": self.scaler.state_dict(),
            "rng": self.context.gather(rng),
        }

    def check(self, checkpoint: Checkpoint, source: Path | str, name: str, hint: str = "") -> None:
        """Check that `checkpoint` can be loaded. Nothing is changed.

        source: its file; name, hint: beginning and end of the message about weights that do not
        fit.

        Raises UserError, which names the file and the key.
        """
        check_training_state(checkpoint, source)
        check_weights_fit(self.model, checkpoint["model"], name, hint)
        check_weights(self.model, checkpoint, source)
        check_optimizer(self.optimizer, checkpoint, source)
        check_scheduler(self.scheduler, checkpoint, source)

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore the state of `checkpoint`.

        Raises UserError for a state that does not fit; `check` names the reason.
        """
        try:
            self._load(checkpoint)
        except Exception as error:  # optimizers and schedules raise any exception
            raise UserError(
                "the training state of the checkpoint cannot be restored "
                f"({describe_error(error)}): start from its weights by trainer.init"
            ) from error

    def _load(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self._load_optimizer(deepcopy(checkpoint["optimizer"]))
        # Another version of torch may have stored further values.
        known = self.scheduler.state_dict().keys()
        schedule = {key: value for key, value in checkpoint["scheduler"].items() if key in known}
        self.scheduler.load_state_dict(
            {**schedule, "lr_lambdas": [None] * len(self.optimizer.param_groups)}
        )
        if checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema is not None:
            # An EMA that the checkpoint does not have yet starts from the weights.
            new_ema = {"model": checkpoint["model"], "updates": 0}
            ema: dict[str, Any] = checkpoint["ema"] or new_ema
            self.ema.module.load_state_dict(ema["model"])
            self.ema.n_averaged.fill_(ema["updates"])
        self._load_rng(checkpoint["rng"])
        self.step = int(checkpoint["step"])
        self.best = checkpoint["best"]
        self.metrics = dict(checkpoint["metrics"])
        self.last_eval_step = int(checkpoint["evaluated"])
        self.evals_since_best = int(checkpoint["stale"])

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the optimizer's state, but keep the choice of a fused kernel.

        Whether the kernel is fused belongs to this run's config and device, not to the checkpoint.
        """
        fused_flags = [group.get("fused") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, fused in zip(self.optimizer.param_groups, fused_flags, strict=True):
            if "fused" in group:
                group["fused"] = fused
            if not fused:
                continue
            for parameter in group["params"]:
                count = self.optimizer.state.get(parameter, {}).get("step")
                if isinstance(count, Tensor):  # a fused kernel counts its steps on the device
                    self.optimizer.state[parameter]["step"] = count.to(parameter.device)

    def _load_rng(self, rng_states: list[dict[str, Any]]) -> None:
        """Restore this rank's random state. More ranks than before share the saved states."""
        rng = rng_states[self.context.rank % len(rng_states)]
        torch.set_rng_state(rng["cpu"])
        if torch.cuda.is_available() and rng["cuda"] is not None:
            torch.cuda.set_rng_state(rng["cuda"])
