"""Keys with the value auto follow the objects of the training images; a checkpoint has numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskseg import config as configs
from maskseg.commands import train as training
from maskseg.config import fitted
from maskseg.config.auto import FITTED_KEYS, open_keys
from maskseg.config.build import build_source
from maskseg.config.fitted import choose_trunk_weights, fit_to_objects
from maskseg.data.object_sizes import (
    ObjectSizes,
    choose_anchors,
    choose_detections,
    choose_proposals,
    choose_size,
    few_samples,
)
from maskseg.engine.checkpoint import save_checkpoint
from maskseg.engine.distributed import DistributedContext
from maskseg.errors import UserError
from maskseg.structures import Categories


def objects(*sides: float, most: int = 1) -> ObjectSizes:
    return ObjectSizes(np.array(sides, dtype=np.float64), most)


@pytest.mark.parametrize(
    ("side", "size"),
    [(0.5, 256), (0.05, 320), (0.0334, 480), (0.03125, 512), (0.0312, 512), (0.001, 512)],
)
def test_the_size_gives_small_objects_16_pixels(side: float, size: int) -> None:
    chosen, reason = choose_size(objects(*[side] * 20), 256, 512)
    assert chosen == size
    assert (side * size < 16) == ("less than 16 pixels" in reason)
    assert chosen % 32 == 0


def test_a_tenth_of_the_objects_may_be_smaller() -> None:
    sides = [0.001, *[0.1] * 19]
    assert choose_size(objects(*sides), 128, 512)[0] == 160
    assert choose_size(objects(*[0.001] * 4, *[0.1] * 16), 128, 512)[1] == (
        "the largest of data.size_range; 20% of the objects have a side of less than 16 pixels: "
        "data.size=16000, or images that are cut into tiles, would help"
    )


@pytest.mark.parametrize(
    ("small", "large", "sizes"),
    [
        (20, 500, [32, 64, 128, 256, 512]),  # those of COCO at 800 pixels
        (16, 200, [16, 32, 64, 128, 256]),
        (6, 50, [8, 16, 32, 64, 128]),
        (1, 20, [4, 8, 16, 32, 64]),
        (400, 700, [32, 64, 128, 256, 512]),
        (6, 500, [8, 23, 64, 181, 512]),  # a wide range: the levels are further apart
        (6, 3000, [8, 23, 64, 181, 512]),
    ],
)
def test_anchors_cover_the_objects(small: float, large: float, sizes: list[int]) -> None:
    sides = [small / 100] * 50 + [large / 100] * 50
    chosen, reason = choose_anchors(objects(*sides), 100, 5)
    assert chosen == [[size] for size in sizes]
    assert f"from {small} (10%) to {large} pixels" in reason


@pytest.mark.parametrize(
    ("most", "detections"), [(1, 100), (80, 100), (81, 150), (300, 400), (5000, 2000)]
)
def test_limits_follow_the_fullest_image(most: int, detections: int) -> None:
    number, reason = choose_detections(objects(0.1, most=most))
    assert number == detections
    assert f"at most {most} objects" in reason
    assert ("more than can be found" in reason) == (most > number)
    assert choose_proposals(detections, 1000)[0] == max(3 * detections, 1000)


def test_few_regions_of_objects_are_reported() -> None:
    assert not few_samples(objects(0.1, most=32), 128, 0.25)
    warning = few_samples(objects(0.1, most=300), 128, 0.25)
    assert "at most 32 regions" in warning
    assert "300 objects: model.sampler.num_samples=1216 learns from all" in warning


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images without files: 40 objects of 20 x 20 px in 400 x 200 px, and one in 100 x 300."""
    boxes = [[9 * i, 5, 20, 20] for i in range(40)]
    images = [
        {"id": 1, "file_name": "1.png", "height": 200, "width": 400},
        {"id": 2, "file_name": "2.png", "height": 300, "width": 100},
    ]
    annotations: list[dict[str, Any]] = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)
    ]
    crowd = {"id": 98, "image_id": 2, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 1}
    annotations += [{**annotations[0], "id": 99, "image_id": 2}, crowd]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "data.json").write_text(json.dumps(content))
    return tmp_path


