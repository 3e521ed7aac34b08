"""Checkpoints are written atomically, verified when they are read, and cannot run code."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made.disk import REASON, full_at
from torch import nn

from maskseg.engine.checkpoint import (
    FORMAT,
    best_threshold,
    checkpoint_path,
    follow_latest,
    latest_valid,
    load_checkpoint,
    load_weights,
    model_checkpoint,
    save_checkpoint,
)
from maskseg.errors import UserError


def make_model(classes: int = 3) -> nn.Module:
    torch.manual_seed(classes)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, classes))


def make_checkpoint(step: int = 5) -> dict[str, Any]:
    return {
        "step": step,
        "best": 0.25,
        "metrics": {"segm/AP": 0.25, "lost": float("inf")},
        "config": "name: ü\nlist: [1, 2]\n",
        "categories": {"names": ["a"], "ids": [7]},
        "model": make_model().state_dict(),
        "rng": {"cpu": torch.get_rng_state(), "cuda": []},
        "nothing": None,
        "flag": True,
        "pair": (1, 2.5),
    }


def assert_equal(first: Any, second: Any) -> None:
    if isinstance(first, torch.Tensor):
        assert isinstance(second, torch.Tensor)
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_equal(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_equal(a, b)
    else:
        assert type(first) is type(second)
        assert first == second


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    expected = make_checkpoint()
    save_checkpoint(tmp_path / "last.pt", expected)
    assert_equal({"format": FORMAT, **expected}, load_checkpoint(tmp_path / "last.pt"))
    assert files(tmp_path) == ["last.pt"]


def test_a_checkpoint_can_be_read_with_weights_only(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last.pt", make_checkpoint())
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == 5


def test_the_state_of_an_optimizer_is_restored(tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    save_checkpoint(
        tmp_path / "a.pt",
        {"model": {}, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()},
    )
    assert_equal(load_checkpoint(tmp_path / "a.pt")["optimizer"], optimizer.state_dict())


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
        KeyboardInterrupt(),
    ],
)
def test_a_failed_save_leaves_only_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    # Guards against: only OSError and RuntimeError clean up, but not Ctrl-C.
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_checkpoint(5))
    before = path.read_bytes()

    def half(_: object, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise error

    monkeypatch.setattr(torch, "save", half)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    with pytest.raises(expected) as raised:
        save_checkpoint(path, make_checkpoint(6))
    if expected is UserError:
        assert "last.pt" in str(raised.value)
        assert "an older one there is intact" in str(raised.value)
    assert path.read_bytes() == before
    assert files(tmp_path) == ["last.pt"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    # Guards against: "[enforce fail at inline_container.cc] unexpected pos", the error of torch.
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_checkpoint(5))
    before = path.read_bytes()
    for size in (0, 100, len(before) // 2, len(before) - 1):
        with full_at(size), pytest.raises(UserError) as raised:
            save_checkpoint(path, make_checkpoint(6))
        expected = f"{path}: the checkpoint could not be written ({REASON})"
        assert str(raised.value) == f"{expected}; an older one there is intact"
    assert path.read_bytes() == before
    assert files(tmp_path) == ["last.pt"]


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="could not be written"):
        save_checkpoint(tmp_path / "absent" / "last.pt", make_checkpoint())


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
def test_a_truncated_file(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_checkpoint())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=r"last\.pt: not a checkpoint, or truncated"):
        load_checkpoint(path)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(bytes(content))


def test_a_flipped_byte_of_a_weight_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, make_checkpoint())
    weight = make_model().state_dict()["0.weight"].numpy().tobytes()
    flip(path, path.read_bytes().index(weight) + 10)
    changed = torch.load(path, weights_only=True)  # torch does not notice the damage
    assert not torch.equal(changed["model"]["0.weight"], make_model().state_dict()["0.weight"])
    with pytest.raises(UserError, match=r"damaged, the checksum of .* is wrong"):
        load_checkpoint(path)


def test_a_flipped_byte_anywhere_is_found_or_changes_nothing(tmp_path: Path) -> None:
    # Guards against: zipfile raises an unexpected exception, and a resume does not fall back.
    # Guards against: bit 4 of an entry's external attributes marks a folder; torch then returns
    # uninitialized memory, and zipfile's check ignores the bit.
    path = tmp_path / "last.pt"
    checkpoint = make_checkpoint()
    save_checkpoint(path, checkpoint)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    refused = 0
    unexpected = []
    for position in [*range(0, directory, 7), *range(directory, len(content))]:
        path.write_bytes(content)
        flip(path, position)
        try:
            loaded = load_checkpoint(path)
            # The padding and unused fields of the zip file do not matter.
            assert_equal({"format": FORMAT, **checkpoint}, loaded)
        except UserError:
            refused += 1
        except Exception as error:
            unexpected.append(f"{position}: {type(error).__name__}")
    assert unexpected == []
    assert refused > 1000


def test_a_save_removes_the_temporary_file_of_a_killed_process(tmp_path: Path) -> None:
    # Guards against: `.last.pt.PID.tmp` of a killed process is never removed.
    (tmp_path / ".last.pt.999999999.tmp").write_bytes(b"half")
    save_checkpoint(tmp_path / "last.pt", make_checkpoint())
    assert files(tmp_path) == ["last.pt"]


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path(self.target),)


@pytest.mark.parametrize("container", ["torch", "old torch", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, container: str) -> None:
    path = tmp_path / "evil.pt"
    mark = tmp_path / "mark"
    evil = {"format": FORMAT, "model": {}, "step": 1, "bomb": Evil(str(mark))}
    if container == "pickle":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=container == "torch")
    with pytest.raises(UserError, match=r"evil\.pt"):
        load_checkpoint(path)
    assert not mark.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.load(path, weights_only=False) if container != "pickle" else pickle.loads(
            path.read_bytes()
        )
    assert mark.exists()  # the payload works


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.5),
        np.float32(1),
        np.int64(3),
        np.zeros(2),
        Path("x"),
        {1, 2},
        b"bytes",
        torch.float32,
        Evil("x"),
        True + 0j,
    ],
)
def test_values_that_are_not_plain_are_not_written(tmp_path: Path, value: object) -> None:
    with pytest.raises(
        TypeError,
        match=r"checkpoint\.metrics\.a\[1\] is a .*; "
        r"a checkpoint holds only tensors and plain values",
    ):
        save_checkpoint(tmp_path / "last.pt", {"model": {}, "metrics": {"a": [1.0, value]}})
    assert files(tmp_path) == []


def test_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        load_checkpoint(tmp_path)
    torch.save(make_model().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth: not a maskseg checkpoint of format 1"):
        load_checkpoint(tmp_path / "weights.pth")
    torch.save({"format": FORMAT + 1, "model": {}}, tmp_path / "future.pt")
    with pytest.raises(UserError, match="not a maskseg checkpoint"):
        load_checkpoint(tmp_path / "future.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not a maskseg checkpoint"):
        load_checkpoint(tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(UserError, match=r"archive\.pt"):
        load_checkpoint(tmp_path / "archive.pt")


@pytest.mark.parametrize(
    "change",
    [
        *[
            {"model": value}
            for value in (
                "text",
                [1],
                None,
                {"a": 1},
                {3: torch.zeros(1)},
                {"a": torch.zeros(2).to_sparse()},
            )
        ],
        *[
            {"ema": value}
            for value in ("text", 3, [1], {"updates": 1}, {"model": [torch.zeros(1)]})
        ],
        *[{"format": value} for value in (True, 1.0, torch.tensor(1), torch.zeros(4))],
    ],
)
def test_a_checkpoint_without_weights_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    # Guards against: an AttributeError when the weights are copied into the model.
    torch.save({"format": FORMAT, "model": {}, "step": 1} | change, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: ") as raised:
        load_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.timeout(60)
def test_nested_values_are_checked_in_bounded_time(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(60):
        nested = [nested, nested]  # 2 ** 60 leaves
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    torch.save(
        {
            "format": FORMAT,
            "model": {},
            "nested": nested,
            "deep": deep,
            "long": {"k" * 900: [None] * 200_000},
        },
        tmp_path / "a.pt",
    )
    assert load_checkpoint(tmp_path / "a.pt")["format"] == FORMAT


def test_mismatched_weights_are_listed() -> None:
    state = make_model(5).state_dict()
    state["extra.weight"] = state.pop("1.weight")
    model = make_model(3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as raised:
        load_weights(model, state, "some.pt", hint="trainer.init_partial=true takes what fits")
    message = str(raised.value)
    assert message.startswith("some.pt does not fit this model")
    assert (
        "2 of another shape (2.weight [5, 8] instead of [3, 8], 2.bias [5] instead of [3])"
        in message
    )
    assert "1 missing (1.weight)" in message
    assert "1 unexpected (extra.weight)" in message
    assert message.endswith("; trainer.init_partial=true takes what fits")
    assert_equal(dict(model.state_dict()), before)


def test_partial_loading_returns_the_skipped_tensors() -> None:
    state = make_model(5).state_dict()
    model = make_model(3)
    state["extra.weight"] = torch.zeros(1)
    head = model.state_dict()["2.weight"].clone()
    skipped = load_weights(model, state, "some.pt", partial=True)
    assert len(skipped) == 3
    assert {name.split()[0] for name in skipped} == {"2.weight", "2.bias", "extra.weight"}
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])
    assert torch.equal(model.state_dict()["2.weight"], head)


def test_matching_weights() -> None:
    state = make_model(3).state_dict()
    model = make_model(3)
    nn.init.zeros_(model[0].weight)  # type: ignore[index]
    assert load_weights(model, state, "some.pt") == []
    assert_equal(dict(model.state_dict()), dict(state))


def test_latest_valid_prefers_last(tmp_path: Path) -> None:
    assert latest_valid(tmp_path) is None
    save_checkpoint(tmp_path / "step_0000030.pt", make_checkpoint(30))
    latest = latest_valid(tmp_path)
    assert latest is not None
    assert (latest[0].name, latest[1]["step"]) == ("step_0000030.pt", 30)
    save_checkpoint(tmp_path / "last.pt", make_checkpoint(40))
    latest = latest_valid(tmp_path)
    assert latest is not None
    assert (latest[0].name, latest[1]["step"]) == ("last.pt", 40)


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_latest_valid_falls_back_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    save_checkpoint(tmp_path / "step_0000030.pt", make_checkpoint(30))
    save_checkpoint(tmp_path / "last.pt", make_checkpoint(40))
    if content is None:
        weight = make_model().state_dict()["0.weight"].numpy().tobytes()
        flip(tmp_path / "last.pt", (tmp_path / "last.pt").read_bytes().index(weight) + 3)
    else:
        (tmp_path / "last.pt").write_bytes(content)
    latest = latest_valid(tmp_path)
    assert latest is not None
    assert (latest[0].name, latest[1]["step"]) == ("step_0000030.pt", 30)
    output = capsys.readouterr().out
    assert output.startswith("warning: ")
    assert "last.pt" in output


def test_latest_valid_without_a_valid_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"")
    (tmp_path / "step_0000030.pt").write_bytes(b"x")
    assert latest_valid(tmp_path) is None
    # best.pt has no state of an optimizer, so that no resume takes it
    save_checkpoint(tmp_path / "best.pt", make_checkpoint(30))
    assert latest_valid(tmp_path) is None


def test_a_checkpoint_to_use_has_the_weights_of_the_ema() -> None:
    ema = make_model(5).state_dict()
    checkpoint = {
        **make_checkpoint(30),
        "ema": {"model": ema, "updates": 4},
        "optimizer": {"state": {0: torch.zeros(3)}},
        "scheduler": {"last_epoch": 30},
        "scaler": {},
        "rng": [],
        "evaluated": 30,
        "stale": 0,
        "config": "name: x",
        "metrics": {"segm/AP": 0.5},
    }
    exported = model_checkpoint(checkpoint)
    assert set(exported) == set(make_checkpoint(30)) - {"rng"}
    assert_equal(dict(exported["model"]), dict(ema))
    assert_equal(dict(model_checkpoint(make_checkpoint(30))["model"]), make_checkpoint(30)["model"])


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"segm/best_threshold": 0.25, "bbox/best_threshold": 0.5}, 0.25),
        ({"bbox/best_threshold": 0.5}, 0.5),
        ({"segm/best_threshold": -1.0}, None),  # no detection was correct
        ({"segm/best_threshold": float("nan")}, None),
        ({"segm/best_threshold": "0.5"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_the_best_threshold_of_a_checkpoint(metrics: Any, expected: float | None) -> None:
    assert best_threshold({"metrics": metrics}) == expected


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = make_model()
    weights = model.state_dict()
    weights["0.weight"] = weights["0.weight"].to(memory_format=torch.channels_last)
    weights["shared"] = weights["0.weight"]  # two names for the same memory
    weights["half"] = torch.arange(4, dtype=torch.bfloat16)
    metrics = {"segm/AP": 0.5, "loss": float("nan")}
    entries = {"step": 3, "config": "name: ü", "metrics": metrics, "categories": {"names": ["a"]}}
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, {"model": weights, "ema": None, **entries})
    loaded = load_checkpoint(path)
    assert_equal(dict(sorted(loaded.pop("model").items())), dict(sorted(weights.items())))
    assert loaded == {"format": 1, **entries, "metrics": {"segm/AP": 0.5}}
    assert list(tmp_path.iterdir()) == [path]
    # other programs read it, too
    assert set(safetensors.load_file(path)) == set(weights)

    whole = path.read_bytes()
    for content in (whole[:-5], whole[:40], b"", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"best\.safetensors: not a complete safetensors file"):
            load_checkpoint(path)
    path.write_bytes(safetensors.save({"a": torch.zeros(2)}))  # of another program
    with pytest.raises(UserError, match="not a maskseg checkpoint of format 1"):
        load_checkpoint(path)
    path.write_bytes(safetensors.save({"a": torch.zeros(2)}, {"maskseg": "{"}))
    with pytest.raises(UserError, match="the header is damaged"):
        load_checkpoint(path)


def test_safetensors_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    path = tmp_path / "best.safetensors"
    path.write_bytes(b"")
    needs = r"best\.safetensors needs the library safetensors: pip install -e '\.\[safetensors\]'"
    with pytest.raises(UserError, match=needs):
        load_checkpoint(path)
    with pytest.raises(UserError, match=needs):
        save_checkpoint(path, make_checkpoint(30))


@pytest.mark.parametrize("as_file", [False, True])
def test_latest_names_a_run_folder(tmp_path: Path, as_file: bool) -> None:
    run = tmp_path / "2026-11-28"
    run.mkdir()
    (run / "last.pt").write_bytes(b"")
    latest = tmp_path / "latest"
    if as_file:
        latest.write_text("2026-11-28\n")
    else:
        latest.symlink_to("2026-11-28")
    assert follow_latest(latest) == run
    assert checkpoint_path(latest) == run / "last.pt"
    (run / "best.pt").write_bytes(b"")
    assert checkpoint_path(latest) == run / "best.pt"
    latest.unlink()
    for text in ("absent", "../../etc", "", "x" * 5000):
        latest.write_text(text)
        assert follow_latest(latest) == latest
