"""torchvision's Mask R-CNN and Keypoint R-CNN with ResNet-FPN trunks: names, what can be told from the tensors, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from maskseg.interop.classes import last_to_first, take
from maskseg.interop.resnet_detection import has_statistics, trunk_name
from maskseg.interop.state_dict_names import Pairs, translate

BODY = "backbone.body."
_COMMON: Pairs = (
    ("backbone.trunk.stem.conv1.", f"{BODY}conv1."),
    ("backbone.trunk.stem.bn1.", f"{BODY}bn1."),
    ("backbone.trunk.layer{i}.", BODY + "layer{i}."),
    ("backbone.lateral.p{i+2}.", "backbone.fpn.inner_blocks.{i}."),
    ("backbone.output.p{i+2}.", "backbone.fpn.layer_blocks.{i}."),
    ("proposer.head.convs.{i}.", "rpn.head.conv.{i}.0."),
    ("proposer.head.objectness.", "rpn.head.cls_logits."),
    ("proposer.head.deltas.", "rpn.head.bbox_pred."),
    ("classifier.scores.", "roi_heads.box_predictor.cls_score."),
    ("classifier.deltas.", "roi_heads.box_predictor.bbox_pred."),
    ("heads.mask.convs.{i}.", "roi_heads.mask_head.{i}."),
    ("heads.mask.deconv.", "roi_heads.mask_predictor.conv5_mask."),
    ("heads.mask.predictor.", "roi_heads.mask_predictor.mask_fcn_logits."),
    ("heads.keypoint.convs.{i}.0.", "roi_heads.keypoint_head.{2i}."),
    ("heads.keypoint.deconv.", "roi_heads.keypoint_predictor.kps_score_lowres."),
)
PLAIN: Pairs = (*_COMMON, ("classifier.trunk.layers.{i}.", "roi_heads.box_head.fc{i+6}."))
# The box head of the v2 models is one sequence: four convolutions with norms, a flattening, a layer.
V2: Pairs = (
    *_COMMON,
    ("classifier.trunk.convs.{i}.{j}.", "roi_heads.box_head.{i}.{j}."),
    ("classifier.trunk.layers.{i}.", "roi_heads.box_head.{2i+5}."),
)
# Names of older files, as torchvision's own modules replace them when they load one.
_OLD: Pairs = tuple(
    (f"{old}{kind}", f"{new}{kind}")
    for kind in ("weight", "bias")
    for old, new in (
        ("rpn.head.conv.", "rpn.head.conv.0.0."),
        ("backbone.fpn.inner_blocks.{i}.", "backbone.fpn.inner_blocks.{i}.0."),
        ("backbone.fpn.layer_blocks.{i}.", "backbone.fpn.layer_blocks.{i}.0."),
        ("roi_heads.mask_head.mask_fcn{i+1}.", "roi_heads.mask_head.{i}.0."),
    )
)
FIRST_BACKGROUND = True
RESIZE = "plain"  # how its models resize (`data.transforms.ResizeShortestEdge`)
EPS = 1e-5  # of the norms that torchvision's builders make


def pairs(own: Iterable[str]) -> Pairs:
    """The pairs of names for a model of ours with these tensors."""
    return V2 if any(name.startswith("classifier.trunk.convs.") for name in own) else PLAIN


def modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under the names of today's torchvision."""
    return {translate(name, _OLD) or name: tensor for name, tensor in state.items()}


def recognise(state: Mapping[str, Tensor]) -> list[str]:
    """What the tensors tell of the model, as words of the command line; empty where they are no torchvision detector's."""
    trunk = trunk_name(state, BODY + "layer{}.{}.", first=1)
    if trunk is None:
        return []
    v2 = "rpn.head.conv.1.0.weight" in state
    kind = (
        "keypoint_rcnn"
        if any(name.startswith("roi_heads.keypoint_head.") for name in state)
        else "mask_rcnn"
    )
    words = [f"model=torchvision_{kind}{'_v2' if v2 else ''}", f"model.backbone.trunk.name={trunk}"]
    if not v2 and has_statistics(state, BODY):
        words.append(
            "model.backbone.trunk.norm=BN"
        )  # built without pretrained weights, so that it could learn its own
    return words


def our_name(name: str) -> str:
    """The name of torchvision's tensor in `GeneralizedRCNN`. Raises KeyError for a tensor that has no place there."""
    found = translate(name, (*V2[:-1], *PLAIN[-1:], V2[-1]), back=True)
    if found is None:
        raise KeyError(f"torchvision's tensor {name!r} has no place in this model")
    return found


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of a model that counts its classes 0 (the background) to K -> state dict of ours, with all K classes."""
    converted = {our_name(name): tensor for name, tensor in modern(state).items()}
    number = len(converted["classifier.scores.bias"]) - 1
    return take(converted, list(range(1, number + 1)), background=0)


def to_torchvision(state: Mapping[str, Tensor], rows: list[int], number: int) -> dict[str, Tensor]:
    """State dict of ours -> torchvision's with `number` classes, the background first; rows: where each of our classes goes."""
    table = pairs(state)
    return {
        translate(name, table) or name: tensor.clone()
        for name, tensor in last_to_first(state, rows, number).items()
    }


def refold(state: Mapping[str, Tensor], eps: float) -> dict[str, Tensor]:
    """State dict of ours whose trunk has norms with `eps` -> one that gives the same with torchvision's."""
    folded = dict(state)
    for name, variance in state.items() if eps != EPS else ():
        if name.startswith("backbone.trunk.") and name.endswith(".running_var"):
            weight = name.replace(".running_var", ".weight")
            folded[weight] = (
                state[weight].double()
                * ((variance.double() + EPS) / (variance.double() + eps)).sqrt()
            ).float()
    return folded
