"""The process settings of the command-line tools."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

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


ENCODED = """
import sys
from maskseg import cli
tool = lambda _: print("\\xdcbung \\u8bad \\udcff")
sys.exit(cli.run(tool, "Hilfe f\\xfcr \\u8bad", sys.argv[1:]))
"""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_any_terminal_can_print_any_name(encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    for arguments in ([], ["--help"]):
        process = subprocess.run(
            [sys.executable, "-c", ENCODED, *arguments],
            env=environment,
            capture_output=True,
            check=False,
        )
        assert (process.returncode, process.stderr) == (0, b"")
        assert process.stdout


def test_a_reader_that_has_gone_is_no_error() -> None:
    # Guards against: `--help | head -1` prints a BrokenPipeError
    code = "from maskseg import cli; raise SystemExit(cli.run(print, 'help ' * 9999, ['--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (141, b"")


WITHOUT_UNIX = """
import importlib, os, pkgutil, signal, sys
import torch, torchvision, torch.utils.tensorboard, torch.distributed.run, hydra, matplotlib.figure
import matplotlib.backends.backend_agg, pycocotools.coco, scipy.io
for name in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[name] = None
for name in ("fork", "getuid", "register_at_fork", "sched_getaffinity", "uname", "killpg"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "alarm", "sigwaitinfo", "pthread_sigmask"):
    delattr(signal, name)
import maskseg
for module in pkgutil.walk_packages(maskseg.__path__, "maskseg."):
    try:
        importlib.import_module(module.name)
    except ImportError as error:
        if error.name in ("resource", "fcntl", "termios", "pwd", "grp"):
            raise
from maskseg import cli
from maskseg.errors import UserError
from maskseg.files.locks import lock
from pathlib import Path
for tool in sys.argv[1:]:
    assert cli.run_tool(tool, ["--help"]) == 0
    assert cli.run_tool(tool, ["no_such_key"]) == 2, tool
try:
    maskseg.load("no such run")
except UserError:
    print("loaded")
"""
TOOLS = sorted(path.stem for path in (Path(__file__).parents[1] / "tools").glob("*.py"))


def test_nothing_needs_a_module_of_unix() -> None:
    # Guards against: no tool starts on Windows
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX, *TOOLS], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("loaded\n")
    assert "Traceback" not in process.stderr
