"""What the command line chooses is never changed by keys of an experiment that belong to something
else.
"""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from torch import nn

from maskseg import config as configs
from maskseg.config import Config
from maskseg.files import parse_yaml
from maskseg.files.configs import config_folder


def compose(*overrides: str) -> Config:
    return configs.compose("train", list(overrides))


def read(group: str, name: str) -> dict[str, object]:
    """The keys of a config file."""
    content = parse_yaml((config_folder() / group / f"{name}.yaml").read_text())
    assert isinstance(content, dict)
    return content


def test_the_default_experiment_is_used_where_nothing_is_chosen() -> None:
    assert compose() == compose("experiment=scenes_r18")
    assert compose("trainer.max_steps=5").name == "scenes_r18"


def test_a_chosen_optimizer_keeps_its_own_rate(capsys: pytest.CaptureFixture[str]) -> None:
    config = configs.compose("train", ["optimizer=sgd"], print)
    assert config.optimizer == OmegaConf.create(read("optimizer", "sgd"))
    assert (config.name, config.trainer.max_steps) == ("scenes_r18", 1400)
    assert capsys.readouterr().out.strip() == (
        "optimizer=sgd drops these keys of experiment=scenes_r18: optimizer.lr=0.0007, "
        "optimizer.base_batch_size=4"
    )
    compose("optimizer=sgd")  # configs that a tool composes for itself report nothing
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("tool", ["benchmark", "segments", "fit_backbone"])
def test_tools_that_include_the_config_of_a_training_follow_the_same_rule(
    tool: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configs.compose(tool, ["optimizer=sgd"], print)
    assert config.optimizer == OmegaConf.create(read("optimizer", "sgd"))
    assert "drops these keys of experiment=scenes_r18" in capsys.readouterr().out
    assert configs.compose(tool, ["model=mask_rcnn"]).name == "unnamed"


def test_a_chosen_optimizer_is_scaled_from_its_own_batch_size() -> None:
    # Guards against: sgd's rate for 16 images per step is used for 4, because the experiment states
    # its own rate for 4.
    config = compose("optimizer=sgd", "trainer.device=cpu")
    model = nn.Linear(1, 1)
    optimizer = configs.build_optimizer(config, configs.build(config.trainer), model)
    assert config.batch_size == 4
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * 4 / 16)
    own = compose("trainer.device=cpu")
    optimizer = configs.build_optimizer(own, configs.build(own.trainer), model)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0007)
    unscaled = compose("optimizer=sgd", "optimizer.base_batch_size=null", "trainer.device=cpu")
    optimizer = configs.build_optimizer(unscaled, configs.build(unscaled.trainer), model)
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_the_command_line_still_changes_keys_of_what_it_chooses() -> None:
    assert compose("optimizer=sgd", "optimizer.lr=0.5").optimizer.lr == 0.5


@pytest.mark.parametrize("overrides", [["model=torchvision_mask_rcnn"], ["data=coco"]])
def test_no_default_experiment_under_a_chosen_model_or_dataset(overrides: list[str]) -> None:
    config = compose(*overrides)
    assert config.name == "unnamed"
    assert config.model.backbone.trunk.name == "resnet50"
    assert config.optimizer.lr == read("optimizer", "sgd")["lr"]


def test_a_model_in_an_experiment_of_another_kind() -> None:
    config = compose("experiment=scenes_cfm", "model=mask_rcnn")
    assert config.model == compose("model=mask_rcnn", "data=scenes").model
    assert (config.name, config.trainer.max_steps) == ("scenes_cfm", 2000)


def test_choices_of_an_experiment_below_a_replaced_model_are_dropped() -> None:
    # The experiment chooses superpixels for a segmenter that the model does not have.
    config = compose("experiment=scenes_hash_r18", "model=mask_rcnn")
    assert "segmenter" not in config.model


def test_a_replaced_stage_keeps_nothing_of_the_stage_before() -> None:
    config = compose("model/proposer=file")
    assert set(config.model.proposer) == set(read("model/proposer", "file"))
    assert config.model.backbone.channels == 64  # the experiment's other keys are unchanged


def test_a_group_in_a_place_of_its_own() -> None:
    config = compose("model/trunk@model.backbone.trunk=resnet")
    assert config.model.backbone.trunk == OmegaConf.create(read("model/trunk", "resnet"))


def test_a_removed_head_leaves_no_keys() -> None:
    config = compose("~model/heads@model.heads.mask")
    assert "mask" not in config.model.heads


def test_experiments_that_build_on_others() -> None:
    config = compose("experiment=scenes_keypoint_r18", "optimizer=sgd")
    assert config.optimizer.lr == read("optimizer", "sgd")["lr"]
    assert config.model.heads.keypoint.channels == 128


def test_files_of_the_replaced_dataset_are_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    # Guards against: values that refer to data.root, which data=custom does not have.
    config = configs.compose("train", ["experiment=scenes_cfm", "data=custom"], print)
    assert config.data.train_segments is None
    assert config.data.train_semantic is None
    assert config.data.segment_sampler.negative_iou == [0.0, 0.5]
    assert "data.train_segments=${data.root}/segments_train" in capsys.readouterr().out
    kept = compose("experiment=coco_cfm_r50_fpn", "data=coco").data
    assert kept.train_segments == "datasets/coco/segments_train2017"


def test_the_recipe_stays_with_another_dataset() -> None:
    # Transforms are a key that all datasets have; the recipe's are used for each of them.
    config = compose("experiment=coco_r50_fpn_lsj", "data=custom")
    assert (
        config.data.train_transforms == compose("experiment=coco_r50_fpn_lsj").data.train_transforms
    )
    assert config.data.train_json is None
