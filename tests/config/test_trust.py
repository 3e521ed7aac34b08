"""A checkpoint cannot run code: its config may only name a closed set of classes."""

from __future__ import annotations

import datetime
import importlib
import inspect
import os
import pkgutil
import shutil
import socket
import subprocess
import sys
import types
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made.runs import ROOT
from made.tools import assert_refused, said
from made.watch import watched
from omegaconf import OmegaConf
from torch import nn

import maskseg
from maskseg import config as configs
from maskseg.config.auto import with_usual_numbers
from maskseg.config.restore import open_data
from maskseg.engine.checkpoint import save_checkpoint
from maskseg.errors import UserError
from maskseg.structures import Categories

CASE = ROOT.parent / "shared" / "cases" / "10_checkpoint_runs_code"
TINY = [
    "model.backbone.trunk.name=resnet18",
    "model.backbone.channels=8",
    "model.classifier.mlp.width=8",
    "model.heads.mask.channels=8",
]
TINY += [
    "model.heads.mask.layers=1",
    "model.backbone.trunk.weights=null",
    "data.num_classes=3",
    "data.point_ranges=[[0,0],[0,5],[5,9]]",
]
PLAIN = (
    "Felzenszwalb",
    "SLIC",
    "HierarchicalGrouping",
    "FeatureSpec",
    "DrawnSegments",
    "RegionSampler",
    "AnchorGenerator",
    "AnchorSampler",
    "ProposalLimits",
    "MLPSettings",
    "MaskingSettings",
    "PoolerSettings",
)  # neither nn.Modules nor transforms
# Packages and modules below maskseg that no class may come from.
NEVER = ("benchmarks", "cli", "commands", "config", "engine", "files", "interop")


@lru_cache
def modules() -> list[types.ModuleType]:
    """Every module of the package."""
    return [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(maskseg.__path__, "maskseg.")
    ]


@lru_cache
def names() -> list[str]:
    """Every name in the package that leads to a callable, including imported ones."""
    return sorted(
        {
            f"{module.__name__}.{name}"
            for module in modules()
            for name, value in vars(module).items()
            if callable(value)
        }
    )


@lru_cache
def checkpoint_text(*overrides: str) -> str:
    """The config of a checkpoint of a small Mask R-CNN."""
    config = configs.compose("train", [*TINY, *overrides])
    configs.set_categories(config, Categories(("a", "b", "c"), (1, 2, 3)))
    return configs.to_yaml(config)


def checkpoint_values(*overrides: str) -> Any:
    """The same config as plain values."""
    return yaml.load(checkpoint_text(*overrides), Loader=yaml.CSafeLoader)


def to_text(config: Any) -> str:
    return str(yaml.dump(config, Dumper=yaml.CSafeDumper))


def refusal(text: str) -> str:
    modules()  # an import reads code
    with pytest.raises(UserError) as raised, watched() as events:
        configs.from_checkpoint(text, [], "predict")
    assert "\n" not in str(raised.value)
    assert events == []
    return str(raised.value)


def with_value(key: str, value: Any, *overrides: str) -> str:
    """The text with a value for a key, which need not exist."""
    config = checkpoint_values(*overrides)
    *parents, last = key.split(".")
    node = config
    for part in parents:
        node = node.setdefault(part, {})
        assert isinstance(node, dict)
    node[last] = value
    return to_text(config)


def test_only_the_listed_names_can_be_built() -> None:
    assert len(names()) > 3000
    assert set(names()) > configs.CHECKPOINT_TARGETS
    for name in names():
        if name not in configs.CHECKPOINT_TARGETS:
            for config in ({"_target_": name}, {"a": [{"b": {"_target_": name}}]}):
                with pytest.raises(UserError, match="is refused"):
                    configs.check_closed(config)
                with pytest.raises(UserError, match="is refused"):
                    configs.construct(config)


