"""The training loop with a model small enough for a CPU: exact resume, checkpoints, logs, evaluation, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from maskseg.data.source import CocoSource
from maskseg.data.transforms import ColorJitter, Flip, RandomCrop, Transform
from maskseg.engine.checkpoint import Checkpoint, load_checkpoint, newest
from maskseg.engine.optim import cosine, multistep
from maskseg.engine.trainer import Trainer, pick_device
from maskseg.errors import UserError
from maskseg.inference.validation import Validation
from maskseg.modules.anchors import AnchorGenerator
from maskseg.modules.box_head import BoxClassifier, FCTrunk
from maskseg.modules.fpn import FPN
from maskseg.modules.mask_head import MaskHead
from maskseg.modules.pooling import MultiLevelRoIAlign
from maskseg.modules.resnet import ResNet
from maskseg.modules.rpn import RPN, RPNHead
from maskseg.modules.sampling import RegionSampler
from maskseg.rcnn import GeneralizedRCNN
from maskseg.structures import Batch

SIZE, CHANNELS, CLASSES = 64, 32, 2
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
TIMES = {"images_per_second", "data_seconds", "step_seconds", "memory_gb"}  # the numbers of a log that no two runs share
RANDOM: list[Transform] = [RandomCrop(56), Flip(0.5, 0.5), ColorJitter(0.2, 0.2, 0.2, 0.05)]


def write_scenes(folder: Path, count: int, seed: int = 0) -> str:
    """Pictures of SIZE with an ellipse and a triangle of two colours on noise, and their COCO file. -> its path."""
    rng = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(1, count + 1):
        picture = Image.fromarray(rng.integers(0, 60, (SIZE, SIZE, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(picture)
        for k in range(2):
            w, h = (int(v) for v in rng.integers(16, 26, 2))
            x, y = int(rng.integers(0, SIZE - w)), int(rng.integers(0, SIZE // 2 - h + 1) + k * SIZE // 2)
            if k == 0:
                angle = np.arange(24) * np.pi / 12
                points = np.stack([x + w / 2 * (1 + np.cos(angle)), y + h / 2 * (1 + np.sin(angle))], axis=1)
            else:
                points = np.array([[x, y + h], [x + w, y + h], [x + w / 2, y]])
            pen.polygon([tuple(p) for p in points.tolist()], fill=(230, 120, 20) if k == 0 else (30, 120, 240))
            row = {"image_id": i, "category_id": k + 1, "bbox": [x, y, w, h], "segmentation": [points.ravel().tolist()]}
            annotations.append({"id": len(annotations) + 1, **row})
        picture.save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE})
    categories = [{"id": 1, "name": "ellipse"}, {"id": 2, "name": "triangle"}]
    path = folder / "data.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(path)


def make_source(folder: Path, transforms: list[Transform] | None = None, **keys: Any) -> CocoSource:
    file = str(folder / "data.json")
    values: dict[str, Any] = {"num_workers": 0, "train_transforms": transforms or [], "val_json": file}
    return CocoSource(file, images=str(folder / "images"), **(values | keys))


def validation(source: CocoSource) -> Validation:
    return Validation(lambda: source.test_loader("val", 2), lambda: source.val.to_dict(), source.categories)


def make_model(seed: int = 0, norm: str = "BN") -> GeneralizedRCNN:
    torch.manual_seed(seed)
    anchors = AnchorGenerator([[8], [16], [32], [64], [128]])
    limits = {"per_level": 100, "per_image": 50}
    pool = partial(MultiLevelRoIAlign, STRIDES, canonical_size=56.0)
    return GeneralizedRCNN(
        FPN(ResNet("resnet18", norm=norm), CHANNELS),
        RPN(RPNHead(CHANNELS), anchors, STRIDES | {"p6": 64}, limits, limits, num_samples=64),
        RegionSampler(CLASSES, 32),
        BoxClassifier(pool(7), FCTrunk(CHANNELS, 7, 128), CLASSES, max_detections=20),
        {"mask": MaskHead(pool(14), CLASSES, CHANNELS, 32, layers=2)},
    )


class Run:
    """One process' worth of a training: everything is new but the folder."""

    def __init__(self, source: CocoSource, folder: Path, steps: int = 6, seed: int = 0, batch: int = 2, **keys: Any) -> None:
        values: dict[str, Any] = {"device": "cpu", "reference_batch": batch, "clip_norm": 10.0, "log_every": 1, "checkpoint_every": 0}
        self.trainer = Trainer(steps, **(values | keys))
        self.model = self.trainer.place(make_model(seed))
        self.optimizer = self.trainer.optimizer(self.model, partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4), batch)
        self.scheduler = multistep(self.optimizer, 6, (0.5,), warmup_steps=2)
        self.source, self.folder, self.batch, self.seed = source, folder, batch, seed
        folder.mkdir(exist_ok=True)

    def go(self, resume: Checkpoint | None = None, evaluate: Any = None, stop: int | None = None) -> dict[str, float]:
        """stop: the run is cut off after so many batches, as a kill would."""

        def loader(step: int) -> Iterable[Batch]:
            batches = self.source.train_loader(self.batch, self.trainer.max_steps, self.seed, step)
            for i, batch in enumerate(batches, start=step):
                if i == stop:
                    raise Killed
                yield batch

        about: Checkpoint = {"config": "name: test", "categories": {"names": ["a", "b"], "ids": [1, 2]}}
        return self.trainer.run(self.model, self.optimizer, self.scheduler, loader, self.folder, about, evaluate, resume)


