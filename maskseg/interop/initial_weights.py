"""Initial weights of a training: of a checkpoint, or of a published or other foreign detector.

Weights of a class follow its name: a class that the weights do not have keeps its initial ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torchvision.models import get_model_weights

from maskseg.errors import UserError
from maskseg.files.downloads import fetch, is_address
from maskseg.interop import classes, detectron2, torchvision
from maskseg.interop.resnet_detection import detect_trunk
from maskseg.interop.state_dict_names import Pairs, translate
from maskseg.interop.torchvision_hashes import norm_eps
from maskseg.interop.weight_files import read_weights
from maskseg.structures import Categories

COCO = "coco"  # the name for the published weights that suit the model
PUBLISHED = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "keypointrcnn_resnet50_fpn",
)
_WEIGHTS = "COCO_V1"
_TRUNK = "resnet50"  # of all published models
_COUNTER = ".num_batches_tracked"  # of a batch norm; some files lack it, and it is not needed
_CLASS_TENSORS = (classes.CLS_SCORE, classes.BBOX_PRED, classes.MASK_PREDICTOR)
# Tensors with one channel for each keypoint.
_KEYPOINTS = "heads.keypoint.deconv."


@dataclass(frozen=True)
class ForeignWeights:
    """The weights of a detector of another framework, under our names.

    tensors: the rows of classes are in the order of `categories`, the background last.
    categories: None where they are not known.
    overrides: the config of the model that the weights were trained in.
    sizes_first: the anchors of a cell are ordered by size, then aspect ratio (detectron2).
    """

    tensors: dict[str, Tensor]
    categories: Categories | None
    overrides: list[str]
    sizes_first: bool


@dataclass(frozen=True)
class AdaptedWeights:
    """Weights for the classes and heads of a model.

    taken, reset: names of classes whose weights are those of the file, or initial ones.
    new_heads: the heads of the model that the file does not have.
    """

    tensors: dict[str, Tensor]
    taken: list[str]
    reset: list[str]
    new_heads: list[str]


def find_weights(name: str, model: Mapping[str, Tensor]) -> Path | None:
    """Return the local file of published weights, which are downloaded once.

    name: `coco`, one of `PUBLISHED`, or the address of a file; None is returned for another name.
    model: the state dict of the model that `coco` is chosen for.
    Raises UserError, also where there are no weights for the model.
    """
    if is_address(name):
        return fetch(name)
    if name == COCO:
        name = _suitable_name(model)
    return fetch(published_address(name)) if name in PUBLISHED else None


def published_address(name: str) -> str:
    """The address of the weights of one of `PUBLISHED`."""
    return str(get_model_weights(name)[_WEIGHTS].url)


def _suitable_name(model: Mapping[str, Tensor]) -> str:
    """The published model with the heads of this one. Raises UserError for another trunk."""
    trunk = detect_trunk(model, "backbone.trunk.layer{}.{}.", first=1)
    if trunk != _TRUNK:
        raise UserError(
            f"trainer.init={COCO}: the published weights are for a {_TRUNK} with a feature "
            f"pyramid, the model has {trunk or 'another trunk'}; trainer.init names a file, an "
            "address or a run, null starts without"
        )
    kind = "fasterrcnn"
    for head in ("keypoint", "mask"):
        if any(key.startswith(f"heads.{head}.") for key in model):
            kind = f"{head}rcnn"
    is_v2 = kind != "keypointrcnn" and any(key.startswith("classifier.mlp.convs.") for key in model)
    return f"{kind}_resnet50_fpn{'_v2' if is_v2 else ''}"


def read_foreign_weights(path: Path, eps: float = torchvision.EPS) -> ForeignWeights:
    """Read the weights of a detector of torchvision or detectron2.

    eps: of the norms in the model's trunk, to which torchvision's norms are rescaled.
    Raises UserError for a file that is missing, damaged, or of another kind.
    """
    state = read_weights(path)
    named = torchvision.normalize_state_dict(state)
    number = classes.num_classes(state)
    overrides = torchvision.infer_overrides(named)
    if overrides and number is not None:
        tensors = {_our_name(name): tensor for name, tensor in named.items()}
        tensors = torchvision.rescale_norms(tensors, norm_eps(path), eps)
        categories, tensors = _order_classes(tensors, number, True, path)
        return ForeignWeights(tensors, categories, overrides, sizes_first=False)
    overrides = detectron2.infer_overrides(state)
    if overrides and number is not None:
        tensors = _rename(detectron2.normalize_state_dict(state), detectron2.PAIRS)
        if detectron2.takes_bgr(state):
            tensors = detectron2.to_rgb(tensors)
        categories, tensors = _order_classes(tensors, number, False, path)
        return ForeignWeights(tensors, categories, overrides, sizes_first=True)
    raise UserError(
        f"{path}: neither a checkpoint of maskseg nor the weights of a ResNet-FPN detector of "
        "torchvision or detectron2"
    )


def _our_name(name: str) -> str:
    """Our name of a tensor of torchvision, or its own where it has none."""
    try:
        return torchvision.our_name(name)
    except KeyError:
        return name


def _rename(state: Mapping[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """The tensors under our names; others keep theirs, and do not fit."""
    # The longest pattern counts: `conv1.norm.` before `conv1.`.
    ordered = tuple(sorted(pairs, key=lambda pair: len(pair[1]), reverse=True))
    return {translate(name, ordered, back=True) or name: state[name] for name in state}


def _order_classes(
    tensors: Mapping[str, Tensor], number: int, background_first: bool, path: Path
) -> tuple[Categories | None, dict[str, Tensor]]:
    """Put the rows of COCO's classes in their order; other classes have no known names."""
    has_keypoints = any(name.startswith("heads.keypoint.") for name in tensors)
    try:
        categories, rows = classes.resolve_classes(number, has_keypoints, None)
    except UserError:
        return None, dict(tensors)
    background = number
    if background_first:
        background = 0
        rows = [row + 1 for row in rows]
    try:
        return categories, classes.select_class_rows(tensors, rows, background)
    except (IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: the tensors with one row per class do not fit each other ({reason})"
        ) from error


