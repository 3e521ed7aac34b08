"""Process pools: results, errors and signals."""

from __future__ import annotations

import os
import signal

import pytest

from maskseg.data.process_pool import describe_differences, run_pool, sigterm_as_exception
from maskseg.errors import Interrupted, UserError


def test_differences_of_both_sides_are_described() -> None:
    assert describe_differences({"a": 1, "b": [2]}, {"a": 1, "b": [2]}) == ""
    assert (
        describe_differences({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": "2", "d": 4})
        == "b=2 there, '2' here; c=3 there, None here; d=None there, 4 here"
    )


def test_all_results_arrive_and_jobs_are_taken_as_needed() -> None:
    taken: list[int] = []
    results = run_pool(abs, (taken.append(n) or -n for n in range(30)), 2)
    first = next(results)
    assert len(taken) <= 4 * 2
    assert sorted([first, *results]) == list(range(30))


def test_a_worker_that_dies_is_reported() -> None:
    with pytest.raises(UserError, match="a worker process has died"):
        list(run_pool(os._exit, [1], 1))


def test_sigterm_raises_and_the_old_handler_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), sigterm_as_exception():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
