"""What every tool sets up before it starts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

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
    """Of ten tensors of 16 MB one after another, in a process of its own."""
    plain = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("MALLOC_", "GLIBC_", "THP_"))
    }
    told = subprocess.run(
        [sys.executable, "-c", PAGES],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(told.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is glibc's here alone")
def test_memory_is_kept_for_the_next_step() -> None:
    kept, usual = (
        page_faults(),
        page_faults(MALLOC_MMAP_THRESHOLD_="1000000"),
    )  # who sets malloc up means it
    assert usual > 20
    assert kept < usual / 10
