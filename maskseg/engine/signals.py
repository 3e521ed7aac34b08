"""Handling of SIGTERM and Ctrl-C: the current step is finished and saved first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from maskseg.errors import Interrupted

# The context that handles signals now, because handlers belong to the whole process.
_active: list[Interrupts] = []

Handler = Callable[[int, FrameType | None], object] | int | None  # what `signal.signal` returns


class Interrupts:
    """Context in which SIGTERM and the first Ctrl-C are recorded instead of ending the process.

    SIGTERM is sent by cluster schedulers and by torchrun. A Ctrl-C after either signal raises
    KeyboardInterrupt at once.

    signal: number of the first signal that was received, else None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._immediate = False
        self._previous_handlers: dict[int, Handler] = {}

    def __enter__(self) -> Interrupts:
        # Python allows signal handlers to be set in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous_handlers[number] = signal.signal(number, self._handle)
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            name = signal.Signals(number).name
            # print() is not reentrant, and the signal may have interrupted one.
            os.write(2, f"\n{name}: finishing and saving the current step\n".encode())
        self.check()

    def check(self) -> None:
        """Raise Interrupted in work that need not be finished, if a signal was received."""
        if self._immediate and self.signal is not None:
            raise Interrupted(self.signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Context in which a signal raises Interrupted, for work that need not be finished.

        Python ignores an exception that a signal handler raises inside some callbacks, for example
        while a process is started. Long work therefore also calls `check_interrupted`.
        """
        if self.signal is not None:
            raise Interrupted(self.signal)
        self._immediate = True
        try:
            yield
        finally:
            self._immediate = False


def check_interrupted() -> None:
    """Raise Interrupted inside `Interrupts.at_once` if a signal was received."""
    for interrupts in _active:
        interrupts.check()
