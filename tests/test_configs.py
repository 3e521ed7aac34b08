"""Every experiment composes and builds; a wrong override raises an error of one clear line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from maskseg import cli
from maskseg import config as configs
from maskseg.annotation.classifier import ImageClassifier
from maskseg.data.datasets.bsds import BsdsSource
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.scenes import ScenesSource
from maskseg.data.transforms import Flip
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.files.configs import group_files
from maskseg.models.mask_head import MaskHead
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Categories
from maskseg.variants.cfm.net import CFMNet
from maskseg.variants.hash.net import SegmentationNet

NO_WEIGHTS = [
    "model.backbone.trunk.weights=null",
    "data.num_classes=3",
    "data.point_ranges=[[0,0],[0,5],[5,9]]",
    "trainer.device=cpu",
]
TINY = [
    "model.backbone.trunk.name=resnet18",
    "model.backbone.channels=16",
    "model.classifier.mlp.width=16",
]
TINY += ["model.heads.mask.channels=16", "model.heads.mask.layers=1", *NO_WEIGHTS]


@pytest.fixture(autouse=True)
def no_data_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the experiments' data, which are not on this machine, are not looked for."""
    module = import_module("maskseg.config.build")
    monkeypatch.setattr(module, "check_data_paths", lambda *_, **__: None)


def refusal(overrides: list[str], name: str = "train") -> str:
    with pytest.raises(UserError) as raised:
        configs.compose(name, overrides)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def make_batch() -> Batch:
    sizes = torch.tensor([[64, 64]])
    return Batch(torch.zeros((1, 3, 64, 64), dtype=torch.uint8), sizes, sizes, [0], [""])


def test_a_model_of_segments_only_builds_from_alexnet() -> None:
    config = configs.compose("train", ["experiment=hash_bsds", "model.backbone.weights=null"])
    model = configs.build_model(config)
    assert config.name == "hash_bsds"
    assert isinstance(model, SegmentationNet)
    assert model.segmenter.feature_spec == model.backbone.levels["fc7"]
    source = configs.build_source(config.data)
    assert isinstance(source, BsdsSource)
    assert source.split == "val"


NO_RESNET = ("hash_bsds", "voc_cfm_vgg16", "context_cfm_vgg16")  # tested elsewhere


