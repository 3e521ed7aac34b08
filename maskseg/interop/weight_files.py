"""Files of weights that another framework wrote -> a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.files.torch_files import is_torch_file, read_torch
from maskseg.interop import safe_pickle


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pth of torch or a .pkl of detectron2: tensors on the CPU, by name. Nothing in the file is run.

    Raises UserError for a file that is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if is_torch_file(path):
            content = read_torch(path, "weights")
        else:
            with path.open("rb") as file:
                content = safe_pickle.load(file, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if isinstance(content, Mapping) and "blobs" in content:
        raise UserError(
            f"{path}: weights of Caffe2's Detectron, which are not read; detectron2's own files are"
        )
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(name, str) for name in state)
    ):
        raise UserError(f"{path}: no state dict, neither at the top nor under 'model'")
    return {name: _tensor(value, name, path) for name, value in state.items()}


def _tensor(value: Any, name: str, path: Path) -> Tensor:
    if isinstance(value, safe_pickle.Array) and value.value is not None:
        value = torch.from_numpy(value.value)
    if not isinstance(value, Tensor) or value.is_sparse or value.is_quantized or value.is_complex():
        raise UserError(f"{path}: {name} is no plain tensor but a {type(value).__name__}")
    tensor: Tensor = value.detach()
    return tensor.float() if tensor.is_floating_point() else tensor
