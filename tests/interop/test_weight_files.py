"""Weight files: supported contents, and one-line errors for others."""

from __future__ import annotations

import argparse
import os
import pickle
import struct
from collections import OrderedDict
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


DETECTOR = {
    "backbone.body.conv1.weight": torch.arange(4.0).view(2, 2),
    "roi_heads.box_predictor.cls_score.bias": torch.ones(2),
}


class AttributeDict(dict[str, Any]):
    """A dictionary of hyperparameters, as Lightning saves it."""


class WholeModel:
    """An object in the place of a state dict."""

    def __init__(self) -> None:
        self.state = DETECTOR


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return OrderedDict((f"{prefix}{name}", tensor) for name, tensor in DETECTOR.items())


REFERENCE = {
    "model": DETECTOR,
    "optimizer": {"state": {}, "param_groups": [{"lr": 0.02}]},
    "args": argparse.Namespace(lr=0.02, output_dir=Path("x"), device="cuda"),
    "epoch": 25,
}
LIGHTNING = {
    "state_dict": {**prefixed("model."), "criterion.weight": torch.ones(3)},
    "hyper_parameters": AttributeDict(lr=0.02, classes=["cat"]),
    "callbacks": {"ModelCheckpoint": {"best": np.float64(0.5), "history": np.arange(3)}},
}


@pytest.mark.parametrize(
    "content",
    [
        REFERENCE,
        LIGHTNING,
        prefixed("module."),
        {"state_dict": prefixed("module."), "epoch": 3},
        {"model_state_dict": prefixed("_orig_mod.module.")},
        {"model": "maskrcnn_resnet50_fpn", "state_dict": DETECTOR},
        {"model": {"state_dict": prefixed("net.model.")}},
        {"module": {"n_averaged": torch.tensor(3), **prefixed("module.")}},
    ],
    ids=[
        "reference",
        "Lightning",
        "DDP",
        "nested",
        "compiled",
        "name of the model",
        "twice nested",
        "average",
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints(tmp_path: Path, content: Any, zipped: bool) -> None:
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    state = read_weights(tmp_path / "w.pth")
    assert state.keys() == DETECTOR.keys()
    assert all(torch.equal(state[name], DETECTOR[name]) for name in state)


def test_two_detectors_in_a_file(tmp_path: Path) -> None:
    torch.save({**prefixed("student."), **prefixed("teacher.")}, tmp_path / "w.pth")
    assert "more than one detector, under the prefixes student., teacher." in refused(
        tmp_path / "w.pth"
    )


def test_a_whole_model_is_no_state_dict(tmp_path: Path) -> None:
    for content in (WholeModel(), {"model": WholeModel()}):
        torch.save(content, tmp_path / "w.pth")
        assert "save model.state_dict()" in refused(tmp_path / "w.pth")
    torch.save({"model": {"a": WholeModel()}}, tmp_path / "w.pth")
    assert "a is not a plain tensor but a SkippedObject" in refused(tmp_path / "w.pth")


def test_calls_beside_the_weights_are_refused(tmp_path: Path) -> None:
    mark = tmp_path / "was_run"
    torch.save({"model": DETECTOR, "args": Evil(mark)}, tmp_path / "w.pth")
    assert "it asks for a call of posix.system" in refused(tmp_path / "w.pth")
    assert not mark.exists()


def test_state_of_a_skipped_dictionary_is_refused(tmp_path: Path) -> None:
    """torch reads such an object as a dictionary, of which the state could replace methods."""
    parameters = AttributeDict(lr=0.02)
    parameters.note = 1  # type: ignore[attr-defined]
    torch.save({"model": DETECTOR, "args": parameters}, tmp_path / "w.pth")
    assert "it sets the state of a dictionary" in refused(tmp_path / "w.pth")


def test_archives_of_more_than_one_disk(tmp_path: Path) -> None:
    """`zipfile.is_zipfile` itself raises an exception for such a file."""
    path = tmp_path / "w.pth"
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 1, 0, 2)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 1, 1, 1, 1, 0, 0, 0)
    path.write_bytes(b"X" * 100 + locator + end)
    refused(path)
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-22] + locator + end)
    assert "not weights, or truncated" in refused(path)


def test_a_memo_index_needs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "w.pkl"
    path.write_bytes(b"\x80\x04}r\xff\xff\xff\x2f.")
    assert "no state dict" in refused(path)
