"""One optimiser step: forward, backward, and what is done when a number is not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maskseg.engine.state import State
from maskseg.structures import Batch


@dataclass
class Step:
    """What a step gave. losses: the sum and each term, of this process' images; grad_norm: before clipping; problem: why the weights were
    left as they were, None where they were not; stop: some process was told to stop."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor | None = None
    problem: str | None = None
    stop: bool = False


class Stepper:
    """Forward and backward of the pieces of a batch, clipping, the optimiser, the schedule, the moving average.

    A step whose loss or gradient is not finite, in whichever process, changes nothing: no weight, no running mean. forward: the model, or what
    wraps it for several processes.
    """

    def __init__(
        self,
        state: State,
        forward: nn.Module,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        clip_norm: float,
    ) -> None:
        self.state, self.forward, self.device, self.autocast, self.clip_norm = (
            state,
            forward,
            device,
            autocast,
            clip_norm,
        )
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]
        self.buffers = list(state.model.buffers())
        self.saved = [b.clone() for b in self.buffers]

    def __call__(self, batches: Sequence[Batch], told_to_stop: Callable[[], bool]) -> Step:
        """batches: the pieces of one step, whose gradients are averaged."""
        state = self.state
        state.model.train()
        state.optimizer.zero_grad(set_to_none=True)
        if self.buffers:
            torch._foreach_copy_(
                self.saved, self.buffers
            )  # batch norm's means move in the forward pass already
        step, sums = Step(), {}  # type: Step, dict[str, Tensor]
        for i, batch in enumerate(batches):
            losses = self._forward(batch, sync=i == len(batches) - 1)
            total = torch.stack(list(losses.values())).sum()
            bad, step.stop = state.group.any(not bool(torch.isfinite(total)), told_to_stop())
            if bad:
                own = None if bool(torch.isfinite(total)) else _loss_problem(losses, batch)
                return self._skip(step, _together(state.group.gather(own)))
            self._backward(total / len(batches), sync=i == len(batches) - 1)
            for name, value in {
                "loss": total,
                **{f"loss/{k}": v for k, v in losses.items()},
            }.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(batches)
        state.scaler.unscale_(state.optimizer)
        step.losses, step.grad_norm = sums, self._clip()
        finite = bool(torch.isfinite(step.grad_norm))
        if not finite and not self._overflow():
            return self._skip(step, _together(state.group.gather(self._gradient_problem(batches))))
        if finite:  # not left to the scaler: a fused SGD that it stops at the first step keeps momenta that nobody has written
            state.scaler.step(state.optimizer)
        state.scaler.update()
        self._schedule()
        if state.ema is not None and finite:
            state.ema.update_parameters(state.model)
        return step

    def _sync(self, sync: bool) -> AbstractContextManager[Any]:
        return (
            nullcontext()
            if sync or not isinstance(self.forward, DistributedDataParallel)
            else self.forward.no_sync()
        )

    def _forward(self, batch: Batch, sync: bool) -> dict[str, Tensor]:
        with self._sync(sync), self.autocast():
            losses: dict[str, Tensor] = self.forward(batch.to(self.device))
        return losses

    def _backward(self, total: Tensor, sync: bool) -> None:
        with self._sync(sync):
            self.state.scaler.scale(total).backward()  # type: ignore[no-untyped-call]

    def _clip(self) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return norm

    def _overflow(self) -> bool:
        """Whether fp16's loss scale is only too high, which it finds out by trying."""
        return self.state.scaler.is_enabled() and self.state.scaler.get_scale() > 1

    def _skip(self, step: Step, problem: str) -> Step:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.saved)
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.state.scaler.is_enabled() and step.grad_norm is not None:
            self.state.scaler.update()
        self._schedule()
        step.problem = problem
        return step

    def _schedule(self) -> None:
        """The schedule is one of steps, whatever came of them."""
        with warnings.catch_warnings():  # torch takes a first step that was left out for a mistake
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.state.scheduler.step()

    def _gradient_problem(self, batches: Sequence[Batch]) -> str:
        named = self.state.model.named_parameters()
        wrong = [
            n for n, p in named if p.grad is not None and not bool(torch.isfinite(p.grad).all())
        ]
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f"the gradient of {', '.join(wrong[:3])}{more} is not finite, from {', '.join(_images(b) for b in batches)}"


def _loss_problem(losses: dict[str, Tensor], batch: Batch) -> str:
    values = {name: float(value.detach()) for name, value in losses.items()}
    wrong = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    return f"not finite: {', '.join(wrong) or 'the sum of the losses'}, from {_images(batch)}"


def _images(batch: Batch) -> str:
    return ", ".join(
        f"image {i} ({name})" for i, name in zip(batch.image_ids, batch.names, strict=True)
    )


def _together(problems: list[str | None]) -> str:
    """Where rank 0 is, what all processes found; elsewhere that there is something."""
    return "; ".join(p for p in problems if p) or "another process had a number that is not finite"
