"""Keys that may be `auto`, and the usual numbers for them where there are no training data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from omegaconf import DictConfig, OmegaConf

AUTO = "auto"
SIZE = "data.size"
SIZE_RANGE = "data.size_range"
ANCHORS = "model.proposer.anchors.sizes"
DETECTIONS = "model.classifier.max_detections"
LIMITS = ("model.proposer.train_limits", "model.proposer.test_limits")
TRUNK_WEIGHTS = "model.backbone.trunk.weights"
_USUAL: dict[str, object] = {
    SIZE: 800,
    ANCHORS: [[32], [64], [128], [256], [512]],
    DETECTIONS: 100,
    **{f"{limits}.post_nms_top_n": 1000 for limits in LIMITS},
    **{f"{limits}.pre_nms_top_n": 1000 for limits in LIMITS},
    TRUNK_WEIGHTS: None,
}
FITTED_KEYS = tuple(_USUAL)


def open_keys(config: DictConfig) -> list[str]:
    """The keys with the value `auto` that a training sets.

    `data.size` of a dataset that makes its images is none: it is always a number.
    """
    keys = [key for key in FITTED_KEYS if OmegaConf.select(config, key) == AUTO]
    if OmegaConf.select(config, SIZE_RANGE) is None:
        return [key for key in keys if key != SIZE]
    return keys


def with_usual_numbers(config: DictConfig) -> DictConfig:
    """A whole config with the usual numbers instead of `auto`; values that refer to them follow."""
    keys = open_keys(config)
    if not keys:
        return config
    config = config.copy()
    for key in keys:
        OmegaConf.update(config, key, _USUAL[key])
    return config


@contextmanager
def usual_size(data: DictConfig) -> Iterator[None]:
    """Set the `size` of a group `data` to the usual number, where it is `auto`, in this context.

    The group is changed in place: values that refer to the size look it up in the whole config.
    """
    is_open = data.get("size") == AUTO and "size_range" in data
    if not is_open:
        yield
        return
    data.size = _USUAL[SIZE]
    try:
        yield
    finally:
        data.size = AUTO