def compose(folder: Path, *overrides: str) -> Any:
    keys = [
        "experiment=custom_r18",
        f"data.train_json={folder}/data.json",
        f"data.images={folder}",
        "data.val_fraction=null",
        "data.check_images=false",
        "trainer.device=cpu",
        "trainer.max_steps=5",
        "trainer.evaluate_every=0",
        "trainer.checkpoint_every=0",
        *overrides,
    ]
    return configs.compose("train", keys)


def fit(config: Any) -> tuple[Any, list[str]]:
    lines: list[str] = []
    source = build_source(config.data)
    source = fit_to_objects(config, source, lambda text, **_: lines.append(text))
    return source, lines


def test_all_numbers_are_chosen_and_reported(folder: Path) -> None:
    config = compose(folder)
    assert len(open_keys(config)) == len(FITTED_KEYS)
    source, lines = fit(config)
    # Of the first image, 20 of 200 px; the longer side of the second one, 5/3 of the size.
    assert config.data.size == 256
    assert source.split("val").transforms[0].resize.sizes == [256]
    assert source.split("train").transforms[0].resize.sizes[0] == 205
    assert config.model.proposer.anchors.sizes == [[32], [64], [128], [256], [512]]
    assert config.model.classifier.max_detections == config.evaluation.max_detections == 100
    limits = config.model.proposer
    assert (limits.train_limits.post_nms_top_n, limits.test_limits.post_nms_top_n) == (300, 300)
    assert (limits.train_limits.pre_nms_top_n, limits.test_limits.pre_nms_top_n) == (600, 300)
    assert len(lines) == 8
    assert lines[0] == "data.size=256: 90% of the objects have a side of at least 21 pixels"
    assert lines[2] == "model.classifier.max_detections=100: at most 40 objects in an image"
    assert lines[-1].startswith("a training step learns from at most 32 regions")
    assert open_keys(config) == ["model.backbone.trunk.weights"]


def test_numbers_of_the_user_count(folder: Path) -> None:
    config = compose(folder, "data.size=128", "model.classifier.max_detections=20", "data=custom")
    _, lines = fit(config)
    assert config.data.size == 128
    assert config.model.proposer.anchors.sizes == [[16], [32], [64], [128], [256]]
    assert config.model.classifier.max_detections == 20
    assert config.model.proposer.test_limits.post_nms_top_n == 300
    assert not any(line.startswith(("data.size", "model.classifier")) for line in lines)


def test_data_without_objects_are_refused(folder: Path) -> None:
    content = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps({**content, "annotations": []}))
    with pytest.raises(UserError, match=r"data\.json: no training image has an object, by which d"):
        fit(compose(folder))


def test_a_resumed_run_takes_the_numbers_of_its_checkpoint(folder: Path) -> None:
    trained = compose(folder)
    fit(trained)
    trained.data.size = 288
    trained.model.backbone.trunk.weights = None
    config = compose(folder)
    fitted.take_from_checkpoint(config, configs.to_yaml(trained))
    assert open_keys(config) == []
    assert config.data.size == 288
    assert configs.config_differences(config, configs.to_yaml(trained)) == []
    # Without an experiment on the command line, the whole config is the checkpoint's.
    own = configs.resumed_config(configs.to_yaml(trained), ["trainer.epochs=3"])
    assert open_keys(own) == []
    assert (own.trainer.epochs, own.trainer.max_steps) == (3, None)
    (difference,) = configs.config_differences(own, configs.to_yaml(trained))[:1]
    assert difference == "trainer.max_steps: 5 -> None"


