"""Weight files: supported contents, and one-line errors for others."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskseg.errors import UserError
from maskseg.interop.weight_files import read_weights

STATE = {
    "a.weight": torch.arange(4.0).view(2, 2),
    "a.bias": torch.ones(2, dtype=torch.float16),
    "a.num_batches_tracked": torch.tensor(3),
}


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


def check(path: Path) -> None:
    found = read_weights(path)
    assert set(found) == set(STATE)
    assert all(found[k].tolist() == v.tolist() for k, v in STATE.items())
    assert [v.dtype for v in found.values()] == [torch.float32, torch.float32, torch.int64]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_files_of_torch(tmp_path: Path, zipped: bool, nested: bool) -> None:
    content = {"model": STATE, "iteration": 9, "optimizer": {"state": {}}} if nested else STATE
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    check(tmp_path / "w.pth")


def test_files_of_detectron2(tmp_path: Path) -> None:
    content = {
        "model": {k: v.numpy() for k, v in STATE.items()},
        "__author__": "somebody",
        "matching_heuristics": True,
    }
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content, protocol=2))
    check(tmp_path / "w.pkl")


def refused(path: Path) -> str:
    with pytest.raises(UserError) as raised:
        read_weights(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["zipped", "old", "pickle"])
def test_a_file_that_runs_code(tmp_path: Path, kind: str) -> None:
    path, mark = tmp_path / "evil.pth", tmp_path / "was_run"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": {"a": Evil(mark)}}))
    else:
        torch.save(
            {"model": {"a": Evil(mark)}}, path, _use_new_zipfile_serialization=kind == "zipped"
        )
    assert "refused" in refused(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"blobs": {"conv1_w": np.zeros(1)}}, "Caffe2"),
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
        ({"model": {}}, "no state dict"),
        ({"model": None}, "no state dict"),
        ({"model": {3: np.zeros(1)}}, "no state dict"),
        ({"model": {"a": "text"}}, "a is not a plain tensor but a str"),
        ({"model": {"a": [1.0]}}, "a is not a plain tensor but a list"),
    ],
)
def test_other_content(tmp_path: Path, content: Any, told: str) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(content))
    assert told in refused(tmp_path / "w.pkl")


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    assert "no such file" in refused(path)
    assert "no such file" in refused(tmp_path)
    path.write_text("hello")
    assert "refused" in refused(path)
    torch.save({"a": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused(path)
    at = whole.index(np.float32(500).tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    # torch alone would silently read a file with a flipped bit.
    assert "checksum" in refused(path)
    torch.save({"a": torch.zeros(3).to_sparse()}, path)
    assert "sparse" in refused(path)
