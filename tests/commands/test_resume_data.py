"""A training is only resumed on the data that it was started with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from maskseg import config as configs
from maskseg.commands.evaluate import evaluate
from maskseg.commands.train import (
    _check_run_dir,
    _take_from_rank_zero,
    compose_training,
    train,
)
from maskseg.engine.checkpoint import load_checkpoint, save_checkpoint
from maskseg.engine.distributed import DistributedContext
from maskseg.engine.run_folder import RunFolder, choose
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError

KEYS = [
    "experiment=scenes_r18",
    "debug=smoke",
    "data=custom",
    "data.val_json=null",
    "data.train_transforms=[]",
    "data.test_transforms=[]",
    "model.backbone.channels=16",
    "model.classifier.mlp.width=16",
    "model.heads.mask.channels=16",
    "trainer.device=cpu",
]


def document(names: tuple[str, str], areas: int = 480) -> dict[str, Any]:
    """Two images of a cat beside a dog, whose ids are their places in `names`."""
    annotations = []
    for index, (image, name) in enumerate([(1, "cat"), (1, "dog"), (2, "cat"), (2, "dog")]):
        left = 8 if name == "cat" else 48
        annotations.append(
            {
                "id": index + 1,
                "image_id": image,
                "category_id": names.index(name) + 1,
                "segmentation": [[left, 10, left + 24, 10, left + 24, 30, left, 30]],
                "bbox": [left, 10, 24, 20],
                "area": areas,
                "iscrowd": 0,
            }
        )
    images = [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 96} for i in (1, 2)]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of a dataset, and a run of one step on the first."""
    folder = tmp_path_factory.mktemp("resume")
    for number in (1, 2):
        Image.new("RGB", (96, 64), (40, 90, 160 + number)).save(folder / f"{number}.png")
    (folder / "first.json").write_text(json.dumps(document(("cat", "dog"))))
    (folder / "swapped.json").write_text(json.dumps(document(("dog", "cat"))))
    (folder / "edited.json").write_text(json.dumps(document(("cat", "dog"), areas=479)))
    train(compose(folder, "first", "run", "trainer.max_steps=1e0"))
    return folder


def compose(folder: Path, data: str, run: str, *overrides: str) -> Any:
    places = [f"data.train_json={folder}/{data}.json", f"data.images={folder}"]
    return configs.compose("train", [*KEYS, *places, f"run_dir={folder}/{run}", *overrides])


def resume(folder: Path, data: str, run: str, *overrides: str) -> Path:
    resumed = f"trainer.resume={folder}/run"
    return train(compose(folder, data, run, resumed, "trainer.max_steps=2", *overrides))


def test_other_ids_of_the_classes_are_refused(home: Path) -> None:
    with pytest.raises(UserError) as raised:
        resume(home, "swapped", "refused")
    assert "'cat' had id 1 and has id 2; 'dog' had id 2 and has id 1" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (home / "refused").exists()


