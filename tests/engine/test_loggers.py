"""Loggers: names, files that a resumed run continues, and services by stand-ins."""

from __future__ import annotations

import csv
import inspect
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams_metadata

from maskseg.engine import loggers
from maskseg.engine.logs import RunLog
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError

CONFIG = (
    "name: scenes\noptimizer:\n  lr: 0.001\n  betas: [0.9, 0.99]\nrun_dir: null\nref: ${name}\n"
)
IMAGE = np.full((8, 6, 3), 200, dtype=np.uint8)


def rows(run: Path, name: str = "results.csv") -> list[dict[str, str]]:
    with (run / name).open(newline="") as file:
        return list(csv.DictReader(file))


def board(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_every_value_has_one_of_four_groups() -> None:
    train = {"loss": 2.0, "loss/mask": 1.0, "lr": 0.1, "grad_norm": 3.0, "memory_gb": 1.5}
    assert loggers.select_scalars("train", train) == {
        "train/loss": 2.0,
        "train/loss/mask": 1.0,
        "lr/learning_rate": 0.1,
        "train/grad_norm": 3.0,
        "sys/memory_gb": 1.5,
    }
    val = {"segm/AP": 0.5, "segm/APs": -1.0, "loss": -1.0}
    # -1 of an absent size is no value, a loss of -1 is one
    assert loggers.select_scalars("val", val) == {"val/segm/AP": 0.5, "val/loss": -1.0}
    per_class = {"segm": {"cat": 0.25, "salt/pepper": 0.5, "dog": -1.0}}
    assert loggers.select_class_scalars(per_class) == {
        "classes/segm_AP/cat": 0.25,
        "classes/segm_AP/salt_pepper": 0.5,
    }


def test_tensorboard_has_the_hyperparameters_with_the_metrics(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 10, CONFIG) as log:
        log.log_scalars(2, "val", {"segm/AP": 0.25, "segm/APs": -1.0})
        log.log_scalars(4, "val", {"segm/AP": 0.5, "segm/APs": -1.0})
        log.log_classes(4, {"segm": {"cat": 0.75, "dog": -1.0}}, {"cat": 3, "dog": 0})
    events = board(tmp_path)
    tags = set(events.Tags()["scalars"])
    assert tags == {"val/segm/AP", "classes/segm_AP/cat"}
    content = events.SummaryMetadata(hparams_metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = hparams_metadata.parse_session_start_info_plugin_data(content)
    values = dict(start.hparams.items())
    assert values["optimizer.lr"].number_value == 0.001
    assert values["optimizer.betas"].string_value == "[0.9, 0.99]"
    assert set(values) == {"name", "optimizer.lr", "optimizer.betas"}
    content = events.SummaryMetadata(hparams_metadata.EXPERIMENT_TAG).plugin_data.content
    experiment = hparams_metadata.parse_experiment_plugin_data(content)
    assert [info.name.tag for info in experiment.metric_infos] == ["val/segm/AP"]
    # the tab shows the last value of the tag
    assert [(e.step, e.value) for e in events.Scalars("val/segm/AP")][-1] == (4, 0.5)


def test_the_table_of_results(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 10, "", loggers=["csv"]) as log:
        log.log_scalars(2, "train", {"loss": 0.123456789, "lr": 1e-5})
        assert rows(tmp_path) == [
            {"step": "2", "train/loss": "0.123457", "lr/learning_rate": "1e-05"}
        ]
        log.log_scalars(4, "train", {"loss": 0.5, "lr": 1e-5})
        log.log_scalars(4, "val", {"segm/AP": 0.25, "segm/APs": -1.0})
        log.log_scalars(6, "train", {"loss": 0.25, "lr": 1e-5})
        log.log_scalars(6, "val", {"segm/AP": 0.5, "segm/APs": -1.0})
    assert not (tmp_path / "tensorboard").exists()
    assert [list(row.values()) for row in rows(tmp_path)] == [
        ["2", "0.123457", "1e-05", ""],
        ["4", "0.5", "1e-05", "0.25"],
        ["6", "0.25", "1e-05", "0.5"],
    ]


@pytest.mark.parametrize("last_eval_step", [4, 2])
def test_a_killed_and_resumed_run_has_no_step_twice(tmp_path: Path, last_eval_step: int) -> None:
    """The run is killed after step 6 and resumed from step 4, with or without its evaluation."""

    def go(log: RunLog, first: int, last: int) -> None:
        for step in range(first, last + 1):
            log.log_scalars(step, "train", {"loss": float(step)})
            if step % 2 == 0:
                evaluate(log, step)

    def evaluate(log: RunLog, step: int) -> None:
        log.log_scalars(step, "val", {"segm/AP": step / 10})
        log.log_classes(step, {"segm": {"cat": step / 10}}, {"cat": step})
        log.log_image("worst", IMAGE, step)

    killed = RunLog(tmp_path, 0, 8, CONFIG, loggers=loggers.DEFAULT_LOGGERS)
    go(killed, 1, 6)
    for logger in killed.loggers.values():
        if isinstance(logger, loggers.TensorBoardLogger):
            logger.writer.flush()
    with (tmp_path / "results.csv").open("a") as file:
        file.write("7,0.1")  # a row that a power failure has cut
    with (tmp_path / "per_class.csv").open("a") as file:
        file.write("6,ca")
    with RunLog(tmp_path, 4, 8, CONFIG, last_eval_step, loggers.DEFAULT_LOGGERS) as log:
        if last_eval_step < 4:
            evaluate(log, 4)
        go(log, 5, 8)
    killed.close()

    steps = list(range(1, 9))
    evaluated = [2, 4, 6, 8]
    assert [int(row["step"]) for row in rows(tmp_path)] == steps
    assert [row["train/loss"] for row in rows(tmp_path)] == [str(step) for step in steps]
    assert [row["step"] for row in rows(tmp_path) if row["val/segm/AP"]] == list("2468")
    assert [(r["step"], r["class"], r["objects"]) for r in rows(tmp_path, "per_class.csv")] == [
        (str(step), "cat", str(step)) for step in evaluated
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["step"] for line in lines if line["kind"] == "train") == steps
    assert [line["step"] for line in lines if line["kind"] == "val"] == evaluated
    events = board(tmp_path)
    assert [e.step for e in events.Scalars("train/loss")] == steps
    assert [e.step for e in events.Scalars("val/segm/AP")] == evaluated
    assert [e.step for e in events.Scalars("classes/segm_AP/cat")] == evaluated
    assert [e.step for e in events.Images("worst")] == evaluated


def test_names_that_are_no_loggers_and_libraries_that_are_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        UserError, match=r"trainer\.loggers: 'tensorbord' is not one of tensorboard"
    ):
        Trainer(max_steps=1, loggers=["tensorbord"])  # type: ignore[list-item]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for name in ("wandb", "mlflow", "trackio"):
        with pytest.raises(
            UserError, match=rf"{name} needs the library {name}: pip install -e '\.\["
        ):
            Trainer(max_steps=1, loggers=[name])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"trainer\.safetensors needs the library safetensors"):
        Trainer(max_steps=1, safetensors=True)


