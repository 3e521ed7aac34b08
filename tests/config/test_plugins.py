"""What enables a plug-in, what it may add, and what is refused."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from made.plugins import EXAMPLES, enable, write_distribution, write_package
from made.runs import ROOT
from made.tools import assert_refused, done, said
from omegaconf import OmegaConf

from maskseg import config as configs
from maskseg import plugins
from maskseg.errors import UserError
from maskseg.files.configs import config_folders
from maskseg.structures import Categories

PART = """
import os
from torch import nn
from maskseg.plugins import register
from maskseg.structures import FeatureSpec

@register("part")
class Trunk(nn.Module):
    def __init__(self, width: int = 8, weights: str | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.levels = {"c2": FeatureSpec(4, 2.0, width), "c3": FeatureSpec(8, 4.0, width)}

class Plain(nn.Module):
    pass

@register("transform")
class Invert:
    def __call__(self, sample, rng):
        return sample

def function(width: int = 8) -> None:
    raise AssertionError
"""
TINY = [
    "model.backbone.channels=8",
    "model.classifier.mlp.width=8",
    "model.heads.mask.channels=8",
    "model.heads.mask.layers=1",
    "data.num_classes=3",
]


@pytest.fixture(autouse=True)
def _clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages of a test are forgotten after it."""
    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and file.startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An enabled plug-in with a trunk, a transform and files of groups."""
    package = f"plugin_{tmp_path.name.replace('-', '_')}"
    trunk = f"_target_: {package}.Trunk\nwidth: 8\nweights: null\n"
    experiment = (
        "# @package _global_\ndefaults:\n- override /model/trunk@model.backbone.trunk: short\n"
        "name: from_a_plugin\n"
    )
    write_package(
        tmp_path,
        package,
        {
            "__init__.py": PART,
            "configs/model/trunk/short.yaml": trunk,
            "configs/experiment/from_a_plugin.yaml": experiment,
            "configs/optimizer/quick.yaml": "_target_: torch.optim.SGD\n_partial_: true\nlr: 1.0\n",
        },
    )
    monkeypatch.setenv(plugins.VARIABLE, package)
    return package


def refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def checkpoint(*overrides: str) -> Any:
    """The config of a checkpoint, as plain values."""
    config = configs.compose("train", ["experiment=from_a_plugin", *TINY, *overrides])
    configs.set_categories(config, Categories(("a", "b", "c"), (1, 2, 3)))
    return yaml.safe_load(configs.to_yaml(config))


def read(values: Any) -> Any:
    return configs.from_checkpoint(yaml.safe_dump(values), [], "predict")


def test_an_entry_point_enables_a_package(tmp_path: Path) -> None:
    write_package(tmp_path, "installed_one", {"configs/optimizer/fast.yaml": "lr: 1.0\n"})
    write_distribution(tmp_path, "some-dist", "any_name = installed_one")
    (plugin,) = plugins.enabled()
    assert plugin.package == "installed_one"
    assert plugin.source == "the entry point 'any_name' of some-dist"
    assert config_folders()[1:] == (tmp_path / "installed_one" / "configs",)
    assert "installed_one" not in sys.modules
    plugins.import_plugins()
    assert "installed_one" in sys.modules


def test_a_package_that_is_enabled_twice_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path, "installed_two", {})
    write_package(tmp_path, "named", {})
    write_distribution(tmp_path, "some-dist", "x = installed_two")
    monkeypatch.setenv(plugins.VARIABLE, " named , installed_two,")
    assert [plugin.package for plugin in plugins.enabled()] == ["installed_two", "named"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("x = not_there", "plug-in 'not_there' (the entry point 'x' of some-dist): there is no"),
        ("x = a.b:c", "plug-in 'a.b:c' (the entry point 'x' of some-dist): not the name of a"),
        ("x = fails", "plug-in 'fails' (the entry point 'x' of some-dist): it cannot be imported"),
    ],
)
def test_entry_points_that_lead_nowhere(entry: str, message: str, tmp_path: Path) -> None:
    write_package(tmp_path, "fails", {"__init__.py": "import a_module_that_is_missing"})
    write_distribution(tmp_path, "some-dist", entry)
    assert_refused(said("train"), message)
    assert_refused(said("predict", "checkpoint=x.pt"), "")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("not_there", "there is no such package; install it, or add the folder that contains it"),
        ("good,not_there", "plug-in 'not_there' (MASKSEG_PLUGINS=good,not_there): there is no"),
        ("./good", "plug-in './good' (MASKSEG_PLUGINS=./good): not the name of a package"),
        ("folder", "plug-in 'folder' (MASKSEG_PLUGINS=folder): the folder has no __init__.py"),
        ("raises", "it cannot be imported: ZeroDivisionError: one line of two"),
        ("raises.inner", "it cannot be imported: ZeroDivisionError"),
        ("missing", "it cannot be imported: ModuleNotFoundError: No module named 'a_missing_one'"),
        ("exits", "it cannot be imported: SyntaxError"),
        ("kind", "register: kind must be one of part, model, transform, superpixels, not 'head'"),
        ("nested", "nested.f.<locals>.A must be at the top level of its module"),
    ],
)
def test_names_that_lead_nowhere(
    value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path, "good", {})
    (tmp_path / "folder").mkdir()
    write_package(
        tmp_path, "raises", {"__init__.py": "raise ZeroDivisionError('one line\\nof two')"}
    )
    write_package(tmp_path, "missing", {"__init__.py": "import a_missing_one"})
    write_package(tmp_path, "exits", {"__init__.py": "def ("})
    imports = "from maskseg.plugins import register\n"
    write_package(tmp_path, "kind", {"__init__.py": f"{imports}@register('head')\nclass A: pass"})
    nested = "def f():\n    @register('part')\n    class A: pass\nf()"
    write_package(tmp_path, "nested", {"__init__.py": imports + nested})
    monkeypatch.setenv(plugins.VARIABLE, value)
    assert_refused(said("train"), message)


def test_files_that_clash_or_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_package(tmp_path, "first", {"configs/optimizer/mine.yaml": "lr: 1.0\n"})
    write_package(tmp_path, "second", {"configs/optimizer/mine.yaml": "lr: 2.0\n"})
    write_package(tmp_path, "shadow", {"configs/optimizer/sgd.yaml": "lr: 2.0\n"})
    write_package(tmp_path, "damaged", {"configs/optimizer/bad.yaml": "lr: [1.0\n"})
    write_package(tmp_path, "empty", {"configs/optimizer/none.yaml": "# nothing\n"})
    for value, parts in {
        "first,second": ("second/configs/optimizer/mine.yaml", "first/configs/optimizer/mine.yaml"),
        "shadow": ("shadow/configs/optimizer/sgd.yaml", str(ROOT / "configs/optimizer/sgd.yaml")),
        "damaged": ("damaged/configs/optimizer/bad.yaml: the config file cannot be used",),
        "empty": ("empty/configs/optimizer/none.yaml: the config file has no keys",),
    }.items():
        monkeypatch.setenv(plugins.VARIABLE, value)
        assert_refused(said("train"), *parts)
        assert_refused(said("train", "--help"), *parts)
    monkeypatch.setenv(plugins.VARIABLE, "first")
    assert len(config_folders()) == 2


def test_files_of_a_plugin_are_found_everywhere(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "from_a_plugin" in configs.experiments()
    assert "from_a_plugin" in done("train", "--help")
    assert part not in sys.modules  # the help imports nothing
    config = configs.compose("train", ["experiment=from_a_plugin", "optimizer=quick", *TINY])
    assert part in sys.modules
    assert config.name == "from_a_plugin"
    assert config.optimizer.lr == 1.0
    assert config.model.backbone.trunk == {"_target_": f"{part}.Trunk", "width": 8, "weights": None}
    message = refusal(configs.compose, "train", ["optimizer=quikc"])
    assert "did you mean 'quick'?" in message
    assert "adamw, quick, sgd" in message
    # Keys of a replaced group are dropped from an experiment of a plug-in too.
    replaced = ["experiment=from_a_plugin", "model/trunk@model.backbone.trunk=resnet"]
    config = configs.compose("train", replaced)
    assert config.model.backbone.trunk.name == "resnet50"
    settings = configs.hydra_settings(["experiment=from_a_plugin"])
    assert "experiment=from_a_plugin" in settings.overrides.task
    monkeypatch.delenv(plugins.VARIABLE)
    assert "from_a_plugin" not in configs.experiments()
    assert "has no 'quick'" in refusal(configs.compose, "train", ["optimizer=quick"])


@pytest.mark.usefixtures("part")
def test_keys_of_a_class_of_a_plugin_have_types_and_levels() -> None:
    override = "model.backbone.trunk.width=wide"
    message = refusal(configs.compose, "train", ["experiment=from_a_plugin", *TINY, override])
    assert message.startswith("model.backbone.trunk.width='wide': expected a whole number")
    config = configs.compose("train", ["experiment=from_a_plugin", *TINY])
    model: Any = configs.build_model(config)
    assert type(model.backbone.trunk).__name__ == "Trunk"
    assert list(model.backbone.levels) == ["p2", "p3", "p4"]
    assert model.proposer.strides == {"p2": 4, "p3": 8, "p4": 16}


def test_own_configs_may_name_what_an_enabled_package_defines(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs.check_targets({"_target_": f"{part}.Plain"})
    configs.check_targets({"_target_": f"{part}.function"})
    for target in (f"{part}.os.system", f"{part}.nn.Linear"):
        assert "not defined in the package" in refusal(configs.check_targets, {"_target_": target})
    assert "is refused" in refusal(configs.check_targets, {"_target_": f"{part}_2.Plain"})
    monkeypatch.delenv(plugins.VARIABLE)
    message = refusal(configs.check_targets, {"_target_": f"{part}.Plain"})
    assert f"if {part!r} is a plug-in that you trust, MASKSEG_PLUGINS={part} enables it" in message


def test_a_checkpoint_names_registered_classes(part: str) -> None:
    values = checkpoint()
    config = read(values)
    model: Any = configs.build_model(config, configs.CHECKPOINT_TARGETS)
    assert type(model.backbone.trunk).__name__ == "Trunk"
    assert f"{part}.Trunk" not in configs.CHECKPOINT_TARGETS
    values["model"]["backbone"]["trunk"]["weights"] = "/etc/passwd"
    model = configs.build_model(read(values), configs.CHECKPOINT_TARGETS)
    assert model.backbone.trunk.weights is None


def test_a_checkpoint_of_a_plugin_that_is_not_enabled(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = checkpoint()
    write_package(tmp_path, "another", {})
    for value in ("", "another"):
        # It stays refused although its module is imported and has registered the class.
        assert part in sys.modules
        monkeypatch.setenv(plugins.VARIABLE, value)
        message = refusal(read, values)
        assert f"_target_ '{part}.Trunk' is refused" in message
        assert f"MASKSEG_PLUGINS={part} enables it" in message
    del sys.modules[part]
    refusal(read, values)
    assert part not in sys.modules  # a name in a checkpoint imports nothing


@pytest.mark.parametrize("name", ["Plain", "function", "nn.Linear", "os.system", "missing", ""])
def test_a_checkpoint_names_nothing_else_of_a_plugin(name: str, part: str) -> None:
    values = checkpoint()
    values["model"]["backbone"]["trunk"] = {"_target_": f"{part}.{name}"}
    message = refusal(read, values)
    assert "is refused" in message
    if name:
        assert f"the plug-in {part!r} is enabled and does not register this class" in message
    refusal(configs.construct, {"_target_": f"{part}.{name}"})


@pytest.mark.usefixtures("part")
def test_keys_of_a_registered_class_are_checked() -> None:
    trained = checkpoint()
    for key, value, message in (
        ("nothing", 1, "Trunk has no key 'nothing'"),
        ("self", 1, "Trunk has no key 'self'"),
        ("_args_", [1], "the key '_args_' of model.backbone.trunk is refused"),
        ("width", "wide", "model.backbone.trunk.width='wide': expected a whole number"),
        ("width", "${oc.env:HOME}", "only plain references"),
    ):
        values = deepcopy(trained)
        values["model"]["backbone"]["trunk"][key] = value
        assert message in refusal(read, values)


def test_a_class_is_named_where_its_kind_belongs(part: str) -> None:
    values = checkpoint()
    values["data"]["test_transforms"] = [{"_target_": f"{part}.Invert"}]
    config = read(values)
    transform = configs.build(config.data.test_transforms[0], configs.CHECKPOINT_TARGETS)
    assert type(transform).__name__ == "Invert"
    values["data"]["test_transforms"] = [{"_target_": f"{part}.Trunk"}]
    refusal(read, values)
    values["data"]["test_transforms"] = []
    values["data"]["superpixels"] = {"_target_": f"{part}.Trunk"}
    refusal(read, values)
    values["data"]["superpixels"] = None
    values["model"] = {"_target_": f"{part}.Trunk"}
    assert "model is not one of" in refusal(read, values)


def test_a_whole_model_and_superpixels(part: str, tmp_path: Path) -> None:
    text = (
        "from maskseg.models.rcnn import PixelModel\n@register('model')\nclass Model(PixelModel):\n"
        "    pass\n@register('superpixels')\nclass Grid:\n    pass\n"
    )
    write_package(tmp_path, part, {"__init__.py": PART + text})
    importlib.invalidate_caches()
    values = checkpoint()
    trunk = values["model"]["backbone"]
    means = {"pixel_mean": [0.0, 0.0, 0.0], "pixel_std": [1.0, 1.0, 1.0]}
    values["model"] = {"_target_": f"{part}.Model", "backbone": trunk, **means}
    values["data"]["superpixels"] = {"_target_": f"{part}.Grid"}
    config = read(values)
    model = configs.build_model(config, configs.CHECKPOINT_TARGETS)
    assert type(model).__name__ == "Model"
    assert OmegaConf.to_container(config.data.superpixels) == {"_target_": f"{part}.Grid"}
    values["model"]["_target_"] = f"{part}.Grid"
    assert "model is not one of" in refusal(read, values)


@pytest.mark.parametrize(
    "target", ["os.system", "torch.hub.load", "maskseg.load", "Trunk", "a-b.c"]
)
def test_no_message_suggests_to_enable_a_package_that_is_no_plugin(target: str) -> None:
    assert "MASKSEG_PLUGINS" not in refusal(configs.construct, {"_target_": target})


def test_groups_that_a_checkpoint_chooses(part: str) -> None:
    values = checkpoint("optimizer=quick")
    values["optimizer"]["lr"] = 3.0
    assert read(values).optimizer.lr == 3.0
    values["optimizer"]["_target_"] = f"{part}.function"
    assert "is refused" in refusal(read, values)


def test_a_key_whose_default_refers_to_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "defaults: [custom, _self_]\n_target_: maskseg.data.datasets.coco.CocoSource\nroot: ???\n"
        "train_json: ${data.root}/a.json\n"
    )
    write_package(tmp_path, "missing_root", {"configs/data/needs_root.yaml": text})
    monkeypatch.setenv(plugins.VARIABLE, "missing_root")
    choice = ["data=needs_root", "data.root=x"]
    config = configs.compose("train", [*choice, "data.train_json=other.json"])
    assert config.data.train_json == "other.json"
    assert "data.root" in refusal(configs.compose, "train", ["data=needs_root"])


def test_a_module_and_a_package_in_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one_module.py").write_text(PART)
    (tmp_path / "configs").mkdir()  # beside the module, not its own
    write_package(tmp_path, "outer", {"inner/__init__.py": PART, "sub.py": PART})
    monkeypatch.setenv(plugins.VARIABLE, "one_module,outer.inner")
    assert plugins.registered("part") == {"one_module.Trunk", "outer.inner.Trunk"}
    assert len(config_folders()) == 1
    importlib.import_module("outer.sub")
    assert "outer.sub.Trunk" not in plugins.registered()


def test_another_process_finds_a_plugin(tmp_path: Path) -> None:
    write_package(tmp_path, "elsewhere", {"configs/experiment/remote.yaml": "name: remote\n"})
    environment = {**os.environ, "MASKSEG_PLUGINS": "elsewhere"}
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{tmp_path}"
    command = [sys.executable, str(ROOT / "tools" / "train.py")]
    result = subprocess.run(
        [*command, "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert "remote" in result.stdout
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: plug-in 'elsewhere' (MASKSEG_PLUGINS=elsewhere): there")
    assert len(result.stderr.splitlines()) == 1


def test_the_examples_register_their_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    enable(monkeypatch, *EXAMPLES)
    assert plugins.registered() == {
        "convnext_trunk.trunk.ConvNeXt",
        "boundary_head.head.BoundaryHead",
        "recipe.photometric.Photometric",
    }
