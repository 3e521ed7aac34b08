"""What a config may name: that of the user's own command line, and that of a file of unknown origin.

A checkpoint brings its own config. Hydra's `instantiate` calls whatever `_target_` names, so the
config of a checkpoint never reaches it: its model and its transforms are built here, by a function
that knows a closed set of classes and none of Hydra's other keys. See
docs/decisions/0016-closed-set.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import hydra
from omegaconf import OmegaConf

from maskseg.config.compose import check_kind
from maskseg.errors import UserError
from maskseg.files import parse_yaml
from maskseg.files.configs import config_folder

# Prefixes of what the user's own command line may name.
TRUSTED = ("maskseg.", "torch.optim.")

TRANSFORMS = frozenset(
    f"maskseg.data.transforms.{name}"
    for name in ("ColorJitter", "Flip", "RandomCrop", "ResizeShortestEdge", "ScaleJitterCrop")
)
SUPERPIXELS = frozenset(
    {"maskseg.superpixels.methods.GraphSegments", "maskseg.superpixels.methods.SLIC"}
)
_MODEL_PARTS = SUPERPIXELS | {
    "maskseg.variants.cfm.hierarchy.HierarchicalGrouping",
    "maskseg.structures.FeatureSpec",
    "maskseg.models.anchors.AnchorGenerator",
    "maskseg.models.box_head.BoxClassifier",
    "maskseg.models.box_head.FCTrunk",
    "maskseg.models.file_proposer.FileProposer",
    "maskseg.models.backbones.fpn.FPN",
    "maskseg.models.keypoint_head.KeypointHead",
    "maskseg.models.mask_head.MaskHead",
    "maskseg.models.roi_pooler.MultiLevelRoIAlign",
    "maskseg.models.backbones.resnet.ResNet",
    "maskseg.models.rpn.RPN",
    "maskseg.models.rpn.RPNHead",
    "maskseg.models.region_sampler.RegionSampler",
    "maskseg.models.rcnn.GeneralizedRCNN",
    "maskseg.models.backbones.alexnet.AlexNet",
    "maskseg.variants.cfm.classifier.CFMClassifier",
    "maskseg.variants.cfm.net.CFMNet",
    "maskseg.variants.cfm.svm_classifier.CFMSvm",
    "maskseg.variants.hash.segmenter.HashSegmenter",
    "maskseg.annotation.classifier.ImageClassHead",
    "maskseg.annotation.classifier.ImageClassifier",
    "maskseg.variants.cfm.proposer.DrawnSegments",
    "maskseg.variants.cfm.proposer.SegmentProposer",
    "maskseg.variants.hash.net.SegmentationNet",
    "maskseg.models.backbones.vgg.VGG16",
}
# Classes that the config of a checkpoint may name: never a function. Their constructors neither
# read, write nor start anything, but for `weights`, which is null here.
FROM_CHECKPOINT = _MODEL_PARTS | TRANSFORMS
# What a whole model is.
MODELS = frozenset(
    {
        "maskseg.models.rcnn.GeneralizedRCNN",
        "maskseg.variants.cfm.net.CFMNet",
        "maskseg.annotation.classifier.ImageClassifier",
        "maskseg.variants.hash.net.SegmentationNet",
    }
)


def check_targets(config: Any, allowed: Sequence[str] = TRUSTED) -> None:
    """Raises UserError where a `_target_` of the user's own config names something outside the packages of `allowed`."""
    plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    for target in targets_of(plain):
        if not (
            isinstance(target, str) and target.startswith(tuple(allowed)) and ".." not in target
        ):
            raise UserError(
                f"config: _target_ {target!r} is refused; allowed are names that begin with {' or '.join(allowed)}"
            )
        if not _is_own(target, allowed):
            raise UserError(
                f"config: _target_ {target!r} is refused; it only passes through the package"
            )


def _is_own(target: str, allowed: Sequence[str]) -> bool:
    """Whether what the name leads to is defined where the name says, and not something that a module there has imported."""
    try:
        function = hydra.utils.get_object(target)
    except Exception:  # reported again, and better, by the one who builds it
        return True
    return str(getattr(function, "__module__", "")).startswith(tuple(allowed)) and callable(
        function
    )


def targets_of(plain: Any) -> Iterator[Any]:
    """Each `_target_` of plain nested values."""
    return (node["_target_"] for node in _nodes_with_target(plain) if node["_target_"] is not None)