def test_the_listed_names_are_parts_of_models_and_transforms() -> None:
    modules()
    for name in configs.CHECKPOINT_TARGETS:
        module, _, short = name.rpartition(".")
        value = getattr(sys.modules[module], short)
        assert inspect.isclass(value)
        assert (value.__module__, value.__qualname__) == (module, short)
        assert module.split(".")[1] not in NEVER
        assert "data" not in module.split(".") or module == "maskseg.data.transforms"
        assert (
            issubclass(value, nn.Module) or module == "maskseg.data.transforms" or short in PLAIN
        ), name


def test_classes_of_the_installed_models_are_listed() -> None:
    """Guards against: a new part of a model that cannot be loaded from a checkpoint."""
    for file in (ROOT / "configs" / "model").rglob("*.yaml"):
        text = file.read_text()
        for target in (
            line.split("_target_:")[1].split()[0].strip(",}")
            for line in text.splitlines()
            if "_target_:" in line
        ):
            assert target in configs.CHECKPOINT_TARGETS, f"{file}: {target}"
    transforms = importlib.import_module("maskseg.data.transforms")
    for name, value in vars(transforms).items():
        if (
            inspect.isclass(value)
            and value.__module__ == transforms.__name__
            and name != "Transform"
        ):
            assert f"{transforms.__name__}.{name}" in configs.CHECKPOINT_TARGETS


@pytest.mark.parametrize("experiment", configs.experiments())
def test_the_config_of_every_experiment_can_be_that_of_a_checkpoint(experiment: str) -> None:
    # A checkpoint has numbers instead of `auto`, and steps instead of epochs.
    config = with_usual_numbers(configs.compose("train", [f"experiment={experiment}"]))
    if config.trainer.max_steps is None:
        steps = {"max_steps": 100, "checkpoint_every": 10, "evaluate_every": 20}
        config.trainer.update({**steps, "epochs": None})
    configs.set_categories(config, Categories(("a", "b", "c"), (1, 2, 3)))
    trained = configs.from_checkpoint(configs.to_yaml(config), [], "predict")
    for key in (
        "model",
        "data",
        "trainer",
        "evaluation",
        "optimizer",
        "scheduler",
        "seed",
        "batch_size",
    ):
        assert (
            OmegaConf.to_container(trained, resolve=True)[key]
            == OmegaConf.to_container(config, resolve=True)[key]
        )  # type: ignore[index,call-overload]


FOREIGN = [
    "os.system",
    "builtins.exec",
    "subprocess.run",
    "torch.load",
    "torch.hub.load",
    "torch.nn.Linear",
    "hydra.utils.instantiate",
    "pathlib.Path.touch",
]
OWN = [
    "maskseg.config.build",
    "maskseg.config.compose",
    "maskseg.config.build.build",
    "maskseg.files.replacing",
    "maskseg.load",
    "maskseg.cli.run",
]
OWN += [
    "maskseg.data.datasets.coco.CocoSource",
    "maskseg.engine.trainer.Trainer",
    "maskseg.models.backbones.resnet.load_pretrained_state",
    "maskseg.models.rcnn.nn.Linear",
]
OWN += [
    "maskseg.data.datasets.scenes.make_scenes",
    "maskseg.models.backbones.fpn.FPN.__init__",
    "maskseg..modules.fpn.FPN",
    "maskseg.models.backbones.fpn",
    "FPN",
    "",
]


@pytest.mark.parametrize(
    "target", [*FOREIGN, *OWN, 3, None, ["os.system"], {"a": "os.system"}, "${name}"]
)
@pytest.mark.parametrize(
    "key",
    [
        "model",
        "model.backbone",
        "model.backbone.trunk.x",
        "data.test_transforms",
        "data.superpixels",
    ],
)
def test_other_targets_are_refused_in_every_place(key: str, target: Any) -> None:
    value: Any = {"_target_": target, "x": 1}
    refusal(with_value(key, [value] if key.endswith("transforms") else value))


