"""Load the initial weights of a training: `trainer.init`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from maskseg.config.build import to_yaml
from maskseg.config.compose import compose
from maskseg.config.derived import model_differences
from maskseg.engine.checkpoint import (
    Checkpoint,
    checkpoint_path,
    inference_weights,
    load_checkpoint,
    load_weights,
)
from maskseg.engine.resume import checkpoint_categories, moved_labels
from maskseg.engine.trainer import Trainer
from maskseg.errors import UserError
from maskseg.interop import detectron2
from maskseg.interop.initial_weights import (
    AdaptedWeights,
    ForeignWeights,
    adapt_classes,
    complete_foreign,
    find_weights,
    read_foreign_weights,
)
from maskseg.structures import Categories

_HINT = "trainer.init_partial=true takes what fits"
_BASE_EXPERIMENT = "experiment=coco_r50_fpn_3x"
# Keys of a model that a training may set as it likes, although the weights are of another model:
# the norms are rescaled, and anchors and limits follow the objects of the data.
_FREE_KEYS = ("norm", "norm_eps", "sizes", "canonical_size", "pre_nms_top_n", "post_nms_top_n")
_FREE_KEYS_OF_DETECTIONS = ("max_detections", "score_threshold", "nms_threshold", "num_samples")
_MAX_NAMED = 5  # tensors or keys in a message
_MAX_CLASSES = 10  # classes in a message


def load_initial_weights(
    model: nn.Module,
    trainer: Trainer,
    config: DictConfig,
    categories: Categories,
    log: Callable[..., None],
) -> None:
    """Load the weights that `trainer.init` names into a model, and report what fits.

    categories: of the model. Raises UserError for weights that do not fit.
    """
    assert trainer.init is not None
    name = f"trainer.init={trainer.init}"
    initial = model.state_dict()
    path = find_weights(trainer.init, initial) or checkpoint_path(Path(trainer.init))
    source = _read(path, config)
    if isinstance(source, ForeignWeights):
        tensors = _order_anchors(source, config)
        adapted = adapt_classes(tensors, source.categories, initial, categories)
        adapted = complete_foreign(adapted, source.categories is not None, initial)
    else:
        old = checkpoint_categories(source)
        adapted = adapt_classes(inference_weights(source), old, initial, categories)
    unused = load_weights(model, adapted.tensors, name, trainer.init_partial, _HINT)
    text = f"started from {trainer.init}"
    if str(path) != trainer.init:
        text += f" ({path})"
    if unused:
        text += f"; {len(unused)} tensors do not fit: {', '.join(unused[:_MAX_NAMED])}"
    log(text, flush=True)
    for line in _describe_classes(adapted, source, categories):
        log(line, flush=True)
    differences = _model_differences(config, source)
    if differences:
        named = join_some(differences, _MAX_NAMED)
        log(f"warning: the weights were trained in another model: {named}", flush=True)


def _read(path: Path, config: DictConfig) -> Checkpoint | ForeignWeights:
    """A checkpoint of this package, or foreign weights. Raises UserError."""
    try:
        return load_checkpoint(path)
    except UserError as error:
        if not path.is_file():
            raise
        eps = OmegaConf.select(config, "model.backbone.trunk.norm_eps")
        try:
            return read_foreign_weights(path, *([] if eps is None else [float(eps)]))
        except UserError as reason:
            raise (error if path.suffix == ".pt" else reason) from reason


def _order_anchors(source: ForeignWeights, config: DictConfig) -> dict[str, Tensor]:
    """The tensors with the outputs of the RPN in our order of a cell's anchors."""
    anchors = OmegaConf.select(config, "model.proposer.anchors")
    if not source.sizes_first or anchors is None:
        return source.tensors
    num_sizes = len(anchors.sizes[0])
    return detectron2.reorder_anchors(source.tensors, num_sizes, len(anchors.aspect_ratios))


def _describe_classes(
    adapted: AdaptedWeights, source: Checkpoint | ForeignWeights, categories: Categories
) -> list[str]:
    """A line for classes, and for heads, that start from other weights than those of the file."""
    lines = []
    if adapted.taken or adapted.reset:
        taken = join_some(adapted.taken, _MAX_CLASSES) or "none"
        reset = join_some(adapted.reset, _MAX_CLASSES) or "none"
        lines.append(f"classes with weights of their name: {taken}; reset: {reset}")
    elif isinstance(source, ForeignWeights):
        if source.categories is None:
            lines.append("the names of the file's classes are not known: all classes are reset")
    else:
        old = checkpoint_categories(source)
        moved = moved_labels(old, categories) if old else []
        if moved and old and old.names != categories.names:
            named = join_some(moved, _MAX_NAMED)
            lines.append(f"warning: class weights start from those of other classes: {named}")
    if adapted.new_heads:
        lines.append(f"not in the file, from scratch: {', '.join(adapted.new_heads)}")
    return lines


def _model_differences(config: DictConfig, source: Checkpoint | ForeignWeights) -> list[str]:
    """The keys of the model in which a config differs from that of the weights."""
    if isinstance(source, ForeignWeights):
        trained = compose("train", [_BASE_EXPERIMENT, *source.overrides])
        free = (*_FREE_KEYS, *_FREE_KEYS_OF_DETECTIONS)
        differences = model_differences(config, to_yaml(trained))
        return [d for d in differences if d.partition("=")[0].rpartition(".")[2] not in free]
    text = source.get("config")
    return model_differences(config, text if isinstance(text, str) else "")


def join_some(texts: Sequence[str], number: int) -> str:
    """The first texts, and the number of further ones."""
    named = ", ".join(texts[:number])
    if len(texts) > number:
        named += f" and {len(texts) - number} more"
    return named
