"""Files of weights that another framework wrote -> a state dict."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.interop import safe_pickle

# What torch wrote before 1.6 begins with the pickle of this number.
_OLD_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .pth of torch or a .pkl of detectron2: tensors on the CPU, by name. Nothing in the file is run.

    Raises UserError for a file that is missing, damaged, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            start = file.read(len(_OLD_TORCH))
            file.seek(0)
            content = _torch(path) if start == _OLD_TORCH or zipfile.is_zipfile(path) else safe_pickle.load(file, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if isinstance(content, Mapping) and "blobs" in content:
        raise UserError(f"{path}: weights of Caffe2's Detectron, which are not read; detectron2's own files are")
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path}: no state dict, neither at the top nor under 'model'")
    return {name: _tensor(value, name, path) for name, value in state.items()}


def _torch(path: Path) -> Any:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip() or next((i.filename for i in archive.infolist() if i.external_attr), None)
            if damaged:
                raise UserError(f"{path}: damaged, the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zipfile and torch raise almost anything on damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: refused, damaged or more than tensors and plain values ({reason})") from error


def _tensor(value: Any, name: str, path: Path) -> Tensor:
    if isinstance(value, safe_pickle.Array) and value.value is not None:
        value = torch.from_numpy(value.value)
    if not isinstance(value, Tensor) or value.is_sparse or value.is_quantized or value.is_complex():
        raise UserError(f"{path}: {name} is no plain tensor but a {type(value).__name__}")
    tensor: Tensor = value.detach()
    return tensor.float() if tensor.is_floating_point() else tensor