@pytest.mark.parametrize(
    "experiment", [name for name in configs.experiments() if name not in NO_RESNET]
)
def test_every_experiment_builds(experiment: str) -> None:
    no_weights = (
        ["model.backbone.weights=null", "data.num_classes=3", "trainer.device=cpu"]
        if experiment.startswith("classify")
        else NO_WEIGHTS
    )
    data = ["data.train_json=all.json"] if experiment.startswith("custom_") else []
    config = configs.compose("train", [f"experiment={experiment}", *no_weights, *data])
    assert config.name == experiment
    model = configs.build_model(config)
    if experiment.startswith("classify"):
        assert isinstance(model, ImageClassifier)
    elif "cfm" in experiment:
        assert isinstance(model, CFMNet)
    else:
        assert isinstance(model, GeneralizedRCNN)
        assert isinstance(model.heads["mask"], MaskHead)
    trainer = configs.build(config.trainer)
    assert isinstance(trainer, Trainer)
    assert trainer.max_steps == config.trainer.max_steps
    optimizer = configs.build_optimizer(config, trainer, model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == trainable
    assert optimizer.param_groups[0]["lr"] == pytest.approx(
        config.optimizer.lr * config.batch_size / config.optimizer.base_batch_size
    )
    length = trainer.in_steps(1000, config.batch_size).length
    scheduler = configs.build(config.scheduler)(optimizer, max_steps=length.max_steps)
    full = scheduler.lr_lambdas[0](config.scheduler.warmup_steps)
    end = scheduler.lr_lambdas[0](length.max_steps - 1)
    assert full == pytest.approx(1.0)
    assert end < 0.02
    source = configs.build_source(config.data)
    assert isinstance(source, CocoSource)
    assert source.splits() == ["train", "val"]
    assert all(callable(t) for name in ("train", "val") for t in source.split(name).transforms)
    assert source.split("train").transforms


# Categories that suit all models: two things, the second with keypoints, and stuff.
DATA_KEYS = {"num_classes": 3, "num_things": 2, "point_ranges": [[0, 0], [0, 5], [5, 5]]}
STAGES = ("backbone", "proposer", "sampler", "classifier")
SEGMENT_DATA = ("bsds", "msrc")  # datasets that are not for training
RPN_CHANNELS = r"model\.proposer\.head\.in_channels is not set"
NO_BOX_POOLER = r"model\.heads\.\w+\.pooler\.\w+: Interpolation key 'model\.classifier\.pooler\."
# Choices of stages that do not fit a model, with the key that the error names.
MISFITS = {
    "mask_rcnn": {
        "backbone=alexnet": RPN_CHANNELS,
        "backbone=resnet": RPN_CHANNELS,
        "backbone=vgg16": RPN_CHANNELS,
        "classifier=cfm": NO_BOX_POOLER,
        "classifier=cfm_svm": NO_BOX_POOLER,
    },
    "cfm": {
        "backbone=alexnet": r"model\.classifier\.levels=",
        "backbone=resnet": r"model\.classifier\.levels=",
        "backbone=vgg16": r"model\.classifier\.levels=",
    },
    "cfm_vgg16": {
        "backbone=fpn": r"model\.classifier\.mlp\.weights: .*'model\.backbone\.weights'",
        "backbone=resnet": r"model\.classifier\.levels=",
        "classifier=cfm": r"model\.classifier\.levels=",
        "classifier=cfm_svm": r"model\.classifier\.levels=",
    },
    "hash_net": {
        "backbone=fpn": r"model\.segmenter\.level=fc7",
        "backbone=resnet": r"model\.segmenter\.level=fc7",
        "backbone=vgg16": r"model\.segmenter\.level=fc7",
    },
    "image_classifier": {
        "backbone=alexnet": r"model\.head\.levels=",
        "backbone=vgg16": r"model\.head\.levels=",
    },
}


def choices(group: str) -> list[str]:
    return [file.stem for file in group_files(group)]


@cache
def composed(*overrides: str) -> DictConfig:
    return configs.compose("train", list(overrides))


def family(experiment: str) -> str:
    """The model of an experiment, as far as the fit of other stages depends on it."""
    names = {"hash_bsds": "hash_net", "classify": "image_classifier", "cfm_vgg16": "cfm_vgg16"}
    names |= {"cfm": "cfm", "": "mask_rcnn"}
    return next(model for part, model in names.items() if part in experiment)


def plain(node: object) -> Any:
    return OmegaConf.to_container(node)  # type: ignore[call-overload]


@cache
def build_small(model: str) -> nn.Module:
    """Build a model without memory for its weights. model: its config as YAML, resolved."""
    with torch.device("meta"):
        return configs.build_model(OmegaConf.create(model), pretrained=False)


def build_config(config: DictConfig) -> nn.Module:
    """The model of a config with the smallest ResNet; equal models are built once."""
    config = config.copy()
    for key, value in DATA_KEYS.items():
        configs.set_key(config, f"data.{key}", value)
    for node in (config.model.get("backbone"), config.model.get("backbone", {}).get("trunk")):
        if node is not None and str(node.get("_target_")).endswith("ResNet"):
            node.name = "resnet18"
            node.stride_in_1x1 = False  # ResNet-18 has no bottlenecks
    model = OmegaConf.create({"model": OmegaConf.to_container(config, resolve=True)["model"]})  # type: ignore[index,call-overload]
    return build_small(OmegaConf.to_yaml(model))


PARTS = 7  # of all combinations; each experiment has one part that is not slow
COMBINATIONS = [
    pytest.param(name, part, marks=[] if part == index % PARTS else pytest.mark.slow)
    for index, name in enumerate(configs.experiments())
    for part in range(PARTS)
]


@pytest.mark.parametrize(("experiment", "part"), COMBINATIONS)
def test_every_experiment_with_every_other_choice_of_a_stage(experiment: str, part: int) -> None:
    own = composed(f"experiment={experiment}").model
    misfits = MISFITS[family(experiment)]
    pairs = [(stage, choice) for stage in STAGES for choice in choices(f"model/{stage}")]
    for stage, choice in pairs[part::PARTS]:
        override = f"model/{stage}={choice}"
        error = misfits.get(f"{stage}={choice}")
        if stage not in own:
            error = f"{override}: the config has no model/{stage} that could be replaced"
        if error is not None:
            with pytest.raises(UserError, match=error) as raised:
                build_config(composed(f"experiment={experiment}", override))
            assert "\n" not in str(raised.value)
            continue
        config = composed(f"experiment={experiment}", override)
        build_config(config)
        # The stage is that of its file, and the others are those of the experiment.
        expected = composed(f"model={family(experiment)}", override).model[stage]
        assert plain(config.model[stage]) == plain(expected)
        for other in set(STAGES) & set(own) - {stage}:
            assert plain(config.model[other]) == plain(own[other])


@pytest.mark.parametrize(("experiment", "part"), COMBINATIONS)
def test_every_experiment_with_every_other_choice_of_a_group(experiment: str, part: int) -> None:
    datasets = [name for name in choices("data") if name not in SEGMENT_DATA]
    common = OmegaConf.load(configs.config_folder() / "data" / "_common.yaml")
    shared = {str(key) for key in common}  # an experiment's values for them stay
    for index, model in list(enumerate(choices("model")))[part::PARTS]:
        groups = {"model": model, "data": datasets[index % len(datasets)]}
        for group in ("optimizer", "scheduler"):
            groups[group] = choices(group)[index % len(choices(group))]
        overrides = [f"{group}={choice}" for group, choice in groups.items()]
        config = composed(f"experiment={experiment}", *overrides)
        alone = composed(*overrides)
        for group in ("model", "optimizer", "scheduler"):
            assert plain(config[group]) == plain(alone[group])
        # data=custom, the experiment's own choice, replaces nothing.
        is_own = experiment.startswith("custom_") and groups["data"] == "custom"
        expected = composed(f"experiment={experiment}") if is_own else alone
        for key in set(alone.data) - shared:
            assert plain(expected.data)[key] == plain(config.data)[key]
        build_config(config)
        configs.build_source(config.data)
        trainer = configs.build(config.trainer)
        optimizer = configs.build_optimizer(config, trainer, nn.Linear(1, 1))
        max_steps = trainer.in_steps(1000, 2).length.max_steps
        configs.build(config.scheduler)(optimizer, max_steps=max_steps)


@pytest.mark.parametrize(
    ("experiment", "frozen", "norm"),
    [("coco_r50_fpn_1x", 2, "FrozenBatchNorm2d"), ("coco_r50_fpn_lsj", 0, "SyncBatchNorm")],
)
def test_values_of_an_experiment_reach_the_model(experiment: str, frozen: int, norm: str) -> None:
    model = configs.build_model(configs.compose("train", [f"experiment={experiment}", *NO_WEIGHTS]))
    assert model.backbone.trunk.frozen_stages == frozen  # type: ignore[union-attr]
    assert norm in {
        kind.__name__ for m in model.backbone.trunk.modules() for kind in type(m).__mro__
    }  # type: ignore[union-attr]
    assert model.classifier.max_detections == 100  # type: ignore[union-attr]
    shapes = {
        name: list(p.shape)
        for name, p in model.named_parameters()
        if name.startswith(("classifier.", "heads."))
    }
    assert [4, 1024] in shapes.values()  # three classes and background
    assert [12, 1024] in shapes.values()


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=adamw"],
        ["scheduler=cosine"],
        ["data=custom"],
        ["debug=smoke"],
        ["debug=overfit"],
        ["data=nuclei"],
    ],
)
def test_every_choice_composes_and_builds(overrides: list[str]) -> None:
    config = configs.compose("train", overrides)
    configs.build_source(config.data)
    for part in (config.optimizer, config.scheduler, config.trainer):
        configs.build(part)


