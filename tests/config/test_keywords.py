"""Keyword arguments of Python become overrides that Hydra reads back as the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made.runs import ROOT

import maskseg
from maskseg import config as configs
from maskseg.config.keywords import to_overrides
from maskseg.config.restore import load_predictor
from maskseg.errors import UserError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.max_steps", 60),
        ("trainer.plots", False),
        ("optimizer.lr", 1e-05),
        ("run_dir", None),
        ("run_dir", "runs/it's (1), a=b [x] ü"),
        ("data.train_json", ["a b.json", "c,d.json"]),
        ("scheduler.milestones", [0.5, 0.75]),
        ("trainer.resume", "auto"),
        ("data.images", "2024"),
    ],
)
def test_values_are_read_back(key: str, value: object) -> None:
    keywords: dict[str, Any] = {
        "experiment": "coco_r50_fpn_1x",
        "data": "custom",
        key.replace(".", "__"): value,
    }
    config = configs.compose("train", to_overrides(keywords))
    for part in key.split("."):
        config = config[part]
    assert config == value


def test_both_spellings_and_choices_of_groups() -> None:
    keywords = {"experiment": "scenes_r18", "data__size": 64, "trainer.max_steps": 2}
    assert to_overrides(keywords) == [
        "experiment=scenes_r18",
        "data.size=64",
        "trainer.max_steps=2",
    ]
    dropped = to_overrides({"~model/heads@model.heads.mask": None, "run_dir": Path("a b")})
    assert dropped == ["~model/heads@model.heads.mask", "run_dir='a b'"]
    nested = to_overrides({"optimizer": {"lr": 0.1, "betas": (0.9, 0.99)}})
    assert nested == ["optimizer={lr: 0.1, betas: [0.9, 0.99]}"]


def test_numpy_numbers_and_other_objects() -> None:
    assert to_overrides({"seed": np.float64(0.5)}) == ["seed=0.5"]
    assert to_overrides({"seed": np.int64(3)}) == ["seed=3"]
    with pytest.raises(UserError, match=r"trainer\.max_steps: a object is no value of a config"):
        to_overrides({"trainer__max_steps": object()})
    with pytest.raises(UserError, match=r"did you mean 'trainer\.max_steps'"):
        configs.compose("train", to_overrides({"trainer__max_step": 3}))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"trainer__device": "cpu"}, r"trainer\.device is the argument device$"),
        ({"trainer.device": "cpu"}, r"trainer\.device is the argument device$"),
        ({"++trainer.device": "cpu"}, r"trainer\.device is the argument device$"),
        ({"checkpoint": "best.pt"}, "checkpoint is the argument run$"),
        (
            {"input": "photos", "output": "results"},
            r"input is the argument .* load\(run\)\(images\); output is .* prediction\.save$",
        ),
        ({"overwrite": True}, r"overwrite is the argument overwrite of prediction\.save$"),
    ],
)
def test_keys_without_an_effect_on_a_predictor(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        maskseg.load("no_such_run", **keywords)


def test_every_key_of_predict_is_refused_by_load() -> None:
    for key in yaml.safe_load((ROOT / "configs" / "predict.yaml").read_text()):
        with pytest.raises(UserError, match=f"load: .* {key} is the argument"):
            load_predictor(Path("no_such_run"), overrides=[f"{key}=1"])


def test_evaluate_takes_the_run_once() -> None:
    with pytest.raises(UserError, match=r"checkpoint is the argument run$"):
        maskseg.evaluate("no_such_run", "evaluation", checkpoint="another")
