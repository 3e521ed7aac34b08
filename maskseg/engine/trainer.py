"""What a training is set to; the loop itself is in `loop`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskseg.engine.checkpoint import Checkpoint
from maskseg.engine.distributed import Group
from maskseg.engine.loop import Evaluate, Run
from maskseg.engine.precision import (
    autocast,
    check_compiler,
    check_precision,
    grad_scaler,
    inference_dtype,
    pick_device,
)
from maskseg.engine.schedules import parameter_groups
from maskseg.engine.state import State, averaged
from maskseg.errors import UserError
from maskseg.models.layers.conv_norm import channels_last
from maskseg.structures import Batch


class Trainer:
    """Trains for `max_steps` steps, saves and evaluates on the way.

    precision: `fp32`, `bf16` or `fp16` (with a loss scale). channels_last: memory layout of the weights, faster at equal output. compile: the
    backbone by torch.compile. accumulate: each step's images go through the model in so many pieces. clip_norm: gradients are scaled down to
    this norm (0: never). reference_batch: the total batch that the optimiser's learning rate is meant for; it is scaled linearly to the batch
    in use (Goyal et al., section 2.1). decay_norms_and_biases: as `parameter_groups`. ema: decay of a moving average of the weights, which is
    then what is evaluated and used (0: none). checkpoint_every, evaluate_every, log_every: in steps; 0 for only at the end. keep: how many
    checkpoints before the last stay. best_metric: the metric whose highest value so far makes `best.pt`; patience: the training ends after so many
    evaluations without a better one (0: never). max_bad_steps: it stops after so many steps in a row whose loss or gradient is not finite.
    resume: `auto`, a checkpoint or a run folder; init: a checkpoint whose weights to start from, `init_partial` with those that fit.
    """

    def __init__(
        self,
        max_steps: int,
        device: str = "auto",
        precision: str = "fp32",
        channels_last: bool = True,
        compile: bool = False,
        accumulate: int = 1,
        clip_norm: float = 0.0,
        reference_batch: int = 16,
        decay_norms_and_biases: bool = True,
        ema: float = 0.0,
        log_every: int = 20,
        checkpoint_every: int = 1000,
        keep: int = 1,
        evaluate_every: int = 0,
        best_metric: str = "segm/AP",
        patience: int = 0,
        max_bad_steps: int = 5,
        resume: str | None = None,
        init: str | None = None,
        init_partial: bool = False,
    ) -> None:
        for name, value, least in (
            ("max_steps", max_steps, 1),
            ("reference_batch", reference_batch, 1),
            ("accumulate", accumulate, 1),
            ("max_bad_steps", max_bad_steps, 1),
            ("keep", keep, 0),
            ("patience", patience, 0),
        ):
            if value < least:
                raise UserError(f"trainer.{name} must be at least {least}, not {value}")
        if not 0 <= ema < 1:
            raise UserError(f"trainer.ema must be at least 0 and below 1, not {ema}")
        check_precision(precision)
        self.max_steps, self.device, self.precision = max_steps, pick_device(device), precision
        self.autocast, self.dtype = (
            partial(autocast, self.device, precision),
            inference_dtype(precision),
        )
        self.channels_last, self.compile, self.accumulate, self.clip_norm = (
            channels_last,
            compile,
            accumulate,
            clip_norm,
        )
        self.log_every, self.checkpoint_every, self.evaluate_every = (
            max(log_every, 1),
            checkpoint_every,
            evaluate_every,
        )
        self.best_metric, self.skip_bad, self.ema, self.keep = best_metric, 0, ema, keep
        self.patience, self.max_bad_steps = patience, max_bad_steps
        self.reference_batch, self.decay_norms_and_biases = reference_batch, decay_norms_and_biases
        self.resume, self.init, self.init_partial = resume, init, init_partial
        if compile:
            check_compiler(self.device)

    def optimizer(
        self, model: nn.Module, make: Callable[..., Optimizer], total_batch: int
    ) -> Optimizer:
        """make: an optimiser class with its numbers, such as `partial(SGD, lr=0.02, weight_decay=1e-4)`; the rate is scaled."""
        decay = float(getattr(make, "keywords", {}).get("weight_decay", 0.0))
        try:
            made = make(parameter_groups(model, decay, self.decay_norms_and_biases))
        except ValueError as error:
            raise UserError(f"optimizer: {error}") from error
        for group in made.param_groups:
            group["lr"] = group["lr"] * total_batch / self.reference_batch
        made.defaults["lr"] = made.param_groups[0]["lr"]
        return made

    @staticmethod
    def fits(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
        """Raises UserError for a checkpoint of another kind of optimiser, or of none."""
        if not {"optimizer", "scheduler", "rng", "step"} <= checkpoint.keys():
            raise UserError(
                "the checkpoint holds weights alone (a converted one?): it cannot be resumed, only started from by trainer.init"
            )
        own, other = (
            state["param_groups"] for state in (optimizer.state_dict(), checkpoint["optimizer"])
        )
        if [(set(g), len(g["params"])) for g in own] != [(set(g), len(g["params"])) for g in other]:
            raise UserError(
                "the checkpoint is of another optimizer than this run's: resume with its config, or start from it by trainer.init"
            )

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the layout of the run."""
        model = model.to(self.device)
        if self.channels_last:
            channels_last(model)
        if self.compile:
            model.compile()
        return model

    def run(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        loader: Callable[[int], Iterable[Batch]],
        run_dir: Path,
        about: Checkpoint,
        evaluate: Evaluate | None = None,
        resume: Checkpoint | None = None,
        group: Group | None = None,
        report: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """loader(step) gives this process' batches from that step on, `accumulate` for each; about: what each checkpoint says of the run
        (config, categories); evaluate: called by all processes, its metrics count where rank is 0; report: called there after each evaluation.

        -> the metrics of the last evaluation. Raises Interrupted after a signal, when everything is saved; UserError where it cannot go on.
        """
        state = self.state(model, optimizer, scheduler, about, group or Group())
        if resume is not None:
            state.load(resume)
        run = Run(self, state, run_dir, evaluate, report)
        try:
            with run.interrupts:
                run.go(loader)
        finally:
            run.log.close()
        return state.metrics

    def state(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        about: Checkpoint,
        group: Group,
    ) -> State:
        """The run at its beginning, with a loss scale and a moving average where they are asked for."""
        ema = averaged(model, self.ema) if self.ema else None
        return State(
            model,
            optimizer,
            scheduler,
            grad_scaler(self.device, self.precision),
            ema,
            dict(about),
            group,
        )

    def wrapped(self, model: nn.Module, group: Group) -> nn.Module:
        """The model, or what averages its gradients over the processes."""
        if group.world == 1:
            return model
        if self.device.type == "cpu" and any(
            isinstance(m, nn.SyncBatchNorm) for m in model.modules()
        ):
            raise UserError(
                "norm SyncBN needs GPUs: with several processes on a CPU use FrozenBN, GN or BN"
            )
        return DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None
        )