def test_the_debug_modes() -> None:
    smoke = configs.compose("train", ["debug=smoke"])
    assert (smoke.trainer.max_steps, smoke.data.max_images, smoke.data.num_workers) == (4, 8, 0)
    overfit = configs.compose("train", ["debug=overfit", "data.root=x"])
    source = configs.build_source(overfit.data)
    assert source.split("val").json == source.split("train").json == "x/train.json"
    assert source.split("train").transforms == source.split("val").transforms == ()


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=scenes_cfm"],
        ["experiment=coco_cfm_r50_fpn", "data=coco_panoptic"],
        ["data=coco_stuff", "data.train_proposals=x"],
    ],
)
def test_overfitting_validates_with_all_files_of_the_training_images(overrides: list[str]) -> None:
    # Guards against: segments, maps or proposals of the validation images are used with the
    # training images.
    source = configs.build_source(configs.compose("train", [*overrides, "debug=overfit"]).data)
    train = source.split("train")
    assert source.split("val") == replace(
        train, name="val", transforms=source.split("val").transforms
    )
    folders = {} if source.segments is None else source.segments.folders
    for parts in (folders, getattr(source, "panoptic", {})):
        assert parts.get("val") == parts.get("train")
    assert source.split("val").semantic is not None


def test_both_tools_propose_segments_with_the_same_method() -> None:
    alone = configs.compose("propose_segments", [])
    within = configs.compose("train", ["experiment=scenes_cfm"])
    assert alone.method == within.model.proposer.method
    assert (
        configs.compose(
            "train", ["experiment=scenes_cfm", "model.proposer.method.sigma=0.8"]
        ).model.proposer.method.sigma
        == 0.8
    )