@pytest.mark.parametrize(
    "key", ["data", "trainer", "optimizer", "scheduler", "evaluation", "data.segment_sampler"]
)
def test_a_group_must_be_an_installed_one(key: str) -> None:
    for target in ("os.system", "maskseg.config.build", "maskseg.models.backbones.fpn.FPN", 3):
        assert "is refused" in refusal(with_value(key, {"_target_": target}))


@pytest.mark.parametrize(
    "key", ["_partial_", "_args_", "_recursive_", "_convert_", "_mode_", "_new_"]
)
@pytest.mark.parametrize(
    "place", ["model", "model.backbone.trunk", "model.classifier.pooler", "data", "optimizer"]
)
def test_other_special_keys_of_hydra_are_refused(place: str, key: str) -> None:
    if (place, key) != ("optimizer", "_partial_"):
        assert "refused" in refusal(
            with_value(f"{place}.{key}", ["x"])
        ) or "no such key" in refusal(with_value(f"{place}.{key}", ["x"]))


RESOLVERS = [
    "${oc.env:HOME}",
    "${oc.env:HOME,x}",
    "x${oc.env:HOME}",
    "${oc.decode:'1'}",
    "${oc.create:{_target_:os.system}}",
    "${oc.dict.keys:model}",
]
RESOLVERS += [
    "${oc.select:name}",
    "${oc.select:model.segmenter.superpixels,null} ",
    "${hydra:runtime.cwd}",
    "${now:%Y}",
    "${a.${name}}",
    "\\${name}",
]
RESOLVERS += ["${oc.env:${name}}", "${.name}", "${..name}", "${data[root]}", "${", "${name"]