# Stand-ins with the signatures of the libraries; each records its calls.


class Calls(list[tuple[str, dict[str, Any]]]):
    """The calls of a stand-in: the name of the function and its arguments."""

    def record(self, signature: Callable[..., object], result: object = None) -> Any:
        """A function that accepts what `signature` accepts."""

        def call(*arguments: Any, **options: Any) -> object:
            bound = inspect.signature(signature).bind(*arguments, **options)
            self.append((signature.__name__, dict(bound.arguments)))
            return result

        call.__signature__ = inspect.signature(signature)  # type: ignore[attr-defined]
        return call

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self if called == name]


def log(data, step=None, commit=None): ...  # of a wandb.Run


def finish(exit_code=None, quiet=None): ...


def init(  # of wandb
    entity=None,
    project=None,
    dir=None,
    id=None,
    name=None,
    notes=None,
    tags=None,
    config=None,
    config_exclude_keys=None,
    config_include_keys=None,
    allow_val_change=None,
    group=None,
    job_type=None,
    mode=None,
    force=None,
    reinit=None,
    resume=None,
    resume_from=None,
    fork_from=None,
    save_code=None,
    tensorboard=None,
    sync_tensorboard=None,
    monitor_gym=None,
    settings=None,
): ...


def define_metric(
    name, step_metric=None, step_sync=None, hidden=None, summary=None, goal=None, overwrite=None
): ...