def targets(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all nodes that an object is built from."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path
        for key in map(str, node):
            if not OmegaConf.is_interpolation(node, key):
                yield from targets(node[key], f"{path}.{key}")


def test_no_key_of_a_model_is_ignored() -> None:
    """Each constructor refuses an unknown key, so every key of a config is used."""
    config = configs.compose("train", TINY)
    paths = list(targets(config.model, "model"))
    assert len(paths) >= 11
    configs.build_model(config)
    for path in paths:
        changed = config.copy()
        OmegaConf.set_struct(changed, False)
        OmegaConf.update(changed, f"{path}.no_such_key", 1, force_add=True)
        with pytest.raises(UserError, match="no_such_key"):
            configs.build_model(changed)


def test_no_key_of_the_rest_is_ignored() -> None:
    config = configs.compose("train", NO_WEIGHTS)
    for group in ("data", "trainer", "optimizer", "scheduler"):
        OmegaConf.set_struct(config, False)
        config[group].no_such_key = 1
        if group == "optimizer":
            trainer = configs.build(configs.compose("train", NO_WEIGHTS).trainer)
            with pytest.raises(UserError, match="no_such_key"):
                configs.build_optimizer(config, trainer, nn.Linear(1, 1))
        elif group == "scheduler":  # raises when it is called
            with pytest.raises(TypeError, match="no_such_key"):
                configs.build(config[group])(None, max_steps=1)
        else:
            build = configs.build_source if group == "data" else configs.build
            with pytest.raises(UserError, match="no_such_key"):
                build(config[group])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "trainer.max_step=3",
            "trainer.max_step=3: no such key 'trainer.max_step'; did you mean 'trainer.max_steps'?",
        ),
        ("optimzer.lr=1", "optimzer.lr=1: no such key 'optimzer.lr'; did you mean 'optimizer.lr'?"),
        ("max_steps=5", "max_steps=5: no such key 'max_steps'; did you mean 'trainer.max_steps'?"),
        ("model.heads.mask.layer=2", "did you mean 'model.heads.mask.layers'?"),
        ("qqqqqq=1", "qqqqqq=1: no such key 'qqqqqq'; the keys are those of configs/"),
        ("trainer.max_steps=many", "trainer.max_steps='many': expected a whole number"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: expected a whole number"),
        ("trainer.max_steps=true", "trainer.max_steps=True: expected a whole number"),
        ("optimizer.lr=fast", "optimizer.lr='fast': expected a number"),
        ("data.keep_empty=yes", "data.keep_empty='yes': expected true or false"),
        ("data.keep_empty=1", "data.keep_empty=1: expected true or false"),
        ("data.train_transforms=x", "data.train_transforms='x': expected a list"),
        ("model.proposer.anchors.aspect_ratios=1", "expected a list"),
        (
            "experiment=scenes_r19",
            "experiment has no 'scenes_r19'; did you mean 'scenes_r18'? "
            "(there are classify_coco_r50, ",
        ),
        ("optimizer=adam", "optimizer has no 'adam'; did you mean 'adamw'? (there are adamw, sgd)"),
        (
            "data=coc",
            "data has no 'coc'; did you mean 'coco'? "
            "(there are bsds, coco, coco_panoptic, coco_stuff, custom, ",
        ),
        ("model/backbone=fnp", "model/backbone has no 'fnp'; did you mean 'fpn'?"),
        ("+trainer.foo=3", "+trainer.foo=3: no such key 'trainer.foo'"),
        ("++trainer.foo=3", "++trainer.foo=3: no such key 'trainer.foo'"),
        (
            "trainer.max_steps",
            "'trainer.max_steps' is not of the form key=value; --help shows commands",
        ),
        ("--verbose", "'--verbose' is not of the form key=value"),
        ("data.root=${data.nothing}", "data.nothing"),
        # Guards against: a choice that does not exist is ignored, or raises a ValueError, as for
        # an optional group
        ("debug=smok", "debug has no 'smok'; did you mean 'smoke'?"),
        ("trainer=3", "trainer has no '3'"),
        ("experiment=null", "experiment has no 'null'"),
        ("=3", "=3"),
    ],
)
def test_wrong_overrides_are_reported_in_one_line(override: str, message: str) -> None:
    assert message in refusal([override])


