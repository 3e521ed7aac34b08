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
from maskseg.commands.train import train
from maskseg.engine.checkpoint import load_checkpoint
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
    images = [{"id": i, "file_name": "0.png", "height": 64, "width": 96} for i in (1, 2)]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of a dataset, and a run of one step on the first."""
    folder = tmp_path_factory.mktemp("resume")
    Image.new("RGB", (96, 64), (40, 90, 160)).save(folder / "0.png")
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
    assert load_checkpoint(run / "last.pt")["step"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert any("edited.json has changed" in line for line in lines)
    assert "resumed with trainer.log_every: 1 -> 2" in lines
    (warning,) = [line for line in lines if line.startswith("warning: resumed with other")]
    assert warning.endswith(": trainer.max_steps: 1 -> 2")


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
