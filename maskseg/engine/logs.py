"""What a run writes down: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class RunLog:
    """Numbers of a run by step. Lines of `metrics.jsonl`: {"step", "kind": "train" or "val", ...}; the same numbers go to TensorBoard.

    A resumed run drops the lines after the step it starts from, so that each step is there once.
    """

    def __init__(self, run_dir: Path, start_step: int, max_steps: int, config: str) -> None:
        self.path = run_dir / "metrics.jsonl"
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # a line that a kill cut short
                    continue
                if entry["step"] <= start_step:
                    kept.append(line)
        self.path.write_text("".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self.board.add_text("config", f"```yaml\n{config}\n```", start_step)
        self.bar: Any = tqdm(total=max_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.max_steps = max_steps

    def numbers(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and TensorBoard's scalars `kind/name`."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, **values}, allow_nan=True) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, values: Mapping[str, float], say: bool) -> None:
        """Moves the bar; where there is no terminal, `say` prints a line instead."""
        self.bar.update(step - self.bar.n)
        if not say:
            return
        if self.bar.disable:
            parts = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            print(f"step {step}/{self.max_steps}  {parts}", flush=True)
        else:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})

    def say(self, text: str) -> None:
        """A message that does not break the bar."""
        if self.bar.disable:
            print(text, flush=True)
        else:
            tqdm.write(text)

    def picture(self, name: str, image: Any, step: int) -> None:
        """image: uint8 [H, W, 3] array, to TensorBoard."""
        self.board.add_image(name, torch.as_tensor(image).permute(2, 0, 1), step)

    def close(self) -> None:
        """Flushes everything."""
        self.bar.close()
        self.board.close()
