"""Signals that are remembered, and when one leaves at once."""

from __future__ import annotations

import os
import signal

import pytest

from maskseg.engine.signals import Interrupts
from maskseg.errors import Interrupted


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_is_remembered_and_a_ctrl_c_after_it_leaves_at_once(first: int) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert interrupts.signal is None
        os.kill(os.getpid(), first)
        assert interrupts.signal == first
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, after the terminal's: no second wish
        assert interrupts.signal == first
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_what_may_be_cut_short_is() -> None:
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted) as raised, interrupts.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
        assert raised.value.code == 143
        with pytest.raises(Interrupted), interrupts.at_once():
            raise AssertionError("not begun: a signal has come before")
