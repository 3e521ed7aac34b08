"""The choice of the run folder, and the record of how a run was started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from made.states import build_state

import maskseg
from maskseg.engine.checkpoint import checkpoint_path, follow_latest, save_checkpoint
from maskseg.engine.run_folder import (
    choose,
    find_config_text,
    git_revision,
    make_folder,
    point_latest,
    record,
)
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def test_every_start_is_recorded(tmp_path: Path) -> None:
    for step in (0, 40):
        record(tmp_path, torch.device("cpu"), 2, step)
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert [s["from_step"] for s in starts] == [0, 40]
    for start in starts:
        assert (
            start["versions"]["torch"] == torch.__version__.split("+")[0]
            or start["versions"]["torch"] == torch.__version__
        )
        assert start["versions"]["maskseg"] == maskseg.__version__
        assert start["command"] == sys.argv
        assert (start["device"], start["processes"]) == ("cpu", 2)
    (tmp_path / "environment.json").write_text("[{")  # truncated
    record(tmp_path, torch.device("cpu"), 1, 0)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_the_version_of_a_source_tree_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_installed(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("maskseg.engine.run_folder.version", not_installed)
    record(tmp_path, torch.device("cpu"), 1, 0)
    (start,) = json.loads((tmp_path / "environment.json").read_text())
    assert start["versions"]["maskseg"] == maskseg.__version__


def test_the_revision_is_that_of_the_projects_repository(tmp_path: Path) -> None:
    assert git_revision(tmp_path) is None
    git(tmp_path, "init", "-q")
    (tmp_path / "file.txt").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    assert git_revision(tmp_path) == {
        "revision": git(tmp_path, "rev-parse", "HEAD"),
        "changed": False,
    }
    (tmp_path / "file.txt").write_text("2")
    assert git_revision(tmp_path) == {
        "revision": git(tmp_path, "rev-parse", "HEAD"),
        "changed": True,
    }
    (tmp_path / "inside").mkdir()
    # A package that is installed below another project's repository has no revision.
    assert git_revision(tmp_path / "inside") is None


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    # Guards against: trainer.resume=PATH with another run's run_dir overwrites its checkpoints.
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "last.pt", {"step": 3, "model": {}})
    trainer = Trainer(1, device="cpu", resume=str(tmp_path / "one" / "last.pt"))
    with pytest.raises(UserError, match="other already holds a run"):
        choose("x", str(tmp_path / "other"), trainer)
    new = choose("x", str(tmp_path / "new"), trainer)
    assert (new.path, new.resume_from) == (tmp_path / "new", tmp_path / "one" / "last.pt")
    assert choose("x", str(tmp_path / "one"), trainer).path == tmp_path / "one"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_folders_that_are_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even root cannot write to /proc."""
    with pytest.raises(
        UserError, match=r"run_dir=/proc/run: the folder cannot be made or written to"
    ):
        make_folder(Path("/proc/run"))
    with pytest.raises(UserError, match=r"/proc/last\.pt: the checkpoint could not be written"):
        save_checkpoint(Path("/proc/last.pt"), {"step": 1, "model": {}})
    # An existing folder of another user.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"cannot be made or written to \(not writable\)"):
        make_folder(tmp_path)


def test_runs_started_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "now")
    trainer = Trainer(1, device="cpu")
    chosen = [choose("x", None, trainer) for _ in range(3)]
    assert list(tmp_path.iterdir()) == []  # nothing is made before the checks of the run
    paths = [folder.make() for folder in chosen]
    assert [path.name for path in paths] == ["now", "now_1", "now_2"]
    for folder in chosen:
        folder.close()
    assert [list(path.iterdir()) for path in paths] == [[], [], []]


def test_two_runs_cannot_write_to_one_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for resume in (None, "auto"):
        trainer = Trainer(1, device="cpu", resume=resume)
        first = choose("x", str(run_dir), trainer)
        second = choose("x", str(run_dir), trainer)
        first.make()
        with pytest.raises(UserError, match=r"run_dir=.*run: another process is training there"):
            second.make()
        first.close()
    # The first run ends while the second one checks its data.
    second = choose("x", str(run_dir), Trainer(1, device="cpu", resume="auto"))
    save_checkpoint(run_dir / "last.pt", {"step": 3, "model": {}})
    with pytest.raises(UserError, match=r"run already holds a run"):
        second.make()


@pytest.mark.parametrize("resume", ["auto", "RUN", "RUN/last.pt"])
def test_a_run_is_resumed_by_one_process_at_a_time(tmp_path: Path, resume: str) -> None:
    save_checkpoint(tmp_path / "last.pt", build_state(steps=3).checkpoint())
    trainer = Trainer(1, device="cpu", resume=resume.replace("RUN", str(tmp_path)))
    first = choose("x", str(tmp_path), trainer)
    with pytest.raises(UserError, match="another process is training there"):
        choose("x", str(tmp_path), trainer)
    first.close()
    again = choose("x", str(tmp_path), trainer)
    assert again.make() == tmp_path
    assert again.resume_from == tmp_path / "last.pt"
    again.close()


