"""maskseg: a modular, pure-Python framework to train, evaluate and use Mask R-CNN-style models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskseg.inference.predictor import Predictor

__version__ = "0.1.0"


def load(path: str | Path, device: str = "auto") -> Predictor:
    """Load a trained model: `maskseg.load("runs/.../best.pt")("photo.jpg")`.

    path: a checkpoint or a run folder (its best.pt, else last.pt).
    Raises `maskseg.errors.UserError`.
    """
    # Imported here: the loader processes must not pay for importing torch.
    from maskseg.config.restore import load_predictor

    return load_predictor(Path(path), device)