@pytest.mark.parametrize(
    "override",
    [
        "trainer.device=a=b",
        "optimizer.lr=[1",
        "trainer.best_metric=a,b",
        "name=scen(es)",
        "/model/backbone=fpn",
    ],
)
def test_overrides_that_hydra_cannot_parse_are_named(override: str) -> None:
    # Guards against: some of Hydra's messages do not show which override is wrong
    assert override in refusal(["seed=1", override])


@pytest.mark.parametrize(
    "override", ["seed=null", "batch_size=null", "trainer.log_every=null", "data.skip_bad=null"]
)
def test_null_is_not_a_number(override: str) -> None:
    # Guards against: a TypeError with a traceback later
    assert override.split("=")[0] in refusal([override])


@pytest.mark.parametrize(
    "override",
    [
        "data.max_images=all",
        "data.max_images=2.5",
        "data.max_images=0",
        "data.num_workers=-1",
        "data.divisor=0",
    ],
)
def test_invalid_numbers_of_the_data(override: str) -> None:
    # Guards against: a traceback later, because a default of null accepts anything and no
    # constructor checks these numbers
    with pytest.raises(UserError, match=override.split(".")[1].split("=")[0]):
        configs.build_source(configs.compose("train", [override]).data)


def test_a_valid_key_of_the_wrong_group() -> None:
    assert "no such key 'optimizer.betas'" in refusal(
        ["optimizer=sgd", "optimizer.betas=[0.9,0.99]"]
    )
    config = configs.compose("train", ["optimizer=adamw", "optimizer.betas=[0.8,0.99]"])
    assert configs.build(config.optimizer).keywords["betas"] == [0.8, 0.99]


def test_whole_numbers_for_a_float_key() -> None:
    assert configs.compose("train", ["optimizer.lr=1"]).optimizer.lr == 1
    assert (
        configs.compose("train", ["trainer.resume=auto"]).trainer.resume == "auto"
    )  # a default of null accepts text
    assert configs.compose("train", ["trainer.resume=null"]).trainer.resume is None


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.run",
        "torch.load",
        "maskseg",
        "masksegevil.x",
        "torch.optimus.x",
        "maskseg..os",
        3,
    ],
)
def test_targets_outside_the_allowed_are_refused(target: object) -> None:
    with pytest.raises(UserError, match=r"_target_ .* is refused"):
        configs.build({"_target_": target})
    with pytest.raises(UserError, match=r"_target_ .* is refused"):
        configs.build(
            {
                "_target_": "maskseg.data.datasets.coco.CocoSource",
                "train_transforms": [{"a": {"_target_": target}}],
            }
        )
    with pytest.raises(UserError, match=r"_target_ .* is refused"):
        configs.build_model(
            OmegaConf.create(
                {
                    "model": {
                        "_target_": "maskseg.models.rcnn.GeneralizedRCNN",
                        "backbone": {"trunk": {"_target_": target}},
                    }
                }
            )
        )


