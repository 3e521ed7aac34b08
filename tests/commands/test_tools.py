"""The tools as a user calls them: what they print, write and refuse."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made.runs import MASKS, ROOT, SCENES, SMALL
from made.tools import Said, assert_refused
from made.tools import said as here
from PIL import Image
from pycocotools.coco import COCO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import maskseg
from maskseg.config.restore import load_predictor, trained_model
from maskseg.data.datasets.scenes import make_scenes
from maskseg.data.transforms import ResizeShortestEdge
from maskseg.engine.checkpoint import load_checkpoint, save_checkpoint
from maskseg.errors import UserError
from maskseg.evaluation.coco import CocoEvaluator
from maskseg.files.outputs import RECORD
from maskseg.structures import Categories

TOOLS = ["train", "evaluate", "predict", "check_data", "convert"]
PLAIN = ["data.train_transforms=[]", "data.test_transforms=[]"]


@pytest.fixture(autouse=True)
def _threads_of_the_processes() -> Iterator[None]:
    """As many threads here as `in_a_process` gives: a sum in another order is another number in
    the last bit.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_process(tool: str, *words: str, cwd: Path) -> Said:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *words]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )
    return Said(done.returncode, done.stdout, done.stderr)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def steps(run: Path) -> list[int]:
    return [
        line["step"]
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["kind"] == "train"
    ]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a small data set and one finished run."""
    folder = tmp_path_factory.mktemp("home")
    make_scenes(folder / "scenes", num_train=8, num_val=4, size=128, num_workers=0)
    words = [*SMALL, *MASKS, *SCENES, "run_dir=run", "trainer.plots=true"]
    said = in_a_process("train", *words, cwd=folder)
    assert said.code == 0, said
    (folder / "said.txt").write_text(said.out)
    return folder


def test_a_run_leaves_what_it_should(home: Path) -> None:
    found = {p.name for p in (home / "run").iterdir()}
    pictures = {
        "labels.png",
        "train_batch_1.png",
        "train_batch_2.png",
        "train_batch_3.png",
        "results.png",
        "validation.png",
        "pr_curves.png",
        "confidence.png",
        "confusion.png",
        "worst.png",
    }
    assert found == {
        "last.pt",
        "step_0000002.pt",
        "best.pt",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "per_class.csv",
        "results.csv",
        "tensorboard",
        *pictures,
    }
    for name in pictures:
        assert min(Image.open(home / "run" / name).size) > 100, name
    events = EventAccumulator(str(home / "run" / "tensorboard"))
    events.Reload()
    images = {"validation", "pr_curves", "confidence", "confusion", "worst"}
    assert images == set(events.Tags()["images"])
    assert {
        "train/loss/mask",
        "train/grad_norm",
        "sys/memory_gb",
        "lr/learning_rate",
        "val/segm/AP75",
        "val/loss/mask",
    } <= set(events.Tags()["scalars"])
    assert "segm at IoU 0.50/figure" in events.Tags()["tensors"]
    checkpoint = load_checkpoint(home / "run" / "last.pt")
    assert checkpoint["step"] == 4
    assert checkpoint["categories"]["names"] == [
        "disc",
        "box",
        "triangle",
        "star",
        "ring",
        "crescent",
        "cross",
        "figure",
    ]
    assert steps(home / "run") == [1, 2, 3, 4]
    table = (home / "run" / "per_class.csv").read_text().splitlines()
    assert table[0] == "step,class,objects,bbox/AP,segm/AP"
    assert [row.split(",")[:2] for row in table[1:]] == [
        ["4", name] for name in checkpoint["categories"]["names"]
    ]
    best, last = (home / "run" / f"{name}.pt" for name in ("best", "last"))
    assert best.stat().st_size < 0.4 * last.stat().st_size  # AdamW has two moments a weight
    assert "optimizer" not in load_checkpoint(best)
    assert "${" not in (home / "run" / "config.yaml").read_text()
    assert "num_classes: 8" in (home / "run" / "config.yaml").read_text()
    assert Image.open(home / "run" / "results.png").size[0] > 300
    said = (home / "said.txt").read_text()
    for part in ("8 classes, 8 images", "step 4/4  loss", "AP50", "AP by class", "run folder: run"):
        assert part in said
    # nothing else was written
    assert {p.name for p in home.iterdir()} >= {"run", "scenes", "said.txt"}
    assert not (home / "outputs").exists()
    assert not (home / "multirun").exists()


def test_a_run_is_never_overwritten(at_home: Path) -> None:
    before = tree(at_home / "run")
    assert_refused(
        here("train", *SMALL, *MASKS, *SCENES, "run_dir=run"),
        "run_dir=run already holds a run",
        "trainer.resume=auto",
    )
    assert tree(at_home / "run") == before


@pytest.mark.slow
def test_runs_without_a_name_get_folders_of_their_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").symlink_to(home / "scenes")
    words = [*SMALL, *MASKS, *SCENES, "trainer.max_steps=1", "data.val_json=null"]
    for _ in range(2):
        assert here("train", *words).code == 0
    latest = tmp_path / "runs" / "scenes_r18" / "latest"
    runs = sorted(path for path in latest.parent.iterdir() if path != latest)
    assert len(runs) == 2
    assert latest.resolve() == runs[1].resolve()
    assert all(steps(run) == [1] for run in runs)
    # auto goes on with the newest
    said = here("train", *words, "trainer.max_steps=2", "trainer.resume=auto")
    assert said.code == 0
    assert sorted(map(len, map(steps, runs))) == [1, 2]
    assert len(list(latest.parent.iterdir())) == 3


def test_auto_goes_on_and_ends_where_one_run_would(at_home: Path, tmp_path: Path) -> None:
    words = [
        *SMALL,
        *MASKS,
        *SCENES,
        f"run_dir={tmp_path / 'run'}",
        "trainer.resume=auto",
        "data.val_json=null",
    ]
    # the schedule is a function of max_steps: the warm-up, which all these steps lie in, is not
    assert here("train", *words, "trainer.max_steps=2").code == 0
    said = here("train", *words)
    assert said.code == 0, said
    assert "resuming from" in said.out
    assert "step 2" in said.out
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    whole, resumed = (
        load_checkpoint(at_home / "run" / "last.pt"),
        load_checkpoint(tmp_path / "run" / "last.pt"),
    )
    different = [k for k, v in whole["model"].items() if not torch.equal(v, resumed["model"][k])]
    # Guards against: an iterator of a DataLoader draws from torch's global stream, which a resume
    # has just restored
    assert different == []
    assert list((tmp_path / "run").glob("*.png")) == []  # trainer.plots is false


@pytest.mark.usefixtures("at_home")
def test_auto_starts_where_nothing_was_saved_yet(tmp_path: Path) -> None:
    # Guards against: a job that was killed before its first checkpoint can never be started again
    # with the same words
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 3.0}\n')
    said = here(
        "train",
        *SMALL,
        *MASKS,
        *SCENES,
        f"run_dir={run}",
        "trainer.resume=auto",
        "trainer.max_steps=2",
        "data.val_json=null",
    )
    assert said.code == 0, said
    assert steps(run) == [1, 2]


def test_auto_falls_back_from_a_damaged_checkpoint(at_home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    whole = (at_home / "run" / "last.pt").read_bytes()
    (run / "step_0000004.pt").write_bytes(whole)
    (run / "last.pt").write_bytes(b"half")
    said = here(
        "train",
        *SMALL,
        *MASKS,
        *SCENES,
        f"run_dir={run}",
        "trainer.resume=auto",
        "trainer.max_steps=5",
        "data.val_json=null",
    )
    assert said.code == 0, said
    assert "warning: " in said.out
    assert "last.pt" in said.out
    assert load_checkpoint(run / "last.pt")["step"] == 5
    for file in run.glob("step_*.pt"):
        file.unlink()
    (run / "last.pt").write_bytes(b"half")
    (run / "best.pt").write_bytes((at_home / "run" / "best.pt").read_bytes())
    assert_refused(
        here("train", *SMALL, *MASKS, *SCENES, f"trainer.resume={run}"),
        "no checkpoint there can be resumed; best.pt has no state of an optimizer: trainer.init=",
    )


@pytest.mark.usefixtures("at_home")
def test_starting_from_other_weights(tmp_path: Path) -> None:
    words = [*SMALL, *SCENES, "trainer.max_steps=1", "data.val_json=null", "trainer.init=run"]
    assert here("train", *words, *MASKS, f"run_dir={tmp_path / 'same'}").code == 0
    wider = [
        "model.heads.mask.channels=24",
        "model.heads.mask.layers=1",
        f"run_dir={tmp_path / 'wider'}",
    ]
    assert_refused(
        here("train", *words, *wider),
        "run does not fit this model",
        "heads.mask",
        "trainer.init_partial=true",
    )
    # Guards against: the folder is made before the weights are looked at
    assert not (tmp_path / "wider").exists()
    said = here("train", *words, *wider, "trainer.init_partial=true")
    assert said.code == 0, said
    assert "tensors do not fit" in said.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.max_step=3"], "did you mean 'trainer.max_steps'?"),
        (["experiment=nothing"], "experiment has no 'nothing'"),
        (["trainer.resume=absent.pt"], "absent.pt: no such checkpoint"),
        (["trainer.init=absent.pt"], "absent.pt: no such checkpoint"),
        (["trainer.precision=fp8"], "trainer.precision"),
        (["trainer.device=cuda:77"], "trainer.device=cuda:77"),
        (["data.num_classes=3"], "data.num_classes=3, but"),
        (["model.backbone.trunk.weights=absent.pth"], "absent.pth"),
        (
            ["data=custom", "data.train_json=absent.json", "data.images=scenes"],
            "absent.json: cannot be read",
        ),
        (["data=custom"], "data.train_json is not set"),
        (["run_dir=scenes/train.json"], "run_dir=scenes/train.json: the folder cannot be made"),
        # Guards against: a traceback instead of a line (an endless loop for batch_size=0), or the
        # folder is made too soon, or
        # (backend) the error only comes with the first evaluation, hours later
        (["optimizer.lr=-1.0"], "optimizer.lr=-1.0: expected a number above 0"),
        (["batch_size=0"], "batch_size"),
        (["data.num_workers=-1"], "num_workers"),
        (["evaluation.batch=0"], "evaluation.batch"),
        (["optimizer.base_batch_size=0"], "optimizer.base_batch_size"),
        (["evaluation.backend=slow"], "slow"),
    ],
)
@pytest.mark.timeout(30)
def test_errors_before_a_training_leave_nothing_behind(
    at_home: Path, tmp_path: Path, words: list[str], told: str
) -> None:
    run = [] if any(w.startswith("run_dir=") for w in words) else [f"run_dir={tmp_path / 'run'}"]
    data = [] if "data=custom" in words else SCENES
    before = tree(at_home)
    assert_refused(here("train", *SMALL, *MASKS, *data, *run, *words), told)
    assert list(tmp_path.iterdir()) == []
    assert tree(at_home) == before


def test_evaluate_writes_its_files(at_home: Path, tmp_path: Path) -> None:
    said = here(
        "evaluate",
        "checkpoint=run",
        f"output={tmp_path / 'out'}",
        "model.classifier.score_threshold=0.0",
    )
    assert said.code == 0, said
    pictures = ["confidence.png", "confusion.png", "pr_curves.png", "validation.png", "worst.png"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [RECORD, "detections.json", "metrics.json", "per_class.json", *pictures]
    )
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for kind in ("bbox", "segm"):
        for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"):
            assert -1 <= metrics[f"{kind}/{name}"] <= 1
    assert {"loss", "loss/mask", "loss/rpn_box"} <= set(metrics)
    assert set(json.loads((tmp_path / "out" / "per_class.json").read_text())) == {"bbox", "segm"}
    rows = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {row["image_id"] for row in rows} <= {1, 2, 3, 4}
    truth = json.loads((at_home / "scenes" / "val.json").read_text())
    again = CocoEvaluator(
        truth, Categories.from_dict(load_checkpoint(at_home / "run" / "best.pt")["categories"])
    )
    again.add_rows([1, 2, 3, 4], rows)
    assert again.compute()["segm/AP50"] == metrics["segm/AP50"]
    assert "AP50" in said.out


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
def test_evaluate_on_other_data_and_another_split(tmp_path: Path) -> None:
    other = [
        "data=custom",
        "data.val_json=scenes/train.json",
        "data.images=scenes/images",
        "data.num_workers=0",
    ]
    found = {}
    for name, words in {"custom": other, "train": ["split=train", "data.max_images=null"]}.items():
        said = here(
            "evaluate",
            "checkpoint=run/last.pt",
            f"output={tmp_path / name}",
            "trainer.device=cpu",
            "evaluation.batch=4",
            *words,
        )
        assert said.code == 0, said
        assert "images: 8" in said.out
        found[name] = json.loads((tmp_path / name / "metrics.json").read_text())
    # Guards against: the losses draw regions from an unseeded stream; no two evaluations of one
    # checkpoint give the same ones
    assert found["custom"] == found["train"]


def test_evaluate_gives_the_numbers_of_the_training(at_home: Path, tmp_path: Path) -> None:
    # Seeded likewise: the training seeds its evaluations with 0
    assert here("evaluate", "checkpoint=run/last.pt", f"output={tmp_path / 'out'}").code == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    logged = [
        json.loads(line) for line in (at_home / "run" / "metrics.jsonl").read_text().splitlines()
    ][-1]
    assert logged["kind"] == "val"
    assert {k: v for k, v in logged.items() if k not in ("step", "kind")} == pytest.approx(
        found, rel=1e-3, abs=1e-4
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["checkpoint=run"],
            "output",
        ),  # Guards against: a key that is missing ends in OmegaConf's traceback
        (["output=OUT"], "checkpoint=... is missing"),
        (["checkpoint=absent", "output=OUT"], "absent"),
        (["checkpoint=scenes/train.json", "output=OUT"], "not a checkpoint"),
        (["checkpoint=run", "output=OUT", "splitt=train"], "did you mean 'split'?"),
        (["checkpoint=run", "output=OUT", "split=test"], "split"),
        (
            [
                "checkpoint=run",
                "output=OUT",
                "data=custom",
                "data.val_json=absent.json",
                "data.images=scenes",
            ],
            "absent.json",
        ),
        (["checkpoint=run", "output=OUT", "evaluation.backend=slow"], "slow"),
    ],
)
@pytest.mark.usefixtures("at_home")
def test_evaluate_refuses_in_one_line_and_writes_nothing(
    tmp_path: Path, words: list[str], told: str
) -> None:
    # Guards against: it is made before the data is read
    words = [w.replace("OUT", str(tmp_path / "out")) for w in words]
    assert_refused(here("evaluate", *words), told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_predict_draws_from_the_best_threshold_of_the_checkpoint(
    at_home: Path, tmp_path: Path, suffix: str
) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    checkpoint = load_checkpoint(at_home / "run" / "best.pt")
    del checkpoint["format"]
    paths = {}
    for name, metrics in {
        "best": {"segm/best_threshold": 0.125, "bbox/best_threshold": 0.75},
        "undefined": {"segm/best_threshold": -1.0},
    }.items():
        paths[name] = tmp_path / f"{name}{suffix}"
        save_checkpoint(paths[name], {**checkpoint, "metrics": metrics})
    for name, words, expected in (
        ("best", [], 0.125),
        ("best", ["min_score=0.625"], 0.625),
        ("undefined", [], 0.5),
    ):
        _, config, _ = trained_model(paths[name], ["input=x", *words], "predict")
        assert config.min_score == expected
    # plots of the Python interface are those of the tool
    assert load_predictor(paths["best"], "cpu").plot_min_score == 0.125
    assert load_predictor(paths["best"], "cpu", min_score=0.25).plot_min_score == 0.25
    output = tmp_path / "out"
    image = "scenes/images/val_000001.jpg"
    said = here("predict", f"checkpoint={paths['best']}", f"input={image}", f"output={output}")
    assert said.code == 0, said
    assert "objects with a score of 0.125 or more" in said.out


def test_predict_draws_and_writes_coco_results(at_home: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    sizes = {"a.png": (70, 90), "b.jpg": (128, 100), "c.tiff": (40, 64)}
    for name, (height, width) in sizes.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            pictures / name
        )
    (pictures / "notes.txt").write_text("no picture")
    words = [
        "model.classifier.score_threshold=0.0",
        "min_score=0.0",
        "model.classifier.max_detections=5",
    ]
    said = here(
        "predict", "checkpoint=run", f"input={pictures}", f"output={tmp_path / 'out'}", *words
    )
    assert said.code == 0, said
    assert "3 images, 15 objects" in said.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        RECORD,
        "a.png",
        "b.jpg.png",
        "c.tiff.png",
        "predictions.json",
    ]
    for name, file in {"a.png": "a.png", "b.jpg": "b.jpg.png", "c.tiff": "c.tiff.png"}.items():
        drawn, picture = Image.open(tmp_path / "out" / file).size, Image.open(pictures / name).size
        assert (
            drawn[0] / picture[0] == drawn[1] / picture[1] >= 1
        )  # small pictures are enlarged, for the names to be read
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {(row["image_id"], Path(row["file_name"]).name) for row in rows} == {
        (1, "a.png"),
        (2, "b.jpg"),
        (3, "c.tiff"),
    }
    truth = COCO()
    truth.dataset = {
        "images": [
            {"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes.values(), 1)
        ],
        "categories": json.loads((at_home / "scenes" / "val.json").read_text())["categories"],
        "annotations": [],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        results = truth.loadRes(str(tmp_path / "out" / "predictions.json"))
    assert len(results.anns) == 15
    for i, (height, width) in enumerate(sizes.values(), 1):
        for row in results.imgToAnns[i]:
            assert results.annToMask(row).shape == (height, width)
            x, y, w, h = row["bbox"]
            assert 0 <= x <= x + w <= width + 0.01
            assert 0 <= y <= y + h <= height + 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
def test_predict_on_one_picture_and_on_a_pattern(tmp_path: Path) -> None:
    here(
        "predict",
        "checkpoint=run",
        "input=scenes/images/val_000001.jpg",
        f"output={tmp_path / 'one'}",
        "trainer.device=cpu",
    )
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        RECORD,
        "predictions.json",
        "val_000001.jpg.png",
    ]
    here(
        "predict",
        "checkpoint=run",
        "input='scenes/images/val_*.jpg'",
        f"output={tmp_path / 'many'}",
        "trainer.device=cpu",
    )
    assert len(list((tmp_path / "many").glob("*.png"))) == 4


@pytest.mark.usefixtures("at_home")
def test_predict_keeps_pictures_of_one_name_apart(tmp_path: Path) -> None:
    # Guards against: with a pattern over folders the later picture of a name overwrites the earlier
    # one
    for i, folder in enumerate(("x", "y")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        Image.fromarray(np.full((64, 64, 3), 100 * i, dtype=np.uint8)).save(
            tmp_path / "in" / folder / "a.png"
        )
    said = here(
        "predict",
        "checkpoint=run",
        f"input='{tmp_path}/in/**/*.png'",
        f"output={tmp_path / 'out'}",
        "trainer.device=cpu",
    )
    assert said.code == 0, said
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["checkpoint=run"], "input"),  # as for evaluate
        (["checkpoint=run", "input=absent"], "input=absent: no image found"),
        (["checkpoint=run", "input=scenes"], "no image found"),
        (["checkpoint=run", "input=scenes/train.json"], "train.json"),
        (["checkpoint=run", "input=scenes/images", "min_scor=0.5"], "did you mean 'min_score'?"),
        (["input=scenes/images"], "checkpoint=... is missing"),
    ],
)
@pytest.mark.usefixtures("at_home")
def test_predict_refuses_in_one_line(tmp_path: Path, words: list[str], told: str) -> None:
    assert_refused(here("predict", f"output={tmp_path / 'out'}", *words), told)


def test_load(at_home: Path) -> None:
    predictor = maskseg.load("run", device="cpu")
    predictor.model.classifier.score_threshold = 0.0  # type: ignore[union-attr]
    path = at_home / "scenes" / "images" / "val_000001.jpg"
    picture = Image.open(path).crop((0, 0, 128, 100))
    found = predictor(picture)
    assert len(found) == 100
    assert found.boxes.shape == (100, 4)
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype, found.masks.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
        torch.bool,
    )
    assert found.masks.shape == (100, 100, 128)
    assert (found.scores.diff() <= 0).all()
    assert found.labels.min() >= 0
    assert found.labels.max() < 8
    assert [predictor.categories.names[i] for i in found.labels.tolist()] == found.names
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([128, 100, 128, 100])).all()
    array = predictor(np.asarray(picture))
    assert torch.equal(array.boxes, found.boxes)
    assert torch.equal(array.masks, found.masks)
    assert torch.equal(predictor(str(path)).scores, predictor(path).scores)
    assert torch.equal(predictor(path).boxes, predictor(Image.open(path)).boxes)
    assert torch.equal(
        predictor(Image.open(path).convert("L")).boxes,
        predictor(np.asarray(Image.open(path).convert("L").convert("RGB"))).boxes,
    )


@pytest.mark.parametrize("short", [64, 256])
def test_load_gives_the_pictures_own_pixels_whatever_the_test_transforms(
    at_home: Path, short: int
) -> None:
    predictor = maskseg.load("run", device="cpu")
    predictor.prepare.transforms = [ResizeShortestEdge([short], 1000)]
    predictor.model.classifier.score_threshold = 0.0  # type: ignore[union-attr]
    found = predictor(
        Image.open(at_home / "scenes" / "images" / "val_000001.jpg").crop((0, 0, 128, 100))
    )
    assert found.masks.shape == (len(found), 100, 128)
    assert (found.boxes[:, 2:] <= torch.tensor([128, 100])).all()
    assert found.boxes[:, 2].max() > 100  # not in the small frame
    inside = [
        bool(m.any()) and m.nonzero().amax(0).flip(0).lt(b[2:] + 1.5).all().item()
        for m, b in zip(found.masks, found.boxes, strict=True)
        if m.any()
    ]
    assert len(inside) > 10
    assert all(inside)


def test_load_of_a_picture_in_which_nothing_is_found(at_home: Path) -> None:
    predictor = maskseg.load(at_home / "run" / "last.pt", device="cpu")
    predictor.model.classifier.score_threshold = 1.0  # type: ignore[union-attr]
    found = predictor(np.zeros((50, 70, 3), dtype=np.uint8))
    assert len(found) == 0
    assert found.masks.shape == (0, 50, 70)
    assert found.boxes.shape == (0, 4)
    assert found.names == []


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((5, 5, 7), dtype=np.uint8),
        np.full((5, 5, 3), 2.0),
        np.zeros((0, 5, 3), dtype=np.uint8),
        None,
        3,
        "absent.png",
    ],
)
@pytest.mark.usefixtures("at_home")
def test_what_is_no_image(image: Any) -> None:
    with pytest.raises(UserError, match=r"an image (is|of)|no such image file"):
        maskseg.load("run", device="cpu")(image)


def test_load_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no best\.pt or last\.pt in this folder"):
        maskseg.load(tmp_path)
    torch.save({"format": 1, "model": {}}, tmp_path / "bare.pt")
    with pytest.raises(UserError, match="lacks its config or categories"):
        maskseg.load(tmp_path / "bare.pt")


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_five_commands(tool: str) -> None:
    said = here(tool, "--help")
    assert said.code == 0
    assert said.err == ""
    assert sum(f"python tools/{tool}.py" in line for line in said.out.splitlines()) >= 5
    assert tool != "train" or "scenes_r18" in said.out


@pytest.mark.slow
def test_evaluate_and_predict_in_a_process(home: Path, tmp_path: Path) -> None:
    said = in_a_process("evaluate", "checkpoint=run", f"output={tmp_path / 'out'}", cwd=home)
    assert said.code == 0, said
    assert "AP50" in said.out
    said = in_a_process(
        "predict",
        "checkpoint=run",
        "input=scenes/images/val_000001.jpg",
        f"output={tmp_path / 'drawn'}",
        cwd=home,
    )
    assert said.code == 0, said
    assert "1 images" in said.out
    said = in_a_process("check_data", *SCENES, cwd=home)
    assert said.code == 0, said


@pytest.mark.slow
def test_a_misspelt_key_in_a_process(tmp_path: Path) -> None:
    said = in_a_process("train", "trainer.max_step=3", cwd=tmp_path)
    assert_refused(said, "did you mean 'trainer.max_steps'?")
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_check_data(at_home: Path, tmp_path: Path) -> None:
    words = [
        "data=custom",
        "data.train_json=scenes/train.json",
        "data.val_json=scenes/val.json",
        "data.images=scenes/images",
    ]
    said = here("check_data", *words)
    assert said.code == 0, said
    assert "8 classes, 8 images" in said.out
    assert "8 classes, 4 images" in said.out
    broken = json.loads((at_home / "scenes" / "val.json").read_text())
    broken["annotations"][0]["image_id"] = 999
    broken["images"][1]["file_name"] = "absent.jpg"
    (tmp_path / "val.json").write_text(json.dumps(broken))
    said = here("check_data", *words[:2], f"data.val_json={tmp_path / 'val.json'}", words[3])
    assert said.code == 2
    assert said.err.startswith("error: ")
    for part in (str(tmp_path / "val.json"), "absent.jpg", "999"):
        assert part in said.err
    assert_refused(
        here("check_data", "data=custom"), "nothing to check: set data.train_json or data.val_json"
    )
    assert_refused(
        here("check_data", "data=custom", "data.val_jsn=x"), "did you mean 'data.val_json'?"
    )
    assert_refused(
        here("check_data", "data=custom", "data.val_json=absent.json", "data.images=scenes"),
        "absent.json: cannot be read",
    )


@pytest.mark.usefixtures("at_home")
def test_check_data_tells_of_both_files_at_once(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text('{"images": [')
    words = [
        f"data.train_json={tmp_path / 'train.json'}",
        f"data.val_json={tmp_path / 'val.json'}",
        "data.images=scenes/images",
    ]
    said = here("check_data", "data=custom", *words)
    assert said.code == 2
    assert "train.json" in said.err
    assert "val.json" in said.err


def strangers(folder: Path) -> list[str]:
    """A COCO file as nobody here would write it: ids without order, no licence, area, iscrowd, no
    ids of annotations, odd names.
    """
    rng = np.random.default_rng(0)
    names = ["it's a «cat»", "=x, [y]: ${z}", "🦊", "a/b\\c", "zażółć  "]
    category_ids = [9_000_000_000, -5, 0, 77, 3]
    images, annotations = [], []
    (folder / "bilder ä").mkdir(parents=True)
    for i in range(4):
        height, width = (64, 96) if i % 2 else (100, 64)
        name = f"sub {i}/ä {i}.jpg"
        (folder / "bilder ä" / f"sub {i}").mkdir()
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            folder / "bilder ä" / name
        )
        images.append(
            {
                "file_name": name,
                "width": width,
                "height": height,
                "id": 2**40 - 17 * i,
                "extra": {"deep": [1]},
            }
        )
        for k in range(3):
            x, y = 5 + 14 * k, 6 + 9 * k
            part = [x, y, x + 20, y, x + 20, y + 25.5, x, y + 25.5]
            annotations.append(
                {
                    "image_id": 2**40 - 17 * i,
                    "category_id": category_ids[(i + k) % 5],
                    "segmentation": [part],
                    "bbox": [x, y, 20, 25.5],
                }
            )
    categories = [
        {"id": number, "name": name} for number, name in zip(category_ids, names, strict=True)
    ]
    (folder / "strange.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return [
        "experiment=scenes_r18",
        "data=custom",
        f"data.train_json='{folder / 'strange.json'}'",
        f"data.images='{folder / 'bilder ä'}'",
        *PLAIN,
    ]


@pytest.mark.usefixtures("at_home")
def test_a_strangers_data_trains_without_touching_code(tmp_path: Path) -> None:
    words = strangers(tmp_path / "data")
    said = here(
        "train",
        *words,
        *SMALL,
        *MASKS,
        f"data.val_json='{tmp_path / 'data' / 'strange.json'}'",
        f"run_dir={tmp_path / 'run'}",
        "trainer.plots=true",
    )
    assert said.code == 0, said
    assert "5 classes, 4 images" in said.out
    assert (tmp_path / "run" / "validation.png").is_file()
    assert steps(tmp_path / "run") == [1, 2, 3, 4]
    found = load_checkpoint(tmp_path / "run" / "last.pt")
    assert set(found["categories"]["ids"]) == {9_000_000_000, -5, 0, 77, 3}
    assert found["categories"]["names"][found["categories"]["ids"].index(0)] == "🦊"
    predictor = maskseg.load(tmp_path / "run", device="cpu")
    predictor(np.zeros((64, 64, 3), dtype=np.uint8))
    words = ["pictures=0", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}"]
    said = here("evaluate", *words)
    assert said.code == 0, said
    assert list((tmp_path / "out").glob("*.png")) == []
    assert {
        row["category_id"] for row in json.loads((tmp_path / "out" / "detections.json").read_text())
    } <= {9_000_000_000, -5, 0, 77, 3}


@pytest.mark.usefixtures("at_home")
def test_a_data_set_without_a_validation_file(tmp_path: Path) -> None:
    words = strangers(tmp_path / "data")
    run = ["trainer.max_steps=2", "trainer.plots=true", f"run_dir={tmp_path / 'run'}"]
    said = here("train", *words, *SMALL, *MASKS, *run)
    assert said.code == 0, said
    assert (tmp_path / "run" / "last.pt").is_file()
    assert (tmp_path / "run" / "results.png").is_file()
    assert not (tmp_path / "run" / "best.pt").exists()
    maskseg.load(tmp_path / "run", device="cpu")  # the last one, as there is no best


def boxes_only(folder: Path) -> list[str]:
    words = strangers(folder)
    content = json.loads((folder / "strange.json").read_text())
    for row in content["annotations"]:
        del row["segmentation"]
    (folder / "strange.json").write_text(json.dumps(content))
    return [*words, f"data.val_json='{folder / 'strange.json'}'"]


@pytest.mark.parametrize(
    "experiment", ["scenes_r18", pytest.param("coco_r50_fpn_1x", marks=pytest.mark.slow)]
)
def test_boxes_alone_train_a_model_without_masks(
    at_home: Path, tmp_path: Path, experiment: str
) -> None:
    # Guards against: what the experiment says of the head stays behind without a _target_
    words = [
        *boxes_only(tmp_path / "data"),
        *SMALL,
        f"experiment={experiment}",
        "~model/heads@model.heads.mask",
        "trainer.best_metric=bbox/AP",
    ]
    words += [
        "model.backbone.trunk.name=resnet18",
        "model.backbone.trunk.weights=null",
        f"run_dir={tmp_path / 'run'}",
        "trainer.max_steps=2",
    ]
    said = here("train", *words)
    assert said.code == 0, said
    assert (tmp_path / "run" / "best.pt").is_file()
    assert not any(
        name.startswith("heads.") for name in load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    )
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert "loss/mask" not in lines[0]
    assert "bbox/AP" in lines[-1]
    assert "segm/AP" not in lines[-1]
    predictor = maskseg.load(tmp_path / "run", device="cpu")
    predictor.model.classifier.score_threshold = 0.0  # type: ignore[union-attr]
    assert len(predictor(np.zeros((64, 64, 3), dtype=np.uint8))) > 0
    assert (
        here("evaluate", f"checkpoint={tmp_path / 'run'}", f"output={tmp_path / 'out'}").code == 0
    )
    said = here(
        "predict",
        f"checkpoint={tmp_path / 'run'}",
        f"input={at_home / 'scenes/images/val_000001.jpg'}",
        f"output={tmp_path / 'pictures'}",
    )
    assert said.code == 0, said


@pytest.mark.usefixtures("at_home")
def test_boxes_alone_with_a_mask_head_are_a_clear_error(tmp_path: Path) -> None:
    said = here(
        "train", *boxes_only(tmp_path / "data"), *SMALL, *MASKS, f"run_dir={tmp_path / 'run'}"
    )
    assert_refused(said, "mask", "~model/heads@model.heads.mask")
    # Guards against: it is found out in the first step; the folder then "already holds a run" for
    # the mended command
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.slow)]
)  # torch takes 5 s to end a worker after an error
@pytest.mark.usefixtures("at_home")
def test_a_picture_that_breaks_during_the_training(tmp_path: Path, workers: int) -> None:
    # Guards against: the line is a whole traceback
    words = strangers(tmp_path / "data")
    for file in (tmp_path / "data" / "bilder ä").rglob("*.jpg"):
        file.write_bytes(file.read_bytes()[:700])  # the header is whole: the check sees nothing
    said = here(
        "train",
        *words,
        *SMALL,
        *MASKS,
        f"run_dir={tmp_path / 'run'}",
        f"data.num_workers={workers}",
    )
    assert_refused(said, "the image is damaged or truncated", ".jpg")
    assert len(said.err.strip().splitlines()) == 1, said


@pytest.mark.usefixtures("at_home")
def test_resuming_with_another_optimiser_is_a_clear_error(tmp_path: Path) -> None:
    # Guards against: the optimiser takes the other one's state and breaks at its first step, or
    # trains with its numbers
    words = [
        *SMALL,
        *MASKS,
        *SCENES,
        "trainer.resume=run",
        f"run_dir={tmp_path / 'new'}",
        "trainer.max_steps=5",
        "data.val_json=null",
    ]
    assert_refused(here("train", *words, "optimizer=sgd"), "optimizer")


def test_resuming_into_a_new_folder(at_home: Path, tmp_path: Path) -> None:
    before = tree(at_home / "run")
    words = [
        *SMALL,
        *MASKS,
        *SCENES,
        "trainer.resume=run",
        f"run_dir={tmp_path / 'new'}",
        "trainer.max_steps=5",
        "data.val_json=null",
    ]
    said = here("train", *words)
    assert said.code == 0, said
    assert load_checkpoint(tmp_path / "new" / "last.pt")["step"] == 5
    assert tree(at_home / "run") == before


def test_predict_passes_over_damaged_images(at_home: Path, tmp_path: Path) -> None:
    # Guards against: one damaged file ends the work on a folder, without predictions.json
    folder = tmp_path / "in"
    folder.mkdir()
    whole = (at_home / "scenes" / "images" / "val_000001.jpg").read_bytes()
    for name in ("a.jpg", "photo (1).jpg", "z.jpg"):
        (folder / name).write_bytes(whole)
    (folder / "broken.jpg").write_bytes(whole[:700])
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7" + bytes(40))
    words = [
        "checkpoint=run",
        "trainer.device=cpu",
        "model.classifier.score_threshold=0.0",
        f"input={folder}",
    ]
    said = here("predict", *words, f"output={tmp_path / 'out'}")
    assert_refused(said, "2 of 5 images could not be predicted", "broken.jpg", "._a.jpg")
    assert "3 images, " in said.out
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())
    names = {Path(row["file_name"]).name for row in rows}
    assert names == {"a.jpg", "photo (1).jpg", "z.jpg"}
    before = tree(tmp_path)
    # Guards against: the images or the results of another job are replaced
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for output in ("out", "link", "in/../out"):
        said = here("predict", *words, f"output={tmp_path / output}")
        assert_refused(said, "predictions.json already exists")
    assert_refused(here("predict", *words, "output=run"), "output=run already holds a run")
    assert {k: v for k, v in tree(tmp_path).items() if not k.startswith("link")} == before


@pytest.mark.usefixtures("at_home")
def test_predict_never_replaces_its_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "b.jpg.png"):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    before = tree(tmp_path)
    words = ["checkpoint=run", "trainer.device=cpu"]
    for pattern in (tmp_path, tmp_path / "*.png"):
        said = here("predict", *words, f"input={pattern}", f"output={tmp_path}")
        assert_refused(said, "is an input file")
    assert tree(tmp_path) == before
    # two images whose drawings have the same name
    out = tmp_path / "out"
    assert here("predict", *words, f"input={tmp_path}", f"output={out}").code == 0
    assert len(list(out.glob("*.png"))) == 3


def test_evaluate_replaces_no_file(at_home: Path, tmp_path: Path) -> None:
    before = tree(at_home / "run")
    assert_refused(here("evaluate", "checkpoint=run", "output=run"), "already holds a run")
    assert tree(at_home / "run") == before
    (tmp_path / "worst.png").write_bytes(b"mine")
    said = here("evaluate", "checkpoint=run", f"output={tmp_path}")
    assert_refused(said, "worst.png already exists")
    said = here("train", *SMALL, *MASKS, *SCENES, f"run_dir={tmp_path}")
    assert_refused(said, "run_dir: ", "worst.png already exists")
    assert tree(tmp_path) == {"worst.png": b"mine"}


def test_overwrite_replaces_the_earlier_results_of_the_tool(at_home: Path, tmp_path: Path) -> None:
    images = sorted((at_home / "scenes" / "images").glob("val_*"))
    out = tmp_path / "out"
    words = ["checkpoint=run", "trainer.device=cpu", f"output={out}"]
    assert here("predict", *words, f"input={images[0]}").code == 0
    refused = here("predict", *words, f"input={images[1]}")
    assert_refused(refused, "already exists", "overwrite=true")
    said = here("predict", *words, f"input={images[1]}", "overwrite=true")
    assert said.code == 0, said
    # Guards against: the drawing of an image that predictions.json does not have is left
    assert {p.name for p in out.glob("*.png")} == {f"{images[1].name}.png"}
    (out / "predictions.json").write_text("edited")
    refused = here("predict", *words, f"input={images[1]}", "overwrite=true")
    assert_refused(refused, "predictions.json already exists", "unchanged files of this tool")
    before = tree(at_home / "run")
    for tool in ("predict", "evaluate"):
        words = ["checkpoint=run", "output=run", "overwrite=true", f"input={images[0]}"]
        assert_refused(here(tool, *words[: 4 if tool == "predict" else 3]), "already holds a run")
    refused = here("train", *SMALL, *MASKS, *SCENES, "run_dir=run", "overwrite=true")
    assert_refused(refused, "no such key 'overwrite'")
    assert tree(at_home / "run") == before


@pytest.mark.usefixtures("at_home")
def test_a_failure_to_draw_does_not_end_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("12 GB for an image")

    for name in ("draw_confusion", "draw_detections"):
        monkeypatch.setattr(f"maskseg.inference.validation.{name}", fail)
    said = here("evaluate", "checkpoint=run", f"output={tmp_path / 'out'}")
    assert said.code == 0, said
    assert "warning: confusion.png could not be drawn (12 GB for an image)" in said.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"metrics.json", "pr_curves.png"} <= names
    assert "confusion.png" not in names
