"""`--cfg job` prints the config of a command line, `--info` its groups; nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from maskseg import cli
from maskseg import config as configs
from maskseg.errors import Shown


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tool", ["train", "benchmark", "check_data", "annotate", "review"])
def test_the_config_of_a_tool(
    tool: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_tool(tool, ["--cfg", "job"]) == 0
    assert OmegaConf.create(capsys.readouterr().out) == configs.compose(tool, [])
    assert list(empty_folder.iterdir()) == []  # nothing was run


def test_the_config_with_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_tool("train", ["optimizer=sgd", "--cfg", "job", "optimizer.lr=0.5"]) == 0
    lines = capsys.readouterr().out.partition("model:")
    assert "drops these keys" in lines[0]
    config = OmegaConf.create(lines[1] + lines[2])
    assert config == configs.compose("train", ["optimizer=sgd", "optimizer.lr=0.5"])
    assert cli.run_tool("train", ["--cfg=job", "optimizer.rate=1"]) == 2
    assert "no such key 'optimizer.rate'" in capsys.readouterr().err


def test_the_config_of_a_sweep_is_that_of_its_first_trial(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run_tool("sweep", ["--multirun", "seed=4,5", "--cfg", "job"]) == 0
    assert OmegaConf.create(capsys.readouterr().out) == configs.compose("train", ["seed=4"])


def test_the_config_of_a_checkpoint() -> None:
    text = configs.to_yaml(configs.compose("train", []))
    overrides = ["evaluation.batch=3", "data=custom"]
    with pytest.raises(Shown) as shown:
        configs.from_checkpoint(text, [*overrides, "--cfg=job"], "evaluate")
    assert OmegaConf.create(shown.value.text) == configs.from_checkpoint(
        text, overrides, "evaluate"
    )
    with pytest.raises(Shown) as shown:
        configs.from_checkpoint(text, [*overrides, "--info"], "evaluate")
    assert shown.value.text.splitlines()[0] == "data=custom"


def test_the_groups_with_their_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_tool("train", ["optimizer=sgd", "model=mask_rcnn_hash", "--info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[lines.index("optimizer=sgd") + 1].split() == ["adamw", "sgd"]
    assert "model/heads@model.heads.mask=mask" in lines
    assert "model/superpixels@model.segmenter.superpixels=slic" in lines
    assert "debug: overfit smoke" in lines
    assert not any(line.startswith("experiment=") for line in lines)  # deselected by the model


def test_the_experiment_is_shown_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_tool("train", ["optimizer=sgd", "--info"]) == 0
    assert "experiment=scenes_r18" in capsys.readouterr().out.splitlines()


def test_the_groups_need_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_tool("evaluate", ["data=coco", "--info"]) == 0
    assert capsys.readouterr().out.startswith("data=coco\n    bsds coco ")
    assert cli.run_tool("evaluate", ["--cfg", "job"]) == 2
    assert "checkpoint=... is missing" in capsys.readouterr().err


def test_other_values_of_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--cfg", "hydra"], ["--cfg"], ["--cfg=all"]):
        assert cli.run_tool("train", arguments) == 2
        assert "--cfg job prints the config" in capsys.readouterr().err


def test_the_help_names_the_options() -> None:
    assert "--cfg job prints" in cli.help_text("train")
    assert "--cfg job prints" in cli.help_text("review")
    assert "--cfg" not in cli.help_text("compare")  # takes folders, and has no config


def test_a_process_of_a_higher_rank_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.run_tool("train", ["--info"]) == 0
    assert capsys.readouterr().out == ""