@pytest.mark.parametrize("text", RESOLVERS)
@pytest.mark.parametrize(
    "key",
    [
        "model.backbone.trunk.name",
        "model.pixel_mean",
        "data.root",
        "data.superpixels",
        "trainer.precision",
        "optimizer.lr",
    ],
)
def test_every_resolver_is_refused(key: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/a/secret")
    config = checkpoint_values()
    node = config
    for part in key.split(".")[:-1]:
        node = node[part]
    node[key.split(".")[-1]] = text
    message = refusal(to_text(config))
    assert "secret" not in message


def test_no_resolver_runs_when_a_training_starts_from_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SECRET", "a secret")
    text = checkpoint_text().replace("name: resnet18", "name: ${oc.env:SECRET}")
    assert "oc.env" in text
    assert configs.model_differences(configs.compose("train", TINY), text) == []


def test_values_behind_references_are_checked() -> None:
    config = checkpoint_values()
    config["data"]["train_transforms"] = [{"_target_": "maskseg.data.transforms.Flip"}]
    config["model"]["backbone"] = "${data.train_transforms.0}"
    assert "model.backbone is not a backbone" in build_all(to_text(config))
    config["model"] = {
        "_target_": "maskseg.variants.hash.net.SegmentationNet",
        "backbone": "${data.train_transforms.0}",
        "segmenter": "${data.train_transforms.0}",
    }
    modules()
    with watched() as events:
        assert "model.backbone is not a stage" in build_all(to_text(config))
    assert events == []
    config["hidden"] = {"_target_": "maskseg.config.build"}
    config["model"]["backbone"] = "${hidden}"
    assert "is refused" in refusal(to_text(config))
    config["hidden"] = "os.system"
    config["model"]["backbone"] = {"_target_": "${hidden}"}
    assert "_target_ '${hidden}' is refused" in refusal(to_text(config))
    config["hidden"] = "x"
    config["name"] = "$"
    config["model"]["backbone"] = {
        "_target_": "maskseg.models.backbones.fpn.FPN",
        "norm": "${name}{oc.env:HOME}",
    }
    assert "refused" in refusal(to_text(config))


def test_references_that_expand_almost_without_end() -> None:
    config = checkpoint_values()
    for i in range(1, 40):
        config["model"][f"k{i}"] = f"${{model.k{i - 1}}}" * 2
    config["model"]["k0"] = "x" * 10
    assert "too often" in refusal(to_text(config))
    for i in range(1, 40):
        config["model"][f"k{i}"] = [f"${{model.k{i - 1}}}"] * 2
    assert "too often" in refusal(to_text(config))
    for i in range(1, 400):
        config["model"][f"k{i}"] = f"${{model.k{i - 1}}}"
    assert "refer to each other" in refusal(to_text(config))
    for i in range(1, 400):
        config["model"].pop(f"k{i}")
    config["model"]["k0"] = "${model.k0}"
    assert "refer to each other" in refusal(to_text(config))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "model.backbone.channels",
            "many",
            "model.backbone.channels='many': expected a whole number, such as 256",
        ),
        (
            "model.proposer.nms_threshold",
            [1],
            "model.proposer.nms_threshold=[1]: expected a number",
        ),
        ("model.classifier.class_agnostic", 1, "expected true or false"),
        ("model.classifier.nothing", 1, "BoxHead has no key 'nothing'"),
        ("model.backbone.self", 1, "FPN has no key 'self'"),
        ("data.num_workers", "two", "data.num_workers='two': expected a whole number"),
        ("data.nothing", 1, "no such key 'data.nothing'"),
        ("trainer.command", "true", "no such key 'trainer.command'"),
        ("evaluation.batch", "x", "evaluation.batch='x': expected a whole number"),
        ("optimizer.lr", "x", "optimizer.lr='x': expected a number"),
        ("seed", "x", "seed='x': expected a whole number"),
        (
            "data.test_transforms",
            [{"_target_": "maskseg.data.transforms.Flip", "horizontal": "x"}],
            "horizontal='x': expected a number",
        ),
    ],
)
def test_types_are_checked_as_on_the_command_line(key: str, value: Any, message: str) -> None:
    assert message in refusal(with_value(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            (key, datetime.date(2001, 1, 1))
            for key in (
                "model.x",
                "name",
                "seed",
                "data.root",
                "trainer.device",
                "model.backbone.channels",
            )
        ],
        *[(key, {None: 1}) for key in ("model.x", "run_dir", "data.flip_pairs")],
        *[
            (key, text)
            for key in ("name", "run_dir")
            for text in ("${}", "${model.backbone", "${seed}", "???")
        ],
        *[(key, "???") for key in ("model.backbone.norm", "trainer.device", "data.root")],
        *[("seed", float(text)) for text in ("inf", "nan")],
        *[
            (key, "${model}")
            for key in ("trainer.device", "data.divisor", "data.max_pixels", "optimizer.lr")
        ],
        *[
            ("data.test_transforms", steps)
            for steps in ([1], ["a"], [None], [[]], [{}], "${data.root}")
        ],
        (
            "data.test_transforms",
            [
                {
                    "_target_": "maskseg.structures.FeatureSpec",
                    "stride": 1,
                    "centre": 1.0,
                    "channels": 1,
                }
            ],
        ),
        *[
            ("model", value)
            for value in ({}, {"backbone": 1}, {"_target_": "maskseg.data.transforms.Flip"})
        ],
    ],
)
def test_odd_values_are_refused_in_one_line(key: str, value: Any) -> None:
    # Guards against: an exception of OmegaConf, or at the first use of the value
    refusal(with_value(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            ("model.proposer", {"at": None, **more})
            for more in (
                {},
                {"levels": 5},
                {"level": [1]},
                {"level": {}},
                {"levels": None},
                {"levels": [[1]]},
            )
        ],
        *[
            ("model.backbone", value)
            for value in (1, [], {"_target_": "maskseg.data.transforms.Flip"})
        ],
    ],
)
def test_invalid_models_are_refused_in_one_line(key: str, value: Any) -> None:
    config = yaml.safe_load(checkpoint_text("experiment=scenes_hash_r18"))
    config["model"][key.split(".")[1]] = value
    message = build_all(to_text(config))
    assert message
    assert "\n" not in message