def adapt_classes(
    weights: Mapping[str, Tensor],
    categories: Categories | None,
    model: Mapping[str, Tensor],
    model_categories: Categories,
) -> AdaptedWeights:
    """Give the classes of a model the weights of the classes with the same names.

    weights: under our names; categories: their classes, None where they are not known.
    model: the state dict of the model with its initial weights, which other classes keep.
    Tensors that are not of classes, or that do not fit, are left as they are.
    """
    if categories is None or categories.names == model_categories.names:
        return AdaptedWeights(dict(weights), [], [], [])
    rows = {_fold(name): row for row, name in enumerate(categories.names)}
    sources = [rows.get(_fold(name)) for name in model_categories.names]
    adapted = dict(weights)
    changed = False
    for name, initial in model.items():
        if name in weights and name.startswith(_CLASS_TENSORS):
            selected = _select_rows(name, weights[name], initial, sources, len(categories))
            adapted[name] = weights[name] if selected is None else selected
            changed |= selected is not None
    labels = list(zip(model_categories.names, sources, strict=True)) if changed else []
    taken = [name for name, row in labels if row is not None]
    reset = [name for name, row in labels if row is None]
    return AdaptedWeights(adapted, taken, reset, [])


def _fold(name: str) -> str:
    """A class name without the differences between spellings such as `Cell_Phone`."""
    return " ".join(name.replace("_", " ").replace("-", " ").split()).casefold()


def _select_rows(
    name: str, tensor: Tensor, initial: Tensor, sources: Sequence[int | None], number: int
) -> Tensor | None:
    """The rows of the classes of a model. sources: the row of each class, None for a new class.

    number: of the classes of the weights. None is returned for tensors without a row for each
    class, which all classes share, and for tensors of other channels.
    """
    per_class = 4 if name.startswith(classes.BBOX_PRED) else 1
    extra = 1 if name.startswith(classes.CLS_SCORE) else 0  # the background
    lengths = (per_class * number + extra, per_class * len(sources) + extra)
    if (len(tensor), len(initial)) != lengths or tensor.shape[1:] != initial.shape[1:]:
        return None
    selected = initial.clone()
    for label, row in enumerate(sources):
        if row is not None:
            values = tensor[row * per_class : (row + 1) * per_class]
            selected[label * per_class : (label + 1) * per_class] = values
    if extra:
        selected[-1] = tensor[-1]
    return selected


def complete_foreign(
    adapted: AdaptedWeights, has_classes: bool, model: Mapping[str, Tensor]
) -> AdaptedWeights:
    """Complete the weights of another framework by initial ones, and drop heads without use.

    has_classes: the names of the classes are known. Initial weights are kept by heads that the
    file does not have, by classes without known names, by other keypoints than the file's, and by
    the counters of batch norms.
    """
    heads = {name: _head_of(name) for name in (*adapted.tensors, *model)}
    in_file = {heads[name] for name in adapted.tensors}
    in_model = {heads[name] for name in model}
    tensors = {
        name: tensor
        for name, tensor in adapted.tensors.items()
        if heads[name] in in_model and (name in model or not name.endswith(_COUNTER))
    }
    for name, initial in model.items():
        of_other_classes = name.startswith(_CLASS_TENSORS) and not has_classes
        of_other_keypoints = name.startswith(_KEYPOINTS) and name in tensors
        if of_other_keypoints and tensors[name].shape == initial.shape:
            of_other_keypoints = False
        is_missing_counter = name not in tensors and name.endswith(_COUNTER)
        in_new_head = heads[name] not in in_file
        if of_other_classes or of_other_keypoints or is_missing_counter or in_new_head:
            tensors[name] = initial
    new_heads = sorted(head for head in in_model - in_file if head)
    return AdaptedWeights(tensors, adapted.taken, adapted.reset, new_heads)


def _head_of(name: str) -> str:
    """The head that a tensor belongs to, such as `heads.mask`; "" for the detector itself."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "heads" else ""