def test_a_resumed_run_trains_and_validates_at_the_size_of_its_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        """Ends the training where its data are complete."""

    trained = compose(folder)
    fit(trained)
    trained.data.size = 288
    trained.model.backbone.trunk.weights = None
    save_checkpoint(folder / "last.pt", {"config": configs.to_yaml(trained), "model": {}})
    sources = []

    def stop(*arguments: Any) -> None:
        sources.append(fit_to_objects(*arguments))
        raise StoppedError

    monkeypatch.setattr(training, "fit_to_objects", stop)
    resumed = f"trainer.resume={folder}/last.pt"
    config = compose(folder, "model.classifier.max_detections=30", resumed)
    with pytest.raises(StoppedError):
        training.train(config)
    (source,) = sources
    assert source.split("val").transforms[0].resize.sizes == [288]
    assert source.split("train").transforms[0].resize.sizes[-1] == 288
    assert config.data.size == 288
    assert config.model.classifier.max_detections == 30


def test_other_tools_use_the_usual_numbers(folder: Path) -> None:
    config = compose(folder, "model.backbone.trunk.weights=auto")
    configs.set_key(config, "data.num_classes", 1)
    with torch.device("meta"):
        model = configs.build_model(config)
    assert model.classifier.max_detections == 100
    with pytest.raises(UserError, match=r"data\.size='automatic': expected a whole number"):
        compose(folder, "data.size=automatic")
    with pytest.raises(UserError, match=r"num_samples='auto': expected a whole number"):
        compose(folder, "model.sampler.num_samples=auto")
    with pytest.raises(UserError, match=r"data\.size='auto'"):
        configs.compose("train", ["data.size=auto"])  # of the synthetic dataset


@pytest.mark.parametrize(
    "key",
    [
        *("evaluation.max_detections", "model.proposer.sampler.num_samples", "data.max_images"),
        *("data.size_range", "model.classifier.pooler.size", "batch_size"),
    ],
)
def test_other_keys_are_never_auto(folder: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key}='auto': expected "):
        compose(folder, f"{key}=auto")


def test_weights_elsewhere_are_never_auto(folder: Path) -> None:
    strides = "{c4: 16}"
    keys = [f"model.proposer.strides={strides}", f"model.classifier.pooler.strides={strides}"]
    backbone = ["model/backbone=resnet", "~model/heads@model.heads.mask"]
    config = compose(folder, *backbone, *keys, "model.backbone.weights=auto")
    configs.set_key(config, "data.num_classes", 1)
    with pytest.raises(UserError, match=r"weights 'auto': no such file"):
        configs.build_model(config)


def test_references_to_open_keys_are_usual_numbers(folder: Path) -> None:
    """Also where they are references to references."""
    config = compose(folder, "data.min_proposals=${data.size}", "batch_size=${data.min_proposals}")
    assert (config.data.size, config.batch_size) == ("auto", "auto")
    transforms = "[{_target_: maskseg.data.transforms.Resize, size: '${batch_size}'}]"
    config = compose(folder, "batch_size=${data.size}", f"data.test_transforms={transforms}")
    assert build_source(config.data).split("val").transforms[0].resize.sizes == [800]
    assert config.data.size == "auto"


def test_tools_on_a_checkpoint_refuse_auto(folder: Path) -> None:
    config = compose(folder)
    fit(config)
    config.model.backbone.trunk.weights = None
    text = configs.to_yaml(config)
    for tool, key in (("predict", "data.size"), *(("evaluate", key) for key in FITTED_KEYS)):
        with pytest.raises(UserError, match=rf"^{key}=auto: only a training chooses it") as raised:
            configs.from_checkpoint(text, [f"{key}=auto"], tool)
        assert "\n" not in str(raised.value)


def test_a_checkpoint_is_used_at_the_chosen_size(folder: Path) -> None:
    config = compose(folder)
    fit(config)
    config.model.backbone.trunk.weights = None
    text = configs.to_yaml(config)
    classes = Categories(("a",), (1,))
    for overrides, size in (
        ([], 256),
        (["data.size=96"], 96),
        (["data=custom", f"data.val_json={folder}/data.json"], 256),
        (["data=custom", "data.size=96"], 96),
        (["data=coco"], 256),
    ):
        used = configs.from_checkpoint(text, overrides, "evaluate")
        assert build_source(used.data, classes).split("val").transforms[0].resize.sizes == [size], (
            overrides
        )


