"""Every number of every config is checked against its range when the config is composed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from maskseg import config as configs
from maskseg.config.schema import check_types, walk
from maskseg.errors import UserError
from maskseg.files.configs import config_folder
from maskseg.values import describe, has_range, matches

BAD = (math.nan, math.inf, -math.inf, -1, -1.5, 0, 2, 10**12, 2**70, 1e300)
# Floats that are valid whatever they are, as long as they are finite.
WITHOUT_RANGE = ("pixel_mean", "centre")
TOOLS = sorted(file.stem for file in config_folder().glob("*.yaml"))


@cache
def composed(tool: str, *overrides: str) -> DictConfig:
    return configs.compose(tool, list(overrides))


def all_configs() -> Iterator[DictConfig]:
    """The config of each tool and experiment, and of groups that no experiment uses."""
    for tool in TOOLS:
        yield composed(tool)
    for experiment in configs.experiments():
        yield composed("train", f"experiment={experiment}")
    for choices in (
        ("model=torchvision_mask_rcnn_v2",),
        ("model=detectron2_keypoint_rcnn_x101",),
        ("model/proposer=file",),
        ("optimizer=adamw",),
        ("model=hash_net",),
        ("data=msrc",),
        ("data=coco_panoptic",),
        ("model=cfm", "model/classifier=cfm_svm"),
    ):
        yield composed("train", *choices)


def plain(config: DictConfig) -> dict[str, Any]:
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def numbers(value: object) -> list[float]:
    if isinstance(value, list):
        return [number for item in value for number in numbers(item)]
    return [value] if type(value) in (int, float) else []  # type: ignore[list-item]


def replacements(value: object, bad: float) -> object:
    """The value with its first number replaced."""
    if isinstance(value, list) and value:
        return [replacements(value[0], bad), *value[1:]]
    return bad


def without_nulls(node: Any) -> Any:
    """Nested values without the keys that are null, which are read from the data later."""
    if not isinstance(node, dict):
        return node
    return {key: without_nulls(value) for key, value in node.items() if value is not None}


def test_every_number_has_a_range() -> None:
    without = set()
    for config in all_configs():
        for key, value, hint in walk(plain(config)):
            name = key.rpartition(".")[2]
            if numbers(value) and not has_range(hint) and name not in WITHOUT_RANGE:
                without.add(f"{key}: {describe(hint)}")
    assert without == set()


def test_each_number_is_accepted_within_its_range_or_refused_in_one_line() -> None:
    tried = set()
    for config in all_configs():
        references = {k for k, _ in _leaves(OmegaConf.to_container(config, resolve=False))}
        for key, value, hint in walk(plain(config)):
            if key in tried or key not in references or not numbers(value):
                continue
            tried.add(key)
            # The group of the key alone, which is faster to resolve.
            top = key.partition(".")[0]
            group = OmegaConf.create({top: without_nulls(plain(config)[top])})
            for bad in BAD:
                _check(group, key, replacements(value, bad), hint)
    assert len(tried) > 120


def _leaves(node: object, place: str = "") -> Iterator[tuple[str, object]]:
    """The keys that are no references to others."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{place}.{key}".lstrip("."))
    elif not (isinstance(node, str) and "${" in node):
        yield place, node


def _check(config: DictConfig, key: str, value: object, hint: object) -> None:
    changed = config.copy()
    OmegaConf.update(changed, key, value)
    exact = int(value) if isinstance(value, float) and value.is_integer() else value
    if matches(value, hint) or matches(exact, hint):
        check_types(changed)
        return
    with pytest.raises(UserError) as raised:
        check_types(changed)
    message = str(raised.value)
    assert message.startswith(f"{key}="), message
    assert f": expected {describe(hint)}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed=-1: expected a whole number from 0 to 4294967295"),
        ("data.timeout=-5", "data.timeout=-5: expected a number above 0 and at most 604800"),
        (
            "model.heads.mask.layers=-1",
            "model.heads.mask.layers=-1: expected a whole number from 0 to 100",
        ),
        (
            "model.heads.mask.pooler.size=0",
            "model.heads.mask.pooler.size=0: expected a whole number from 1 to 256",
        ),
        (
            "model.classifier.pooler.size=0",
            "model.classifier.pooler.size=0: expected a whole number from 1 to 256",
        ),
        (
            "data.train_transforms=[1]",
            "data.train_transforms=[1]: expected a list of values, each a group with _target_",
        ),
        (
            "data.train_transforms=[{_target_:maskseg.data.transforms.Flip,horizontal:2}]",
            "data.train_transforms.0.horizontal=2: expected a number from 0 to 1",
        ),
        ("optimizer.lr=nan", "optimizer.lr=nan: expected a number above 0"),
        ("trainer.clip_norm=nan", "trainer.clip_norm=nan: expected a number of at least 0"),
        ("trainer.max_steps=inf", "trainer.max_steps=inf: expected a whole number from 1 to"),
        ("data.num_classes=0", "data.num_classes=0: expected a whole number from 1 to"),
        (
            "model.proposer.strides={p2:0}",
            "model.proposer.strides={'p2': 0}: expected a group of keys, each a whole number",
        ),
        (
            "model.proposer.anchors.sizes=[]",
            "model.proposer.anchors.sizes=[]: expected a list of at least 1 value",
        ),
        ("evaluation.backend=fast", "evaluation.backend='fast': expected auto or faster or"),
        ("batch_size=100000", "batch_size=100000: expected a whole number from 1 to 65536"),
    ],
)
def test_values_out_of_range_on_a_command_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        configs.compose("train", [override])


def test_a_value_that_others_refer_to_is_reported_under_its_own_key() -> None:
    overrides = ["experiment=scenes_r18", "model.classifier.pooler.sampling_ratio=-1"]
    with pytest.raises(UserError, match=r"^model\.classifier\.pooler\.sampling_ratio=-1: "):
        configs.compose("train", overrides)
    with pytest.raises(UserError, match=r"^data\.num_classes=0: "):
        configs.compose("train", ["data.num_classes=0"])
