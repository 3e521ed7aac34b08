"""Logging of a run: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import NoReturn, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from maskseg.errors import UserError
from maskseg.files import parse_json, replacing

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

_MAX_IMAGE_SIDE = 2000  # pixels of the longer side of an image in TensorBoard


class RunLog:
    """Logs the metrics of a run by step.

    Each line of `metrics.jsonl` is {"step": ..., "kind": "train", "val" or "skipped", ...}. Scalars
    also go to TensorBoard. A resumed run drops the lines after the step that it starts from, so
    that every step occurs once. As a context manager, the log is closed at the end.

    Raises UserError if a file cannot be written, for example because the disk is full.

    Args:
        run_dir: folder of the run; None on ranks other than 0, which write and print nothing.
        start_step: step that the run starts from.
        max_steps: last step.
        config: the config as YAML, shown in TensorBoard.
        last_eval_step: step of the last evaluation that the checkpoint contains; None if that is
            `start_step`.
    """

    def __init__(
        self,
        run_dir: Path | None,
        start_step: int,
        max_steps: int,
        config: str,
        last_eval_step: int | None = None,
    ) -> None:
        self.max_steps = max_steps
        self.start_step = start_step
        self.started = time.perf_counter()
        self.path: Path | None = None
        self.board: SummaryWriter | None = None
        quiet = run_dir is None or not sys.stderr.isatty()
        self.bar: tqdm[NoReturn] = tqdm(
            total=max_steps, initial=start_step, unit="step", disable=quiet, dynamic_ncols=True
        )
        if run_dir is None:
            return
        self.path = run_dir / "metrics.jsonl"
        with self._writing():
            self.path.touch()
            has_lines = self.path.stat().st_size > 0
        if has_lines:
            last_eval = start_step if last_eval_step is None else last_eval_step
            _drop_later_lines(self.path, start_step, last_eval)
        self._previous_hook = threading.excepthook
        threading.excepthook = _silence_board_errors(self._previous_hook)
        try:
            with self._writing():
                self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
                self.board.add_text("config", f"```yaml\n{config}\n```", start_step)
        except UserError:
            threading.excepthook = self._previous_hook
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the log. Its own failure does not replace an earlier error."""
        try:
            self.close()
        except UserError:
            if error is None:
                raise

    def log_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Write one line of metrics.jsonl and TensorBoard's scalars `kind/name`."""
        self.log_event(step, kind, values)
        if self.board is not None:
            with self._writing():
                for name, value in values.items():
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise UserError if the disk rejects a write."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written to ({error.strerror}); "
                "the checkpoints there are intact"
            ) from error

    def log_event(self, step: int, kind: str, values: Mapping[str, object]) -> None:
        """Write one line of metrics.jsonl only. Raises UserError if it cannot be written."""
        if self.path is None:
            return
        with self._writing(), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}, allow_nan=True) + "\n")

    def progress(self, step: int, values: Mapping[str, float], show: bool) -> None:
        """Advance the progress bar.

        show: display `values` beside the bar, or print them as a line if there is no terminal.
        """
        self.bar.update(step - self.bar.n)
        if not show:
            return
        if not self.bar.disable:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
        elif self.path is not None:
            text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            print(f"step {step}/{self.max_steps}  {text}  eta {self.eta(step)}", flush=True)

    def eta(self, step: int) -> str:
        """Estimate the remaining time from the mean duration of a step so far, as h:mm:ss."""
        seconds_per_step = (time.perf_counter() - self.started) / max(step - self.start_step, 1)
        return str(tqdm.format_interval(round(seconds_per_step * (self.max_steps - step))))

    def print(self, text: str, any_rank: bool = False) -> None:
        """Print a message without breaking the progress bar.

        any_rank: also print it on ranks other than 0, for events that only one rank knows of.
        """
        if not self.bar.disable:
            tqdm.write(text)
        elif self.path is not None or any_rank:
            print(text, flush=True)

    def log_image(self, name: str, image: NDArray[np.uint8], step: int) -> None:
        """Log a uint8 [H, W, 3] image to TensorBoard, reduced to at most 2000 pixels a side."""
        if self.board is not None:
            thumbnail = Image.fromarray(image)
            thumbnail.thumbnail((_MAX_IMAGE_SIDE, _MAX_IMAGE_SIDE))
            with self._writing():
                self.board.add_image(name, np.array(thumbnail), step, dataformats="HWC")

    def log_pr_curve(self, name: str, precision: ArrayLike, step: int) -> None:
        """Log a precision-recall curve to TensorBoard.

        precision: [n], at n recalls evenly spaced from 0 to 1. The counts of TensorBoard's plot are
        left at 0, because a detector has no number of true negatives.
        """
        if self.board is None:
            return
        values = np.asarray(precision)
        recall = np.linspace(0, 1, len(values))
        counts = np.zeros(len(values))
        # TensorBoard draws the points from last to first, so the recall must fall.
        curves = (counts, counts, counts, counts, values[::-1], recall[::-1])
        with self._writing():
            self.board.add_pr_curve_raw(name, *curves, global_step=step, num_thresholds=len(values))

    def close(self) -> None:
        """Close the progress bar and flush TensorBoard's files."""
        self.bar.close()
        if self.board is None:
            return
        try:
            with self._writing():
                self.board.close()
        finally:
            threading.excepthook = self._previous_hook


def _silence_board_errors(
    hook: Callable[[threading.ExceptHookArgs], object],
) -> Callable[[threading.ExceptHookArgs], None]:
    """Return a hook for errors in threads that ignores those of TensorBoard's writer.

    The writer keeps such an error and raises it again in the thread that logs.
    """

    def handle(arguments: threading.ExceptHookArgs) -> None:
        module = type(arguments.thread).__module__
        is_board = module.partition(".")[0] == "tensorboard"
        if not (is_board and issubclass(arguments.exc_type, OSError)):
            hook(arguments)

    return handle


def _drop_later_lines(path: Path, step: int, last_eval_step: int) -> None:
    """Drop lines after `step`, evaluations after `last_eval_step`, and truncated lines."""
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            entry = parse_json(line)
            if entry["step"] <= (last_eval_step if entry["kind"] == "val" else step):
                lines.append(line)
        except (ValueError, KeyError, TypeError):  # includes bytes that are not UTF-8
            continue
    with replacing(path, "the metrics") as file:
        file.write(b"".join(line + b"\n" for line in lines))


@contextmanager
def print_warnings() -> Iterator[None]:
    """Print all warnings of the block, also repeated ones, when it ends without an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        print(f"warning: {warning.message}", flush=True)


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory of this process in GB: GPU memory on a GPU, else resident memory.

    None on Windows, whose Python has no module `resource`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * unit / 1e9
