"""Handling of signals."""

from __future__ import annotations

import os
import signal

import pytest

from maskseg.engine.signals import Interrupts
from maskseg.errors import Interrupted


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_recorded_and_a_later_ctrl_c_interrupts(first: int) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert interrupts.signal is None
        os.kill(os.getpid(), first)
        assert interrupts.signal == first
        os.kill(
            os.getpid(), signal.SIGTERM
        )  # torchrun's SIGTERM after a Ctrl-C is no second request
        assert interrupts.signal == first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_signal_interrupts_work_that_need_not_be_finished() -> None:
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted) as raised, interrupts.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
        assert raised.value.code == 143
        with pytest.raises(Interrupted), interrupts.at_once():
            raise AssertionError("must not start: a signal has been received before")