@pytest.mark.parametrize("content", [b'{"a": 1}', b"3", b"\xff[]", b"[NaN]", b"[1e999]"])
def test_a_damaged_record_of_starts_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "environment.json").write_bytes(content)
    record(tmp_path, torch.device("cpu"), 1, 0)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def start(home: Path, run_dir: str | None = None, resume: str | None = None) -> Path:
    """Make the folder of a run of the experiment x."""
    folder = choose("x", run_dir, Trainer(max_steps=1, resume=resume))
    try:
        return home / folder.make()
    finally:
        folder.close()


def test_latest_is_the_run_that_was_started_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    latest = tmp_path / "runs" / "x" / "latest"
    first = start(tmp_path)
    assert latest.readlink() == Path(first.name)  # relative: the folders can be moved together
    second = start(tmp_path)
    assert latest.resolve() == second
    assert sorted(p.name for p in latest.parent.iterdir()) == sorted(
        [first.name, second.name, "latest"]
    )
    # a resumed run is the latest; one elsewhere has no link
    save_checkpoint(first / "last.pt", build_state().checkpoint())
    assert start(tmp_path, resume=str(first)) == first
    assert latest.resolve() == first
    start(tmp_path, run_dir="elsewhere")
    assert latest.resolve() == first
    assert not (tmp_path / "latest").exists()
    # `latest` itself is resumed in the folder that it names now
    assert start(tmp_path, resume="runs/x/latest") == first
    assert start(tmp_path, resume="runs/x/latest/last.pt") == first
    assert latest.readlink() == Path(first.name)
    assert start(tmp_path, resume="auto") == first


def test_latest_on_a_disk_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def no_links(*_: object, **__: object) -> None:
        raise OSError("links are not supported")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    latest = tmp_path / "runs" / "x" / "latest"
    for _ in range(2):
        run = start(tmp_path)
        assert latest.read_text() == f"{run.name}\n"
        assert follow_latest(latest) == run
        assert follow_latest(latest / "last.pt") == run / "last.pt"
    save_checkpoint(run / "last.pt", build_state().checkpoint())
    for name in ("latest", "latest/last.pt"):
        assert start(tmp_path, resume=f"runs/x/{name}") == run
    assert checkpoint_path(latest / "last.pt") == run / "last.pt"
    assert len(list(latest.parent.iterdir())) == 3  # no temporary file is left


def test_what_a_user_keeps_under_the_name_latest_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    latest = tmp_path / "runs" / "x" / "latest"
    latest.mkdir(parents=True)
    (latest / "notes.txt").write_text("mine")
    start(tmp_path)
    assert (latest / "notes.txt").read_text() == "mine"
    (latest / "notes.txt").unlink()
    latest.rmdir()
    latest.write_text("my notes")
    start(tmp_path)
    assert latest.read_text() == "my notes"


def test_runs_that_start_at_once_leave_one_link(
    tmp_path: Path,
) -> None:
    home = tmp_path / "runs"
    names = [f"run{i}" for i in range(8)]
    for name in names:
        (home / name).mkdir(parents=True)
    errors: list[BaseException] = []

    def point(name: str, process: int) -> None:
        try:
            for _ in range(20):
                point_latest(home, name, process)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=point, args=(n, i)) for i, n in enumerate(names)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        link = home / "latest"
        assert not link.is_symlink() or link.resolve().name in names
    assert errors == []
    assert (home / "latest").resolve().name in names
    assert sorted(p.name for p in home.iterdir()) == sorted([*names, "latest"])


def test_the_config_of_the_run_that_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config_text("auto", None) is None
    assert find_config_text("absent", None) is None
    for number, name in enumerate(("old", "new")):
        folder = Path("runs") / f"experiment {name}" / "time"
        folder.mkdir(parents=True)
        save_checkpoint(
            folder / "last.pt", {**build_state().checkpoint(), "config": f"name: {name}"}
        )
        os.utime(folder, (number, number))
    old = Path("runs/experiment old/time")
    new = Path("runs/experiment new/time")
    assert find_config_text("auto", None) == ("name: new", new)
    assert find_config_text("auto", str(old)) == ("name: old", old)
    assert find_config_text(str(old), None) == ("name: old", old)
    assert find_config_text(str(old / "last.pt"), None) == ("name: old", old)
    (new / "last.pt").rename(new / "step_0000002.pt")
    (new / "last.pt").write_bytes(b"half")
    assert find_config_text(str(new), None) == ("name: new", new)
