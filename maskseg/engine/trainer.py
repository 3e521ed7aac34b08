"""A plain training loop by steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from maskseg.engine.checkpoint import Checkpoint, save_checkpoint
from maskseg.engine.logs import RunLog
from maskseg.engine.optim import parameter_groups
from maskseg.errors import UserError
from maskseg.structures import Batch

Evaluate = Callable[[nn.Module, int, RunLog], dict[str, float]]
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"trainer.device={name}: {str(error).splitlines()[0]}") from error


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context of `precision`: `bf16` computes convolutions and matrix products in bfloat16, the weights stay float32."""
    if precision not in PRECISIONS:
        raise UserError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    kind = PRECISIONS[precision]
    return nullcontext() if kind is None else torch.autocast(device.type, dtype=kind)


class Trainer:
    """Trains for `max_steps` steps, saves and evaluates on the way.

    clip_norm: gradients are scaled down to this norm (0: never). checkpoint_every, evaluate_every, log_every: in steps; 0 for only at the end.
    best_metric: the metric whose highest value so far makes `best.pt`. channels_last: memory layout of the weights, faster at equal output.
    reference_batch: the total batch that the optimiser's learning rate is meant for; it is scaled linearly to the batch in use
    (Goyal et al., section 2.1). decay_norms_and_biases: as `parameter_groups`. resume: `auto`, a checkpoint or a run folder;
    init: a checkpoint whose weights to start from, `init_partial` with those that fit.
    """

    def __init__(
        self,
        max_steps: int,
        device: str = "auto",
        precision: str = "fp32",
        channels_last: bool = True,
        clip_norm: float = 0.0,
        reference_batch: int = 16,
        decay_norms_and_biases: bool = True,
        log_every: int = 20,
        checkpoint_every: int = 1000,
        evaluate_every: int = 0,
        best_metric: str = "segm/AP",
        resume: str | None = None,
        init: str | None = None,
        init_partial: bool = False,
    ) -> None:
        if max_steps < 1:
            raise UserError(f"trainer.max_steps must be at least 1, not {max_steps}")
        if reference_batch < 1:
            raise UserError(f"trainer.reference_batch must be at least 1, not {reference_batch}")
        self.max_steps, self.device, self.precision = max_steps, pick_device(device), precision
        self.autocast = partial(autocast, self.device, precision)
        self.autocast()
        self.channels_last, self.clip_norm = channels_last, clip_norm
        self.log_every, self.checkpoint_every, self.evaluate_every = max(log_every, 1), checkpoint_every, evaluate_every
        self.best_metric, self.skip_bad = best_metric, 0
        self.reference_batch, self.decay_norms_and_biases = reference_batch, decay_norms_and_biases
        self.resume, self.init, self.init_partial = resume, init, init_partial

    def optimizer(self, model: nn.Module, make: Callable[..., Optimizer], total_batch: int) -> Optimizer:
        """make: an optimiser class with its numbers, such as `partial(SGD, lr=0.02, weight_decay=1e-4)`; the rate is scaled."""
        try:
            made = make(parameter_groups(model, _default(make, "weight_decay"), self.decay_norms_and_biases))
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
    ) -> dict[str, float]:
        """loader(step) gives the batches from that step on; about: what each checkpoint says of the run (config, categories).

        -> the metrics of the last evaluation.
        """
        state = _State(model, optimizer, scheduler, dict(about))
        if resume is not None:
            state.load(resume)
        log = RunLog(run_dir, state.step, self.max_steps, str(about["config"]))
        try:
            for batch in self._timed(loader(state.step), log):
                state.step += 1
                rate = float(optimizer.param_groups[0]["lr"])
                losses = self._step(model, optimizer, scheduler, batch)
                last = state.step == self.max_steps
                if last or state.step % self.log_every == 0:
                    self._log(log, state, losses, rate)
                else:
                    log.progress(state.step, {}, say=False)
                due = last or bool(self.evaluate_every and state.step % self.evaluate_every == 0)
                if due or (self.checkpoint_every and state.step % self.checkpoint_every == 0):
                    save_checkpoint(run_dir / "last.pt", state.checkpoint())  # before the evaluation: what is trained is safe
                if evaluate and due:
                    self._evaluate(evaluate, log, state, run_dir)
        finally:
            log.close()
        return state.metrics

    def _step(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, batch: Batch) -> dict[str, Tensor]:
        model.train()
        with self.autocast():
            losses: dict[str, Tensor] = model(batch.to(self.device))
            total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        if self.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
        optimizer.step()
        scheduler.step()
        return {"loss": total.detach(), **{f"loss/{k}": v.detach() for k, v in losses.items()}}

    def _timed(self, batches: Iterable[Batch], log: RunLog) -> Iterable[Batch]:
        """The batches, with the seconds spent waiting for them, and with a count of what could not be read."""
        self.images, self.waited, self.since, skipped = 0, 0.0, time.perf_counter(), 0
        iterator = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            self.images += len(batch)
            for message in batch.skipped:
                skipped += 1
                log.say(f"warning: image passed over ({skipped} of at most {self.skip_bad}): {message}")
                if skipped > self.skip_bad:
                    raise UserError(f"more than data.skip_bad={self.skip_bad} images cannot be read, the last: {message}")
            yield batch

    def _log(self, log: RunLog, state: _State, losses: dict[str, Tensor], rate: float) -> None:
        seconds = time.perf_counter() - self.since
        values = {k: float(v) for k, v in losses.items()}
        values["lr"] = rate
        values["images_per_second"] = self.images / max(seconds, 1e-9)
        values["data_share"] = self.waited / max(seconds, 1e-9)
        self.images, self.waited, self.since = 0, 0.0, time.perf_counter()
        log.numbers(state.step, "train", values)
        log.progress(state.step, {k: values[k] for k in ("loss", "lr", "images_per_second")}, say=True)

    def _evaluate(self, evaluate: Evaluate, log: RunLog, state: _State, run_dir: Path) -> None:
        # A stream of its own: what an evaluation draws must not change the training that follows it.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.autocast():
            torch.manual_seed(0)
            state.metrics = evaluate(state.model, state.step, log)
        log.numbers(state.step, "val", state.metrics)
        value = state.metrics.get(self.best_metric)
        if value is None:
            log.say(f"warning: trainer.best_metric={self.best_metric!r} is not among the metrics, no best.pt: {', '.join(state.metrics)}")
        elif state.best is None or value > state.best:
            state.best = value
            save_checkpoint(run_dir / "best.pt", state.checkpoint())
        save_checkpoint(run_dir / "last.pt", state.checkpoint())
        self.since = time.perf_counter()


def _default(make: Callable[..., Optimizer], key: str) -> float:
    return float(getattr(make, "keywords", {}).get(key, 0.0))


class _State:
    """All that a run is at a step, so that it can go on as if it had never stopped."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, about: Checkpoint) -> None:
        self.model, self.optimizer, self.scheduler, self.about = model, optimizer, scheduler, about
        self.step, self.best, self.metrics = 0, None, {}  # type: int, float | None, dict[str, float]

    def checkpoint(self) -> Checkpoint:
        rng = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
        return {
            **self.about,
            "step": self.step,
            "best": self.best,
            "metrics": self.metrics,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "rng": rng,
        }

    def load(self, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict({**checkpoint["scheduler"], "lr_lambdas": [None] * len(self.optimizer.param_groups)})
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if torch.cuda.is_available() and checkpoint["rng"]["cuda"]:
            torch.cuda.set_rng_state_all(checkpoint["rng"]["cuda"])
        self.step, self.best, self.metrics = int(checkpoint["step"]), checkpoint["best"], dict(checkpoint["metrics"])