def fake_wandb(calls: Calls) -> ModuleType:
    last_steps = [-1]
    record = calls.record(log)

    def log_unless_earlier(data, step=None, commit=None):
        """As the library: values of a step before the last one are dropped."""
        last_steps.append(last_steps[-1] + 1 if step is None else step)
        if last_steps[-1] == max(last_steps):
            record(data, step, commit)
        else:
            last_steps.pop()

    run = SimpleNamespace(
        log=log_unless_earlier,
        finish=calls.record(finish),
        define_metric=calls.record(define_metric),
    )
    module = ModuleType("wandb")
    module.init = calls.record(init, run)  # type: ignore[attr-defined]

    def image(data_or_path, mode=None, caption=None): ...

    module.Image = calls.record(image, "an image")  # type: ignore[attr-defined]
    return module


def fake_trackio(calls: Calls) -> ModuleType:
    def init(
        project,
        name=None,
        group=None,
        space_id=None,
        server_url=None,
        space_storage=None,
        dataset_id=None,
        bucket_id=None,
        config=None,
        resume="never",
        settings=None,
        private=None,
        embed=True,
        auto_log_gpu=None,
    ): ...

    def log(metrics, step=None): ...
    def finish(): ...
    def image(value, caption=None): ...

    run = SimpleNamespace(log=calls.record(log), finish=calls.record(finish))
    module = ModuleType("trackio")
    module.init = calls.record(init, run)  # type: ignore[attr-defined]
    module.Image = calls.record(image, "an image")  # type: ignore[attr-defined]
    return module


def fake_mlflow(calls: Calls) -> ModuleType:
    def set_experiment(experiment_name=None, experiment_id=None): ...
    def start_run(
        run_id=None,
        experiment_id=None,
        run_name=None,
        nested=False,
        parent_run_id=None,
        tags=None,
        description=None,
        log_system_metrics=None,
    ): ...
    def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None): ...
    def log_params(params, synchronous=None, run_id=None): ...
    def log_image(
        image, artifact_file=None, key=None, step=None, timestamp=None, synchronous=False
    ): ...
    def end_run(status="FINISHED"): ...

    module = ModuleType("mlflow")
    active = SimpleNamespace(info=SimpleNamespace(run_id="run7"))
    for function in (set_experiment, log_metrics, log_params, log_image, end_run):
        setattr(module, function.__name__, calls.record(function))
    module.start_run = calls.record(start_run, active)  # type: ignore[attr-defined]
    return module


STAND_INS = {"wandb": fake_wandb, "mlflow": fake_mlflow, "trackio": fake_trackio}


@pytest.fixture(params=list(STAND_INS))
def service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Calls]:
    """The name of a service, and the calls of the stand-in of its library."""
    calls = Calls()
    name = request.param
    monkeypatch.setitem(sys.modules, name, STAND_INS[name](calls))
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    return name, calls


def logged(calls: Calls) -> list[tuple[int, str, Any]]:
    """What was logged to a service: step, name, value."""
    values = []
    for called, arguments in calls:
        if called in ("log", "log_metrics"):
            data = dict(arguments.get("data") or arguments["metrics"])
            step = data.pop("step", None) if arguments["step"] is None else arguments["step"]
            values += [(step, key, value) for key, value in data.items()]
        elif called == "log_image":
            values.append((arguments["step"], f"images/{arguments['key']}", "an image"))
    return values


