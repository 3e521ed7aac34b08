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

# Keys of a training checkpoint for its state dict, in the order in which they are tried.
_STATE_KEYS = ("model", "state_dict", "model_state_dict", "model_state", "module")
_MAX_LEVELS = 3  # of a state dict inside a training checkpoint
# A tensor that each detector of torchvision and detectron2 has under this name. Programs that wrap
# the model (DistributedDataParallel, Lightning, torch.compile) write a prefix before all names.
_ANCHOR = "roi_heads.box_predictor.cls_score.bias"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a .pth file of torch or a .pkl file of detectron2.

    A training checkpoint contains it under one of `_STATE_KEYS`; everything else in it is ignored,
    such as the options of the training. The prefixes of programs that wrap a model are removed.
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
    state = _find_state_dict(content)
    if not _is_state_dict(state):
        raise UserError(
            f"{path}: no state dict, neither at the top level nor under "
            f"{', '.join(map(repr, _STATE_KEYS))}; save model.state_dict()"
        )
    state = _remove_prefix(state, path)
    return {name: _to_tensor(value, name, path) for name, value in state.items()}


def _find_state_dict(content: object) -> object:
    """Return the content of the innermost of the nested `_STATE_KEYS`."""
    for _ in range(_MAX_LEVELS):
        if not isinstance(content, Mapping):
            break
        candidates = [content[key] for key in _STATE_KEYS if key in content]
        if not candidates:
            break
        # The others can be the name or the version of the model.
        content = next((c for c in candidates if isinstance(c, Mapping)), candidates[0])
    return content


def _remove_prefix(state: Mapping[str, object], path: Path) -> Mapping[str, object]:
    """Return the tensors of the detector, without the prefix of all of its names.

    Tensors of anything else that was wrapped with it (a loss, a metric) are dropped.
    Raises UserError for a file with more than one detector.
    """
    prefixes = [name.removesuffix(_ANCHOR) for name in state if name.endswith(_ANCHOR)]
    if not prefixes or "" in prefixes:
        return state
    if len(prefixes) > 1:
        raise UserError(
            f"{path}: more than one detector, under the prefixes {', '.join(prefixes)}; save the "
            "state dict of one of them"
        )
    prefix = prefixes[0]
    return {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}


def _read(path: Path) -> object:
    """Return the content of a file of either kind."""
    if is_torch_file(path):
        return read_torch(path, "weights", skip_objects=True)
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