PURSUIT = {"_target_": "maskseg.variants.cfm.segment_data.FolderSegments", "_partial_": True}
SHELL = "${oc.create:\"{_target_: torch.utils.collect_env.run, command: 'touch RAN'}\"}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # Guards against: an unchecked key contains a resolver, and another key refers to it
        ("run_dir", SHELL),
        ("name", SHELL),
        ("data.segment_sampler", {**PURSUIT, "stuff_rule": SHELL}),
        # Guards against: classes in keys of the data that take no class, which Hydra would build
        # with their weights
        *[
            ("data.segment_sampler", value)
            for value in (
                [PURSUIT],
                "${trainer}",
                {**PURSUIT, "stuff_rule": "${trainer}"},
                {**PURSUIT, "_args_": [7]},
            )
        ],
        (
            "data.segment_sampler",
            {
                **PURSUIT,
                "negative_iou": [{"_target_": "maskseg.engine.trainer.Trainer", "max_steps": 1}],
            },
        ),
        *[
            (
                key,
                {
                    "_target_": "maskseg.models.backbones.resnet.ResNet",
                    "name": "resnet18",
                    "weights": "IMAGENET1K_V1",
                },
            )
            for key in (
                "data.superpixels",
                "data.flip_pairs",
                "data.root",
                "data.segment_sampler",
                "evaluation.oks_sigmas",
            )
        ],
        ("data.superpixels", "${model.backbone.trunk}"),
        ("data.root", "${model.backbone.trunk}"),
        ("model.x", 2**80),
    ],
)
def test_no_key_is_a_way_around(key: str, value: Any) -> None:
    refusal(with_value(key, value))


def test_only_plain_values_of_a_checkpoint_reach_hydra() -> None:
    trained = configs.compose(
        "train", ["experiment=scenes_cfm", "data.segment_sampler.num_samples=7"]
    )
    config = configs.from_checkpoint(configs.to_yaml(trained), [], "evaluate")
    data = OmegaConf.to_container(config.data, resolve=False)
    assert isinstance(data, dict)
    assert data["segment_sampler"]["num_samples"] == 7
    assert "${" not in str(data["segment_sampler"]) + str(data["test_transforms"])
    many = configs.from_checkpoint(with_value("data.num_workers", 10**6), [], "evaluate")
    assert many.data.num_workers <= (os.cpu_count() or 1)


def test_weights_are_null_in_every_part() -> None:
    part = {
        "_target_": "maskseg.models.backbones.resnet.ResNet",
        "name": "resnet18",
        "norm": "BN",
        "weights": "IMAGENET1K_V1",
    }
    with watched() as events:
        configs.construct(part)
        configs.build(part, configs.CHECKPOINT_TARGETS)
    assert events == []


def test_a_checkpoint_does_not_set_keys_of_a_tool() -> None:
    # Guards against: `output: ???` of the tool leaves the `output` of the checkpoint in place, so
    # that the file decides where to write
    text = with_value("output", "/etc") + "input: /etc\nmin_score: 2.0\nfit: {split: x}\n"
    for tool, keys in {
        "evaluate": ["output", "checkpoint"],
        "predict": ["input"],
        "fit_svm": ["output"],
    }.items():
        config = configs.from_checkpoint(text, [], tool)
        assert all(OmegaConf.is_missing(config, key) for key in keys)
    config = configs.from_checkpoint(text, [], "predict")
    assert config.output is None
    assert config.min_score is None
    assert "fit" not in config


def test_no_weights_are_read_or_downloaded() -> None:
    for word in ("IMAGENET1K_V1", "/etc/passwd"):
        config = configs.from_checkpoint(
            with_value("model.backbone.trunk.weights", word), [], "predict"
        )
        with watched() as events:
            configs.build_model(config, configs.CHECKPOINT_TARGETS, pretrained=True)
        assert events == []