def check_closed(plain: Any, allowed: Collection[str] = FROM_CHECKPOINT, place: str = "") -> None:
    """Raises UserError where plain values of a checkpoint would build a class that is not in `allowed`,
    or not by its constructor's own parameters, or where a value has another type than in the
    installed configs. Nothing is built.
    """
    if isinstance(plain, list):
        for index, value in enumerate(plain):
            check_closed(value, allowed, f"{place}.{index}")
    elif isinstance(plain, dict):
        _check_keys(plain, allowed, place)
        for key, value in plain.items():
            check_closed(value, allowed, f"{place}.{key}")
    elif isinstance(plain, str) and ("${" in plain or plain == "???"):
        raise UserError(
            f"the checkpoint's config: {place}={plain[:200]!r} is refused, it is no plain value"
        )
    elif not (plain is None or type(plain) in (str, int, float, bool)):
        raise UserError(
            f"the checkpoint's config: {place} is refused, it is a {type(plain).__name__}"
        )


def _check_keys(node: dict[Any, Any], allowed: Collection[str], place: str) -> None:
    for key in node:
        if not isinstance(key, str) or (key.startswith("_") and key != "_target_"):
            raise UserError(f"the checkpoint's config: the key {key!r} of {place} is refused")
    if "_target_" not in node:
        return
    target = node["_target_"]
    if not isinstance(target, str) or target not in allowed:
        raise UserError(refusal(target))
    parameters = _parameters(_class_of(target))
    defaults = _installed_defaults().get(target, {})
    for key in node.keys() - {"_target_"}:
        if key not in parameters:
            raise UserError(
                f"the checkpoint's config: {target.rpartition('.')[2]} has no key {key!r}"
            )
        if key in defaults:
            check_kind(f"the checkpoint's config: {place}.{key}", defaults[key], node[key])


def _parameters(of_class: type) -> set[str]:
    """The names that a constructor takes, also those that it hands on to that of its base class as `**keys`."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    constructors = [
        vars(base)["__init__"]
        for base in of_class.__mro__
        if base is not object and "__init__" in vars(base)
    ]
    parameters = (
        p
        for constructor in constructors
        for p in inspect.signature(constructor).parameters.values()
    )
    return {p.name for p in parameters if p.kind in named} - {"self"}


def refusal(target: Any) -> str:
    """The message for a name that a checkpoint may not use."""
    return f"config: _target_ {str(target)[:200]!r} is refused; a checkpoint may name the models' own parts and transforms only"


def construct(plain: Any, allowed: Collection[str] = FROM_CHECKPOINT) -> Any:
    """The object that plain values describe, after `check_closed`. Raises UserError for what it or a constructor refuses."""
    check_closed(plain, allowed, "model")
    return _construct(plain)


def _construct(plain: Any) -> Any:
    if isinstance(plain, list):
        return [_construct(value) for value in plain]
    if not isinstance(plain, dict):
        return plain
    values = {
        key: None if key == "weights" else _construct(value) for key, value in plain.items()
    }  # no file is read, none downloaded
    if "_target_" not in values:
        return values
    target = str(values.pop("_target_"))
    try:
        return _class_of(target)(**values)
    except UserError:
        raise
    except Exception as error:  # a constructor's own, of values that make no sense
        raise UserError(
            f"config: {[*str(error).splitlines(), type(error).__name__][0]} (in {target})"
        ) from error


def _class_of(target: str) -> type:
    """The class of a name that was checked. Raises UserError where the name is not that of the class itself."""
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not inspect.isclass(found) or f"{found.__module__}.{found.__qualname__}" != target:
        raise UserError(refusal(target))
    return found


@functools.cache
def _installed_defaults() -> dict[str, dict[str, Any]]:
    """Class -> key -> a value that the installed configs have for it; without interpolations and null, which show no type."""
    defaults: dict[str, dict[str, Any]] = {}
    for file in sorted(config_folder().glob("**/*.yaml")):
        for node in _nodes_with_target(parse_yaml(file.read_text(encoding="utf-8"))):
            of_class = defaults.setdefault(node["_target_"], {})
            for key, value in node.items():
                if value is not None and "${" not in str(value) and value != "???":
                    of_class.setdefault(key, value)
    return defaults


def _nodes_with_target(plain: Any) -> Iterator[dict[str, Any]]:
    if isinstance(plain, dict) and "_target_" in plain:
        yield plain
    for value in (
        plain.values() if isinstance(plain, dict) else plain if isinstance(plain, list) else ()
    ):
        yield from _nodes_with_target(value)