@pytest.mark.parametrize(
    "target",
    [
        "maskseg.engine.run_folder.os.system",
        "maskseg.engine.checkpoint.torch.load",
        "maskseg.engine.checkpoint.torch.hub.load",
        "maskseg.commands.train.nn.Linear",
    ],
)
def test_targets_that_reach_out_of_the_package_are_refused(target: str) -> None:
    # Guards against: `maskseg.engine.checkpoint.torch.hub.load` begins with "maskseg." and is
    # torch.hub.load, which downloads and runs code. os.system is only stopped by a list inside
    # Hydra. The object must be defined in the package, not only its name must begin with it.
    with pytest.raises(UserError, match="is refused"):
        configs.check_targets({"_target_": target})
    with pytest.raises(UserError, match="is refused"):
        configs.check_closed({"_target_": target.replace("maskseg.", "torch.optim.", 1)})


def test_errors_of_constructors_have_one_line() -> None:
    with pytest.raises(UserError, match="trunk must be one of resnet18"):
        configs.build_model(configs.compose("train", [*TINY, "model.backbone.trunk.name=resnet19"]))
    with pytest.raises(UserError, match=r"trainer\.precision must be one of"):
        configs.build(configs.compose("train", ["trainer.precision=fp8"]).trainer)


def test_missing_weights() -> None:
    with pytest.raises(
        UserError, match="weights 'IMAGENET1K_V9': no such file, and torchvision has IMAGENET1K_V1"
    ):
        configs.build_model(
            configs.compose("train", [*TINY, "model.backbone.trunk.weights=IMAGENET1K_V9"])
        )
    # Without `pretrained`, no file is needed.
    configs.build_model(
        configs.compose("train", [*TINY, "model.backbone.trunk.weights=IMAGENET1K_V9"]),
        pretrained=False,
    )


def test_a_model_without_masks() -> None:
    # Guards against: the values of an experiment for the head, such as those of scenes_r18, remain
    # as a group without a _target_
    overrides = [w for w in TINY if not w.startswith("model.heads")]
    model = configs.build_model(
        configs.compose("train", [*overrides, "~model/heads@model.heads.mask"])
    )
    assert isinstance(model, GeneralizedRCNN)
    assert len(model.heads) == 0
    assert model.eval().predict(make_batch()).detections.masks is None
    with_masks = configs.build_model(configs.compose("train", TINY)).eval()
    assert isinstance(with_masks, GeneralizedRCNN)
    assert with_masks.predict(make_batch()).detections.masks is not None


@lru_cache
def checkpoint_text(*overrides: str) -> str:
    """The config that `train` writes into a checkpoint."""
    config = configs.compose("train", [*TINY, *overrides])
    configs.set_categories(config, Categories(("a", "b", "c"), (1, 2, 3)))
    return configs.to_yaml(config)


def test_a_checkpoints_config_with_a_tools_keys() -> None:
    overrides = [
        "checkpoint=best.pt",
        "output=out",
        "evaluation.max_images=5",
        "model.classifier.score_threshold=0.2",
        "trainer.device=cpu",
    ]
    config = configs.from_checkpoint(checkpoint_text(), overrides, "evaluate")
    assert (config.checkpoint, config.output, config.split, config.pictures) == (
        "best.pt",
        "out",
        "val",
        16,
    )
    assert config.evaluation.max_images == 5
    assert config.evaluation.max_detections == 100  # still refers to the key of the model
    model = configs.build_model(config, configs.CHECKPOINT_TARGETS, pretrained=False)
    assert model.classifier.score_threshold == 0.2  # type: ignore[union-attr]
    more = configs.from_checkpoint(
        checkpoint_text(), ["model.classifier.max_detections=300"], "evaluate"
    )
    assert more.evaluation.max_detections == 300


def test_a_checkpoint_without_new_keys() -> None:
    text = checkpoint_text("evaluation.batch=3")
    lines = [
        line
        for line in text.splitlines()
        if line.strip().partition(":")[0] not in ("oks_sigmas", "precision")
    ]
    assert len(lines) == len(text.splitlines()) - 2
    config = configs.from_checkpoint("\n".join(lines), ["trainer.precision=bf16"], "evaluate")
    assert (config.evaluation.oks_sigmas, config.evaluation.batch, config.trainer.precision) == (
        None,
        3,
        "bf16",
    )


def test_a_checkpoint_of_a_model_without_masks() -> None:
    overrides = [
        "experiment=coco_r50_fpn_1x",
        *(w for w in TINY if not w.startswith("model.heads")),
    ]
    config = configs.compose("train", [*overrides, "~model/heads@model.heads.mask"])
    model = configs.build_model(
        configs.from_checkpoint(configs.to_yaml(config), [], "predict"),
        configs.CHECKPOINT_TARGETS,
        pretrained=False,
    )
    assert isinstance(model, GeneralizedRCNN)
    assert len(model.heads) == 0