def test_a_service_gets_one_run_with_its_config_values_and_images(
    service: tuple[str, Calls], tmp_path: Path
) -> None:
    name, calls = service
    run = tmp_path / "2026-11-28"
    run.mkdir()
    with RunLog(run, 0, 10, CONFIG, loggers=[name]) as log:
        log.log_scalars(2, "train", {"loss": 0.5, "loss/mask": 0.25, "lr": 0.1})
        log.log_scalars(2, "val", {"segm/AP": 0.125, "segm/APs": -1.0})
        log.log_classes(2, {"segm": {"red: cat": 0.75}}, {})
        log.log_image("worst", IMAGE, 2)
    separator = "." if name == "mlflow" else "/"
    category = "segm_AP.red_ cat" if name == "mlflow" else "segm_AP/red: cat"
    assert logged(calls) == [
        (2, "train/loss", 0.5),
        (2, f"train/loss{separator}mask", 0.25),
        (2, "lr/learning_rate", 0.1),
        (2, f"val/segm{separator}AP", 0.125),
        (2, f"classes/{category}", 0.75),
        (2, "images/worst", "an image"),
    ]
    if name == "mlflow":
        assert calls.of("set_experiment") == [{"experiment_name": "maskseg"}]
        assert calls.of("start_run") == [{"run_name": "scenes/2026-11-28"}]
        assert calls.of("log_params")[0]["params"]["optimizer.lr"] == 0.001
        assert len(calls.of("end_run")) == 1
        assert calls.of("log_image")[0]["image"].shape == IMAGE.shape
        sent = [*calls.of("log_params"), *calls.of("log_metrics"), *calls.of("log_image")]
        assert all(call["synchronous"] is False for call in sent)  # a slow server stops no step
        return
    (start,) = calls.of("init")
    assert start["project"] == "maskseg"
    assert start["resume"] == "allow"
    config = start["config"]
    assert (config["optimizer"]["lr"] if name == "wandb" else config["optimizer.lr"]) == 0.001
    assert "2026-11-28" in start["name"]
    if name == "wandb":
        assert calls.of("define_metric")[-1] == {"name": "*", "step_metric": "step"}
    assert len(calls.of("finish")) == 1
    assert calls.of("image")[0].popitem()[1].shape == IMAGE.shape


def test_a_resumed_run_is_the_same_run_of_the_service_without_steps_twice(
    service: tuple[str, Calls], tmp_path: Path
) -> None:
    name, calls = service
    killed = RunLog(tmp_path, 0, 8, CONFIG, loggers=[name])
    for step in range(1, 7):
        killed.log_scalars(step, "train", {"loss": float(step)})
    # It is killed while it draws the images of its evaluation.
    killed.log_classes(6, {"segm": {"cat": 0.75}}, {})
    killed.log_image("worst", IMAGE, 6)
    again = RunLog(tmp_path, 2, 8, CONFIG, 0, loggers=[name])
    for step in (3, 4):
        again.log_scalars(step, "train", {"loss": float(step)})
    with RunLog(tmp_path, 4, 8, CONFIG, 0, loggers=[name]) as log:
        for step in range(5, 9):
            log.log_scalars(step, "train", {"loss": float(step)})
            if step % 2 == 0:
                log.log_classes(step, {"segm": {"cat": 0.75}}, {})
                log.log_image("worst", IMAGE, step)
                log.log_image("confusion", IMAGE, step)
                log.log_scalars(step, "val", {"segm/AP": 0.5})
    killed.close()
    again.close()
    values = logged(calls)
    assert [step for step, key, _ in values if key == "train/loss"] == list(range(1, 9))
    assert [step for step, key, _ in values if key.startswith("val")] == [6, 8]
    assert [step for step, key, _ in values if key == "images/worst"] == [6, 8]
    assert [step for step, key, _ in values if key == "images/confusion"] == [6, 8]
    assert [step for step, key, _ in values if key.startswith("classes")] == [6, 8]
    first, _, second = calls.of("start_run" if name == "mlflow" else "init")
    if name == "mlflow":
        assert second == {"run_id": "run7"}
        assert len(calls.of("log_params")) == 1  # they cannot be changed
    else:
        assert first == second


def test_a_run_that_starts_again_is_another_run_of_the_service(
    service: tuple[str, Calls], tmp_path: Path
) -> None:
    """In the same folder without a checkpoint, or after the folder has been removed."""
    name, calls = service
    run = tmp_path / "run"
    for is_removed in (False, False, True):
        if is_removed:
            shutil.rmtree(run)
        run.mkdir(exist_ok=True)
        with RunLog(run, 0, 8, CONFIG, loggers=[name]) as log:
            log.log_scalars(1, "train", {"loss": 1.0})
            log.log_scalars(2, "val", {"segm/AP": 1.0})
    starts = calls.of("start_run" if name == "mlflow" else "init")
    if name == "mlflow":
        assert starts == [{"run_name": "scenes/run"}] * 3
    else:
        assert len({start["id" if name == "wandb" else "name"] for start in starts}) == 3
    assert [step for step, _, _ in logged(calls)] == [1, 2] * 3