@pytest.mark.parametrize("cached", [True, False])
def test_the_trunk_starts_from_what_is_at_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    def fetch(address: str) -> Path:
        assert "/resnet18-" in address
        if not cached:
            raise UserError(f"{address} could not be downloaded; put it there")
        return folder

    monkeypatch.setattr(fitted, "fetch", fetch)
    lines: list[str] = []
    for needed in (True, False):
        config = compose(folder)
        choose_trunk_weights(
            config, DistributedContext(), lambda text, **_: lines.append(text), needed
        )
        expected = "IMAGENET1K_V1" if needed and cached else None
        assert config.model.backbone.trunk.weights == expected
    (line,) = lines
    assert ("pretrained on ImageNet" in line) == cached
    assert ("trained from scratch; https://" in line) == (not cached)


def test_a_wrong_trunk_downloads_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitted, "fetch", lambda address: pytest.fail(f"{address} is fetched"))
    for needed in (True, False):
        for name in ("resnet20", "vgg16"):
            config = compose(folder, f"model.backbone.trunk.name={name}")
            with pytest.raises(UserError, match=f"trunk must be one of resnet18, .*, not '{name}'"):
                choose_trunk_weights(config, DistributedContext(), print, needed)
        config = compose(folder)
        config.model.backbone.trunk = {"_target_": "package.Trunk", "weights": "auto"}
        with pytest.raises(UserError, match=r"trunk\.weights=auto: only a ResNet has such weights"):
            choose_trunk_weights(config, DistributedContext(), print, needed)


def test_the_other_processes_wait_for_a_download(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process of each machine downloads, and the first problem counts for all."""
    works: list[bool] = []

    class Context(DistributedContext):
        def gather(self, value: Any) -> list[Any]:
            return [value, "second machine: no network"]

    def run(_: DistributedContext, is_working: bool, function: Callable[[], None]) -> None:
        works.append(is_working)
        if is_working:
            function()

    monkeypatch.setattr(fitted, "run_while_others_wait", run)
    monkeypatch.setattr(fitted, "fetch", lambda _: folder)
    lines: list[str] = []
    for local_rank in (0, 1):
        config = compose(folder)
        choose_trunk_weights(
            config, Context(local_rank=local_rank), lambda text, **_: lines.append(text), True
        )
        assert config.model.backbone.trunk.weights is None
    assert all(line.endswith("from scratch; second machine: no network") for line in lines)
    assert works == [True, False]


def test_a_dataset_without_a_smallest_number_of_proposals(folder: Path) -> None:
    data = ["data=coco", f"data.root={folder}", "data.val_json=null"]
    data += [f"data.train_json={folder}/data.json"]
    keys = [f"data.train_images={folder}", "data.check_images=false", "trainer.device=cpu"]
    config = configs.compose("train", ["experiment=custom_r18", *data, *keys])
    assert "min_proposals" not in config.data
    _, lines = fit(config)
    limits = config.model.proposer.test_limits
    assert (limits.post_nms_top_n, limits.pre_nms_top_n) == (1000, 1000)
    assert not any(line.startswith("data.size") for line in lines)


def test_anchors_of_a_shorter_pyramid(folder: Path) -> None:
    config = compose(folder, "model.backbone.trunk.out_level=c4")
    fit(config)
    assert config.model.proposer.anchors.sizes == [[32], [64], [128], [256]]
    config = compose(folder, "model.proposer.strides={p3: 8, p4: 16}")
    fit(config)
    assert len(config.model.proposer.anchors.sizes) == 2


def test_a_sampler_without_regions_of_objects(folder: Path) -> None:
    _, lines = fit(compose(folder, "model.sampler.positive_fraction=0"))
    assert lines[-1].endswith("no region of an object: model.sampler.positive_fraction is 0")


def test_a_reversed_range_of_sizes_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.size_range=\[512,256\]: the first size must be"):
        fit(compose(folder, "data.size_range=[512,256]"))
