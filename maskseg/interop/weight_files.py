"""Weight files of other frameworks -> a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.files.torch_files import is_torch_file, read_torch
from maskseg.interop import safe_pickle


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a .pth file of torch or a .pkl file of detectron2.

    The tensors are on the CPU, floating-point ones in f32. No code in the file is run.
    Raises UserError for a file that is missing, damaged, or contains anything else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = _read(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if isinstance(content, Mapping) and "blobs" in content:
        raise UserError(
            f"{path}: weights of Caffe2's Detectron are not supported; those of detectron2 are"
        )
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not _is_state_dict(state):
        raise UserError(f"{path}: no state dict, neither at the top level nor under 'model'")
    return {name: _to_tensor(value, name, path) for name, value in state.items()}


def _read(path: Path) -> object:
    """Return the content of a file of either kind."""
    if is_torch_file(path):
        return read_torch(path, "weights")
    with path.open("rb") as file:
        return safe_pickle.load(file, path)


def _is_state_dict(state: object) -> TypeGuard[Mapping[str, object]]:
    """Return whether it is a non-empty mapping whose keys are strings."""
    if not isinstance(state, Mapping) or not state:
        return False
    return all(isinstance(name, str) for name in state)


def _to_tensor(value: object, name: str, path: Path) -> Tensor:
    if isinstance(value, safe_pickle.Array) and value.value is not None:
        value = torch.from_numpy(value.value)
    if not isinstance(value, Tensor) or value.is_sparse or value.is_quantized or value.is_complex():
        raise UserError(f"{path}: {name} is not a plain tensor but a {type(value).__name__}")
    tensor: Tensor = value.detach()
    return tensor.float() if tensor.is_floating_point() else tensor
