"""The process settings of the command-line tools."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from maskseg.cli import run
from maskseg.errors import UserError, describe_error

PAGES = """
import resource, ctypes, sys
from maskseg import cli
import torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(15):
    torch.ones(2**22)
before = faults()
for _ in range(10):
    torch.ones(2**22)
print(faults() - before)
"""


def page_faults(**environment: str) -> int:
    """Count the page faults of ten tensors of 16 MB, one after another, in a separate process."""
    plain = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MALLOC_", "GLIBC_", "THP_"))
    }
    process = subprocess.run(
        [sys.executable, "-c", PAGES],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(process.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_memory_is_kept_for_the_next_step() -> None:
    faults = page_faults()
    # A malloc that the environment configures is left unchanged.
    usual_faults = page_faults(MALLOC_MMAP_THRESHOLD_="1000000")
    assert usual_faults > 20
    assert faults < usual_faults / 10


def test_an_exception_without_a_text_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: list[str]) -> None:
        raise UserError("")

    assert run(fail, "", []) == 2
    assert capsys.readouterr().err == "error: UserError\n"
    assert describe_error(MemoryError()) == "MemoryError"
    assert describe_error(ValueError(" \n")) == "ValueError"
    assert describe_error(ValueError("one\ntwo")) == "one"
    assert describe_error(OSError(28, "No space left on device")) == "No space left on device"
