"""Training from Python: from a config and from objects; the process stays as it was."""

from __future__ import annotations

import json
import logging
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made.runs import MASKS, SCENES, SMALL, assert_equal
from made.training import make_model, make_source, write_scenes
from omegaconf import OmegaConf
from torch import nn

import maskseg
from maskseg import config as configs
from maskseg.engine.checkpoint import best_threshold, load_checkpoint
from maskseg.engine.schedules import multistep
from maskseg.engine.trainer import Trainer
from maskseg.errors import Interrupted, UserError
from maskseg.training import TrainedRun, Training, last_metrics


def keywords(words: list[str]) -> dict[str, Any]:
    """Overrides of the command line as keywords, with the values as Python objects."""
    values: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        try:
            values[key.replace(".", "__")] = json.loads(text)
        except ValueError:
            values[key.replace(".", "__")] = text
    return values


WORDS = [*SMALL, *MASKS, *SCENES]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home: Path) -> TrainedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return maskseg.train("scenes_r18", run_dir=home / "run", **keywords(WORDS))


def process_state() -> dict[str, Any]:
    root = logging.getLogger()
    return {
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "random": random.getstate(),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "living threads": {t.name for t in threading.enumerate() if not t.daemon},
        "hook": threading.excepthook,
        "logging": (root.level, list(root.handlers), logging.root.manager.disable),
        "warnings": list(warnings.filters),
        "gradients": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def test_an_experiment_is_trained_as_by_the_command(home: Path, trained: TrainedRun) -> None:
    checkpoint = load_checkpoint(home / "run" / "last.pt")
    words = ["experiment=scenes_r18", f"run_dir={home / 'run'}", *WORDS]
    command = configs.compose("train", words)
    command.data.update(OmegaConf.create(checkpoint["config"]).data)  # with numbers of classes
    assert OmegaConf.create(checkpoint["config"]) == command
    assert checkpoint["step"] == 4
    assert trained.run_dir == home / "run"
    assert trained.metrics == checkpoint["metrics"]
    assert {"segm/AP", "bbox/AP50", "loss"} <= set(trained.metrics)
    assert trained.checkpoint == home / "run" / "best.pt"
    assert repr(trained) == f"TrainedRun(run_dir={home / 'run'!r})"


def test_the_process_is_as_before(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    torch.rand(3)
    before = process_state()
    words = [*WORDS, "trainer.max_steps=1", "data.val_json=null", "seed=7"]
    run = maskseg.train("scenes_r18", run_dir="again", **keywords(words))
    assert process_state() == before
    assert run.metrics == {}
    with pytest.raises(UserError):
        maskseg.train("scenes_r18", run_dir="again", **keywords(words))
    assert process_state() == before


def test_load_and_evaluate(
    home: Path, trained: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    image = home / "scenes" / "images" / "val_000001.jpg"
    model = trained.load(device="cpu", min_score=0.0)
    # A key of the checkpoint's config, spelled as in `train`.
    same = maskseg.load(trained.run_dir, "cpu", model__classifier__max_detections=3)
    assert len(same(image)) <= 3
    assert torch.equal(same(image).scores, model(image).scores[: len(same(image))])
    rounded = trained.load(device="cpu", precision="bf16", classes=["disc"])
    assert set(rounded(image).names) <= {"disc"}
    assert next(iter(rounded.model.parameters())).dtype == torch.bfloat16  # type: ignore[attr-defined]
    # Plots begin at the threshold of the checkpoint, as those of the command.
    threshold = best_threshold(load_checkpoint(trained.checkpoint))
    assert same.plot_min_score == (0.5 if threshold is None else threshold)
    assert model.plot_min_score == 0.0
    metrics = maskseg.evaluate(trained.run_dir, "evaluation", pictures=0, trainer__device="cpu")
    assert metrics["segm/AP"] == pytest.approx(trained.metrics["segm/AP"], abs=1e-4)
    assert (home / "evaluation" / "metrics.json").is_file()
    with pytest.raises(UserError, match="already exists"):
        maskseg.evaluate(trained.run_dir, "evaluation")


@pytest.mark.parametrize(
    ("experiment", "overrides", "message"),
    [
        ("scenes_r", {}, r"experiment has no 'scenes_r'; did you mean 'scenes_r18'"),
        (None, {"trainer__max_step": 3}, r"did you mean 'trainer\.max_steps'"),
        (None, {"trainer.max_steps": -1}, r"trainer\.max_steps=-1"),
        (None, {"trainer__max_steps": "many"}, r"trainer\.max_steps"),
        (None, {"data": "custom"}, r"data\.train_json is not set"),
        (None, {"data": "custm"}, "did you mean 'custom'"),
        (None, {"trainer__device": "cuda:77"}, r"trainer\.device=cuda:77"),
        (None, {"seed": print}, "is no value of a config"),
    ],
)
@pytest.mark.usefixtures("at_home")
def test_wrong_keywords_are_one_line(
    tmp_path: Path, experiment: str | None, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        maskseg.train(experiment, run_dir=tmp_path / "run", **overrides)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keyword", [{"precision": "fp8"}, {"min_score": 2.0}, {"classes": "dis"}])
@pytest.mark.usefixtures("at_home")
def test_wrong_arguments_of_load_are_one_line(trained: TrainedRun, keyword: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"precision|min_score|did you mean 'disc'"):
        maskseg.load(trained.run_dir, device="cpu", **keyword)
    with pytest.raises(UserError, match=r"device|precision|min_score|did you mean 'disc'"):
        trained.load(**{"device": "cpu", **keyword})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "data", 4)
    return tmp_path


def objects(folder: Path, steps: int = 4, seed: int = 0, **keys: Any) -> Training:
    """A training of objects; keys: settings of the trainer."""
    trainer = Trainer(steps, device="cpu", log_every=1, plots=False, **keys)
    return Training(
        make_model(seed),
        make_source(folder / "data"),
        partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        partial(multistep, warmup_steps=2),
        trainer,
        run_dir=folder / "run",
    )


def test_objects_are_trained_saved_and_loaded(folder: Path) -> None:
    training = objects(folder)
    before = process_state()
    initial = {k: v.clone() for k, v in training.model.state_dict().items()}
    run = training.run()
    assert process_state() == before
    names = {path.name for path in (folder / "run").iterdir()}
    assert {"last.pt", "config.yaml", "metrics.jsonl", "environment.json"} <= names
    checkpoint = load_checkpoint(folder / "run" / "last.pt")
    assert checkpoint["categories"]["names"] == ["ellipse", "triangle"]
    assert checkpoint["metrics"] == run.metrics == last_metrics(folder / "run")
    assert not torch.equal(
        initial["classifier.cls_score.weight"], checkpoint["model"]["classifier.cls_score.weight"]
    )
    image = folder / "data" / "images" / "1.png"
    predictor = run.load(device="cpu", min_score=0.0)
    # Another process builds the same objects and reads the run.
    again = objects(folder, seed=5).load(folder / "run" / "last.pt", device="cpu", min_score=0.0)
    assert torch.equal(predictor(image).boxes, again(image).boxes)
    with pytest.raises(UserError, match=r"built in Python .* maskseg\.training\.Training"):
        maskseg.load(folder / "run")


def test_a_run_of_objects_resumes_bit_for_bit(folder: Path) -> None:
    whole = objects(folder, evaluate_every=2)
    replace(whole, run_dir=folder / "whole").run()
    schedule = partial(multistep_of, 4)
    replace(objects(folder, steps=2, evaluate_every=2), schedule=schedule).run()
    resumed = replace(
        objects(folder, seed=9, evaluate_every=2, resume="auto"), schedule=schedule
    ).run()
    first = load_checkpoint(folder / "whole" / "last.pt")
    second = load_checkpoint(folder / "run" / "last.pt")
    assert second["step"] == 4
    keys = ("model", "optimizer", "rng", "metrics", "step")
    assert_equal({k: first[k] for k in keys}, {k: second[k] for k in keys})
    assert resumed.metrics == first["metrics"]
    # The run is not started again without `resume`, and other data is refused.
    with pytest.raises(UserError, match="already holds a run"):
        objects(folder).run()
    write_scenes(folder / "data", 3)
    with pytest.raises(UserError, match="has changed since"):
        objects(folder, steps=5, resume="auto").run()


def multistep_of(steps: int, optimizer: Any, max_steps: int) -> Any:
    """The schedule of a training of `steps`, which a shorter one begins."""
    del max_steps
    return multistep(optimizer, steps, warmup_steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": nn.Linear(2, 2)}, "a Linear has no losses and predictions"),
        ({"trainer": Trainer(2, device="cpu", init="x.pt")}, "load the weights into the model"),
        ({"batch_size": 3, "trainer": Trainer(2, "cpu", accumulate_grad_batches=2)}, "batch_size"),
        ({"optimizer": partial(torch.optim.SGD, lr=-1.0)}, "optimizer: "),
    ],
)
def test_wrong_objects_are_one_line(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        replace(objects(folder), **changes).run()
    assert not (folder / "run").exists()


def test_a_model_for_other_classes_is_refused(folder: Path) -> None:
    training = objects(folder)
    content = json.loads((folder / "data" / "data.json").read_text())
    content["categories"].append({"id": 9, "name": "third"})
    (folder / "data" / "data.json").write_text(json.dumps(content))
    data = make_source(folder / "data")
    with pytest.raises(UserError, match="the model has 2 classes, but the data has 3: ellipse"):
        replace(training, data=data).run()


@pytest.fixture
def _own_handler() -> Iterator[None]:
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_own_handler")
@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Interrupted)]
)
def test_a_signal_saves_and_reaches_the_handler_of_the_process(
    folder: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda n, _: received.append(n))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    training = objects(folder, steps=50)
    source = training.data
    loader = source.train_loader

    def interrupting_loader(*arguments: Any, **keys: Any) -> Iterator[Any]:
        for i, batch in enumerate(loader(*arguments, **keys)):
            if i == 1:
                signal.raise_signal(number)
            yield batch

    source.train_loader = interrupting_loader  # type: ignore[method-assign, assignment]
    with pytest.raises(error):
        training.run()
    assert load_checkpoint(folder / "run" / "last.pt")["step"] == 2
    assert received == ([number] if number == signal.SIGTERM else [])