def test_a_changed_data_file_is_refused_unless_allowed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = r"data\.train_json=.*edited\.json has changed since the checkpoint was saved"
    with pytest.raises(UserError, match=rf"{changed}; trainer\.resume_changed_data=true"):
        resume(home, "edited", "other")
    assert not (home / "other").exists()
    keys = ["trainer.resume_changed_data=true", "trainer.log_every=2"]
    run = resume(home, "edited", "other", *keys)
    assert (run / "labels.png").exists()  # of the new file
    assert not (run / "train_batch_1.png").exists()  # it would be no first batch
    assert load_checkpoint(run / "last.pt")["step"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert any("edited.json has changed" in line for line in lines)
    assert "resumed with trainer.log_every: 1 -> 2" in lines
    (warning,) = [line for line in lines if line.startswith("warning: resumed with other")]
    assert warning.endswith(": trainer.max_steps: 1 -> 2")


def test_another_division_of_the_training_file_is_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images that were trained on would be validated, or the reverse."""
    half = "data.val_fraction=0.5"
    train(compose(home, "first", "divided", half, "trainer.max_steps=1"))
    for run, override, message in (
        ("divided", "data.val_fraction=null", "which is not divided here"),
        ("divided", f"data.val_json={home}/edited.json", "which is not divided here"),
        ("run", half, "data.val_fraction=0.5 validates on images that the checkpoint was trained"),
    ):
        keys = [f"trainer.resume={home}/{run}", "trainer.max_steps=2", override]
        with pytest.raises(UserError) as raised:
            train(*compose_training(keys))
        assert message in str(raised.value)
        assert "trainer.resume_changed_data=true" in str(raised.value)
        assert load_checkpoint(home / run / "last.pt")["step"] == 1
    assert configs.changes_numbers("data.val_fraction: None -> 0.5")
    assert not configs.changes_numbers("data.val_images: a -> b")
    # An evaluation reports it.
    capsys.readouterr()
    for run, override, count in (("divided", half, 0), ("run", half, 1)):
        output = f"output={home}/division_{run}"
        evaluate([f"checkpoint={home}/{run}", output, "pictures=0", override])
        lines = capsys.readouterr().out.splitlines()
        reports = [line for line in lines if line.startswith("warning: data.val_fraction=0.5 of ")]
        assert len(reports) == count


def test_the_folder_of_a_run_is_all_that_a_resume_needs(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The config is the run's own; keys of the command line change it, and are reported."""
    reports: list[str] = []
    config, _ = compose_training([f"trainer.resume={home}/run"], reports.append)
    assert reports == [
        f"the config is that of {home}/run (scenes_r18), with the keys of the command line"
    ]
    text = load_checkpoint(home / "run" / "last.pt")["config"]
    differences = configs.config_differences(config, text)
    # the classes are read from the data again
    assert {line.partition(":")[0] for line in differences} <= {
        *("data.num_classes", "data.num_things", "data.point_ranges")
    }
    assert (config.trainer.max_steps, config.model.classifier.mlp.width) == (1, 16)
    assert config.data.train_json == f"{home}/first.json"
    capsys.readouterr()
    keys = ["trainer.max_steps=2", "data.timeout=77", f"run_dir={home}/resumed"]
    run = train(*compose_training([f"trainer.resume={home}/run", *keys]))
    assert not (run / "labels.png").exists()  # they have not changed
    assert run == home / "resumed"
    assert load_checkpoint(run / "last.pt")["step"] == 2
    lines = capsys.readouterr().out.splitlines()
    (warning,) = [line for line in lines if line.startswith("warning: resumed with other")]
    assert warning.endswith(": trainer.max_steps: 1 -> 2")
    assert any(line.startswith("resumed with data.timeout: ") for line in lines)
    assert not any("num_classes" in line for line in lines)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("swapped", "the classes of the data are not those of the checkpoint: 'cat' had id 1"),
        ("edited", "has changed since the checkpoint was saved; trainer.resume_changed_data=true"),
    ],
)
def test_other_data_or_classes_are_refused_without_other_words(
    home: Path, data: str, message: str
) -> None:
    keys = [f"trainer.resume={home}/run", f"data.train_json={home}/{data}.json"]
    with pytest.raises(UserError) as raised:
        train(*compose_training(keys))
    assert message in str(raised.value)
    assert load_checkpoint(home / "run" / "last.pt")["step"] == 1


def test_a_resume_of_another_model_or_a_wrong_key(home: Path) -> None:
    own = [f"trainer.resume={home}/run"]
    with pytest.raises(UserError, match=r"did you mean 'trainer\.max_steps'"):
        compose_training([*own, "trainer.max_step=3"])
    with pytest.raises(UserError, match=r"batch_size='many': expected a whole number"):
        compose_training([*own, "batch_size=many"])
    # the length is in epochs or in steps
    longer = compose_training([*own, "trainer.epochs=2"])[0].trainer
    assert (longer.epochs, longer.max_steps) == (2, None)
    with pytest.raises(UserError, match=r"trainer\.epochs and trainer\.max_steps are both set"):
        compose_training([*own, "trainer.epochs=2", "trainer.max_steps=9"])
    # a choice of groups is a whole config, as for a new run
    chosen, overrides = compose_training(["experiment=nuclei_r18", *own])
    assert overrides is None
    assert chosen.name == "nuclei_r18"
    assert chosen.trainer.resume == f"{home}/run"


def test_a_checkpoint_does_not_choose_where_a_dataset_is_made(home: Path, tmp_path: Path) -> None:
    """A dataset that can be made is made only where the command line names it."""
    checkpoint = load_checkpoint(home / "run" / "last.pt")
    del checkpoint["format"]
    target = tmp_path / "elsewhere"
    scenes = configs.compose("train", ["experiment=scenes_r18", f"data.root={target}"])
    save_checkpoint(tmp_path / "last.pt", {**checkpoint, "config": configs.to_yaml(scenes)})
    with pytest.raises(UserError, match="there is no such file; data=NAME names the dataset"):
        train(*compose_training([f"trainer.resume={tmp_path}", "trainer.device=cpu"]))
    assert not target.exists()