class Killed(Exception):  # noqa: N818
    """What a kill is for the tests."""


def log(folder: Path, kind: str = "train") -> list[dict[str, float]]:
    """The lines of a run without what the clock says."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if line["kind"] == kind]


def tensors(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of nested dicts and lists by its path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in tensors(inner, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, inner in enumerate(value) for k, v in tensors(inner, f"{name}.{i}").items()}
    return {name: value}


def assert_equal(first: Any, second: Any) -> None:
    """Bit for bit."""
    one, other = tensors(first), tensors(second)
    assert list(one) == list(other)
    for key, value in one.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key


def assert_same_run(first: Run, second: Run) -> None:
    assert_equal(dict(first.model.state_dict()), dict(second.model.state_dict()))
    assert_equal(first.optimizer.state_dict(), second.optimizer.state_dict())
    assert_equal(load_checkpoint(first.folder / "last.pt"), load_checkpoint(second.folder / "last.pt"))
    assert log(first.folder) == log(second.folder)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 5)
    return folder


@pytest.fixture(scope="module")
def whole(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps without a stop."""
    run = Run(make_source(scenes, RANDOM), tmp_path_factory.mktemp("whole"))
    run.go()
    return run


def test_a_run_writes_what_it_should(whole: Run) -> None:
    checkpoint = load_checkpoint(whole.folder / "last.pt")
    assert checkpoint["step"] == 6
    assert checkpoint["config"] == "name: test"
    assert checkpoint["categories"] == {"names": ["a", "b"], "ids": [1, 2]}
    assert not (whole.folder / "best.pt").exists()  # nothing was evaluated
    lines = log(whole.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    terms = ["loss/rpn_objectness", "loss/rpn_box", "loss/box_class", "loss/box_regression", "loss/mask"]
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line[term] for term in terms), rel=1e-5)
    assert any((whole.folder / "tensorboard").iterdir())
    start = make_model().state_dict()
    moved = [k for k, v in whole.model.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) > 0.9 * len(start)


