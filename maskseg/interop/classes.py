"""The classes of COCO, and the rows of classes in the tensors that have one row per class."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torchvision.models.detection import (
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)

from maskseg.errors import UserError
from maskseg.structures import Categories

# Prefixes of our tensors with one row, or four for the box deltas, per class.
CLS_SCORE = "classifier.cls_score."
BBOX_PRED = "classifier.bbox_pred."
MASK_PREDICTOR = "heads.mask.predictor."
ABSENT_LOGIT = -100.0  # bias of a class that does not exist; its score is practically zero
# Pairs of COCO's keypoints, counted from 0, that the skeleton connects.
_LEGS = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12))
_ARMS = ((5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10))
_FACE = ((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))
SKELETON: tuple[tuple[int, int], ...] = (*_LEGS, *_ARMS, *_FACE)


def coco_categories() -> Categories:
    """Return COCO's 80 classes; their ids range up to 90."""
    names = []
    ids = []
    for i, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]):
        if i > 0 and name != "N/A":
            names.append(name)
            ids.append(i)
    return Categories(tuple(names), tuple(ids))


def person_categories() -> Categories:
    """Return COCO's only class with keypoints."""
    keypoint_names = tuple(KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta["keypoint_names"])
    return Categories(("person",), (1,), (keypoint_names,), (SKELETON,))


def resolve_classes(
    number: int, keypoints: bool, given: Categories | None
) -> tuple[Categories, list[int]]:
    """Return the classes of a model, and the row of each class in its tensors.

    Rows are counted from 0, without the background. They are in the order of the class ids, or
    equal to the ids, which start at 1.
    number: of the model's classes without the background. keypoints: whether it predicts keypoints.
    given: the classes that the user names; None for COCO's.
    Raises UserError if the classes are neither COCO's nor given, or if their number differs.
    """
    categories = given or _coco_classes(number, keypoints)
    if categories is None:
        raise UserError(
            f"the model has {number} classes, which are not COCO's: categories=FILE.json "
            "(any COCO file with these classes) names them"
        )
    if number == len(categories):
        return categories, list(range(number))
    if number == max(categories.ids) and min(categories.ids) > 0:
        return categories, [i - 1 for i in categories.ids]
    raise UserError(
        f"the model has {number} classes, the given categories are {len(categories)} "
        f"with ids up to {max(categories.ids)}"
    )


def _coco_classes(number: int, keypoints: bool) -> Categories | None:
    """Return COCO's classes if `number` is that of a model trained on them."""
    if keypoints and number == 1:
        return person_categories()
    coco = coco_categories()
    return coco if number in (len(coco), max(coco.ids)) else None


def select_class_rows(
    state: Mapping[str, Tensor], rows: list[int], background: int
) -> dict[str, Tensor]:
    """Select the rows of classes; class scores get the `background` row as the last one.

    Box deltas and masks that all classes share stay unchanged.
    """
    selected = dict(state)
    for name, tensor in state.items():
        if name.startswith(CLS_SCORE):
            selected[name] = tensor[[*rows, background]]
        elif name.startswith(BBOX_PRED) and len(tensor) > 4:
            selected[name] = tensor.reshape(-1, 4, *tensor.shape[1:])[rows].flatten(0, 1)
        elif name.startswith(MASK_PREDICTOR) and len(tensor) > 1:
            selected[name] = tensor[rows]
    return selected


def to_background_first(
    state: Mapping[str, Tensor], rows: list[int], number: int
) -> dict[str, Tensor]:
    """Expand the tensors to `number` rows with the background, our last row, first.

    rows: the new row of each class. Classes in the other rows do not exist and are never predicted.
    """
    expanded = dict(state)
    for name, tensor in state.items():
        if name.startswith(CLS_SCORE):
            scores = tensor.new_zeros((number, *tensor.shape[1:]))
            if name.endswith("bias"):
                scores[:] = ABSENT_LOGIT
            scores[[*rows, 0]] = tensor
            expanded[name] = scores
        elif name.startswith(BBOX_PRED):
            deltas = tensor.new_zeros((number, 4, *tensor.shape[1:]))
            deltas[rows] = tensor.reshape(-1, 4, *tensor.shape[1:])
            expanded[name] = deltas.flatten(0, 1)
        elif name.startswith(MASK_PREDICTOR):
            masks = tensor.new_zeros((number, *tensor.shape[1:]))
            masks[rows] = tensor
            expanded[name] = masks
    return expanded


def num_classes(state: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes, without background, in a state dict of either framework.

    torchvision and detectron2 use the same name for the layer. None if there is no such layer.
    """
    bias = state.get("roi_heads.box_predictor.cls_score.bias")
    if bias is None or bias.dim() != 1 or len(bias) < 2:
        return None
    return len(bias) - 1
