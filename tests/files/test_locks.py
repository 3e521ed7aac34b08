"""Locks between processes, within one process, and after a fork or a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskseg.files.locks import InUseError, lock, open_locked, release

HOLD = """
import sys, time
from pathlib import Path
from maskseg.files.locks import open_locked
file = open_locked(Path(sys.argv[1]), "in use")
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a process that holds a lock. Returns when it does."""
    command = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_lock_of_another_process_is_refused_until_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = hold(path, 60)
    with pytest.raises(InUseError, match=r"^taken$"):
        open_locked(path, "taken")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock(path, "taken"):
        assert path.exists()
    assert not path.exists()


def test_waiting_for_another_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    process = hold(path, 0.5)
    waits: list[str] = []
    start = time.monotonic()
    with lock(path, "taken", lambda: waits.append("waiting")):
        assert time.monotonic() - start > 0.2
    assert waits == ["waiting"]
    assert process.wait() == 0
    with lock(path, "taken", lambda: waits.append("again")):
        pass
    assert waits == ["waiting"]


def test_one_process_holds_a_lock_once(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    file = open_locked(path, "taken")
    with pytest.raises(InUseError):
        open_locked(path, "taken")
    release(file, path)
    release(file, path)  # a second call does nothing
    open_locked(path, "taken").close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    file = open_locked(path, "taken")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(reader, 1)  # until the parent has released the lock and taken it again
        os._exit(0)
    try:
        with pytest.raises(InUseError):  # the child's end does not release it
            open_locked(path, "taken")
        release(file, path)
        open_locked(path, "taken").close()
    finally:
        os.write(writer, b"x")
        os.waitpid(child, 0)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_locked(tmp_path / "no" / ".lock", "taken")
