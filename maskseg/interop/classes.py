"""Classes: which of COCO's there are, and their rows in the tensors that have one a class."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torchvision.models.detection import (
    KeypointRCNN_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
)

from maskseg.errors import UserError
from maskseg.structures import Categories

SCORES, DELTAS, MASKS = "classifier.scores.", "classifier.deltas.", "heads.mask.predictor."
NEVER = -100.0  # the score of a class that there is not
# Pairs of COCO's keypoints, from 0, that a line joins.
_LEGS = ((15, 13), (13, 11), (16, 14), (14, 12), (11, 12))
_ARMS = ((5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10))
_FACE = ((1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6))
SKELETON: tuple[tuple[int, int], ...] = (*_LEGS, *_ARMS, *_FACE)


def coco() -> Categories:
    """COCO's 80 classes with their ids, which reach to 90."""
    names = enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    found = [(i, name) for i, name in names if i > 0 and name != "N/A"]
    return Categories(tuple(name for _, name in found), tuple(i for i, _ in found))


def person() -> Categories:
    """COCO's only class with keypoints."""
    return Categories(
        ("person",),
        (1,),
        (tuple(KeypointRCNN_ResNet50_FPN_Weights.COCO_V1.meta["keypoint_names"]),),
        (SKELETON,),
    )


def choose(number: int, keypoints: bool, given: Categories | None) -> tuple[Categories, list[int]]:
    """The classes of a model that tells `number` apart, and which of its rows, from 0 without the background, each one is.

    Rows stand for the classes in order of their ids, or for the ids themselves, from 1. Raises UserError where the classes are not COCO's and
    not `given`, or where these are not as many.
    """
    known = (
        person()
        if keypoints and number == 1
        else coco()
        if number in (len(coco()), max(coco().ids))
        else None
    )
    categories = given or known
    if categories is None:
        raise UserError(
            f"the model tells {number} classes apart, which are not COCO's: categories=FILE.json (any COCO file of them) names them"
        )
    if number == len(categories):
        return categories, list(range(number))
    if number == max(categories.ids) and min(categories.ids) > 0:
        return categories, [i - 1 for i in categories.ids]
    raise UserError(
        f"the model tells {number} classes apart, the categories are {len(categories)} with ids up to {max(categories.ids)}"
    )


def take(state: Mapping[str, Tensor], rows: list[int], background: int) -> dict[str, Tensor]:
    """Class scores of `rows` and then the background, box deltas and masks of `rows` (one for all stays)."""
    taken = dict(state)
    for name, tensor in state.items():
        if name.startswith(SCORES):
            taken[name] = tensor[[*rows, background]]
        elif name.startswith(DELTAS) and len(tensor) > 4:
            taken[name] = tensor.reshape(-1, 4, *tensor.shape[1:])[rows].flatten(0, 1)
        elif name.startswith(MASKS) and len(tensor) > 1:
            taken[name] = tensor[rows]
    return taken


def last_to_first(state: Mapping[str, Tensor], rows: list[int], number: int) -> dict[str, Tensor]:
    """The other way: `number` rows, the background's (our last) first, our classes in `rows`. Classes between them are never found."""
    spread = dict(state)
    for name, tensor in state.items():
        if name.startswith(SCORES):
            spread[name] = tensor.new_zeros((number, *tensor.shape[1:]))
            if name.endswith("bias"):
                spread[name][:] = NEVER
            spread[name][[*rows, 0]] = tensor
        elif name.startswith(DELTAS):
            boxes = tensor.new_zeros((number, 4, *tensor.shape[1:]))
            boxes[rows] = tensor.reshape(-1, 4, *tensor.shape[1:])
            spread[name] = boxes.flatten(0, 1)
        elif name.startswith(MASKS):
            spread[name] = tensor.new_zeros((number, *tensor.shape[1:]))
            spread[name][rows] = tensor
    return spread


def count(state: Mapping[str, Tensor]) -> int | None:
    """How many classes a state dict (theirs) tells apart, without the background; both frameworks call the layer so."""
    bias = state.get("roi_heads.box_predictor.cls_score.bias")
    return None if bias is None or bias.dim() != 1 or len(bias) < 2 else len(bias) - 1
