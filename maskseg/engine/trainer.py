"""The trainer: builds what a training needs and runs `TrainLoop`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskseg.engine.checkpoint import Checkpoint
from maskseg.engine.distributed import DistributedContext
from maskseg.engine.length import epoch_steps, interval_steps
from maskseg.engine.loop import Evaluate, TrainLoop, TrainSettings
from maskseg.engine.precision import grad_scaler
from maskseg.engine.schedules import parameter_groups
from maskseg.engine.state import TrainState, build_ema
from maskseg.errors import UserError
from maskseg.models.layers.conv_norm import channels_last
from maskseg.structures import Batch


@dataclass(frozen=True)
class Trainer(TrainSettings):
    """Trains a model with the settings of config group `trainer` (see `TrainSettings`)."""

    def in_steps(self, images: float, batch_size: int) -> Trainer:
        """These settings with all lengths in steps.

        images: of an epoch, on average; batch_size: images of a step, over all processes and
            gradient accumulation steps.
        """
        max_steps = self.max_steps
        if self.epochs is not None:
            max_steps = epoch_steps(self.epochs, images, batch_size)
        return replace(
            self,
            max_steps=max_steps,
            epochs=None,
            evaluate_every=interval_steps(self.evaluate_every, images, batch_size),
            checkpoint_every=interval_steps(self.checkpoint_every, images, batch_size),
        )

    def build_optimizer(
        self,
        model: nn.Module,
        make: Callable[..., Optimizer],
        batch_size: int,
        base_batch_size: int | None = None,
    ) -> Optimizer:
        """Build the optimizer, with the learning rate scaled linearly to `batch_size`.

        make: optimizer class with its hyperparameters, such as
            `partial(SGD, lr=0.02, weight_decay=1e-4)`.
        base_batch_size: images per step that its learning rate is meant for (Goyal et al.,
            section 2.1); None: the learning rate is not scaled.

        Raises UserError for hyperparameters that the optimizer rejects.
        """
        if base_batch_size is None:
            base_batch_size = batch_size
        if base_batch_size < 1:
            raise UserError(
                f"optimizer.base_batch_size must be at least 1 or null, not {base_batch_size}"
            )
        weight_decay = float(getattr(make, "keywords", {}).get("weight_decay", 0.0))
        groups = parameter_groups(model, weight_decay, self.decay_norms_and_biases)
        try:
            optimizer = make(groups)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer: {error}") from error
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * batch_size / base_batch_size
        optimizer.defaults["lr"] = optimizer.param_groups[0]["lr"]
        return optimizer

    def place(self, model: nn.Module) -> nn.Module:
        """Move the model to the device and memory layout of the run, and compile it if asked to."""
        model = model.to(self.torch_device)
        if self.channels_last:
            channels_last(model)
        if self.compile:
            model.compile()
        return model

    def build_state(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        metadata: Checkpoint,
        context: DistributedContext | None = None,
    ) -> TrainState:
        """Build the state at step 0, with a loss scaler and an EMA if the settings ask for them.

        metadata: entries that every checkpoint of the run stores (config, categories).
        """
        scaler = grad_scaler(self.torch_device, self.precision)
        ema = build_ema(model, self.ema) if self.ema else None
        context = context or DistributedContext()
        return TrainState(model, optimizer, scheduler, scaler, ema, dict(metadata), context)

    def run(
        self,
        state: TrainState,
        loader: Callable[[int], Iterable[Batch]],
        run_dir: Path,
        evaluate: Evaluate | None = None,
        report: Callable[[], None] | None = None,
        skip_bad: int = 0,
    ) -> dict[str, float]:
        """Train from the step of `state` to the end.

        Args:
            state: from `build_state`, with a checkpoint loaded to resume a run.
            loader: returns this rank's batches from a step on, `accumulate_grad_batches` per step.
            run_dir: folder to write to.
            evaluate: returns metrics; called on every rank, those of rank 0 count.
            report: called on rank 0 after each evaluation.
            skip_bad: number of unreadable images to skip before the run fails.

        Returns the metrics of the last evaluation. Raises Interrupted after a signal, when
        everything has been saved, and UserError if the training cannot continue.
        """
        loop = TrainLoop(self, state, run_dir, evaluate, report, skip_bad)
        with loop.log, loop.interrupts:
            loop.run(loader)
        return state.metrics
