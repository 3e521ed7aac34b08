"""Tools that serve a page, in separate processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from made.runs import ROOT


class Server:
    """A running tool. address: URL of its page."""

    def __init__(self, process: subprocess.Popen[str], said: Path) -> None:
        self.process = process
        self.said = said
        end = time.monotonic() + 120
        while not (match := re.search(r"http://\S+", said.read_text())):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < end, said.read_text()
            time.sleep(0.05)
        self.address = match[0]

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def served(tool: str, *words: str, cwd: Path) -> Iterator[Server]:
    """Run a tool that serves at a free port, until the context ends."""
    said = cwd / "said.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *words, "port=0"]
    with said.open("w") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
    try:
        yield Server(process, said)
    finally:
        process.kill()
        process.wait()
