"""What a run writes down: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from maskseg.errors import UserError
from maskseg.files import parse_json, replacing

_SHOWN = 2000  # pixels of the longer side of a picture in TensorBoard


class RunLog:
    """Numbers of a run by step. Lines of `metrics.jsonl`: {"step", "kind": "train", "val" or "skipped", ...}; the numbers go to TensorBoard too.

    A resumed run drops the lines after the step it starts from, so that each step is there once. `run_dir` None (a process that is not the
    first one): nothing is written or printed. evaluated: the step of the last evaluation that the checkpoint knows of, if it is an earlier one.
    """

    def __init__(
        self,
        run_dir: Path | None,
        start_step: int,
        max_steps: int,
        config: str,
        evaluated: int | None = None,
    ) -> None:
        self.max_steps, self.start_step, self.started = max_steps, start_step, time.perf_counter()
        self.path: Path | None = None
        self.board: SummaryWriter | None = None
        quiet = run_dir is None or not sys.stderr.isatty()
        self.bar: Any = tqdm(
            total=max_steps, initial=start_step, unit="step", disable=quiet, dynamic_ncols=True
        )
        if run_dir is None:
            return
        self.path = run_dir / "metrics.jsonl"
        self.path.touch()
        if self.path.stat().st_size:
            _keep_until(self.path, start_step, start_step if evaluated is None else evaluated)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self.board.add_text("config", f"```yaml\n{config}\n```", start_step)

    def numbers(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and TensorBoard's scalars `kind/name`."""
        self.event(step, kind, values)
        if self.board is not None:
            with self._writing():
                for name, value in values.items():
                    self.board.add_scalar(f"{kind}/{name}", value, step)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises UserError where the disk does not take it."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written to ({error.strerror}); the checkpoints there are intact"
            ) from error

    def event(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl alone. Raises UserError where it cannot be written."""
        if self.path is None:
            return
        with self._writing(), self.path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}, allow_nan=True) + "\n")

    def progress(self, step: int, values: Mapping[str, float], say: bool) -> None:
        """Moves the bar; where there is no terminal, `say` prints a line instead."""
        self.bar.update(step - self.bar.n)
        if not say:
            return
        if not self.bar.disable:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
        elif self.path is not None:
            parts = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            print(f"step {step}/{self.max_steps}  {parts}  eta {self.eta(step)}", flush=True)

    def eta(self, step: int) -> str:
        """How long the rest takes at the pace so far, as h:mm:ss."""
        pace = (time.perf_counter() - self.started) / max(step - self.start_step, 1)
        return str(tqdm.format_interval(round(pace * (self.max_steps - step))))

    def say(self, text: str, anywhere: bool = False) -> None:
        """A message that does not break the bar; `anywhere`: from whatever process, of something that only it has seen."""
        if not self.bar.disable:
            tqdm.write(text)
        elif self.path is not None or anywhere:
            print(text, flush=True)

    def picture(self, name: str, image: Any, step: int) -> None:
        """image: uint8 [H, W, 3] array, to TensorBoard, shrunk to what a browser shows."""
        if self.board is not None:
            shown = Image.fromarray(image)
            shown.thumbnail((_SHOWN, _SHOWN))
            with self._writing():
                self.board.add_image(name, np.array(shown), step, dataformats="HWC")

    def pr_curve(self, name: str, precision: Any, step: int) -> None:
        """precision: [n] at n recalls from 0 to 1, to TensorBoard's page of such curves (which shows no counts of a detector's negatives)."""
        if self.board is None:
            return
        recall, nothing = np.linspace(0, 1, len(precision)), np.zeros(len(precision))
        # The page draws the points from the last to the first, by falling recall.
        curves = (nothing, nothing, nothing, nothing, np.asarray(precision)[::-1], recall[::-1])
        with self._writing():
            self.board.add_pr_curve_raw(
                name, *curves, global_step=step, num_thresholds=len(precision)
            )

    def close(self) -> None:
        """Flushes everything."""
        self.bar.close()
        if self.board is not None:
            self.board.close()


def _keep_until(path: Path, step: int, evaluated: int) -> None:
    """Drops the lines after `step`, those of evaluations after `evaluated`, and what a kill cut short."""
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = parse_json(line)
            if entry["step"] <= (evaluated if entry["kind"] == "val" else step):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    with replacing(path, "the metrics") as file:
        file.write("".join(f"{line}\n" for line in kept).encode())


def peak_memory(device: torch.device) -> float:
    """The most that this process has held so far, in GB: of the GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