def test_a_checkpoint_on_other_data() -> None:
    text = checkpoint_text(
        "data.test_transforms=[{_target_:maskseg.data.transforms.ResizeShortestEdge,sizes:[64],max_size:100}]"
    )
    config = configs.from_checkpoint(
        text,
        ["data=custom", "data.val_json=v.json", "data.images=pics", "data.num_workers=0"],
        "evaluate",
    )
    source = configs.build_source(config.data)
    assert type(source) is CocoSource
    assert (source.json_files(), source.split("val").images, source.loading.num_workers) == (
        ["v.json"],
        "pics",
        0,
    )
    assert source.class_options.num_classes == 3
    assert source.split("val").transforms[0].sizes == [64]
    same_data = configs.build_source(
        configs.from_checkpoint(text, ["data.root=elsewhere"], "evaluate").data
    )
    assert isinstance(same_data, ScenesSource)
    assert same_data.split("val").json == "elsewhere/val.json"


def test_a_model_of_segments_on_other_data() -> None:
    # Guards against: the segment sampler is lost, and the data cannot be used
    config = configs.compose(
        "train", ["experiment=scenes_cfm", "data.segment_sampler.num_samples=7", *NO_WEIGHTS]
    )
    configs.set_categories(config, Categories(("a", "b", "c"), (1, 2, 3)))
    text = configs.to_yaml(config)
    overrides = ["data=custom", "data.val_json=v.json", "data.images=pics", "data.val_segments=s"]
    source = configs.build_source(configs.from_checkpoint(text, overrides, "evaluate").data)
    assert (
        source.segments.folders["val"],
        source.split("val").semantic,
        source.segments.make_sampler(2, 3).settings.num_samples,
    ) == ("s", None, 7)
    changed = [*overrides, "data.segment_sampler.num_samples=9"]
    other = configs.build_source(configs.from_checkpoint(text, changed, "evaluate").data)
    assert other.segments.make_sampler(2, 3).settings.num_samples == 9
    assert isinstance(
        configs.build_source(configs.from_checkpoint(text, ["data=bsds"], "evaluate").data),
        BsdsSource,
    )
    assert (
        configs.build_source(
            configs.from_checkpoint(checkpoint_text(), overrides, "evaluate").data
        ).segments
        is None
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("split", "'split' is not of the form key=value"),
        ("spilt=val", "spilt=val: no such key 'spilt'; did you mean 'split'?"),
        ("model.classifier.score_treshold=1", "did you mean 'model.classifier.score_threshold'?"),
        (
            "model.classifier.score_threshold=high",
            "model.classifier.score_threshold='high': expected a number",
        ),
        (
            "data=mine",
            "data has no 'mine' (there are bsds, coco, coco_panoptic, coco_stuff, custom, msrc, "
            "nuclei, pascal_context, scenes, ",
        ),
        ("data.nothing=3", "data.nothing=3: no such key 'data.nothing'"),
        ("evaluation.oks_sigmas=5", "evaluation.oks_sigmas=5: expected a list"),
        ("data.segment_sampler=3", "data.segment_sampler=3: expected"),
        ("evaluation.backend=3", "evaluation.backend=3: expected auto or faster or pycocotools"),
        ("pictures=few", "pictures='few': expected a whole number"),
        (
            "evaluation.max_images=1.5",
            "evaluation.max_images=1.5: expected a whole number from 1 to",
        ),
        ("data.root=${nothing}", "nothing"),
        ("+new=3", "+new=3: no such key"),
        ("pictures=[1", "pictures=[1"),
    ],
)
def test_wrong_overrides_for_a_checkpoint(override: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        configs.from_checkpoint(checkpoint_text(), [override], "evaluate")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "key", ["model.backbone.trunk", "data", "optimizer", "trainer", "evaluation"]
)
def test_a_checkpoints_config_cannot_name_foreign_code(key: str) -> None:
    config = OmegaConf.create(checkpoint_text())
    OmegaConf.update(config, f"{key}._target_", "os.system", force_add=True)
    with pytest.raises(UserError, match=r"_target_ 'os\.system' is refused"):
        configs.from_checkpoint(OmegaConf.to_yaml(config), [], "predict")
    config = OmegaConf.create(checkpoint_text())
    OmegaConf.update(config, key, {"x": [{"_target_": "shutil.rmtree"}]}, force_add=True)
    with pytest.raises(UserError, match=r"_target_ 'shutil\.rmtree' is refused"):
        configs.from_checkpoint(OmegaConf.to_yaml(config), [], "predict")


