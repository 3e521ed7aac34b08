"""The training loop: train, log, save, evaluate, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from maskseg.engine.checkpoint import (
    BEST_SAFETENSORS,
    Checkpoint,
    CheckpointManager,
    checkpoint_step,
    model_checkpoint,
    require_safetensors,
    save_checkpoint,
)
from maskseg.engine.distributed import TIMEOUT_SECONDS
from maskseg.engine.length import Length, check_interval
from maskseg.engine.loggers import DEFAULT_LOGGERS, LoggerName, check_loggers
from maskseg.engine.logs import RunLog, peak_memory
from maskseg.engine.precision import (
    autocast,
    check_compiler,
    check_precision,
    inference_dtype,
    pick_device,
)
from maskseg.engine.signals import Interrupts
from maskseg.engine.state import TrainState
from maskseg.engine.step import StepResult, TrainStep
from maskseg.errors import Interrupted, UserError, warn_if_not_drawn
from maskseg.models.fuse import for_inference
from maskseg.structures import Batch
from maskseg.values import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Size,
    check_fields,
)

Evaluate = Callable[[nn.Module, int, RunLog], dict[str, float]]


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run: the keys of config group `trainer`.

    Raises UserError for values that are out of range and for a device or compiler that does not
    exist.

    Attributes:
        max_steps: number of steps; None if `epochs` is set.
        epochs: number of epochs, of which `Trainer.in_steps` makes steps; None if `max_steps` is
            set.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ... or `mps`.
        precision: `fp32`, or mixed precision with `bf16` or `fp16` (with a loss scale).
        channels_last: memory layout of the weights; faster, with equal results.
        compile: compile the backbone with torch.compile.
        accumulate_grad_batches: gradient accumulation; each step's images go through the model in
            this many micro-batches.
        clip_norm: maximum norm of the gradient; 0 disables clipping.
        decay_norms_and_biases: see `parameter_groups`.
        ema: decay of the EMA of the weights, which is then evaluated and used for inference; 0
            disables it.
        log_every: steps between two lines of the log; 0 means 1.
        checkpoint_every: steps, or epochs such as `2epochs`, between two checkpoints; 0 saves only
            at the end.
        keep_checkpoints: number of checkpoints to keep besides the last one.
        evaluate_every: steps, or epochs such as `1epoch`, between two evaluations; 0 evaluates only
            at the end.
        plots: draw the labels and the first batches of the run and its curves, and the images and
            plots of every evaluation.
        loggers: where numbers and images are logged: any of `tensorboard`, `csv`, `wandb`, `mlflow`
            and `trackio`; the last three need their libraries.
        best_metric: metric whose highest value so far selects `best.pt`.
        safetensors: also write `best.safetensors`, which needs the library safetensors.
        patience: early stopping after this many evaluations without improvement; 0 disables it.
        max_bad_steps: the run fails after this many consecutive steps whose loss or gradient is not
            finite.
        distributed_timeout: seconds after which a process that does not answer ends the others.
        resume: `auto`, a checkpoint or a run folder.
        resume_changed_data: resume also if a data file has changed since the checkpoint.
        init: checkpoint to take the initial weights from.
        init_partial: take only those weights of `init` that fit.
    """

    max_steps: PositiveInt | None = None
    device: str = "auto"
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    accumulate_grad_batches: Size = 1
    clip_norm: NonNegativeFloat = 0.0
    decay_norms_and_biases: bool = True
    ema: Decay = 0.0
    log_every: NonNegativeInt = 20
    checkpoint_every: NonNegativeInt | str = 1000
    keep_checkpoints: NonNegativeInt = 1
    evaluate_every: NonNegativeInt | str = 0
    plots: bool = True
    loggers: Sequence[LoggerName] = DEFAULT_LOGGERS
    best_metric: str = "segm/AP"
    safetensors: bool = False
    patience: NonNegativeInt = 0
    max_bad_steps: PositiveInt = 5
    distributed_timeout: Annotated[float, Range(ge=1, le=604_800)] = TIMEOUT_SECONDS
    resume: str | None = None
    resume_changed_data: bool = False
    init: str | None = None
    init_partial: bool = False
    epochs: PositiveFloat | None = None

    def __post_init__(self) -> None:
        check_fields(self, "trainer")
        if (self.max_steps is None) == (self.epochs is None):
            raise UserError("exactly one of trainer.epochs and trainer.max_steps must be set")
        check_interval("trainer.evaluate_every", self.evaluate_every)
        check_interval("trainer.checkpoint_every", self.checkpoint_every)
        check_precision(self.precision)
        check_loggers(self.loggers)
        if self.safetensors:
            require_safetensors("trainer.safetensors")
        device = self.torch_device
        if self.compile:
            check_compiler(device)

    @property
    def uses_epochs(self) -> bool:
        """Whether a length is in epochs."""
        intervals = (self.evaluate_every, self.checkpoint_every)
        return self.max_steps is None or any(isinstance(value, str) for value in intervals)

    @cached_property
    def length(self) -> Length:
        """The numbers of steps. Raises UserError for settings in epochs."""
        values = (self.max_steps, self.evaluate_every, self.checkpoint_every)
        max_steps, evaluate_every, checkpoint_every = values
        if (
            max_steps is None
            or isinstance(evaluate_every, str)
            or isinstance(checkpoint_every, str)
        ):
            raise UserError(
                "epochs cannot be counted here: set trainer.max_steps, trainer.evaluate_every and "
                "trainer.checkpoint_every to numbers of steps"
            )
        return Length(max_steps, evaluate_every, checkpoint_every)

    @cached_property
    def torch_device(self) -> torch.device:
        """The device to train on. Raises UserError if it does not exist."""
        return pick_device(self.device)

    @property
    def inference_dtype(self) -> torch.dtype | None:
        """Dtype of the weights during an evaluation; None leaves them unchanged."""
        return inference_dtype(self.precision)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the mixed-precision context of a forward pass."""
        return autocast(self.torch_device, self.precision)


@dataclass
class _Interval:
    """Counts since the last line of the log. images: of all ranks."""

    images: int = 0
    steps: int = 0
    wait_seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)


class TrainLoop:
    """Runs a training from its current step to its end.

    Args:
        settings: settings of the run.
        state: state to start from.
        run_dir: folder to write to.
        evaluate: returns metrics; called on every rank, those of rank 0 count.
        report: called on rank 0 after each evaluation, to draw plots for example.
        skip_bad: number of unreadable images to skip before the run fails.
    """

    def __init__(
        self,
        settings: TrainSettings,
        state: TrainState,
        run_dir: Path,
        evaluate: Evaluate | None,
        report: Callable[[], None] | None,
        skip_bad: int,
    ) -> None:
        self.settings = settings
        self.length = settings.length
        self.state = state
        self.run_dir = run_dir
        self.evaluate = evaluate
        self.report = report
        self.skip_bad = skip_bad
        self.context = state.context
        self.skipped_in_a_row = 0
        # Step that made the present weights.
        self._weights_step = state.step
        self.log = RunLog(
            run_dir if self.context.main else None,
            state.step,
            self.length.max_steps,
            str(state.metadata["config"]),
            state.last_eval_step,
            settings.loggers,
        )
        self.checkpoints: CheckpointManager | None = None
        self.interrupts = Interrupts()
        self._interval = _Interval()
        if self.context.main:
            self.checkpoints = CheckpointManager(run_dir, settings.keep_checkpoints)
            self._set_aside_newer_best()

    def _set_aside_newer_best(self) -> None:
        """Rename a best.pt that is newer than the resume step to best_<step>.pt.

        It belongs to an abandoned branch. Without a best.pt, for example in a new folder, the first
        evaluation writes one.
        """
        path = self.run_dir / "best.pt"
        if not path.exists():
            self.state.best = None
            return
        step = checkpoint_step(path)
        if step is not None and step > self.state.step:
            renamed = self.run_dir / f"best_{step:07d}.pt"
            path.replace(renamed)
            # It is a copy of the file that is renamed.
            path.with_suffix(".safetensors").unlink(missing_ok=True)
            self.state.best = None
            self.log.print(
                f"best.pt is of step {step}, which is after the resume step: "
                f"renamed it to {renamed.name}"
            )

    def run(self, loader: Callable[[int], Iterable[Batch]]) -> None:
        """Train until the last step, early stopping or a signal.

        loader: returns this rank's batches from a step on, `accumulate_grad_batches` per step.

        Raises Interrupted after a signal, when everything has been saved, and UserError if the
        training cannot continue.
        """
        state = self.state
        # The previous process may have ended before the evaluation of its last checkpoint.
        if self._evaluation_due() and state.last_eval_step != state.step:
            self._evaluate()
        if state.step >= self.length.max_steps or self._patience_exhausted():
            return
        train_step = self._build_train_step()
        for batches in self._micro_batches(loader(state.step)):
            self._take_step(train_step, batches)
            if self._evaluation_due() or self._checkpoint_due():
                self._save()  # before the evaluation, which may fail
            if self._evaluation_due():
                self._evaluate()
                if self._patience_exhausted():
                    self._report_early_stopping()
                    break
        if self.checkpoints is not None and not self.skipped_in_a_row:
            self.checkpoints.confirm()

    def _build_train_step(self) -> TrainStep:
        settings = self.settings
        device = settings.torch_device
        model = self.context.wrap_model(self.state.model, device)
        return TrainStep(self.state, model, device, settings.autocast, settings.clip_norm)

    def _take_step(self, train_step: TrainStep, batches: list[Batch]) -> None:
        """Take one step, check it and log it. Raises Interrupted after a signal."""
        self.state.step += 1
        # Read before the step, which advances the schedule.
        rate = float(self.state.optimizer.param_groups[0]["lr"])
        result = train_step(batches, self._should_stop)
        self._check(result)
        if result.problem is None:
            self._log(result, rate)
        if result.stop or (self.context.world_size == 1 and self._should_stop()):
            self._stop()

    def _report_early_stopping(self) -> None:
        settings = self.settings
        self.log.print(
            f"no better {settings.best_metric} in {settings.patience} evaluations: "
            f"early stopping at step {self.state.step}"
        )

    def _should_stop(self) -> bool:
        """Whether this process has received a signal."""
        return self.interrupts.signal is not None

    def _micro_batches(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Yield the micro-batches of one step at a time.

        Measures the time spent waiting for them, and counts the images that could not be read.
        """
        self._interval = _Interval()
        unreadable: set[str] = set()
        iterator = iter(batches)
        count = self.settings.accumulate_grad_batches
        while True:
            start = time.perf_counter()
            micro_batches = list(islice(iterator, count))
            self._interval.wait_seconds += time.perf_counter() - start
            if len(micro_batches) < count:
                return
            self._interval.images += sum(map(len, micro_batches)) * self.context.world_size
            for batch in micro_batches:
                self._report_unreadable(batch.read_errors, unreadable)
            yield micro_batches

    def _report_unreadable(self, messages: list[str], reported: set[str]) -> None:
        """Warn about each unreadable image once, although it is read again in every epoch."""
        for message in messages:
            if message in reported:
                continue
            reported.add(message)
            self.log.print(
                f"warning: image skipped ({len(reported)} of at most {self.skip_bad}): {message}",
                any_rank=True,
            )
            if len(reported) > self.skip_bad:
                raise UserError(
                    f"more than data.skip_bad={self.skip_bad} images cannot be read, "
                    f"the last: {message}"
                )

    def _check(self, result: StepResult) -> None:
        """Report a skipped step. Raises UserError after too many in a row."""
        if result.problem is None:
            self.skipped_in_a_row = 0
            self._weights_step = self.state.step
            if self.checkpoints is not None:
                self.checkpoints.confirm()
            return
        self.skipped_in_a_row += 1
        self.log.print(f"warning: step {self.state.step} is skipped, {result.problem}")
        self.log.log_event(self.state.step, "skipped", {"why": result.problem})
        if self.skipped_in_a_row < self.settings.max_bad_steps:
            return
        renamed: list[str] = []
        if self.checkpoints is not None:
            renamed = self.checkpoints.set_aside_diverged(self._weights_step)
        raise UserError(
            f"{self.skipped_in_a_row} steps in a row with losses or gradients that are not "
            f"finite, the last: {result.problem}. The weights are unchanged since then; try a "
            "lower optimizer.lr, a longer scheduler.warmup_steps, trainer.clip_norm=10 or "
            "trainer.precision=fp32" + "".join(f"; {text}" for text in renamed)
        )

    def _log(self, result: StepResult, rate: float) -> None:
        """Log a step, or only advance the progress bar."""
        settings = self.settings
        interval = self._interval
        interval.steps += 1
        step = self.state.step
        if step != self.length.max_steps and step % max(settings.log_every, 1):
            self.log.progress(step, {}, show=False)
            return
        seconds = max(time.perf_counter() - interval.start, 1e-9)
        losses = self.context.mean(torch.stack([v.double().cpu() for v in result.losses.values()]))
        values = dict(zip(result.losses, losses.tolist(), strict=True))
        values["lr"] = rate
        values["grad_norm"] = 0.0 if result.grad_norm is None else float(result.grad_norm)
        if self.state.scaler.is_enabled():
            values["loss_scale"] = self.state.scaler.get_scale()
        values["images_per_second"] = interval.images / seconds
        values["data_seconds"] = interval.wait_seconds / interval.steps
        values["step_seconds"] = seconds / interval.steps
        memory = peak_memory(settings.torch_device)
        if memory is not None:
            values["memory_gb"] = memory
        self.log.log_scalars(step, "train", values)
        shown = {name: values[name] for name in ("loss", "lr", "images_per_second")}
        self.log.progress(step, shown, show=True)
        self._interval = _Interval()

    def _checkpoint_due(self) -> bool:
        step = self.state.step
        every = self.length.checkpoint_every
        return self._is_last_step() or (every != 0 and step % every == 0)

    def _is_last_step(self) -> bool:
        return self.state.step == self.length.max_steps

    def _evaluation_due(self) -> bool:
        step = self.state.step
        every = self.length.evaluate_every
        if self.evaluate is None or step == 0:
            return False
        return step == self.length.max_steps or (every != 0 and step % every == 0)

    def _patience_exhausted(self) -> bool:
        patience = self.settings.patience
        return patience > 0 and self.state.evals_since_best >= patience

    def _save(self, best: bool = False, stopping: bool = False) -> None:
        """Save a checkpoint, but not while steps are skipped: the weights may have diverged.

        stopping: save in any case, because no other step follows.
        """
        if self.skipped_in_a_row and not stopping and not self._is_last_step():
            return
        checkpoint = self.state.checkpoint()
        if self.checkpoints is not None:
            if best:
                self._save_best(checkpoint)
            self.checkpoints.save(checkpoint)

    def _save_best(self, checkpoint: Checkpoint) -> None:
        """Save a checkpoint to use: without the state of the training."""
        exported = model_checkpoint(checkpoint)
        save_checkpoint(self.run_dir / "best.pt", exported)
        path = self.run_dir / BEST_SAFETENSORS
        if self.settings.safetensors:
            save_checkpoint(path, exported)
        else:  # that of an earlier process would be older than best.pt
            path.unlink(missing_ok=True)

    def _stop(self) -> None:
        self._save(stopping=True)
        self.log.print(f"saved at step {self.state.step}; trainer.resume=auto resumes from there")
        raise Interrupted(self.interrupts.signal or 15)

    def _stop_evaluation(self) -> None:
        """Report that the state was saved before the evaluation, which a resume repeats."""
        if self.skipped_in_a_row and self.context.world_size == 1:
            self._save(stopping=True)
        self.log.print(
            f"stopped in the evaluation, saved at step {self.state.step}; trainer.resume=auto "
            "resumes from there"
        )

    def _evaluate(self) -> None:
        """Evaluate, log the metrics, and save the checkpoint."""
        state = self.state
        metric = self.settings.best_metric
        try:
            state.metrics = self._compute_metrics()
        except Interrupted:
            self._stop_evaluation()
            raise
        self.log.log_scalars(state.step, "val", state.metrics)
        state.last_eval_step = state.step
        value = state.metrics.get(metric)
        if value is None:
            self.log.print(
                f"warning: trainer.best_metric={metric!r} is not among the metrics, no best.pt: "
                f"{', '.join(state.metrics)}"
            )
        improved = value is not None and (state.best is None or value > state.best)
        if improved:
            state.best = value
            state.evals_since_best = 0
        else:
            state.evals_since_best += 1
        self._save(best=improved)
        self._write_report()
        self._interval = _Interval()

    def _compute_metrics(self) -> dict[str, float]:
        """Run the evaluation in a separate random state, so that it does not affect training."""
        assert self.evaluate is not None
        state = self.state
        settings = self.settings
        self.context.broadcast_buffers(state.evaluation_model())
        device = settings.torch_device
        gpus = [device] if device.type == "cuda" else []
        with self.interrupts.at_once(), torch.random.fork_rng(devices=gpus):
            torch.manual_seed(0)
            model = for_inference(state.evaluation_model(), settings.inference_dtype)
            try:
                metrics = self.evaluate(model, state.step, self.log)
                return self.context.broadcast(metrics)
            except RuntimeError:  # another rank has stopped, and its connection is closed
                self.interrupts.check()
                raise

    def _write_report(self) -> None:
        if self.report is None or not self.context.main:
            return
        with warn_if_not_drawn(f"plots of step {self.state.step}", self.log.print):
            self.report()
