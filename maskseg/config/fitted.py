"""Keys with the value `auto`, which a training sets to numbers that suit its data.

The numbers replace `auto` in the config, so that a checkpoint stores them: evaluation, prediction
and a resumed training use the same. Tools without training data use the usual numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from maskseg.config.auto import (
    ANCHORS,
    AUTO,
    DETECTIONS,
    LIMITS,
    SIZE,
    SIZE_RANGE,
    TRUNK_WEIGHTS,
    open_keys,
)
from maskseg.config.build import build_source, proposer_strides, set_key
from maskseg.config.checkpoint_config import read_checkpoint_config
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.object_sizes import (
    ObjectSizes,
    choose_anchors,
    choose_detections,
    choose_proposals,
    choose_size,
    few_samples,
    format_sizes,
    measure_objects,
)
from maskseg.engine.distributed import DistributedContext, run_while_others_wait
from maskseg.errors import UserError
from maskseg.files.downloads import fetch
from maskseg.models.backbones.resnet import ResNet, check_name, published_address

_IMAGENET = "IMAGENET1K_V1"
_RESNET = f"{ResNet.__module__}.{ResNet.__qualname__}"
_USUAL_SIZE = 800.0  # of images, in pixels
_RPN_LEVELS = 5  # of a feature pyramid, p2 .. p6
_USUAL_PROPOSALS = 1000  # at least, of an image, for data without `data.min_proposals`


def take_from_checkpoint(config: DictConfig, text: str) -> None:
    """Set the open keys to the values in the config of a checkpoint that is resumed."""
    trained = read_checkpoint_config(text)
    for key in open_keys(config):
        value = OmegaConf.select(trained, key)
        if value is not None or key == TRUNK_WEIGHTS:
            set_key(config, key, value)


def choose_trunk_weights(
    config: DictConfig, context: DistributedContext, log: Callable[..., None], needed: bool
) -> None:
    """Set open weights of the trunk: torchvision's, where they can be had, else null.

    needed: the trunk starts from them, and not from other weights.
    Raises UserError for a trunk that is no ResNet.
    """
    if OmegaConf.select(config, TRUNK_WEIGHTS) != AUTO:
        return
    trunk = config.model.backbone.trunk
    if trunk.get("_target_") != _RESNET:
        raise UserError(f"{TRUNK_WEIGHTS}=auto: only a ResNet has such weights; set it to a value")
    check_name(trunk.name)
    weights = None
    if needed:
        problem = _find_problem(trunk.name, context)
        if problem:
            log(f"{TRUNK_WEIGHTS}=null: the trunk is trained from scratch; {problem}", flush=True)
        else:
            weights = _IMAGENET
            log(f"{TRUNK_WEIGHTS}={weights}: the trunk is pretrained on ImageNet", flush=True)
    set_key(config, TRUNK_WEIGHTS, weights)


def _find_problem(name: str, context: DistributedContext) -> str:
    """The first problem of a machine with the weights of a trunk, the same text on all ranks.

    One process of each machine downloads them, while the others wait.
    """
    problems: list[str] = []
    run_while_others_wait(
        context, context.local_main, lambda: problems.append(_download_problem(name))
    )
    return context.broadcast(next(filter(None, context.gather("".join(problems))), ""))


def _download_problem(name: str) -> str:
    """Why torchvision's weights of a trunk cannot be used, "" where they can."""
    try:
        fetch(published_address(name, _IMAGENET))
    except UserError as error:
        return str(error)
    return ""


def fit_to_objects(config: DictConfig, source: CocoSource, log: Callable[..., None]) -> CocoSource:
    """Set the open keys by the objects of the training images, and report each choice.

    The key of the trunk's weights is left as it is. -> the source with the transforms of the new
    config. Raises UserError where there is no object.
    """
    keys = [key for key in open_keys(config) if key != TRUNK_WEIGHTS]
    if not keys:
        return source
    if not source.has_objects("train"):
        named = ", ".join(keys)
        raise UserError(
            f"{source.train.name}: no training image has an object, by which {named} could be "
            "chosen: set them to numbers"
        )
    objects = measure_objects(source.train)
    for key, value, reason in _choices(config, objects):
        if key in keys:
            set_key(config, key, value)
            shown = format_sizes(value) if isinstance(value, list) else value
            log(f"{key}={shown}: {reason}", flush=True)
    samples = OmegaConf.select(config, "model.sampler.num_samples")
    if samples is not None:
        share = OmegaConf.select(config, "model.sampler.positive_fraction")
        warning = few_samples(objects, samples, 1.0 if share is None else share)
        if warning:
            log(warning, flush=True)
    return source.with_transforms_of(build_source(config.data, source.known_categories))


def _choices(config: DictConfig, objects: ObjectSizes) -> Iterator[tuple[str, Any, str]]:
    """Each key with the value that the rule gives it, and the reason.

    Later choices depend on earlier ones: a number that the user sets counts instead of the rule's.
    """
    size = OmegaConf.select(config, SIZE)
    if size == AUTO:
        lowest, highest = config.data.size_range
        if lowest > highest:
            raise UserError(
                f"{SIZE_RANGE}=[{lowest},{highest}]: the first size must be at most the second one"
            )
        size, reason = choose_size(objects, lowest, highest)
        yield SIZE, size, reason
    if OmegaConf.select(config, ANCHORS) == AUTO:
        pixels = float(size or _resize_size(config))
        levels = len(proposer_strides(config)) or _RPN_LEVELS
        anchors, reason = choose_anchors(objects, pixels, levels)
        yield ANCHORS, anchors, reason
    detections = OmegaConf.select(config, DETECTIONS)
    if detections == AUTO:
        detections, reason = choose_detections(objects)
        yield DETECTIONS, detections, reason
    fewest = OmegaConf.select(config, "data.min_proposals") or _USUAL_PROPOSALS
    proposals, reason = choose_proposals(detections or 0, fewest)
    for limits in LIMITS:
        yield f"{limits}.post_nms_top_n", proposals, reason
        per_level = 2 * proposals if limits == LIMITS[0] else proposals
        yield f"{limits}.pre_nms_top_n", per_level, "candidates of a level before NMS"


def _resize_size(config: DictConfig) -> float:
    """The shorter side that the test transforms resize to, for data without `data.size`."""
    steps = config.data.test_transforms
    sizes = [step.sizes for step in steps if isinstance(step.get("sizes"), ListConfig)]
    return float(sizes[-1][-1]) if sizes else _USUAL_SIZE
