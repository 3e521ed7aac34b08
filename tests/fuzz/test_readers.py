"""No content of a file makes its reader fail otherwise than documented.

`make fuzz` does the same with many more inputs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="limits of memory need a POSIX system")
pytest.importorskip("fastapi", reason="needs the extra demo")
pytest.importorskip("scipy", reason="needs the extra classic")
from fuzz import limits
from fuzz.limits import find_fault
from fuzz.readers import READERS, Reader
from hypothesis import HealthCheck, Phase, given, seed, settings
from made.runs import ROOT

from maskseg.errors import UserError

EXAMPLES = 25


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_hostile_files(reader: Reader, tmp_path: Path) -> None:
    number = 0

    @seed(0)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(reader.strategy())
    def run(data: bytes) -> None:
        nonlocal number
        number += 1
        folder = tmp_path / str(number)
        folder.mkdir()
        fault, _ = find_fault(reader, data, folder)
        assert fault is None, f"{fault.kind}\n{data[:2000]!r}\n{fault.detail}"

    run()
    assert number >= EXAMPLES


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_the_valid_files_are_valid(reader: Reader, tmp_path: Path) -> None:
    """The mutations of a file that is refused as a whole would test nothing."""
    accepted = 0
    for i, data in enumerate(reader.seeds()):
        (tmp_path / str(i)).mkdir()
        fault, is_refused = find_fault(reader, data, tmp_path / str(i))
        assert fault is None, fault.detail
        accepted += not is_refused
    assert accepted


def _fail(path: Path) -> None:
    data = path.read_bytes()
    if data == b"type":
        raise TypeError("x")
    if data == b"name":
        raise UserError("another file is damaged")
    if data == b"empty":
        raise UserError("")
    if data == b"memory":
        raise UserError(f"{path}: damaged") from MemoryError()
    if data == b"much":
        bytearray(b"x") * (3 * limits.MAX_BYTES)
    if data == b"slow":
        try:
            time.sleep(60)
        except Exception as error:
            raise UserError(f"{path}: damaged") from error
    raise UserError(f"{path}: damaged")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"type", "TypeError"),
        (b"name", "a message without the file's name"),
        (b"empty", "no message"),
        (b"memory", "bytes of memory"),
        (b"much", "MemoryError"),
        (b"slow", "more than 0.05 s"),
        (b"fine", None),
    ],
)
def test_faults_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, kind: str | None
) -> None:
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(limits, "MAX_BYTES", 2**28)
    fault, is_refused = find_fault(Reader("x", "x.bin", _fail, list), data, tmp_path)
    assert (fault is None) == (kind is None)
    if fault is not None and kind is not None:
        assert kind in fault.kind
    assert is_refused == (data in (b"name", b"empty", b"memory", b"fine"))


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "FUZZ_MINUTES": "0.1",
        "FUZZ_READERS": "RLE string,YAML",
        "FUZZ_FOLDER": str(tmp_path / "failures"),
    }
    run = subprocess.run(
        [sys.executable, "-m", "fuzz"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("RLE string", "YAML"):
        match = re.search(rf"{name} +(\d+) inputs +(\d+) refused +0 faults", run.stdout)
        assert match is not None
        assert int(match[1]) > int(match[2]) > 0
    assert not (tmp_path / "failures").exists()