def test_a_checkpoint_does_not_decide_where_data_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = with_value("data.root", str(tmp_path / "elsewhere"))
    with pytest.raises(
        UserError,
        match=r"elsewhere/train\.json: there is no such file; data=NAME names the dataset",
    ):
        open_data(
            configs.from_checkpoint(text, [], "evaluate"),
            may_make=configs.names_data(["split=val"]),
        )
    assert list(tmp_path.iterdir()) == []
    overrides = ["data=scenes", "data.num_train=0", "data.num_val=2", "data.root=here"]
    assert configs.names_data(overrides)
    open_data(configs.from_checkpoint(text, overrides, "evaluate"), may_make=True)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_watched_records_files_processes_and_sockets(tmp_path: Path) -> None:
    with watched() as events:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").read_text()
        subprocess.run(["true"], check=True)
        os.system("true")
        socket.socket().close()
        shutil.rmtree(tmp_path)
    assert {event.split()[0] for event in events} >= {
        "open",
        "subprocess.Popen",
        "os.system",
        "socket.__new__",
        "shutil.rmtree",
    }
    assert sum(event.startswith("open ") for event in events) == 1


def pool() -> list[str]:
    return [
        *FOREIGN,
        *OWN,
        *sorted(configs.CHECKPOINT_TARGETS),
        *names()[:: max(len(names()) // 300, 1)],
    ]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 64),
    st.floats(-10, 10),
    st.sampled_from(
        [
            "touch RAN",
            "RAN",
            "resnet18",
            "BN",
            "p3",
            "http://127.0.0.1:1/x",
            *RESOLVERS,
            "${data.root}",
            "${model.backbone}",
            "${model}",
        ]
    ),
    st.text(max_size=8),
)
HYDRAS = "_target_ _partial_ _args_ _recursive_ _convert_"
PARAMETERS = (
    "config name overrides allowed path file command args function root output weights trunk "
    "backbone proposer heads levels level at channels method"
)
KEYS = st.sampled_from(f"{HYDRAS} {PARAMETERS} superpixels".split())


