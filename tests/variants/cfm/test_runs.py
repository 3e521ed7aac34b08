"""Convolutional feature masking from the command line.

Missing segments, training, interruption, resume, evaluation, prediction and errors.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from made.runs import SCENES, lines
from made.tools import assert_refused, done, said
from PIL import Image

import maskseg
from maskseg.data.datasets.scenes import STUFF, THINGS, make_scenes

pytest.importorskip("cv2")
SMALL = [
    "model.backbone.channels=16",
    "model.classifier.mlp.width=16",
    "data.num_workers=0",
    "trainer.device=cpu",
    "trainer.log_every=1",
]
TRAIN = ["experiment=scenes_cfm", *SMALL, *SCENES, "batch_size=2"]
FOLDERS = ["data.train_segments=segments_train", "data.val_segments=segments_val"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset and two training steps on it."""
    folder = tmp_path_factory.mktemp("cfm")
    make_scenes(folder / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    with contextlib.chdir(folder):
        (folder / "said.txt").write_text(
            done("train", *TRAIN, *FOLDERS, "trainer.max_steps=2", "run_dir=run")
        )
    return folder


def test_a_training_computes_segments_and_scores_pixels(at_home: Path) -> None:
    text = (at_home / "said.txt").read_text()
    assert "segments_train: computing the segments of 8 images" in text
    assert len(list((at_home / "segments_train").glob("*.npz"))) == 8
    assert all("loss/segment_class" in line for line in lines(at_home / "run"))
    (result,) = lines(at_home / "run", "val")
    assert {
        "semantic/mIoU",
        "semantic/mIoU_things",
        "semantic/mIoU_stuff",
        "segm/AP",
        "loss/segment_class",
    } <= set(result)
    assert {"semantic.png", "semantic_confusion.png", "best.pt"} <= {
        path.name for path in (at_home / "run").iterdir()
    }


@pytest.mark.slow
def test_resume_reuses_segments(at_home: Path) -> None:
    text = done(
        "train",
        *TRAIN,
        *FOLDERS,
        "trainer.max_steps=3",
        "trainer.resume=run",
        "trainer.evaluate_every=0",
    )
    assert "computing the segments" not in text
    assert [line["step"] for line in lines(at_home / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_evaluation_and_prediction(at_home: Path) -> None:
    done("evaluate", "checkpoint=run", "output=evaluation", "trainer.device=cpu", "pictures=1")
    metrics = json.loads((at_home / "evaluation" / "metrics.json").read_text())
    assert 0 <= metrics["semantic/mIoU"] <= 1
    rows = json.loads((at_home / "evaluation" / "detections.json").read_text())
    other = [
        "data=custom",
        "data.val_json=scenes/val.json",
        "data.images=scenes/images",
        "data.val_segments=segments_val",
        "data.num_workers=0",
    ]
    done(
        "evaluate", "checkpoint=run", "output=elsewhere", "trainer.device=cpu", "pictures=0", *other
    )
    assert (
        json.loads((at_home / "elsewhere" / "metrics.json").read_text())["segm/AP"]
        == metrics["segm/AP"]
    )
    assert {row["category_id"] for row in rows} <= set(THINGS.values())
    done(
        "predict",
        "checkpoint=run",
        "input=scenes/images/val_000001.jpg",
        "output=predicted",
        "trainer.device=cpu",
    )
    ids = np.asarray(Image.open(at_home / "predicted" / "val_000001.jpg_ids.png"))
    assert ids.shape == (128, 128)
    assert set(np.unique(ids).tolist()) <= {*THINGS.values(), *STUFF.values(), 65535}
    assert (at_home / "predicted" / "val_000001.jpg_classes.png").is_file()
    result = maskseg.load("run")(str(at_home / "scenes" / "images" / "val_000001.jpg"))
    assert result.classes is not None
    names = np.array([*THINGS.values(), *STUFF.values(), 65535])
    assert np.array_equal(names[result.classes.numpy()], ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (
            ["data.train_segments=null", "data.val_segments=segments_val"],
            "data.train_segments is not set",
        ),
        (["data.segment_sampler=null", *FOLDERS], "data.segment_sampler is not set"),
        (["data.stuff_json=absent.json", *FOLDERS], "data.stuff_json=absent.json"),
        (["data.train_semantic=absent", *FOLDERS], "data.train_semantic=absent"),
        (["model.proposer.method.sigma=0.7", *FOLDERS], "sigma"),
        (["model.classifier.levels=[p2,c9]", *FOLDERS], "the backbone has"),
    ],
)
@pytest.mark.usefixtures("at_home")
def test_errors(words: list[str], part: str) -> None:
    assert_refused(said("train", *TRAIN, *words, "trainer.max_steps=1", "run_dir=other"), part)
    assert not Path("other").exists()


@pytest.mark.slow
def test_a_damaged_file_is_named_and_regenerated_after_deletion(at_home: Path) -> None:
    file = at_home / "segments_train" / "3.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    words = [
        *TRAIN,
        *FOLDERS,
        "trainer.max_steps=4",
        "trainer.evaluate_every=0",
        "data.val_json=null",
    ]
    assert_refused(
        said("train", *words, "run_dir=damaged"),
        "segments_train/3.npz: the segments are damaged",
        "delete it",
    )
    file.unlink()
    assert "computing the segments of 1 images" in done("train", *words, "run_dir=mended")
    assert file.read_bytes() == whole