def test_an_evaluation_that_is_repeated_after_a_kill_reaches_the_service(
    service: tuple[str, Calls], tmp_path: Path
) -> None:
    """The training went on after the evaluation that a resume repeats."""
    name, calls = service
    killed = RunLog(tmp_path, 0, 8, CONFIG, loggers=[name])
    for step in range(1, 7):
        killed.log_scalars(step, "train", {"loss": float(step)})
    with RunLog(tmp_path, 4, 8, CONFIG, 0, loggers=[name]) as log:
        log.log_scalars(4, "val", {"segm/AP": 0.5})
    killed.close()
    assert [step for step, key, _ in logged(calls) if key.startswith("val")] == [4]


@pytest.mark.parametrize(
    "content", [b'{"wandb": 3}', b"[", b'{"wandb": {"run": 7, "last_steps": {"train": "x"}}}']
)
def test_a_damaged_state_of_the_services_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    calls = Calls()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    (tmp_path / "loggers.json").write_bytes(content)
    with RunLog(tmp_path, 4, 8, CONFIG, loggers=["wandb"]) as log:
        log.log_scalars(5, "train", {"loss": 1.0})
    state = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    assert state == {"run": calls.of("init")[0]["id"], "last_steps": {"train": 5}}


def test_a_row_of_the_results_is_complete_until_its_metrics_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FullDisk(io.FileIO):
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    log = RunLog(tmp_path, 0, 8, "", loggers=["csv"])
    log.log_scalars(1, "val", {"segm/AP": 0.25})
    log.log_scalars(2, "train", {"loss": 0.5})
    log.log_scalars(3, "train", {"loss": 0.25})
    written = rows(tmp_path)
    with monkeypatch.context() as patch:
        open_file = Path.open
        patch.setattr(
            Path,
            "open",
            lambda self, mode="r", **options: (
                FullDisk(self, mode) if mode == "r+b" else open_file(self, mode, **options)
            ),
        )
        with pytest.raises(UserError, match="cannot be written to"):
            log.log_scalars(3, "val", {"segm/AP": 0.5})
    assert rows(tmp_path) == written
    log.close()


def test_a_service_that_fails_does_not_end_the_training(
    service: tuple[str, Calls],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, calls = service

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto the host")

    with RunLog(tmp_path, 0, 8, CONFIG, loggers=["csv", name]) as log:
        module = sys.modules[name]
        if name == "mlflow":
            monkeypatch.setattr(module, "log_metrics", fail)
        else:
            log.loggers[name].logger.run.log = fail  # type: ignore[attr-defined]
        for step in (1, 2):
            log.log_scalars(step, "train", {"loss": 1.0})
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2"]
    assert capsys.readouterr().out.splitlines() == [
        f"warning: {name} no longer logs this run (no route to the host)"
    ]
    monkeypatch.setattr(module, "start_run" if name == "mlflow" else "init", fail)
    with pytest.raises(UserError, match=rf"loggers: {name} cannot log this run \(no route to the"):
        RunLog(tmp_path, 0, 8, CONFIG, loggers=["tensorboard", name])
    assert calls


def test_other_ranks_log_nothing(service: tuple[str, Calls]) -> None:
    name, calls = service
    with RunLog(None, 0, 8, CONFIG, loggers=["tensorboard", "csv", name]) as log:
        log.log_scalars(1, "train", {"loss": 1.0})
        log.log_classes(1, {"segm": {"cat": 1.0}}, {})
        log.log_image("worst", IMAGE, 1)
    assert calls == []


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for start in (0, 2):
        with RunLog(tmp_path, start, 4, CONFIG, loggers=["wandb"]) as log:
            log.log_scalars(start + 1, "train", {"loss": 1.0})
            log.log_image("worst", IMAGE, start + 1)
    assert any((tmp_path / "wandb").glob("offline-run-*"))


def test_mlflow_on_this_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with RunLog(tmp_path, 0, 4, CONFIG, loggers=["mlflow"]) as log:
        log.log_scalars(1, "train", {"loss": 1.0, "loss/mask": 0.5})
    identifier = json.loads((tmp_path / "loggers.json").read_text())["mlflow"]["run"]
    history = mlflow.MlflowClient().get_metric_history(identifier, "train/loss.mask")
    assert [(point.step, point.value) for point in history] == [(1, 0.5)]
