"""SIGTERM and Ctrl-C: the step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from maskseg.errors import Interrupted


class Interrupts:
    """While it is entered, SIGTERM (a cluster's, torchrun's) and the first Ctrl-C are remembered instead of ending the process.

    A Ctrl-C after either leaves at once. signal: the number of the one that came, else None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            # Not print(): the signal may have come in the middle of one.
            os.write(
                2,
                f"\n{signal.Signals(number).name}: the step is finished and saved first\n".encode(),
            )
        if self._at_once:
            raise Interrupted(self.signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """For what may be cut short, as everything is saved: a signal raises Interrupted."""
        if self.signal is not None:
            raise Interrupted(self.signal)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
