"""Loader processes that die, hang or receive signals."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from maskseg import config as configs
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.scenes import make_scenes
from maskseg.data.loader import BatchLoader
from maskseg.errors import UserError


class Items(Dataset[Any]):
    """Numbers; at some of them, something happens in the process that reads them."""

    def __init__(self, happens: dict[int, Any], folder: Path) -> None:
        self.happens = happens
        self.folder = folder

    def __getitem__(self, item: int) -> Any:
        event = self.happens.get(item)
        if event == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if event == "hang":
            time.sleep(60)
        if event == "signals":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        if event == "bus error":
            os.kill(os.getpid(), signal.SIGBUS)
        if event == "no shared memory":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
            return torch.zeros(1_000_000)
        if event == "refuse":
            raise UserError("image 7.png: truncated")
        if event == "bug":
            raise RuntimeError("a bug")
        return item


def only(items: list[int]) -> int:
    return items[0]


def loader(
    folder: Path, happens: dict[int, Any], workers: int = 2, timeout: float = 30.0
) -> BatchLoader:
    return BatchLoader(
        "data.train_json=some.json",
        Items(happens, folder),
        [[i] for i in range(8)],
        only,
        workers,
        timeout,
    )  # type: ignore[arg-type,return-value]


def test_batches_arrive_in_order(tmp_path: Path) -> None:
    assert list(loader(tmp_path, {})) == list(range(8))
    assert len(loader(tmp_path, {})) == 8


def test_a_killed_worker_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data\.train_json=some\.json: loader worker 1 "
        r"\(process \d+, killed by SIGKILL\) died; out of memory\?",
    ) as raised:
        list(loader(tmp_path, {5: "die"}))
    assert "\n" not in str(raised.value)


def test_a_worker_that_hangs_is_named(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(
        UserError,
        match=r"some\.json: loader worker 1 has returned nothing for data\.timeout=1 seconds",
    ):
        list(loader(tmp_path, {5: "hang"}, timeout=1))
    assert time.monotonic() - began < 20


def test_workers_outlive_signals_so_that_the_step_can_be_finished(tmp_path: Path) -> None:
    assert list(loader(tmp_path, {3: "signals", 4: "signals"})) == list(range(8))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo")
def test_workers_outlive_a_sigterm_for_as_long_as_the_main_process_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskseg.data.loader._GRACE", 1)
    others = multiprocessing.active_children()
    batches = iter(loader(tmp_path, {}))
    first = next(batches)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(2)  # a slow step
    assert [first, *batches] == list(range(8))


@pytest.fixture(params=["fork", "forkserver"])
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the second one, the parent of a worker is not the main process."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.usefixtures("start_method")
def test_the_main_process_ends_a_worker_that_hangs(tmp_path: Path) -> None:
    others = multiprocessing.active_children()
    batches = iter(loader(tmp_path, {4: "hang"}))
    assert [next(batches), next(batches)] == [0, 1]  # both have started
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    began = time.monotonic()
    for worker in workers:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0
    assert time.monotonic() - began < 10
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_other_errors_are_unchanged(tmp_path: Path, workers: int) -> None:
    with pytest.raises(UserError) as refused:
        list(loader(tmp_path, {2: "refuse"}, workers))
    assert str(refused.value) == "image 7.png: truncated"
    with pytest.raises(RuntimeError, match="a bug"):
        list(loader(tmp_path, {2: "bug"}, workers))


@pytest.mark.parametrize("event", ["bus error", "no shared memory"])
def test_a_small_shared_memory_is_named(tmp_path: Path, event: str) -> None:
    # Guards against: torch's thread prints the error and loses the batch, for which the main
    # process waits until data.timeout.
    with pytest.raises(
        UserError, match=r"no shared memory left: make /dev/shm larger .*data\.num_workers=0"
    ) as raised:
        list(loader(tmp_path, {5: event}))
    assert "\n" not in str(raised.value)


def test_what_loader_processes_get_can_be_pickled(tmp_path: Path) -> None:
    # Guards against: loader processes that are spawned, as on macOS and Windows, cannot start
    make_scenes(tmp_path / "scenes", num_train=2, num_val=2, size=128, num_workers=0)
    overrides = [f"data.root={tmp_path / 'scenes'}", "data.num_workers=1"]
    sizes = ["data.num_train=2", "data.num_val=2", "data.size=128"]
    source = configs.build_source(configs.compose("train", [*overrides, *sizes]).data)
    assert isinstance(source, CocoSource)
    for built in (source.test_loader("val", 2), source.train_loader(2, 1, 0)):
        assert isinstance(built, BatchLoader)
        loader = built.loader
        parts = (loader.dataset, loader.collate_fn, loader.worker_init_fn)
        dataset, collate, _ = pickle.loads(pickle.dumps(parts))
        items = next(iter(loader.batch_sampler))
        batch = collate([dataset[item] for item in items]).unpack()
        expected = loader.collate_fn([loader.dataset[item] for item in items]).unpack()
        assert torch.equal(batch.images, expected.images)
        assert batch.file_names == expected.file_names