def test_a_checkpoint_does_not_choose_segments_and_uploads(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = load_checkpoint(home / "run" / "last.pt")
    author = configs.compose("train", ["experiment=scenes_r18"])
    author.trainer.loggers = ["wandb"]
    downloaded = tmp_path / "last.pt"
    save_checkpoint(downloaded, {**checkpoint, "config": configs.to_yaml(author)})
    resumed = f"trainer.resume={downloaded}"
    assert compose_training([resumed])[0].trainer.loggers == ["tensorboard", "csv"]
    chosen, _ = compose_training([resumed, "trainer.loggers=[csv,wandb]"])
    assert chosen.trainer.loggers == ["csv", "wandb"]

    def record(*values: object) -> None:
        raise UserError(f"segments: {values[-1]}")

    monkeypatch.setattr("maskseg.commands.train.prepare_segments", record)
    arguments = [f"trainer.resume={home}/run"]
    with pytest.raises(UserError) as raised:
        train(*compose_training(arguments))
    assert str(raised.value) == f"segments: {arguments}"
    with pytest.raises(UserError, match="segments: None"):  # the config of a new run is trusted
        train(compose(home, "first", "new"))


def test_auto_alone_is_the_newest_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = home / "cwd" / "runs" / "any_experiment"
    runs.mkdir(parents=True)
    (runs / "time").symlink_to(home / "run")
    monkeypatch.chdir(home / "cwd")
    config, overrides = compose_training(["trainer.resume=auto"])
    assert (config.name, config.run_dir, overrides) == (
        "scenes_r18",
        None,
        None,
    )  # links are no runs
    (runs / "time").unlink()
    (runs / "time").mkdir()
    (runs / "time" / "last.pt").write_bytes((home / "run" / "last.pt").read_bytes())
    config, overrides = compose_training(["trainer.resume=auto"])
    assert overrides == ["trainer.resume=auto"]
    assert config.run_dir == "runs/any_experiment/time"
    assert config.trainer.resume == config.run_dir
    assert config.data.train_json == f"{home}/first.json"
    other, _ = compose_training(["trainer.resume=auto", "trainer.max_steps=7"])
    assert (other.run_dir, other.data.train_json) == (None, "datasets/scenes/train.json")
    named = ["trainer.resume=auto", "trainer.max_steps=7", "run_dir=runs/any_experiment/time"]
    config, _ = compose_training(named)
    assert (config.trainer.max_steps, config.data.train_json) == (7, f"{home}/first.json")


def test_initial_weights_follow_the_names_of_classes(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [f"trainer.init={home}/run", "trainer.max_steps=1", "optimizer.lr=1e-12"]
    run = train(compose(home, "swapped", "started", *keys))
    assert "classes with weights of their name: dog, cat; reset: none" in capsys.readouterr().out
    old, new = (
        load_checkpoint(folder / "last.pt")["model"]["classifier.cls_score.weight"]
        for folder in (home / "run", run)
    )
    assert torch.allclose(new, old[[1, 0, 2]])
    assert not torch.allclose(new, old)


def test_an_evaluation_matches_classes_by_name(home: Path) -> None:
    results = []
    for data in ("first", "swapped"):
        output = home / f"evaluated_{data}"
        keys = [f"data.val_json={home}/{data}.json", f"data.images={home}", f"output={output}"]
        evaluate([f"checkpoint={home}/run", *keys, "model.classifier.score_threshold=0.0"])
        results.append((output / "per_class.json").read_text())
        results.append((output / "detections.json").read_text())
    assert results[:2] == results[2:]


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("file", ["", "/last.pt"])
def test_the_run_to_resume_is_resolved_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, has_links: bool
) -> None:
    """Another run of the experiment starts while the config is read."""
    monkeypatch.chdir(tmp_path)
    runs = Path("runs/scenes_r18")
    for name in ("older", "newer"):
        (runs / name).mkdir(parents=True)
        (runs / name / "last.pt").write_bytes((home / "run" / "last.pt").read_bytes())

    def point(name: str) -> None:
        (runs / "latest").unlink(missing_ok=True)
        if has_links:
            (runs / "latest").symlink_to(name)
        else:
            (runs / "latest").write_text(f"{name}\n")

    point("older")
    config, _ = compose_training([f"trainer.resume={runs}/latest{file}"])
    point("newer")
    assert config.trainer.resume == f"runs/scenes_r18/older{file}"
    folder = choose(config.name, config.run_dir, configs.build(config.trainer))
    folder.close()
    assert folder.resume_from == runs / "older" / "last.pt"
    assert folder.path == runs / "older"


def test_all_processes_resume_the_run_of_the_first_one() -> None:
    """Another process may have resolved `auto` or `latest` later than rank 0."""

    class Second(DistributedContext):
        def broadcast(self, value: Any) -> Any:
            settings = {**value[1], "resume": "runs/x/first", "max_steps": 7}
            return configs.make_config({"name": "first"}), settings

    config = configs.make_config({"name": "second"})
    trainer = Trainer(max_steps=9, device="cpu", resume="runs/x/second")
    taken = _take_from_rank_zero(config, trainer, Second(rank=1, world_size=2))
    assert (taken[0].name, taken[1].resume) == ("first", "runs/x/first")
    assert taken[1].length.max_steps == 7


def test_a_run_that_starts_again_draws_its_data_again(home: Path) -> None:
    """The first attempt has drawn wrong labels, which have been corrected since."""
    images = ["labels.png", "train_batch_1.png"]
    folder = home / "restarted"
    folder.mkdir()
    for name in ["environment.json", *images]:
        (folder / name).write_text("[]")
    train(compose(home, "first", "restarted", "trainer.max_steps=1"))
    for name in images:
        assert min(Image.open(folder / name).size) > 50, name


@pytest.mark.parametrize(
    "name", ["best.safetensors", "loggers.json", "results.csv", "per_class.csv", "labels.png"]
)
def test_files_of_the_user_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"run_dir: .*{name} already exists"):
        _check_run_dir(RunFolder(tmp_path, tmp_path / "runs"))
