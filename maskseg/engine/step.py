"""One optimizer step: forward, backward, and the handling of values that are not finite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, _foreach_copy_, nn
from torch.nn.parallel import DistributedDataParallel

from maskseg.engine.state import TrainState
from maskseg.structures import Batch


@dataclass
class StepResult:
    """Result of one step.

    losses: the sum and each term, of this rank's images. grad_norm: norm of the gradient before
    clipping. problem: why the step was skipped, None if it was not. stop: whether any rank should
    stop.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor | None = None
    problem: str | None = None
    stop: bool = False


class TrainStep:
    """Forward and backward passes, gradient clipping, optimizer, schedule and EMA.

    If the loss or the gradient is not finite on any rank, the step changes neither weights nor
    running statistics.

    Args:
        state: the training state to advance.
        forward: the model, or its DistributedDataParallel wrapper.
        device: device of the model.
        autocast: returns the mixed-precision context of a forward pass.
        clip_norm: maximum norm of the gradient; 0 disables clipping.
    """

    def __init__(
        self,
        state: TrainState,
        forward: nn.Module,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[object]],
        clip_norm: float,
    ) -> None:
        self.state = state
        self.forward = forward
        self.device = device
        self.autocast = autocast
        self.clip_norm = clip_norm
        self.parameters = [p for p in state.model.parameters() if p.requires_grad]
        self.buffers = list(state.model.buffers())
        self.saved_buffers = [buffer.clone() for buffer in self.buffers]

    def __call__(self, batches: Sequence[Batch], should_stop: Callable[[], bool]) -> StepResult:
        """Take one step.

        Args:
            batches: the micro-batches of the step, whose gradients are averaged.
            should_stop: whether this rank has been asked to stop.
        """
        state = self.state
        state.model.train()
        state.optimizer.zero_grad(set_to_none=True)
        if self.buffers:
            # The forward pass already updates the running means of batch norm.
            _foreach_copy_(self.saved_buffers, self.buffers)
        result = StepResult()
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            is_last = i == len(batches) - 1
            losses = self._forward(batch, sync=is_last)
            total = torch.stack(list(losses.values())).sum()
            finite = bool(torch.isfinite(total))
            failed, result.stop = state.context.any_rank(not finite, should_stop())
            if failed:
                problem = None if finite else _loss_problem(losses, batch)
                return self._skip(result, _join_problems(state.context.gather(problem)))
            self._backward(total / len(batches), sync=is_last)
            _add_losses(sums, total, losses, len(batches))
        state.scaler.unscale_(state.optimizer)
        result.losses = sums
        result.grad_norm = self._clip()
        finite = bool(torch.isfinite(result.grad_norm))
        if not finite and not self._is_overflow():
            problem = self._gradient_problem(batches)
            return self._skip(result, _join_problems(state.context.gather(problem)))
        # The scaler would also skip the step, but a fused SGD whose first step is skipped by the
        # scaler keeps uninitialized momentum buffers.
        if finite:
            state.scaler.step(state.optimizer)
        state.scaler.update()
        self._advance_schedule()
        if state.ema is not None and finite:
            state.ema.update_parameters(state.model)
        return result

    def _sync_context(self, sync: bool) -> AbstractContextManager[object]:
        """Context that suppresses the gradient averaging over ranks unless `sync` is set."""
        if sync or not isinstance(self.forward, DistributedDataParallel):
            return nullcontext()
        return self.forward.no_sync()

    def _forward(self, batch: Batch, sync: bool) -> dict[str, Tensor]:
        with self._sync_context(sync), self.autocast():
            losses: dict[str, Tensor] = self.forward(batch.to(self.device))
        return losses

    def _backward(self, total: Tensor, sync: bool) -> None:
        with self._sync_context(sync):
            self.state.scaler.scale(total).backward()  # type: ignore[no-untyped-call]

    def _clip(self) -> Tensor:
        """Clip the gradients. Returns their norm before clipping."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        return norm

    def _is_overflow(self) -> bool:
        """Whether a gradient that is not finite means that fp16's loss scale is too high.

        The scaler finds the right scale by trial and error, so such a step is no problem.
        """
        return self.state.scaler.is_enabled() and self.state.scaler.get_scale() > 1

    def _skip(self, result: StepResult, problem: str) -> StepResult:
        """Undo the step, except that the schedule advances."""
        if self.buffers:
            _foreach_copy_(self.buffers, self.saved_buffers)
        self.state.optimizer.zero_grad(set_to_none=True)
        if self.state.scaler.is_enabled() and result.grad_norm is not None:
            self.state.scaler.update()
        self._advance_schedule()
        result.problem = problem
        return result

    def _advance_schedule(self) -> None:
        """Advance the schedule, which counts all steps, including skipped ones."""
        # torch warns if the first step was skipped, because it expects optimizer.step() before.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.state.scheduler.step()

    def _gradient_problem(self, batches: Sequence[Batch]) -> str:
        names = []
        for name, parameter in self.state.model.named_parameters():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                names.append(name)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        images = ", ".join(_describe_images(batch) for batch in batches)
        return f"the gradient of {', '.join(names[:3])}{more} is not finite, from {images}"


def _add_losses(
    sums: dict[str, Tensor], total: Tensor, losses: dict[str, Tensor], num_batches: int
) -> None:
    """Add the losses of one of `num_batches` micro-batches to their mean."""
    named = {"loss": total, **{f"loss/{name}": value for name, value in losses.items()}}
    for name, value in named.items():
        sums[name] = sums.get(name, 0) + value.detach() / num_batches


def _loss_problem(losses: dict[str, Tensor], batch: Batch) -> str:
    values = {name: float(value.detach()) for name, value in losses.items()}
    terms = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    description = ", ".join(terms) or "the sum of the losses"
    return f"not finite: {description}, from {_describe_images(batch)}"


def _describe_images(batch: Batch) -> str:
    names = zip(batch.image_ids, batch.file_names, strict=True)
    return ", ".join(f"image {image_id} ({name})" for image_id, name in names)


def _join_problems(problems: list[str | None]) -> str:
    """Rank 0: all ranks' problems joined; other ranks: a generic message."""
    return "; ".join(p for p in problems if p) or "a value of another process is not finite"
