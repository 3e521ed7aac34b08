"""detectron2's Mask R-CNN and Keypoint R-CNN with ResNet-FPN: names, color order and anchors.

The config overrides for a model are inferred from its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.interop.resnet_detection import detect_trunk, has_statistics
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
    ("classifier.mlp.convs.{i}.0.", "roi_heads.box_head.conv{i+1}."),
    ("classifier.mlp.convs.{i}.1.", "roi_heads.box_head.conv{i+1}.norm."),
    ("classifier.mlp.layers.{i}.", "roi_heads.box_head.fc{i+1}."),
    ("classifier.cls_score.", "roi_heads.box_predictor.cls_score."),
    ("classifier.bbox_pred.", "roi_heads.box_predictor.bbox_pred."),
    ("heads.mask.convs.{i}.0.", "roi_heads.mask_head.mask_fcn{i+1}."),
    ("heads.mask.convs.{i}.1.", "roi_heads.mask_head.mask_fcn{i+1}.norm."),
    ("heads.mask.deconv.", "roi_heads.mask_head.deconv."),
    ("heads.mask.predictor.", "roi_heads.mask_head.predictor."),
    ("heads.keypoint.convs.{i}.0.", "roi_heads.keypoint_head.conv_fcn{i+1}."),
    ("heads.keypoint.deconv.", "roi_heads.keypoint_head.score_lowres."),
)
# Buffers that older files contain besides the weights.
_ANCHORS = "proposal_generator.anchor_generator.cell_anchors."
_BUFFERS = re.compile(rf"pixel_mean|pixel_std|{re.escape(_ANCHORS)}\d+")
BACKGROUND_FIRST = False
RESIZE = "pillow"  # how its models resize images (`data.transforms.ResizeShortestEdge`)


def name_pairs(names: Iterable[str]) -> Pairs:  # noqa: ARG001 - the signature of torchvision's
    """Return the pairs of names."""
    return PAIRS


def normalize_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights only, without buffers."""
    return {name: tensor for name, tensor in state.items() if not _BUFFERS.fullmatch(name)}


def infer_overrides(state: Mapping[str, Tensor]) -> list[str]:
    """Infer the config overrides of a model from its tensors.

    Empty if it is not a detector of detectron2.
    """
    trunk = detect_trunk(state, BODY + "res{}.{}.", first=2)
    if trunk is None:
        return []
    has_keypoints = any(name.startswith("roi_heads.keypoint_head.") for name in state)
    model = "keypoint_rcnn" if has_keypoints else "mask_rcnn"
    suffix = "_x101" if trunk.startswith("resnext") else ""
    overrides = [f"model=detectron2_{model}{suffix}", f"model.backbone.trunk.name={trunk}"]
    if has_statistics(state, BODY):
        overrides.append("model.backbone.trunk.norm=BN")
    return overrides + _pixel_overrides(state)


def _pixel_overrides(state: Mapping[str, Tensor]) -> list[str]:
    """Return the overrides of pixel_mean and pixel_std in RGB order, if the file has both."""
    mean = state.get("pixel_mean")
    std = state.get("pixel_std")
    if mean is None or std is None or not mean.numel() == std.numel() == 3:
        return []
    overrides = []
    for key, tensor in (("pixel_mean", mean), ("pixel_std", std)):
        values = [f"{value:.6g}" for value in tensor.flatten().tolist()]
        if takes_bgr(state):
            values.reverse()
        overrides.append(f"model.{key}=[{','.join(values)}]")
    return overrides


def takes_bgr(state: Mapping[str, Tensor]) -> bool:
    """Return whether the model takes BGR images, detectron2's default.

    A model whose pixel mean is highest in the first channel takes RGB images.
    """
    mean = state.get("pixel_mean")
    return mean is None or mean.numel() != 3 or bool(mean.flatten()[0] < mean.flatten()[2])


def to_rgb(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our state dict with the input channels of the first convolution reversed."""
    name = "backbone.trunk.stem.conv1.weight"
    return {**state, name: state[name].flip(1)} if name in state else dict(state)


def check_anchors(
    state: Mapping[str, Tensor], cell_anchors: Sequence[Tensor], num_sizes: int
) -> None:
    """Raise UserError if a file contains anchors that differ from ours.

    cell_anchors: for each level, the anchors of a cell f32 [A, 4] in our order, of `num_sizes`
    sizes.
    """
    for level, anchors in enumerate(cell_anchors):
        theirs = state.get(f"{_ANCHORS}{level}")
        if theirs is None:
            continue
        ours = anchors.view(-1, num_sizes, 4).transpose(0, 1).flatten(0, 1)
        if theirs.shape != ours.shape or not torch.allclose(theirs.float(), ours, atol=0.01):
            first_boxes = theirs.flatten(0, -2).tolist()[:3]
            rounded = [[round(value, 1) for value in box] for box in first_boxes]
            raise UserError(
                f"the anchors of level {level} are {rounded} ... in the file: "
                "set model.proposer.anchors.sizes and aspect_ratios"
            )


def reorder_anchors(
    state: Mapping[str, Tensor], num_sizes: int, num_ratios: int
) -> dict[str, Tensor]:
    """Return the state dict with the outputs of the RPN in our order of a cell's anchors.

    detectron2 orders them by size, then aspect ratio; here and in torchvision they are ordered by
    aspect ratio, then size.
    """
    num_anchors = num_sizes * num_ratios
    order = torch.arange(num_anchors).view(num_sizes, num_ratios).T.flatten()
    reordered = dict(state)
    for name, tensor in state.items():
        if name.startswith("proposer.head.objectness.") and len(tensor) == num_anchors:
            reordered[name] = tensor[order]
        elif name.startswith("proposer.head.deltas.") and len(tensor) == 4 * num_anchors:
            deltas = tensor.reshape(-1, 4, *tensor.shape[1:])
            reordered[name] = deltas[order].flatten(0, 1)
    return reordered
