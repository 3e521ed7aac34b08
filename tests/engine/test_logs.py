"""The log of a run, read back with TensorBoard's reader."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from made.disk import REASON, full_at
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from maskseg.engine.logs import RunLog, peak_memory
from maskseg.engine.precision import pick_device
from maskseg.engine.run_folder import make_folder
from maskseg.errors import UserError


def board(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_scalars_images_curves_and_the_config(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 10, "name: a config")
    log.log_scalars(2, "train", {"loss": 0.5, "loss/mask": 0.25})
    log.log_scalars(2, "val", {"segm/AP": 0.125})
    log.log_image("worst", np.full((3000, 1500, 3), 200, dtype=np.uint8), 2)
    log.log_pr_curve("segm at IoU 0.50/cat", np.array([1.0, 0.75, 0.5]), 2)
    log.close()
    events = board(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss/mask")] == [(2, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("val/segm/AP")] == [(2, 0.125)]
    image = events.Images("worst")[0]
    assert (image.height, image.width) == (2000, 1000)
    text = tensor_util.make_ndarray(events.Tensors("config/text_summary")[0].tensor_proto)
    assert "name: a config" in str(text)
    curve = tensor_util.make_ndarray(events.Tensors("segm at IoU 0.50/cat")[0].tensor_proto)
    assert curve[4].tolist() == [0.5, 0.75, 1.0]  # precision in the order of falling recall
    assert curve[5].tolist() == [1.0, 0.5, 0.0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 2, "kind": "train", "loss": 0.5, "loss/mask": 0.25},
        {"step": 2, "kind": "val", "segm/AP": 0.125},
    ]


def test_a_resumed_run_drops_later_lines(tmp_path: Path) -> None:
    """Drops steps after the checkpoint, and an evaluation that the checkpoint does not contain."""
    entries = [(2, "train"), (2, "val"), (3, "skipped"), (4, "train"), (4, "val"), (5, "train")]
    text = "".join(json.dumps({"step": step, "kind": kind}) + "\n" for step, kind in entries)
    damaged = b'\xff{"step": 1, "kind": "train"}\n{"step": 6, "ki'  # by a power cut
    for last_eval_step, expected in ((4, entries[:5]), (2, entries[:4])):
        (tmp_path / "metrics.jsonl").write_bytes(text.encode() + damaged)
        RunLog(tmp_path, 4, 10, "", last_eval_step).close()
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(line["step"], line["kind"]) for line in lines] == expected


@pytest.mark.parametrize("text", ["a,b\n1,2\nno end", "step,class\n9,cat\n"])
def test_a_table_of_the_user_is_not_cut(tmp_path: Path, text: str) -> None:
    table = tmp_path / "per_class.csv"
    table.write_text(text)
    RunLog(tmp_path, 0, 10, "").close()
    assert table.read_text() == text
    RunLog(tmp_path, 0, 10, "").close()  # the rows of an earlier attempt of the run are
    assert table.read_text() == text.partition("\n")[0] + "\n"


def test_plain_lines_have_an_eta_and_other_ranks_print_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, 0, 100, "")
    log.started -= 60.0  # a minute for 25 steps
    log.progress(25, {"loss": 1.5}, show=True)
    log.close()
    quiet = RunLog(None, 0, 100, "")
    quiet.progress(25, {"loss": 1.5}, show=True)
    quiet.log_scalars(25, "train", {"loss": 1.5})
    quiet.print("a message of every rank")
    quiet.print("a message of this rank only", any_rank=True)
    quiet.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 25/100  loss 1.5  eta 03:00",
        "a message of this rank only",
    ]


def test_metrics_that_cannot_be_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 10, "")
    log.path = Path("/dev/full")
    with pytest.raises(
        UserError,
        match=r"^/dev/full: cannot be written to \(No space left on device\); "
        r"the checkpoints there are intact$",
    ):
        log.log_scalars(1, "train", {"loss": 1.0})
    log.close()


def test_a_full_disk_is_one_error_without_a_traceback_of_tensorboard(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Guards against: the traceback of TensorBoard's thread, and a failed close that replaces the
    # error of the run.
    hook = threading.excepthook
    image = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)

    def write(count: int, error: UserError | None = None) -> None:
        with RunLog(tmp_path, 0, 10, "") as log:
            for step in range(count):
                log.log_image("noise", image, step)
            if error is not None:
                raise error

    with full_at(20_000):
        for count in (1, 100):
            with pytest.raises(
                UserError, match=rf"metrics\.jsonl: cannot be written to \({REASON}\)"
            ):
                write(count)
        with pytest.raises(UserError, match="the first error"):
            write(1, UserError("the first error"))
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is hook


def test_a_full_disk_at_the_start(tmp_path: Path) -> None:
    for config in ("", "x" * 1000):
        with (
            full_at(0 if not config else 500),
            pytest.raises(UserError, match=rf"cannot be written to \({REASON}\)"),
            RunLog(make_folder(tmp_path / str(len(config))), 0, 10, config) as log,
        ):
            log.log_scalars(1, "train", {"loss": 1.0})


def test_errors_of_other_threads_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: reported.append(arguments))

    def fail() -> None:
        raise OSError("of another thread")

    with RunLog(tmp_path, 0, 10, ""):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert len(reported) == 1


def test_memory_is_that_of_the_process() -> None:
    assert 0.05 < peak_memory(pick_device("cpu")) < 50
