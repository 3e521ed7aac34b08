"""torchvision's Mask R-CNN and Keypoint R-CNN with ResNet-FPN: names of tensors, both ways.

The config overrides for a model are inferred from its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from maskseg.interop.classes import CLS_SCORE, select_class_rows, to_background_first
from maskseg.interop.resnet_detection import detect_trunk, has_statistics
from maskseg.interop.state_dict_names import Pairs, translate

BODY = "backbone.body."
TRUNK = "backbone.trunk."
_COMMON: Pairs = (
    ("backbone.trunk.stem.conv1.", f"{BODY}conv1."),
    ("backbone.trunk.stem.bn1.", f"{BODY}bn1."),
    ("backbone.trunk.layer{i}.", BODY + "layer{i}."),
    ("backbone.lateral.p{i+2}.", "backbone.fpn.inner_blocks.{i}."),
    ("backbone.output.p{i+2}.", "backbone.fpn.layer_blocks.{i}."),
    ("proposer.head.convs.{i}.", "rpn.head.conv.{i}.0."),
    ("proposer.head.objectness.", "rpn.head.cls_logits."),
    ("proposer.head.deltas.", "rpn.head.bbox_pred."),
    ("classifier.cls_score.", "roi_heads.box_predictor.cls_score."),
    ("classifier.bbox_pred.", "roi_heads.box_predictor.bbox_pred."),
    ("heads.mask.convs.{i}.", "roi_heads.mask_head.{i}."),
    ("heads.mask.deconv.", "roi_heads.mask_predictor.conv5_mask."),
    ("heads.mask.predictor.", "roi_heads.mask_predictor.mask_fcn_logits."),
    ("heads.keypoint.convs.{i}.0.", "roi_heads.keypoint_head.{2i}."),
    ("heads.keypoint.deconv.", "roi_heads.keypoint_predictor.kps_score_lowres."),
)
PLAIN: Pairs = (*_COMMON, ("classifier.mlp.layers.{i}.", "roi_heads.box_head.fc{i+6}."))
# The box head of the v2 models is one sequence: four convolutions with norms, a flattening and a
# linear layer.
V2: Pairs = (
    *_COMMON,
    ("classifier.mlp.convs.{i}.{j}.", "roi_heads.box_head.{i}.{j}."),
    ("classifier.mlp.layers.{i}.", "roi_heads.box_head.{2i+5}."),
)
# Names in older files (first) and the current ones, as torchvision's modules rename them when they
# load such a file.
_RENAMED_MODULES: Pairs = (
    ("rpn.head.conv.", "rpn.head.conv.0.0."),
    ("backbone.fpn.inner_blocks.{i}.", "backbone.fpn.inner_blocks.{i}.0."),
    ("backbone.fpn.layer_blocks.{i}.", "backbone.fpn.layer_blocks.{i}.0."),
    ("roi_heads.mask_head.mask_fcn{i+1}.", "roi_heads.mask_head.{i}.0."),
)
_WEIGHTS: Pairs = tuple((f"{old}weight", f"{new}weight") for old, new in _RENAMED_MODULES)
_BIASES: Pairs = tuple((f"{old}bias", f"{new}bias") for old, new in _RENAMED_MODULES)
_OLD_NAMES: Pairs = (*_WEIGHTS, *_BIASES)
BACKGROUND_FIRST = True
RESIZE = "plain"  # how its models resize images (`data.transforms.ResizeShortestEdge`)
EPS = 1e-5  # of the norms in the models that torchvision's builders return


def name_pairs(names: Iterable[str]) -> Pairs:
    """Return the pairs of names for our model with tensors of these names."""
    has_convs = any(name.startswith("classifier.mlp.convs.") for name in names)
    return V2 if has_convs else PLAIN


def normalize_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict with the names of the current torchvision."""
    return {translate(name, _OLD_NAMES) or name: tensor for name, tensor in state.items()}


def infer_overrides(state: Mapping[str, Tensor]) -> list[str]:
    """Infer the config overrides of a model from its tensors.

    Empty if it is not a detector of torchvision.
    """
    trunk = detect_trunk(state, BODY + "layer{}.{}.", first=1)
    if trunk is None:
        return []
    is_v2 = "rpn.head.conv.1.0.weight" in state
    has_keypoints = any(name.startswith("roi_heads.keypoint_head.") for name in state)
    model = "keypoint_rcnn" if has_keypoints else "mask_rcnn"
    overrides = [
        f"model=torchvision_{model}{'_v2' if is_v2 else ''}",
        f"model.backbone.trunk.name={trunk}",
    ]
    if not is_v2 and has_statistics(state, BODY):
        # Built without pretrained weights, so with norms that are trained.
        overrides.append("model.backbone.trunk.norm=BN")
    return overrides


def our_name(name: str) -> str:
    """Return the name of torchvision's tensor in `GeneralizedRCNN`.

    Raises KeyError for a tensor that has no counterpart.
    """
    ours = translate(name, (*V2[:-1], *PLAIN[-1:], V2[-1]), back=True)
    if ours is None:
        raise KeyError(f"torchvision's tensor {name!r} has no counterpart in this model")
    return ours


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a model with classes 0 (the background) to K; all K are kept."""
    converted = {our_name(name): tensor for name, tensor in normalize_state_dict(state).items()}
    number = len(converted[f"{CLS_SCORE}bias"]) - 1
    return select_class_rows(converted, list(range(1, number + 1)), background=0)


def to_torchvision(state: Mapping[str, Tensor], rows: list[int], number: int) -> dict[str, Tensor]:
    """Convert our state dict to torchvision's with `number` classes, the background first.

    rows: the new row of each of our classes.
    """
    pairs = name_pairs(state)
    converted = {}
    for name, tensor in to_background_first(state, rows, number).items():
        converted[translate(name, pairs) or name] = tensor.clone()
    return converted


def rescale_norms(
    state: Mapping[str, Tensor], eps: float, new_eps: float = EPS
) -> dict[str, Tensor]:
    """Rescale the norms of a trunk with `eps`, so that outputs are equal with `new_eps`.

    state: of our model.
    """
    rescaled = dict(state)
    if eps == new_eps:
        return rescaled
    for name, variance in state.items():
        if name.startswith(TRUNK) and name.endswith(".running_var"):
            weight_name = name.replace(".running_var", ".weight")
            factor = ((variance.double() + new_eps) / (variance.double() + eps)).sqrt()
            rescaled[weight_name] = (state[weight_name].double() * factor).float()
    return rescaled