def test_a_target_behind_an_interpolation() -> None:
    config = OmegaConf.create(checkpoint_text())
    OmegaConf.update(config, "hidden", "os.system", force_add=True)
    OmegaConf.update(config, "model.backbone.trunk._target_", "${hidden}", force_add=True)
    with pytest.raises(UserError, match=r"_target_ '\$\{hidden\}' is refused"):
        configs.from_checkpoint(OmegaConf.to_yaml(config), [], "predict")


@pytest.mark.parametrize("text", ["", "just text", "[1, 2]", "a: [", "model: 3"])
def test_a_checkpoint_whose_config_is_not_one(text: str) -> None:
    # Guards against: a traceback for a damaged or foreign config
    with pytest.raises(UserError):
        configs.build_model(
            configs.from_checkpoint(text, [], "predict"),
            configs.CHECKPOINT_TARGETS,
            pretrained=False,
        )


def test_a_config_survives_the_checkpoint() -> None:
    config = configs.compose("train", TINY)
    again = OmegaConf.create(configs.to_yaml(config))
    assert again == config
    assert configs.to_yaml(again, resolve=True) == configs.to_yaml(config, resolve=True)
    assert "${" in configs.to_yaml(config)
    assert "${" not in configs.to_yaml(config, resolve=True)


def test_transforms_from_the_command_line() -> None:
    override = "data.train_transforms=[{_target_:maskseg.data.transforms.Flip,horizontal:1.0}]"
    (flip,) = (
        configs.build_source(configs.compose("train", [override]).data).split("train").transforms
    )
    assert isinstance(flip, Flip)
    assert (flip.horizontal, flip.vertical) == (1.0, 0.0)


def test_the_folder_of_the_configs() -> None:
    assert (configs.config_folder() / "train.yaml").is_file()
    assert len(configs.experiments()) >= 6


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def main(overrides: list[str]) -> None:
        if overrides == ["error"]:
            raise UserError("what is wrong")
        if overrides == ["stop"]:
            raise KeyboardInterrupt
        if overrides == ["bug"]:
            raise ZeroDivisionError

    assert cli.run(main, "usage", ["fine"]) == 0
    assert cli.run(main, "\n usage \n", ["error", "--help"]) == 0
    assert capsys.readouterr().out == "usage\n"
    assert cli.run(main, "usage", ["error"]) == 2
    assert capsys.readouterr().err == "error: what is wrong\n"
    assert cli.run(main, "usage", ["stop"]) == 130
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        cli.run(main, "usage", ["bug"])


def test_composing_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs.compose("train", [])
    refusal(["nothing=1"])
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_stage_drops_the_keys_of_the_experiment() -> None:
    config = configs.compose("train", ["experiment=nuclei_r18", "model/proposer=file", *NO_WEIGHTS])
    assert set(config.model.proposer) == {"_target_", "train_limit", "test_limit"}
    configs.build_model(config)
    with pytest.raises(UserError, match="anchors"):
        configs.compose("train", ["model/proposer=file", "model.proposer.anchors.offset=0.5"])


def test_differences_between_the_models_of_a_checkpoint_and_a_config() -> None:
    trained = configs.compose("train", ["model.pixel_std=[1.0,1.0,1.0]", *NO_WEIGHTS])
    config = configs.compose(
        "train", ["experiment=scenes_keypoint_r18", "model.heads.mask.threshold=0.4", *NO_WEIGHTS]
    )
    differences = configs.model_differences(config, configs.to_yaml(trained))
    assert differences == [
        "model.heads.mask.threshold=0.5 (here 0.4)",
        "model.pixel_std=[1.0, 1.0, 1.0] (here [58.395, 57.12, 57.375])",
    ]
    assert configs.model_differences(config, configs.to_yaml(config)) == []
    assert configs.model_differences(config, "") == []
