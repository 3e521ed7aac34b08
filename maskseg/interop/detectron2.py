"""detectron2's Mask R-CNN and Keypoint R-CNN with ResNet-FPN trunks: names, what can be told from the tensors, colours and anchors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.interop.resnet_detection import has_statistics, trunk_name
from maskseg.interop.state_dict_names import Pairs

BODY = "backbone.bottom_up."
PAIRS: Pairs = (
    ("backbone.trunk.stem.conv1.", f"{BODY}stem.conv1."),
    ("backbone.trunk.stem.bn1.", f"{BODY}stem.conv1.norm."),
    ("backbone.trunk.layer{i}.{j}.conv{k}.", BODY + "res{i+1}.{j}.conv{k}."),
    ("backbone.trunk.layer{i}.{j}.bn{k}.", BODY + "res{i+1}.{j}.conv{k}.norm."),
    ("backbone.trunk.layer{i}.{j}.downsample.0.", BODY + "res{i+1}.{j}.shortcut."),
    ("backbone.trunk.layer{i}.{j}.downsample.1.", BODY + "res{i+1}.{j}.shortcut.norm."),
    ("backbone.lateral.p{i}.0.", "backbone.fpn_lateral{i}."),
    ("backbone.lateral.p{i}.1.", "backbone.fpn_lateral{i}.norm."),
    ("backbone.output.p{i}.0.", "backbone.fpn_output{i}."),
    ("backbone.output.p{i}.1.", "backbone.fpn_output{i}.norm."),
    ("proposer.head.convs.0.", "proposal_generator.rpn_head.conv."),
    ("proposer.head.objectness.", "proposal_generator.rpn_head.objectness_logits."),
    ("proposer.head.deltas.", "proposal_generator.rpn_head.anchor_deltas."),
    ("classifier.trunk.convs.{i}.0.", "roi_heads.box_head.conv{i+1}."),
    ("classifier.trunk.convs.{i}.1.", "roi_heads.box_head.conv{i+1}.norm."),
    ("classifier.trunk.layers.{i}.", "roi_heads.box_head.fc{i+1}."),
    ("classifier.scores.", "roi_heads.box_predictor.cls_score."),
    ("classifier.deltas.", "roi_heads.box_predictor.bbox_pred."),
    ("heads.mask.convs.{i}.0.", "roi_heads.mask_head.mask_fcn{i+1}."),
    ("heads.mask.convs.{i}.1.", "roi_heads.mask_head.mask_fcn{i+1}.norm."),
    ("heads.mask.deconv.", "roi_heads.mask_head.deconv."),
    ("heads.mask.predictor.", "roi_heads.mask_head.predictor."),
    ("heads.keypoint.convs.{i}.0.", "roi_heads.keypoint_head.conv_fcn{i+1}."),
    ("heads.keypoint.deconv.", "roi_heads.keypoint_head.score_lowres."),
)
# What older files hold besides weights.
_ANCHORS = "proposal_generator.anchor_generator.cell_anchors."
_BUFFERS = re.compile(rf"pixel_mean|pixel_std|{re.escape(_ANCHORS)}\d+")
FIRST_BACKGROUND = False
RESIZE = "pillow"  # how its models resize (`data.transforms.ResizeShortestEdge`)


def pairs(own: Iterable[str]) -> Pairs:  # noqa: ARG001 - as torchvision's
    """The pairs of names."""
    return PAIRS


def modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights alone."""
    return {name: tensor for name, tensor in state.items() if not _BUFFERS.fullmatch(name)}


def recognise(state: Mapping[str, Tensor]) -> list[str]:
    """What the tensors tell of the model, as words of the command line; empty where they are no detectron2 detector's."""
    trunk = trunk_name(state, BODY + "res{}.{}.", first=2)
    if trunk is None:
        return []
    kind = (
        "keypoint_rcnn"
        if any(name.startswith("roi_heads.keypoint_head.") for name in state)
        else "mask_rcnn"
    )
    words = [
        f"model=detectron2_{kind}{'_x101' if trunk.startswith('resnext') else ''}",
        f"model.backbone.trunk.name={trunk}",
    ]
    if has_statistics(state, BODY):
        words.append("model.backbone.trunk.norm=BN")
    mean, std = state.get("pixel_mean"), state.get("pixel_std")
    if mean is not None and std is not None and mean.numel() == std.numel() == 3:
        for key, value in (("pixel_mean", mean), ("pixel_std", std)):
            numbers = [f"{v:.6g}" for v in value.flatten().tolist()]
            words.append(
                f"model.{key}=[{','.join(numbers[::-1] if takes_bgr(state) else numbers)}]"
            )
    return words


def takes_bgr(state: Mapping[str, Tensor]) -> bool:
    """Whether the model wants blue first: the rule; one whose file has a mean that is highest in the first channel wants red first."""
    mean = state.get("pixel_mean")
    return mean is None or mean.numel() != 3 or bool(mean.flatten()[0] < mean.flatten()[2])


def rgb(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours, with the first convolution's colours turned round."""
    name = "backbone.trunk.stem.conv1.weight"
    return {**state, name: state[name].flip(1)} if name in state else dict(state)


def check_anchors(state: Mapping[str, Tensor], cells: Sequence[Tensor], sizes: int) -> None:
    """Raises UserError where a file tells its anchors and a level's are not `cells` [A, 4], which are in our order."""
    for level, cell in enumerate(cells):
        theirs = state.get(f"{_ANCHORS}{level}")
        ours = cell.view(-1, sizes, 4).transpose(0, 1).flatten(0, 1)
        if theirs is not None and not (
            theirs.shape == ours.shape and torch.allclose(theirs.float(), ours, atol=0.01)
        ):
            wanted = [[round(v, 1) for v in box] for box in theirs.flatten(0, -2).tolist()[:3]]
            raise UserError(
                f"the anchors of level {level} are {wanted} ... in the file: set model.proposer.anchors.sizes and aspect_ratios"
            )


def reorder_anchors(state: Mapping[str, Tensor], sizes: int, ratios: int) -> dict[str, Tensor]:
    """The RPN's outputs in our order of a cell's anchors. detectron2: size by size, all ratios of each; ours, as torchvision: ratio by ratio."""
    order = torch.arange(sizes * ratios).view(sizes, ratios).T.flatten()
    changed = dict(state)
    for name, tensor in state.items():
        if name.startswith("proposer.head.objectness.") and len(tensor) == len(order):
            changed[name] = tensor[order]
        elif name.startswith("proposer.head.deltas.") and len(tensor) == 4 * len(order):
            changed[name] = tensor.reshape(-1, 4, *tensor.shape[1:])[order].flatten(0, 1)
    return changed
