"""Which classes and functions a config may name: the user's own config, and that of a checkpoint.

A checkpoint brings its own config, which may come from an unknown source. Hydra's `instantiate`
calls whatever `_target_` names. Therefore the config of a checkpoint is never passed to it: its
model and its transforms are built by `construct`, which accepts a closed set of classes and none of
Hydra's other special keys. See docs/decisions/0016-closed-set.md. Enabled plug-ins extend both what
the user's own config may name and the closed set. See docs/decisions/0017-plugins.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import hydra
from omegaconf import OmegaConf

from maskseg.config.compose import check_kind
from maskseg.errors import UserError
from maskseg.files import parse_yaml
from maskseg.files.configs import config_folders
from maskseg.plugins import VARIABLE, enabled, owner, registered

# Prefixes of the names that the user's own config may use, beside those of enabled plug-ins.
TRAIN_TARGETS = ("maskseg.", "torch.optim.")

TRANSFORMS = frozenset(
    f"maskseg.data.transforms.{name}"
    for name in (
        "ColorJitter",
        "Flip",
        "RandomCrop",
        "Resize",
        "ResizeShortestEdge",
        "ScaleJitterCrop",
    )
)
SUPERPIXELS = frozenset(
    {"maskseg.superpixels.methods.Felzenszwalb", "maskseg.superpixels.methods.SLIC"}
)
_MODEL_PARTS = SUPERPIXELS | {
    "maskseg.variants.cfm.hierarchy.HierarchicalGrouping",
    "maskseg.structures.FeatureSpec",
    "maskseg.models.anchors.AnchorGenerator",
    "maskseg.models.box_head.BoxHead",
    "maskseg.models.box_head.BoxHeadMLP",
    "maskseg.models.file_proposer.FileProposer",
    "maskseg.models.backbones.fpn.FPN",
    "maskseg.models.keypoint_head.KeypointHead",
    "maskseg.models.mask_head.MaskHead",
    "maskseg.models.roi_pooler.MultiLevelRoIAlign",
    "maskseg.models.backbones.resnet.ResNet",
    "maskseg.models.rpn.AnchorSampler",
    "maskseg.models.rpn.ProposalLimits",
    "maskseg.models.rpn.RPN",
    "maskseg.models.rpn.RPNHead",
    "maskseg.models.region_sampler.RegionSampler",
    "maskseg.models.rcnn.GeneralizedRCNN",
    "maskseg.models.backbones.alexnet.AlexNet",
    "maskseg.variants.cfm.classifier.CFMClassifier",
    "maskseg.variants.cfm.net.CFMNet",
    "maskseg.variants.cfm.settings.MLPSettings",
    "maskseg.variants.cfm.settings.MaskingSettings",
    "maskseg.variants.cfm.settings.PoolerSettings",
    "maskseg.variants.cfm.svm_classifier.CFMSvm",
    "maskseg.variants.hash.segmenter.HashSegmenter",
    "maskseg.annotation.classifier.ImageClassHead",
    "maskseg.annotation.classifier.ImageClassifier",
    "maskseg.variants.cfm.proposer.DrawnSegments",
    "maskseg.variants.cfm.proposer.SegmentProposer",
    "maskseg.variants.hash.net.SegmentationNet",
    "maskseg.models.backbones.vgg.VGG16",
}
# Classes that the config of a checkpoint may name, beside those that enabled plug-ins register;
# never functions. Their constructors do not read or write files and do not start processes, except
# for `weights`, which is set to None here.
CHECKPOINT_TARGETS = _MODEL_PARTS | TRANSFORMS
# The classes of whole models: the `_target_` of `model`.
MODELS = frozenset(
    {
        "maskseg.models.rcnn.GeneralizedRCNN",
        "maskseg.variants.cfm.net.CFMNet",
        "maskseg.annotation.classifier.ImageClassifier",
        "maskseg.variants.hash.net.SegmentationNet",
    }
)
_MAX_NAME = 200  # characters of a refused name in a message
# Packages that are no plug-ins: no message suggests to enable them.
_NO_PLUGINS = sys.stdlib_module_names | {"hydra", "maskseg", "numpy", "omegaconf", "torch"}


def checkpoint_targets() -> frozenset[str]:
    """The classes that the config of a checkpoint may name. Raises UserError."""
    return CHECKPOINT_TARGETS | registered()


def model_targets() -> frozenset[str]:
    """The classes of whole models that a checkpoint may name. Raises UserError."""
    return MODELS | registered("model")


def transform_targets() -> frozenset[str]:
    """The transforms that a checkpoint may name. Raises UserError."""
    return TRANSFORMS | registered("transform")


def superpixel_targets() -> frozenset[str]:
    """The methods for superpixels that a checkpoint may name. Raises UserError."""
    return SUPERPIXELS | registered("superpixels")


def check_targets(config: object) -> None:
    """Check each `_target_` of the user's own config.

    Raises UserError for a name outside of `TRAIN_TARGETS` and of the enabled plug-ins.
    """
    plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    allowed = (*TRAIN_TARGETS, *(f"{plugin.package}." for plugin in enabled()))
    for target in targets_of(plain):
        if not isinstance(target, str) or not target.startswith(allowed) or ".." in target:
            raise UserError(
                f"config: _target_ {target!r} is refused; allowed are names that begin with "
                f"{' or '.join(allowed)}{_hint(target)}"
            )
        if not _is_defined_in(target, allowed):
            raise UserError(
                f"config: _target_ {target!r} is refused; the object is not defined in the package "
                "that the name begins with"
            )


def _is_defined_in(target: str, prefixes: tuple[str, ...]) -> bool:
    """Whether the object of a name is callable and defined in one of the packages.

    The prefix of the name alone does not show it: `maskseg.engine.checkpoint.torch.load` leads to
    a function that a module of the package only imports.
    """
    try:
        function = hydra.utils.get_object(target)
    except Exception:  # reported, with a better message, when the object is built
        return True
    module = str(getattr(function, "__module__", ""))
    is_inside = module.startswith(prefixes) or owner(module) is not None
    return is_inside and callable(function)


def targets_of(plain: object) -> Iterator[object]:
    """Each `_target_` of plain nested values that is not None."""
    return (node["_target_"] for node in _nodes_with_target(plain) if node["_target_"] is not None)


def check_closed(plain: object, allowed: Collection[str] | None = None, place: str = "") -> None:
    """Check plain nested values from the config of a checkpoint. Nothing is built.

    allowed: the classes that may be named, by default `checkpoint_targets()`; place: the key of the
        values, for messages.
    Raises UserError for a class that is not in `allowed`, for a key that is not a parameter of the
    constructor, for a value of another type than in the installed configs, and for a value that is
    not plain, such as an interpolation.
    """
    allowed = checkpoint_targets() if allowed is None else allowed
    if isinstance(plain, list):
        for index, value in enumerate(plain):
            check_closed(value, allowed, f"{place}.{index}")
    elif isinstance(plain, dict):
        _check_keys(plain, allowed, place)
        for key, value in plain.items():
            check_closed(value, allowed, f"{place}.{key}")
    elif isinstance(plain, str) and ("${" in plain or plain == "???"):
        raise UserError(
            f"the checkpoint's config: {place}={plain[:200]!r} is refused, it is not a plain value"
        )
    elif not (plain is None or type(plain) in (str, int, float, bool)):
        raise UserError(
            f"the checkpoint's config: {place} is refused, it is a {type(plain).__name__}"
        )


def _check_keys(node: dict[object, object], allowed: Collection[str], place: str) -> None:
    """Check the keys of one group: its `_target_`, and the parameters of that class."""
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


def _parameters(built_class: type) -> set[str]:
    """The names of a constructor's parameters.

    Includes those of the base classes, to which a constructor passes its `**keys`.
    """
    named_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names: set[str] = set()
    for base in built_class.__mro__:
        if base is object or "__init__" not in vars(base):
            continue
        for parameter in inspect.signature(vars(base)["__init__"]).parameters.values():
            if parameter.kind in named_kinds:
                names.add(parameter.name)
    return names - {"self"}


def refusal(target: object) -> str:
    """The error message for a name that a checkpoint may not use."""
    return (
        f"config: _target_ {str(target)[:_MAX_NAME]!r} is refused; a checkpoint may name the "
        f"models' own parts and transforms, and classes that an enabled plug-in registers"
        f"{_hint(target)}"
    )


def _hint(target: object) -> str:
    """What to do about a refused name that may be one of a plug-in; else an empty string."""
    if not isinstance(target, str) or len(target) > _MAX_NAME:
        return ""
    package, *others = target.split(".")
    is_name = bool(others) and all(part.isidentifier() for part in (package, *others))
    if not is_name or package in _NO_PLUGINS:
        return ""
    plugin = owner(target)
    if plugin is not None:
        return f"; the plug-in {plugin.package!r} is enabled and does not register this class"
    return f"; if {package!r} is a plug-in that you trust, {VARIABLE}={package} enables it"


def construct(plain: object, allowed: Collection[str] | None = None) -> Any:
    """Build the object that plain values describe, after `check_closed`.

    allowed: as in `check_closed`.
    Raises UserError for values that the check or a constructor refuses.
    """
    check_closed(plain, allowed, "model")
    return _construct(plain)


def _construct(plain: object) -> Any:
    if isinstance(plain, list):
        return [_construct(value) for value in plain]
    if not isinstance(plain, dict):
        return plain
    # Without `weights`, a constructor does not read or download a file.
    values = {key: None if key == "weights" else _construct(value) for key, value in plain.items()}
    if "_target_" not in values:
        return values
    target = str(values.pop("_target_"))
    try:
        return _class_of(target)(**values)
    except UserError:
        raise
    except Exception as error:  # raised by a constructor for values without sense
        reason = [*str(error).splitlines(), type(error).__name__][0]
        raise UserError(f"config: {reason} (in {target})") from error


def _class_of(target: str) -> type:
    """Import the class of a name that was checked.

    Raises UserError for a name that does not lead to a class that is defined under this name.
    """
    module, _, name = target.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    if not inspect.isclass(value) or f"{value.__module__}.{value.__qualname__}" != target:
        raise UserError(refusal(target))
    return value


def _installed_defaults() -> dict[str, dict[str, object]]:
    """Class -> key -> a value that the installed configs have for the key.

    The configs are those of this package and of the enabled plug-ins. Interpolations and null are
    left out, because they do not show a type.
    """
    return _read_defaults(config_folders())


@functools.cache
def _read_defaults(folders: tuple[Path, ...]) -> dict[str, dict[str, object]]:
    defaults: dict[str, dict[str, object]] = {}
    files: list[Path] = []
    for folder in folders:
        files += sorted(folder.glob("**/*.yaml"))
    for file in files:
        for node in _nodes_with_target(parse_yaml(file.read_text(encoding="utf-8"))):
            class_defaults = defaults.setdefault(str(node["_target_"]), {})
            for key, value in node.items():
                if value is not None and "${" not in str(value) and value != "???":
                    class_defaults.setdefault(key, value)
    return defaults


def _nodes_with_target(plain: object) -> Iterator[dict[str, object]]:
    """All dictionaries with a `_target_` in plain nested values."""
    values: Iterable[object] = ()
    if isinstance(plain, dict):
        if "_target_" in plain:
            yield plain
        values = plain.values()
    elif isinstance(plain, list):
        values = plain
    for value in values:
        yield from _nodes_with_target(value)
