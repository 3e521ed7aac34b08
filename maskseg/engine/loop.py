"""A plain training loop by steps: log, save, evaluate, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from maskseg.engine.checkpoint import Keeper, load_checkpoint, save_checkpoint
from maskseg.engine.logs import RunLog, peak_memory
from maskseg.engine.signals import Interrupts
from maskseg.engine.state import State
from maskseg.engine.step import Step, Stepper
from maskseg.errors import Interrupted, UserError
from maskseg.models.fuse import for_inference
from maskseg.structures import Batch

if TYPE_CHECKING:
    from maskseg.engine.trainer import Trainer

Evaluate = Callable[[nn.Module, int, RunLog], dict[str, float]]


class Run:
    """One call of `Trainer.run`."""

    def __init__(
        self,
        trainer: Trainer,
        state: State,
        run_dir: Path,
        evaluate: Evaluate | None,
        report: Callable[[], None] | None,
    ) -> None:
        self.trainer, self.state, self.run_dir, self.evaluate, self.report = (
            trainer,
            state,
            run_dir,
            evaluate,
            report,
        )
        self.group, self.bad = state.group, 0
        main = self.group.main
        self.log = RunLog(
            run_dir if main else None,
            state.step,
            trainer.max_steps,
            str(state.about["config"]),
            state.evaluated,
        )
        self.keeper = Keeper(run_dir, trainer.keep) if main else None
        self.interrupts = Interrupts()
        if main:
            self._keep_best()

    def _keep_best(self) -> None:
        """A best.pt from beyond the step that this run starts from is another branch's: it gets a name of its own. Where there is none (a new
        folder), the first evaluation makes one."""
        path = self.run_dir / "best.pt"
        if not path.exists():
            self.state.best = None
            return
        try:
            step = int(load_checkpoint(path)["step"])
        except (UserError, KeyError):
            return
        if step > self.state.step:
            other = self.run_dir / f"best_{step:07d}.pt"
            path.replace(other)
            self.state.best = None
            self.log.say(
                f"best.pt is of step {step}, after the one that is gone on from: it is {other.name} now"
            )

    def go(self, loader: Callable[[int], Iterable[Batch]]) -> None:
        trainer, state = self.trainer, self.state
        if (
            self._evaluation_due() and state.evaluated != state.step
        ):  # it was cut short by what ended the run before
            self._evaluate()
        if state.step >= trainer.max_steps or self._patience_is_over():
            return
        take_step = Stepper(
            state,
            trainer.wrapped(state.model, self.group),
            trainer.device,
            trainer.autocast,
            trainer.clip_norm,
        )
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
            if (
                due
                or last
                or (trainer.checkpoint_every and state.step % trainer.checkpoint_every == 0)
            ):
                self._save()  # before the evaluation: what is trained is safe
            if due:
                self._evaluate()
                if self._patience_is_over():
                    self.log.say(
                        f"no better {trainer.best_metric} in {trainer.patience} evaluations: the training ends at step {state.step}"
                    )
                    return

    def _pieces(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """The batches of a step at a time, with the seconds spent waiting for them, and with a count of what could not be read."""
        self._reset_clock()
        skipped: set[str] = set()  # an image comes again every epoch
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            pieces = list(islice(iterator, self.trainer.accumulate))
            self.waited += time.perf_counter() - start
            if len(pieces) < self.trainer.accumulate:
                return
            self.images += sum(map(len, pieces)) * self.group.world
            for message in (m for batch in pieces for m in batch.skipped):
                if message in skipped:
                    continue
                skipped.add(message)
                self.log.say(
                    f"warning: image passed over ({len(skipped)} of at most {self.trainer.skip_bad}): {message}",
                    anywhere=True,
                )
                if len(skipped) > self.trainer.skip_bad:
                    raise UserError(
                        f"more than data.skip_bad={self.trainer.skip_bad} images cannot be read, the last: {message}"
                    )
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
        values |= {
            "lr": rate,
            "grad_norm": float(step.grad_norm) if step.grad_norm is not None else 0.0,
        }
        if self.state.scaler.is_enabled():
            values["loss_scale"] = self.state.scaler.get_scale()
        values |= {
            "images_per_second": self.images / seconds,
            "data_seconds": self.waited / self.steps,
            "step_seconds": seconds / self.steps,
        }
        values["memory_gb"] = peak_memory(trainer.device)
        self.log.numbers(at, "train", values)
        self.log.progress(at, {k: values[k] for k in ("loss", "lr", "images_per_second")}, say=True)
        self._reset_clock()

    def _evaluation_due(self) -> bool:
        step, every = self.state.step, self.trainer.evaluate_every
        return bool(
            self.evaluate
            and step
            and (step == self.trainer.max_steps or (every and step % every == 0))
        )

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
        with self.interrupts.at_once(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            state.metrics = self.group.share(
                self.evaluate(
                    for_inference(state.evaluation_model(), trainer.dtype), state.step, self.log
                )
            )
        self.log.numbers(state.step, "val", state.metrics)
        state.evaluated = state.step
        value = state.metrics.get(trainer.best_metric)
        better = value is not None and (state.best is None or value > state.best)
        if value is None:
            self.log.say(
                f"warning: trainer.best_metric={trainer.best_metric!r} is not among the metrics, no best.pt: {', '.join(state.metrics)}"
            )
        state.best, state.stale = (value, 0) if better else (state.best, state.stale + 1)
        self._save(best=better)
        if self.report is not None and self.group.main:
            try:
                self.report()
            except (OSError, UserError) as error:  # no picture is worth a training
                self.log.say(
                    f"warning: the pictures of step {state.step} could not be made ({error})"
                )
        self._reset_clock()
