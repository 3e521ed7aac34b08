"""Which device and which number format a run computes on and in."""

from __future__ import annotations

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from maskseg.errors import UserError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one; with several processes on a machine, each one's own. Raises UserError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local is not None:
        if int(local) >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; lower --nproc-per-node"
            )
        name = f"cuda:{local}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"trainer.device={name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_precision(name: str) -> None:
    """Raises UserError for one that is not there."""
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, not {name!r}")


def inference_dtype(name: str) -> torch.dtype | None:
    """In which the weights are kept for inference; None for their own. Raises UserError."""
    check_precision(name)
    return PRECISIONS[name]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context of `precision`: `bf16` and `fp16` compute convolutions and matrix products in it, the weights stay float32."""
    check_precision(precision)
    kind = PRECISIONS[precision]
    return nullcontext() if kind is None else torch.autocast(device.type, dtype=kind)


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Keeps small gradients of `fp16` from vanishing (Micikevicius et al., section 3.2); does nothing for the others."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile has no C++ compiler to work with."""
    named = os.environ.get("CC" if device.type == "cuda" else "CXX")
    if not any(
        shutil.which(c)
        for c in ([named] if named else ["c++", "g++", "clang++", "gcc", "clang", "cl"])
    ):
        raise UserError(
            "trainer.compile=true needs a C++ compiler (g++ or clang++) on this machine, and none was found; leave it false"
        )
