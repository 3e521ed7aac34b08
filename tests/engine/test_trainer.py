"""The training loop with a small model: exact resume, checkpoints, logs, evaluation, learning."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made.disk import REASON, full_at
from made.runs import assert_equal
from made.training import (
    RANDOM,
    Killed,
    Run,
    Scripted,
    assert_same_run,
    log,
    make_model,
    make_source,
    validation,
    write_scenes,
)
from torch import nn

from maskseg.data.datasets.coco import CocoSource
from maskseg.engine.checkpoint import latest_valid, load_checkpoint
from maskseg.engine.precision import pick_device
from maskseg.engine.schedules import cosine
from maskseg.engine.state_checks import check_training_state
from maskseg.engine.trainer import Trainer
from maskseg.errors import Interrupted, UserError
from maskseg.inference.validation import Validation
from maskseg.structures import Batch


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 5)
    return folder


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of six steps without interruption."""
    run = Run(make_source(scenes, RANDOM), tmp_path_factory.mktemp("whole"))
    run.go()
    return run


def test_the_files_of_a_run(whole: Run) -> None:
    checkpoint = load_checkpoint(whole.folder / "last.pt")
    assert checkpoint["step"] == 6
    assert checkpoint["config"] == "name: test"
    assert checkpoint["categories"] == {"names": ["a", "b"], "ids": [1, 2]}
    assert not (whole.folder / "best.pt").exists()  # nothing was evaluated
    lines = log(whole.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    terms = [
        "loss/rpn_objectness",
        "loss/rpn_box",
        "loss/box_class",
        "loss/box_regression",
        "loss/mask",
    ]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
    assert any((whole.folder / "tensorboard").iterdir())
    start = make_model().state_dict()
    moved = [k for k, v in whole.model.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) > 0.9 * len(start)


def test_the_logged_rate_is_the_one_of_the_step(whole: Run) -> None:
    # Guards against: step k is logged with the rate of step k + 1, as the schedule has advanced.
    factor = whole.scheduler.lr_lambdas[0]  # type: ignore[attr-defined]
    assert [line["lr"] for line in log(whole.folder)] == pytest.approx(
        [0.01 * factor(step) for step in range(6)]
    )


def test_the_same_seed_twice_is_equal_bit_for_bit(whole: Run, tmp_path: Path) -> None:
    torch.manual_seed(99)
    again = Run(whole.source, tmp_path)
    again.go()
    assert_same_run(whole, again)


def test_another_seed_is_another_run(whole: Run, tmp_path: Path) -> None:
    other = Run(whole.source, tmp_path, seed=1, steps=1)
    other.go()
    assert log(other.folder)[0]["loss"] != log(whole.folder)[0]["loss"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_equals_an_uninterrupted_run(
    whole: Run, scenes: Path, tmp_path: Path, workers: int, stop: int
) -> None:
    """Weights, optimizer, schedule, random state and logged losses are equal bit for bit.

    The run stops in the middle of an epoch of 5 images (batches of 2). With stop=4 it ends one step
    after its last checkpoint, so that a step is repeated.
    """
    # Guards against: the iterator of a DataLoader consumes torch's global random state, which the
    # resume has just restored.
    source = make_source(scenes, RANDOM, num_workers=workers)
    first = Run(source, tmp_path, checkpoint_every=3)
    with pytest.raises(Killed):
        first.go(stop=stop)
    latest = latest_valid(tmp_path)
    assert latest is not None
    assert latest[1]["step"] == 3
    torch.manual_seed(1234)
    second = Run(source, tmp_path, seed=0)
    nn.init.zeros_(next(second.model.backbone.parameters()))
    second.go(latest[1])
    assert_same_run(whole, second)


def test_resuming_a_finished_run_does_nothing(whole: Run, tmp_path: Path) -> None:
    run = Run(whole.source, tmp_path)
    run.go(load_checkpoint(whole.folder / "last.pt"))
    assert_equal(dict(run.model.state_dict()), dict(whole.model.state_dict()))
    assert log(tmp_path) == []


def test_a_longer_run_resumes_a_shorter_one(whole: Run, tmp_path: Path) -> None:
    short = Run(whole.source, tmp_path, steps=4)
    short.go()
    long = Run(whole.source, tmp_path)
    long.go(load_checkpoint(tmp_path / "last.pt"))
    assert_same_run(whole, long)


def test_each_step_is_logged_once_after_a_resume(whole: Run, tmp_path: Path) -> None:
    first = Run(whole.source, tmp_path, checkpoint_every=2)
    with pytest.raises(Killed):
        first.go(stop=5)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "kind": "tr')  # a kill in the middle of a line
    latest = latest_valid(tmp_path)
    assert latest is not None
    assert latest[1]["step"] == 4
    Run(whole.source, tmp_path).go(latest[1])
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert log(tmp_path) == log(whole.folder)


def test_the_log_interval(scenes: Path, tmp_path: Path) -> None:
    Run(make_source(scenes), tmp_path, steps=5, log_every=2).go()
    assert [line["step"] for line in log(tmp_path)] == [2, 4, 5]


def test_an_evaluation_does_not_affect_training(whole: Run, scenes: Path, tmp_path: Path) -> None:
    source = make_source(scenes, RANDOM)
    check = validation(source)
    run = Run(source, tmp_path, evaluate_every=2)
    careless = Scripted(0.1, 0.2, 0.3)

    def evaluate(model: nn.Module, step: int, log: Any) -> dict[str, float]:
        return check(model, step, log) | careless(model, step, log)

    run.go(evaluate=evaluate)
    assert careless.steps == [2, 4, 6]
    assert log(tmp_path) == log(whole.folder)
    assert_equal(dict(run.model.state_dict()), dict(whole.model.state_dict()))
    assert_equal(run.optimizer.state_dict(), whole.optimizer.state_dict())


def test_best_and_last(scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "best.safetensors").write_bytes(b"of a process with trainer.safetensors=true")
    run = Run(make_source(scenes), tmp_path, evaluate_every=1, steps=4)
    evaluate = Scripted(0.2, 0.5, 0.4, 0.5)
    metrics = run.go(evaluate=evaluate)
    assert metrics == {"segm/AP": 0.5, "loss": 1.5}
    assert not (tmp_path / "best.safetensors").exists()  # it would be older than best.pt
    best = load_checkpoint(tmp_path / "best.pt")
    last = load_checkpoint(tmp_path / "last.pt")
    assert (best["step"], best["best"], best["metrics"]["segm/AP"]) == (2, 0.5, 0.5)
    assert set(best) == {"format", "model", "step", "best", "metrics", "config", "categories"}
    size = (tmp_path / "best.pt").stat().st_size
    # The optimizer has one value of momentum for each weight.
    assert size < 0.6 * (tmp_path / "last.pt").stat().st_size
    with pytest.raises(UserError, match=r"best\.pt: the checkpoint has no state of an optimizer"):
        check_training_state(best, tmp_path / "best.pt")
    assert (last["step"], last["best"]) == (4, 0.5)
    assert [line["segm/AP"] for line in log(tmp_path, "val")] == [0.2, 0.5, 0.4, 0.5]
    resumed = Run(run.source, tmp_path, evaluate_every=1, steps=6)
    resumed.go(last, Scripted(0.3, 0.45))
    # The best of the whole run, not of its second half.
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2
    assert [line["step"] for line in log(tmp_path, "val")] == [1, 2, 3, 4, 5, 6]


def test_a_missing_best_metric_is_reported(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(make_source(scenes), tmp_path, steps=1).go(evaluate=Scripted(0.3, key="bbox/AP"))
    assert "trainer.best_metric='segm/AP' is not among the metrics" in capsys.readouterr().out
    assert not (tmp_path / "best.pt").exists()
    assert (tmp_path / "last.pt").exists()


def test_a_checkpoint_is_saved_before_the_evaluation(scenes: Path, tmp_path: Path) -> None:
    def broken(*_: Any) -> dict[str, float]:
        raise Killed

    with pytest.raises(Killed):
        Run(make_source(scenes), tmp_path, steps=2).go(evaluate=broken)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


class SignalInDestructor:
    """Sends SIGTERM where Python ignores exceptions, as in callbacks while a process is started."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", ["callback", "batch", "last batch"])
def test_a_signal_stops_an_evaluation_between_batches(
    scenes: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Guards against: the exception of the signal handler is lost, and the evaluation goes on.
    source = make_source(scenes, RANDOM)
    read: list[int] = []

    def batches() -> Iterator[Batch]:
        for i, batch in enumerate(source.test_loader("val", 1)):
            read.append(i)
            if i == (4 if place == "last batch" else 1):
                if place == "batch":
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    SignalInDestructor()
            yield batch

    check = Validation(batches, lambda: source.val.to_dict(), source.categories)
    run = Run(source, tmp_path, steps=3, evaluate_every=2)
    with pytest.raises(Interrupted) as raised:
        run.go(evaluate=check)
    assert raised.value.code == 143
    assert len(read) == (5 if place == "last batch" else 2)
    assert "stopped in the evaluation, saved at step 2" in capsys.readouterr().out
    assert log(tmp_path, "val") == []
    checkpoint = load_checkpoint(tmp_path / "last.pt")
    assert (checkpoint["step"], checkpoint["evaluated"]) == (2, 0)
    again = Run(source, tmp_path, steps=3, evaluate_every=2)
    again.go(checkpoint, Scripted(0.1, 0.2))
    assert [line["step"] for line in log(tmp_path, "val")] == [2, 3]


def damaged(folder: Path) -> CocoSource:
    """The scenes, with two of five images truncated after the data check."""
    write_scenes(folder, 5)
    source = make_source(folder, skip_bad=50)
    _ = source.train
    for i in (2, 4):
        (folder / "images" / f"{i}.png").write_bytes(b"\x89PNG\r\n")
    return source


def test_skipped_images_are_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(damaged(tmp_path / "data"), tmp_path / "run", steps=3, skip_bad=10)
    run.go()
    output = capsys.readouterr().out
    assert "warning: image skipped (1 of at most 10)" in output
    assert "warning: image skipped (2 of at most 10)" in output
    assert "2.png" in output or "4.png" in output


def test_an_unreadable_image_is_counted_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(damaged(tmp_path / "data"), tmp_path / "run", steps=12, skip_bad=2)  # five epochs
    run.go()
    assert capsys.readouterr().out.count("warning: image skipped") == 2


def test_too_many_skipped_images_stop_the_run(tmp_path: Path) -> None:
    run = Run(damaged(tmp_path / "data"), tmp_path / "run", steps=40, skip_bad=1)
    with pytest.raises(
        UserError, match=r"more than data\.skip_bad=1 images cannot be read, the last: .*[24]\.png"
    ):
        run.go()
    assert len(log(tmp_path / "run")) < 10


def test_bf16_runs_and_keeps_the_weights_in_fp32(whole: Run, tmp_path: Path) -> None:
    run = Run(whole.source, tmp_path, precision="bf16", steps=2)
    run.go()
    assert {v.dtype for v in run.model.state_dict().values()} == {torch.float32, torch.int64}
    loss = log(tmp_path)[0]["loss"]
    expected = log(whole.folder)[0]["loss"]
    assert loss != expected
    assert loss == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"precision": "fp8"}, r"trainer\.precision must be one of fp32, bf16, fp16, not 'fp8'"),
        (
            {"accumulate_grad_batches": 0},
            r"trainer\.accumulate_grad_batches=0: expected a whole number from 1",
        ),
        ({"ema": 1.0}, r"trainer\.ema=1\.0: expected a number of at least 0 and below 1"),
        ({"keep_checkpoints": -1}, r"trainer\.keep_checkpoints=-1: expected a whole number from 0"),
        ({"device": "cuda:99"}, r"trainer\.device=cuda:99"),
        ({"device": "gpu"}, r"trainer\.device=gpu"),
        (
            {"distributed_timeout": 0},
            r"trainer\.distributed_timeout=0: expected a number from 1 to 604800",
        ),
        ({"max_steps": 0}, r"trainer\.max_steps=0: expected a whole number from 1"),
    ],
)
def test_invalid_settings(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        Trainer(**({"max_steps": 1, "device": "cpu"} | keys))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["xpu", "meta", "cpu:x", "cuda:-1", "", "CPU", "gpu", "mps:0"])
def test_devices_that_do_not_exist(name: str) -> None:
    with pytest.raises(UserError, match=rf"^device={name}: expected auto, cpu, cuda, .* or mps$"):
        pick_device(name, "device")


def test_mps_is_tried_where_torch_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^trainer\.device=mps: .* no MPS device$"):
        pick_device("mps")
    if not torch.backends.mps.is_built():
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        with pytest.raises(UserError, match=r"^trainer\.device=mps: [^\n]*$"):
            pick_device("mps")


def test_the_available_device() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_clipped(scenes: Path, tmp_path: Path, clip: float) -> None:
    run = Run(make_source(scenes), tmp_path, steps=1, clip_norm=clip)
    run.go()
    norm = (
        torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None])
        .norm()
        .item()
    )
    assert norm == pytest.approx(1e-3, rel=1e-3) if clip else norm > 0.1


def test_channels_last_changes_only_the_layout(scenes: Path, tmp_path: Path) -> None:
    losses = {}
    for flag in (True, False):
        run = Run(make_source(scenes), tmp_path / str(flag), steps=1, channels_last=flag)
        weight = run.model.backbone.trunk.layer1[0].conv1.weight  # type: ignore[union-attr,index]
        assert weight.is_contiguous(memory_format=torch.channels_last) is flag
        run.go()
        losses[flag] = log(tmp_path / str(flag))[0]["loss"]
    assert losses[True] == pytest.approx(losses[False], rel=2e-3)


def test_a_data_set_without_a_single_object_trains(tmp_path: Path) -> None:
    content = json.loads(Path(write_scenes(tmp_path, 3)).read_text())
    (tmp_path / "data.json").write_text(json.dumps({**content, "annotations": []}))
    Run(make_source(tmp_path), tmp_path / "run", steps=2).go()
    assert all(np.isfinite(line["loss"]) for line in log(tmp_path / "run"))


def test_a_model_overfits_a_few_scenes(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3)
    source = make_source(tmp_path)
    steps = 55
    run = Run(source, tmp_path / "run", steps=steps, batch=3, log_every=20)
    run.optimizer.param_groups[0]["lr"] = 0.02
    run.optimizer.param_groups[0].pop("initial_lr")
    run.scheduler = cosine(run.optimizer, steps, warmup_steps=10, warmup_factor=0.1)  # type: ignore[assignment]
    metrics = run.go(evaluate=validation(source))
    assert metrics["segm/AP50"] >= 0.9
    assert metrics["bbox/AP50"] >= 0.9
    assert metrics["segm/AP"] >= 0.4
    untrained = validation(source)(make_model(), 0)
    assert untrained["segm/AP50"] < 0.1


def test_a_failed_report_does_not_end_the_training(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def report() -> None:
        raise UserError("image 3 is missing")

    run = Run(make_source(scenes), tmp_path, steps=2, evaluate_every=1)
    run.go(evaluate=Scripted(0.1, 0.2), report=report)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2
    assert capsys.readouterr().out.count("could not be drawn (image 3 is missing)") == 2


def test_a_disk_that_fills_during_training_is_one_error(
    scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(make_source(scenes), tmp_path, steps=40)
    with (
        full_at(1200),
        pytest.raises(UserError, match=rf"/metrics\.jsonl: cannot be written to \({REASON}\)"),
    ):
        run.go()
    assert 1 <= len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) < 40
    assert "Traceback" not in capfd.readouterr().err


def test_a_best_checkpoint_of_an_abandoned_branch_is_renamed(scenes: Path, tmp_path: Path) -> None:
    # Guards against: a run that resumes an older checkpoint overwrites a later, better best.pt.
    Run(make_source(scenes), tmp_path, steps=4, evaluate_every=1, keep_checkpoints=9).go(
        evaluate=Scripted(0.1, 0.2, 0.3, 0.9)
    )
    back = Run(make_source(scenes), tmp_path, steps=3, evaluate_every=1, keep_checkpoints=9)
    back.go(load_checkpoint(tmp_path / "step_0000002.pt"), Scripted(0.25))
    assert load_checkpoint(tmp_path / "best_0000004.pt")["best"] == 0.9
    assert (
        load_checkpoint(tmp_path / "best.pt")["step"],
        load_checkpoint(tmp_path / "best.pt")["best"],
    ) == (3, 0.25)


def test_resuming_in_a_new_folder_writes_a_best_checkpoint(scenes: Path, tmp_path: Path) -> None:
    Run(make_source(scenes), tmp_path / "a", steps=2, evaluate_every=1).go(
        evaluate=Scripted(0.5, 0.4)
    )
    Run(make_source(scenes), tmp_path / "b", steps=3, evaluate_every=1).go(
        load_checkpoint(tmp_path / "a" / "last.pt"), Scripted(0.3)
    )
    assert load_checkpoint(tmp_path / "b" / "best.pt")["step"] == 3


def test_a_checkpoint_of_weights_cannot_be_resumed(scenes: Path, tmp_path: Path) -> None:
    run = Run(make_source(scenes), tmp_path)
    with pytest.raises(
        UserError,
        match=r"a\.pt: the checkpoint has no state of an optimizer .*: trainer\.resume takes the "
        r"run folder or its last\.pt; trainer\.init=\.\.\. starts a new run from these weights$",
    ):
        check_training_state({"model": run.model.state_dict(), "step": 0}, "a.pt")