def test_the_logged_rate_is_the_one_of_the_step(whole: Run) -> None:
    # Guards against: the line of step k holds the rate of step k + 1, as the schedule has moved on
    factor = whole.scheduler.lr_lambdas[0]  # type: ignore[attr-defined]
    assert [line["lr"] for line in log(whole.folder)] == pytest.approx([0.01 * factor(step) for step in range(6)])


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
def test_a_resumed_run_is_the_run_that_never_stopped(whole: Run, scenes: Path, tmp_path: Path, workers: int, stop: int) -> None:
    """Weights, optimiser, schedule, random state and logged losses, bit for bit; stopped in the middle of an epoch of 5 images (batches of 2).

    The second time the run is cut off a step after its last checkpoint, so that a step is done twice.
    """
    # Guards against: an iterator of a DataLoader draws from torch's global stream, which a resume has just restored
    source = make_source(scenes, RANDOM, num_workers=workers)
    first = Run(source, tmp_path, checkpoint_every=3)
    with pytest.raises(Killed):
        first.go(stop=stop)
    found = newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 3
    torch.manual_seed(1234)
    second = Run(source, tmp_path, seed=0)
    nn.init.zeros_(next(second.model.backbone.parameters()))
    second.go(found[1])
    assert_same_run(whole, second)


def test_a_finished_run_that_is_resumed_does_nothing(whole: Run, tmp_path: Path) -> None:
    run = Run(whole.source, tmp_path)
    run.go(load_checkpoint(whole.folder / "last.pt"))
    assert_equal(dict(run.model.state_dict()), dict(whole.model.state_dict()))
    assert log(tmp_path) == []


def test_a_longer_run_goes_on_from_a_shorter_one(whole: Run, tmp_path: Path) -> None:
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
    found = newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 4
    Run(whole.source, tmp_path).go(found[1])
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert log(tmp_path) == log(whole.folder)


def test_how_often_lines_are_written(scenes: Path, tmp_path: Path) -> None:
    Run(make_source(scenes), tmp_path, steps=5, log_every=2).go()
    assert [line["step"] for line in log(tmp_path)] == [2, 4, 5]


class Scripted:
    """An evaluation that gives the numbers it was told, and draws random numbers as a careless one would."""

    def __init__(self, *values: float, key: str = "segm/AP") -> None:
        self.values, self.key, self.steps = list(values), key, []  # type: ignore[var-annotated]

    def __call__(self, model: nn.Module, step: int, log: Any = None) -> dict[str, float]:
        assert log is not None
        model.eval()
        torch.rand(7)
        np.random.rand(3)
        self.steps.append(step)
        return {self.key: self.values.pop(0), "loss": 1.5}


def test_an_evaluation_changes_nothing_of_what_follows(whole: Run, scenes: Path, tmp_path: Path) -> None:
    source = make_source(scenes, RANDOM)
    check = validation(source)
    run = Run(source, tmp_path, evaluate_every=2)
    careless = Scripted(0.1, 0.2, 0.3)

    def both(model: nn.Module, step: int, log: Any) -> dict[str, float]:
        return check(model, step, log) | careless(model, step, log)

    run.go(evaluate=both)
    assert careless.steps == [2, 4, 6]
    assert log(tmp_path) == log(whole.folder)
    assert_equal(dict(run.model.state_dict()), dict(whole.model.state_dict()))
    assert_equal(run.optimizer.state_dict(), whole.optimizer.state_dict())


def test_best_and_last(scenes: Path, tmp_path: Path) -> None:
    run = Run(make_source(scenes), tmp_path, evaluate_every=1, steps=4)
    evaluate = Scripted(0.2, 0.5, 0.4, 0.5)
    metrics = run.go(evaluate=evaluate)
    assert metrics == {"segm/AP": 0.5, "loss": 1.5}
    best, last = load_checkpoint(tmp_path / "best.pt"), load_checkpoint(tmp_path / "last.pt")
    assert (best["step"], best["best"], best["metrics"]["segm/AP"]) == (2, 0.5, 0.5)
    assert (last["step"], last["best"]) == (4, 0.5)
    assert [line["segm/AP"] for line in log(tmp_path, "val")] == [0.2, 0.5, 0.4, 0.5]
    resumed = Run(run.source, tmp_path, evaluate_every=1, steps=6)
    resumed.go(last, Scripted(0.3, 0.45))
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 2  # the best of the whole run, not of its second half
    assert [line["step"] for line in log(tmp_path, "val")] == [1, 2, 3, 4, 5, 6]


