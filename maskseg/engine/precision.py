"""Device and numeric precision of a run."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch

from maskseg.errors import UserError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_COMPILERS = ("c++", "g++", "clang++", "gcc", "clang", "cl")


def pick_device(name: str, key: str = "trainer.device") -> torch.device:
    """Return the device called `name` and make it the current one.

    `auto` is the CUDA GPU if there is one, else the CPU. If torchrun has started several processes
    on the machine, each gets its own GPU.
    key: the config key of the name, for messages.
    Raises UserError for a name of another form, and if the device does not exist.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?|mps", name) is None:
        raise UserError(f"{key}={name}: expected auto, cpu, cuda, cuda:0, cuda:1 ... or mps")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"{key}=mps: this machine, or this build of torch, has no MPS device")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local_rank = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local_rank is not None:
        count = torch.cuda.device_count()
        if int(local_rank) >= count:
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own: there are {count}; "
                "lower --nproc-per-node"
            )
        name = f"cuda:{local_rank}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{key}={name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_precision(name: str) -> None:
    """Raise UserError for an unknown precision."""
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision must be one of {', '.join(PRECISIONS)}, not {name!r}")


def inference_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of the weights during inference; None to leave them unchanged.

    Raises UserError for an unknown precision.
    """
    check_precision(name)
    return PRECISIONS[name]


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the mixed-precision context of `precision`.

    `bf16` and `fp16` compute convolutions and matrix products in that type; the weights stay
    float32.
    """
    check_precision(precision)
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return the loss scaler of `fp16`, which prevents small gradients from underflowing.

    It is disabled for the other precisions. Source: Micikevicius et al., section 3.2.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def check_compiler(device: torch.device) -> None:
    """Raise UserError if torch.compile has no C++ compiler on this machine."""
    named = os.environ.get("CC" if device.type == "cuda" else "CXX")
    candidates = [named] if named else _COMPILERS
    if not any(shutil.which(compiler) for compiler in candidates):
        raise UserError(
            "trainer.compile=true needs a C++ compiler (g++ or clang++) on this machine, "
            "and none was found; leave it false"
        )
