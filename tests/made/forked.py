"""Scripts in processes of their own, without the seconds that importing torch takes.

They are forked from a server that has imported it once (multiprocessing's `forkserver`). A forked
script has its own session, folder, environment, output, signals and exit code. Only variables that
are read at import, such as OMP_NUM_THREADS, are those of the server.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

# maskseg.cli first: it sets what torch reads when it is imported.
_PRELOADED = [
    "maskseg.cli",
    "maskseg.commands.train",
    "maskseg.commands.evaluate",
    "torch.utils.tensorboard",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


class ForkedScript:
    """A running Python script, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(
        self, command: Sequence[str], cwd: Path, environment: Mapping[str, str], output: Path
    ) -> None:
        """command: script and arguments; output: file to which stdout and stderr are appended."""
        arguments = (list(command), cwd, dict(environment), output)
        self._process = _context.Process(target=_run, args=arguments)
        imported_with = {name: environment[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS")}
        with mock.patch.dict(os.environ, imported_with):  # if the server is started by this
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, -n after signal n, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("a forked script", timeout or 0.0)
        return code

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()


class ForkedRanks:
    """The processes of a distributed run, with torchrun's environment but without its agent.

    Unlike torchrun it does not end the other ranks when one fails. `pid` is that of rank 0.
    """

    def __init__(
        self,
        ranks: int,
        command: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        output: Path,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.ranks: list[ForkedScript] = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank}
            sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            numbers = {name: str(value) for name, value in {**place, **sizes}.items()}
            scope = {**environment, **meeting, **numbers}
            self.ranks.append(ForkedScript(command, cwd, scope, output))
        self.pid = self.ranks[0].pid

    @property
    def returncode(self) -> int | None:
        """The first exit code that is not 0, else 0; None while a rank runs."""
        codes = [rank.returncode for rank in self.ranks]
        if None in codes:
            return None
        return next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        """See `returncode`."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of all. Raises TimeoutExpired after `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        for rank in self.ranks:
            rank.wait(None if end is None else max(end - time.monotonic(), 0.0))
        code = self.returncode
        assert code is not None
        return code

    def terminate(self) -> None:
        """Send SIGTERM to all."""
        for rank in self.ranks:
            rank.terminate()


def _run(command: Sequence[str], cwd: Path, environment: Mapping[str, str], output: Path) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # else it is forkserver in here, too
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = list(command)
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