def test_a_metric_that_is_not_there_is_told(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(make_source(scenes), tmp_path, steps=1).go(evaluate=Scripted(0.3, key="bbox/AP"))
    assert "trainer.best_metric='segm/AP' is not among the metrics" in capsys.readouterr().out
    assert not (tmp_path / "best.pt").exists()
    assert (tmp_path / "last.pt").exists()


def test_a_checkpoint_is_safe_before_the_evaluation(scenes: Path, tmp_path: Path) -> None:
    def broken(*_: Any) -> dict[str, float]:
        raise Killed

    with pytest.raises(Killed):
        Run(make_source(scenes), tmp_path, steps=2).go(evaluate=broken)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


def damaged(folder: Path) -> CocoSource:
    """The scenes with two of five pictures cut short after the check."""
    write_scenes(folder, 5)
    source = make_source(folder, skip_bad=50)
    _ = source.train
    for i in (2, 4):
        (folder / "images" / f"{i}.png").write_bytes(b"\x89PNG\r\n")
    return source


def test_skipped_images_are_counted_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(damaged(tmp_path / "data"), tmp_path / "run", steps=3)
    run.trainer.skip_bad = 10
    run.go()
    told = capsys.readouterr().out
    assert "warning: image passed over (1 of at most 10)" in told
    assert "warning: image passed over (2 of at most 10)" in told
    assert "2.png" in told or "4.png" in told


def test_too_many_skipped_images_stop_the_run(tmp_path: Path) -> None:
    run = Run(damaged(tmp_path / "data"), tmp_path / "run", steps=40)
    run.trainer.skip_bad = 2
    with pytest.raises(UserError, match=r"more than data\.skip_bad=2 images cannot be read, the last: .*[24]\.png"):
        run.go()
    assert len(log(tmp_path / "run")) < 10


def test_bf16_runs_and_keeps_the_weights_in_fp32(whole: Run, tmp_path: Path) -> None:
    run = Run(whole.source, tmp_path, precision="bf16", steps=2)
    run.go()
    assert {v.dtype for v in run.model.state_dict().values()} == {torch.float32, torch.int64}
    first, wanted = log(tmp_path)[0]["loss"], log(whole.folder)[0]["loss"]
    assert first != wanted
    assert first == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"precision": "fp8"}, r"trainer\.precision must be one of fp32, bf16, fp16, not 'fp8'"),
        ({"accumulate": 0}, r"trainer\.accumulate must be at least 1, not 0"),
        ({"ema": 1.0}, r"trainer\.ema must be at least 0 and below 1, not 1"),
        ({"keep": -1}, r"trainer\.keep must be at least 0, not -1"),
        ({"device": "cuda:99"}, r"trainer\.device=cuda:99"),
        ({"device": "gpu"}, r"trainer\.device=gpu"),
        ({"max_steps": 0}, r"trainer\.max_steps must be at least 1, not 0"),
    ],
)
def test_keys_that_make_no_sense(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as raised:
        Trainer(**({"max_steps": 1, "device": "cpu"} | keys))
    assert "\n" not in str(raised.value)


def test_the_device_that_is_there() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_clipped(scenes: Path, tmp_path: Path, clip: float) -> None:
    run = Run(make_source(scenes), tmp_path, steps=1, clip_norm=clip)
    run.go()
    norm = torch.stack([p.grad.norm() for p in run.model.parameters() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3) if clip else norm > 0.1


def test_channels_last_changes_the_layout_only(scenes: Path, tmp_path: Path) -> None:
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


def test_a_model_learns_a_few_scenes_by_heart(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3)
    source, steps = make_source(tmp_path), 55
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