@st.composite
def nodes(draw: st.DrawFn) -> Any:
    """A value of any shape; every second one is a call of a random name."""
    inner = st.recursive(
        SCALARS,
        lambda more: st.lists(more, max_size=3) | st.dictionaries(KEYS, more, max_size=3),
        max_leaves=6,
    )
    if draw(st.booleans()):
        return draw(inner)
    target = draw(st.sampled_from(pool()))
    return {"_target_": target, **draw(st.dictionaries(KEYS, inner, max_size=4))}


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values of nested containers."""
    items: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    paths = [path]
    for key, value in items:
        paths += places(value, (*path, key))
    return paths


@st.composite
def changed_configs(draw: st.DrawFn) -> str:
    """The config of a checkpoint in which one to three values are changed or added."""
    config = checkpoint_values()
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(config)))
        key = draw(KEYS) if draw(st.booleans()) else None
        node = config
        for part in path[:-1]:
            node = node[part]
        inside = node[path[-1]] if path else node
        if key is not None and isinstance(inside, dict):
            inside[key] = draw(nodes())
        elif path:
            node[path[-1]] = draw(nodes())
    return to_text(config)


def build_all(text: str) -> str:
    """Build everything that the tools build. -> the reason of a refusal, empty without one."""
    try:
        config = configs.from_checkpoint(text, [], "predict")
        configs.build_model(config, configs.CHECKPOINT_TARGETS, pretrained=False)
        for transform in config.data.test_transforms:
            configs.build(transform, configs.CHECKPOINT_TARGETS)
    except UserError as error:
        return str(error)
    return ""


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
)
@given(changed_configs())
@example(checkpoint_text("model/proposer=file"))
def test_configs_of_random_targets_have_no_side_effects(text: str) -> None:
    modules()
    with watched() as events:
        message = build_all(text)
    assert events == []
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(changed_configs())
def test_configs_of_many_random_targets_have_no_side_effects(text: str) -> None:
    modules()
    with watched() as events:
        message = build_all(text)
    assert events == []
    assert "\n" not in message


EVIL = {
    "_target_": "maskseg.config.build",
    "allowed": ["torch.", "maskseg."],
    "config": {
        "_target_": "maskseg.config.compose",
        "name": "data_only",
        "overrides": [
            "data.train_transforms=[{_target_:torch.utils.collect_env.run,command:'touch RAN'}]"
        ],
    },
}
CALLS = {
    "predict": ["checkpoint=evil.pt", "input=x.jpg", "output=o"],
    "evaluate": ["checkpoint=evil.pt", "output=o"],
    "propose": ["checkpoint=evil.pt", "output=o"],
    "fit_hash": ["checkpoint=evil.pt", "output=o"],
    "fit_svm": ["checkpoint=evil.pt", "output=o"],
    "convert": ["source=maskseg", "weights=evil.pt", "output=o.pth"],
}


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with evil.pt: plain data with a config that would run a shell command."""
    monkeypatch.chdir(tmp_path)
    data = {"test_transforms": [], "divisor": 32, "max_pixels": 1000000}
    config = yaml.safe_dump(
        {"model": EVIL, "data": data, "trainer": {"precision": "fp32"}, "evaluation": {}}
    )
    metadata = {
        "categories": {"names": ["a"], "ids": [1]},
        "config": config,
        "step": 0,
        "metrics": {},
    }
    save_checkpoint(tmp_path / "evil.pt", {"model": {}, **metadata})
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "config.yaml").write_text(config)
    (tmp_path / "evil" / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')
    shutil.copy(tmp_path / "evil.pt", tmp_path / "evil" / "last.pt")
    return tmp_path


@pytest.mark.parametrize("tool", CALLS)
def test_every_tool_refuses_a_checkpoint_that_would_run_code(tool: str, evil: Path) -> None:
    assert_refused(said(tool, *CALLS[tool]), "_target_ 'maskseg.config.build' is refused")
    assert sorted(p.name for p in evil.iterdir()) == ["evil", "evil.pt"]


def test_load_refuses_a_checkpoint_that_would_run_code(evil: Path) -> None:
    for path in (evil / "evil.pt", evil / "evil"):
        with pytest.raises(UserError, match="is refused"), watched() as events:
            maskseg.load(path)
        assert events == []


def test_training_and_compare_do_not_run_its_code(evil: Path) -> None:
    small = [
        "debug=smoke",
        "data.num_train=4",
        "data.num_val=2",
        "data.size=128",
        "data.num_workers=0",
        "trainer.device=cpu",
    ]
    for word in ("trainer.init=evil.pt", "trainer.resume=evil", "trainer.resume=evil.pt"):
        assert_refused(
            said("train", *small, word), "evil" if word.startswith("trainer.init") else ""
        )
    with watched() as events:
        assert said("compare", "evil", "evil").code == 0
    assert not any("touch" in event for event in events)
    assert not (evil / "RAN").exists()


@pytest.mark.skipif(not CASE.is_dir(), reason="../shared/cases is absent")
def test_a_shared_malicious_file(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, CASE / "make_evil.py"], cwd=tmp_path, check=True, env=env)
    assert (
        torch.load(tmp_path / "evil.pt", weights_only=True)["format"] == 1
    )  # torch itself loads it without an error
    overrides = ["checkpoint=evil.pt", "input=x.jpg", "output=o"]
    run = subprocess.run(
        [sys.executable, ROOT / "tools" / "predict.py", *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=env,
    )
    assert run.returncode == 2
    assert len(run.stderr.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["evil.pt"]
