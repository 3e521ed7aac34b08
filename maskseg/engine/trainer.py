"""A plain training loop by steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskseg.engine.checkpoint import Checkpoint, Keeper, save_checkpoint
from maskseg.engine.distributed import Group
from maskseg.engine.interrupts import Interrupts
from maskseg.engine.logs import RunLog, peak_memory
from maskseg.engine.optim import parameter_groups
from maskseg.engine.precision import autocast, check_compiler, check_precision, grad_scaler, pick_device
from maskseg.engine.state import State, averaged
from maskseg.engine.stepper import Step, Stepper
from maskseg.errors import Interrupted, UserError
from maskseg.structures import Batch

Evaluate = Callable[[nn.Module, int, RunLog], dict[str, float]]


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
        least = {"max_steps": 1, "reference_batch": 1, "accumulate": 1, "max_bad_steps": 1, "keep": 0, "patience": 0}
        given = {"max_steps": max_steps, "reference_batch": reference_batch, "accumulate": accumulate}
        for name, value in {**given, "max_bad_steps": max_bad_steps, "keep": keep, "patience": patience}.items():
            if value < least[name]:
                raise UserError(f"trainer.{name} must be at least {least[name]}, not {value}")
        if not 0 <= ema < 1:
            raise UserError(f"trainer.ema must be at least 0 and below 1, not {ema}")
        check_precision(precision)
        self.max_steps, self.device, self.precision = max_steps, pick_device(device), precision
        self.autocast = partial(autocast, self.device, precision)
        self.channels_last, self.compile, self.accumulate, self.clip_norm = channels_last, compile, accumulate, clip_norm
        self.log_every, self.checkpoint_every, self.evaluate_every = max(log_every, 1), checkpoint_every, evaluate_every
        self.best_metric, self.skip_bad, self.ema, self.keep = best_metric, 0, ema, keep
        self.patience, self.max_bad_steps = patience, max_bad_steps
        self.reference_batch, self.decay_norms_and_biases = reference_batch, decay_norms_and_biases
        self.resume, self.init, self.init_partial = resume, init, init_partial
        if compile:
            check_compiler(self.device)

    def optimizer(self, model: nn.Module, make: Callable[..., Optimizer], total_batch: int) -> Optimizer:
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
        """Raises UserError for a checkpoint of another kind of optimiser."""
        own, other = (state["param_groups"] for state in (optimizer.state_dict(), checkpoint["optimizer"]))
        if [(set(g), len(g["params"])) for g in own] != [(set(g), len(g["params"])) for g in other]:
            raise UserError("the checkpoint is of another optimizer than this run's: resume with its config, or start from it by trainer.init")

    def place(self, model: nn.Module) -> nn.Module:
        """The model on the device, in the layout of the run."""
        model = model.to(self.device)
        if self.channels_last:
            for parameter in model.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
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
        group = group or Group()
        ema = averaged(model, self.ema) if self.ema else None
        state = State(model, optimizer, scheduler, grad_scaler(self.device, self.precision), ema, dict(about), group)
        if resume is not None:
            state.load(resume)
        run = _Run(self, state, run_dir, evaluate, report)
        try:
            with Interrupts() as run.interrupts:
                run.go(loader)
        finally:
            run.log.close()
        return state.metrics

    def wrapped(self, model: nn.Module, group: Group) -> nn.Module:
        """The model, or what averages its gradients over the processes."""
        if group.world == 1:
            return model
        if self.device.type == "cpu" and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
            raise UserError("norm SyncBN needs GPUs: with several processes on a CPU use FrozenBN, GN or BN")
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)


class _Run:
    """One call of `Trainer.run`."""

    def __init__(self, trainer: Trainer, state: State, run_dir: Path, evaluate: Evaluate | None, report: Callable[[], None] | None) -> None:
        self.trainer, self.state, self.run_dir, self.evaluate, self.report = trainer, state, run_dir, evaluate, report
        self.group, self.bad = state.group, 0
        main = self.group.main
        self.log = RunLog(run_dir if main else None, state.step, trainer.max_steps, str(state.about["config"]), state.evaluated)
        self.keeper = Keeper(run_dir, trainer.keep) if main else None
        self.interrupts = Interrupts()

    def go(self, loader: Callable[[int], Iterable[Batch]]) -> None:
        trainer, state = self.trainer, self.state
        if self._evaluation_due() and state.evaluated != state.step:  # it was cut short by what ended the run before
            self._evaluate()
        if state.step >= trainer.max_steps or self._patience_is_over():
            return
        take_step = Stepper(state, trainer.wrapped(state.model, self.group), trainer.device, trainer.autocast, trainer.clip_norm)
        for batches in self._pieces(loader(state.step)):
            state.step += 1
            rate = float(state.optimizer.param_groups[0]["lr"])
            step = take_step(batches, lambda: self.interrupts.signal is not None)
            self._check(step)
            if step.problem is None:
                self._log(step, rate)
            if step.stop or (self.group.world == 1 and self.interrupts.signal is not None):
                self._stop()
            due, last = self._evaluation_due(), state.step == trainer.max_steps
            if due or last or (trainer.checkpoint_every and state.step % trainer.checkpoint_every == 0):
                self._save()  # before the evaluation: what is trained is safe
            if due:
                self._evaluate()
                if self._patience_is_over():
                    self.log.say(f"no better {trainer.best_metric} in {trainer.patience} evaluations: the training ends at step {state.step}")
                    return

    def _pieces(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """The batches of a step at a time, with the seconds spent waiting for them, and with a count of what could not be read."""
        self._reset_clock()
        skipped, iterator = 0, iter(batches)
        while True:
            start = time.perf_counter()
            pieces = list(islice(iterator, self.trainer.accumulate))
            self.waited += time.perf_counter() - start
            if len(pieces) < self.trainer.accumulate:
                return
            self.images += sum(map(len, pieces)) * self.group.world
            for message in (m for batch in pieces for m in batch.skipped):
                skipped += 1
                self.log.say(f"warning: image passed over ({skipped} of at most {self.trainer.skip_bad}): {message}", anywhere=True)
                if skipped > self.trainer.skip_bad:
                    raise UserError(f"more than data.skip_bad={self.trainer.skip_bad} images cannot be read, the last: {message}")
            yield pieces

    def _reset_clock(self) -> None:
        self.images, self.steps, self.waited, self.since = 0, 0, 0.0, time.perf_counter()

    def _check(self, step: Step) -> None:
        """Tells of a step that was left out; stops after too many in a row."""
        if step.problem is None:
            self.bad = 0
            return
        self.bad += 1
        self.log.say(f"warning: step {self.state.step} is left out, {step.problem}")
        self.log.event(self.state.step, "skipped", {"why": step.problem})
        if self.bad >= self.trainer.max_bad_steps:
            raise UserError(
                f"{self.bad} steps in a row with losses or gradients that are not finite, the last: {step.problem}. The weights are those of "
                f"before; try a lower optimizer.lr, a longer scheduler.warmup_steps, trainer.clip_norm=10 or trainer.precision=fp32"
            )

    def _log(self, step: Step, rate: float) -> None:
        self.steps += 1
        at, trainer = self.state.step, self.trainer
        if at != trainer.max_steps and at % trainer.log_every:
            self.log.progress(at, {}, say=False)
            return
        seconds = max(time.perf_counter() - self.since, 1e-9)
        losses = self.group.mean(torch.stack([v.double().cpu() for v in step.losses.values()]))
        values = dict(zip(step.losses, losses.tolist(), strict=True))
        values |= {"lr": rate, "grad_norm": float(step.grad_norm) if step.grad_norm is not None else 0.0}
        if self.state.scaler.is_enabled():
            values["loss_scale"] = self.state.scaler.get_scale()
        values |= {"images_per_second": self.images / seconds, "data_seconds": self.waited / self.steps, "step_seconds": seconds / self.steps}
        values["memory_gb"] = peak_memory(trainer.device)
        self.log.numbers(at, "train", values)
        self.log.progress(at, {k: values[k] for k in ("loss", "lr", "images_per_second")}, say=True)
        self._reset_clock()

    def _evaluation_due(self) -> bool:
        step, every = self.state.step, self.trainer.evaluate_every
        return bool(self.evaluate and step and (step == self.trainer.max_steps or (every and step % every == 0)))

    def _patience_is_over(self) -> bool:
        return bool(self.trainer.patience) and self.state.stale >= self.trainer.patience

    def _save(self, best: bool = False) -> None:
        checkpoint = self.state.checkpoint()
        if self.keeper is not None:
            if best:
                save_checkpoint(self.run_dir / "best.pt", checkpoint)
            self.keeper.save(checkpoint)

    def _stop(self) -> None:
        self._save()
        self.log.say(f"saved at step {self.state.step}; trainer.resume=auto goes on from there")
        raise Interrupted(self.interrupts.signal or 15)

    def _evaluate(self) -> None:
        assert self.evaluate is not None
        state, trainer = self.state, self.trainer
        self.group.share_buffers(state.evaluation_model())
        # A stream of its own: what an evaluation draws must not change the training that follows it.
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with self.interrupts.at_once(), torch.random.fork_rng(devices=devices), trainer.autocast():
            torch.manual_seed(0)
            state.metrics = self.group.share(self.evaluate(state.evaluation_model(), state.step, self.log))
        self.log.numbers(state.step, "val", state.metrics)
        state.evaluated = state.step
        value = state.metrics.get(trainer.best_metric)
        better = value is not None and (state.best is None or value > state.best)
        if value is None:
            self.log.say(f"warning: trainer.best_metric={trainer.best_metric!r} is not among the metrics, no best.pt: {', '.join(state.metrics)}")
        state.best, state.stale = (value, 0) if better else (state.best, state.stale + 1)
        self._save(best=better)
        if self.report is not None and self.group.main:
            try:
                self.report()
            except (OSError, UserError) as error:  # no picture is worth a training
                self.log.say(f"warning: the pictures of step {state.step} could not be made ({error})")
        self._reset_clock()
