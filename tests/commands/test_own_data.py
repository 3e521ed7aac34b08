"""One JSON of the user's own, from the check to the prediction, by experiment=custom_r18."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

import maskseg
from maskseg import config as configs
from maskseg.commands.check_data import check_data
from maskseg.commands.evaluate import evaluate
from maskseg.commands.train import train
from maskseg.engine.checkpoint import load_checkpoint
from maskseg.errors import UserError

NUMBERS = range(7, 17)  # ids of the images; 7 and 8 have no objects
SMALL = [
    "data.num_workers=0",
    "model.backbone.channels=16",
    "model.classifier.mlp.width=16",
    "model.heads.mask.channels=16",
    "model.backbone.trunk.weights=null",
    "trainer.device=cpu",
    "trainer.plots=false",
    "trainer.log_every=1",
    "data.size_range=[64,96]",
]


def document() -> dict[str, Any]:
    """Ten images, of which eight have an object of 12 x 12 px; one category is not used."""
    annotations = [
        {
            "id": number,
            "image_id": number,
            "category_id": 3,
            "bbox": [number, 20, 12, 12],
            "segmentation": [[number, 20, number + 12, 20, number + 12, 32, number, 32]],
        }
        for number in NUMBERS[2:]
    ]
    return {
        "images": [
            {"id": n, "file_name": f"photo ({n}).png", "height": 64, "width": 96} for n in NUMBERS
        ],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "bolt"}, {"id": 30, "name": "unused"}],
    }


def compose(folder: Path, run: str, *overrides: str, data: str = "all") -> Any:
    places = [f"data.train_json={folder}/{data}.json", f"data.images={folder}/images"]
    return configs.compose(
        "train", ["experiment=custom_r18", *SMALL, *places, f"run_dir={folder}/{run}", *overrides]
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and a run of one epoch."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in NUMBERS:
        pixels = rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"photo ({number}).png")
    (folder / "all.json").write_text(json.dumps(document()))
    content = document()
    content["images"].reverse()
    (folder / "reversed.json").write_text(json.dumps(content))
    train(compose(folder, "run", "trainer.epochs=1", "trainer.evaluate_every=1epoch"))
    return folder


def val_names(config: Any) -> list[str]:
    source = configs.build_source(config.data)
    return sorted(image.file_name for image in source.val.images)


def test_one_epoch_is_trained_and_validated(home: Path) -> None:
    checkpoint = load_checkpoint(home / "run" / "last.pt")
    assert checkpoint["step"] == 2  # 8 images of a batch size of 4
    assert checkpoint["evaluated"] == 2
    config = OmegaConf.create(checkpoint["config"])
    assert (config.trainer.max_steps, config.trainer.epochs) == (2, None)
    assert (config.trainer.evaluate_every, config.trainer.checkpoint_every) == (2, 10)
    assert config.scheduler.warmup_steps == 1
    assert config.data.size == 96  # 12 of 64 px; the largest of the range
    assert config.model.proposer.anchors.sizes == [[16], [32], [64], [128], [256]]
    assert config.model.classifier.max_detections == 100


def test_all_tools_divide_the_file_in_the_same_way(home: Path) -> None:
    """The training, the evaluation by the checkpoint alone, and the check, in any order."""
    expected = val_names(compose(home, "other"))
    assert len(expected) == 2
    trained = configs.from_checkpoint(
        load_checkpoint(home / "run" / "last.pt")["config"], [], "evaluate"
    )
    assert val_names(trained) == expected
    evaluate([f"checkpoint={home}/run", f"output={home}/out", "pictures=0", "trainer.device=cpu"])
    words = ["data=custom", f"data.train_json={home}/reversed.json", f"data.images={home}/images"]
    checked = configs.compose("check_data", [*words, "data.val_fraction=0.2"])
    assert val_names(checked) == expected
    text = check_data(checked)
    assert "8 of 10 images" in text
    assert "2 of 10 images" in text


def test_a_prediction_uses_the_chosen_size(home: Path) -> None:
    predictor = maskseg.load(home / "run", device="cpu")
    (resize,) = predictor.prepare.transforms
    assert resize.resize.sizes == [96]  # type: ignore[attr-defined]
    assert len(predictor(home / "images" / "photo (9).png")) <= 100


def test_a_resumed_run_keeps_its_numbers(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resumed = [f"trainer.resume={home}/run", "trainer.evaluate_every=0", "evaluation.max_images=1"]
    run = train(compose(home, "longer", *resumed, "trainer.epochs=1.5", "data.size_range=[64,64]"))
    checkpoint = load_checkpoint(run / "last.pt")
    assert checkpoint["step"] == 3
    assert OmegaConf.create(checkpoint["config"]).data.size == 96
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("data.size=") for line in lines)
    (warning,) = [line for line in lines if line.startswith("warning: resumed with other")]
    assert "trainer.max_steps: 2 -> 3" in warning
    assert "data.size:" not in warning


def test_another_split_is_not_resumed(home: Path) -> None:
    keys = [f"trainer.resume={home}/run", "trainer.epochs=2"]
    with pytest.raises(UserError, match=r"data\.val_fraction=0\.4 gives other validation images"):
        train(compose(home, "refused", *keys, "data.val_fraction=0.4"))
    assert not (home / "refused").exists()
