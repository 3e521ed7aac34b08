"""torchvision's Mask R-CNN beside ours: the same weights, pictures and settings."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from maskseg import config as configs
from maskseg.config.restore import open_data
from maskseg.data.collate import collate
from maskseg.data.transforms import ResizeShortestEdge
from maskseg.errors import UserError
from maskseg.interop.torchvision import from_torchvision
from maskseg.masks.base import rle_to_bitmaps
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Categories

CLASSES = 90  # torchvision's, without the background
LONGEST = 1333 / 800  # of the shorter side


def models(trunk: str, size: int, learnt: bool = False) -> tuple[Any, GeneralizedRCNN]:
    """torchvision's model and ours, in evaluation mode, of equal random weights.

    With those they find a hundred things in a picture; or, `learnt`, they are such as a training begins with, with norms that learn too.
    """
    torch.manual_seed(0)
    norm, frozen = (nn.BatchNorm2d, 0) if learnt else (FrozenBatchNorm2d, 2)
    backbone = resnet_fpn_backbone(
        backbone_name=trunk, weights=None, norm_layer=norm, trainable_layers=5 - frozen
    )
    theirs = detection.MaskRCNN(
        backbone, CLASSES + 1, min_size=size, max_size=round(size * LONGEST)
    ).eval()
    words = [
        f"name={trunk}",
        f"frozen_stages={frozen}",
        f"norm={'BN' if learnt else 'FrozenBN'}",
        "norm_eps=1e-5",
    ]
    config = configs.compose(
        "train",
        [
            "experiment=coco_r50_fpn_1x",
            "model=torchvision_mask_rcnn",
            *(f"model.backbone.trunk.{w}" for w in words),
        ],
    )
    configs.set_categories(
        config, Categories(tuple(map(str, range(CLASSES))), tuple(range(CLASSES)))
    )
    ours = cast(GeneralizedRCNN, configs.build_model(config, pretrained=False)).eval()
    theirs = theirs if learnt else spread(theirs)
    return theirs, copied(theirs, ours)


def copied(theirs: Any, ours: GeneralizedRCNN) -> GeneralizedRCNN:
    """Ours with the weights of torchvision's."""
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return ours


def batches(config: Any, split: str, number: int) -> list[Batch]:
    """The first `number` batches of `config.batch` pictures of a split of `config.data`, the shorter side `config.size` pixels, with their truth.

    Raises UserError where there are too few.
    """
    if config.size < 32 or config.batch < 1:
        raise UserError(
            f"size must be at least 32 and batch at least 1, not {config.size} and {config.batch}"
        )
    source = open_data(config)
    if split not in source.splits():
        raise UserError(
            f"the data has no images of split {split}: set data.root or data.{split}_json"
        )
    dataset = source.dataset(split)
    dataset.transforms = [ResizeShortestEdge([config.size], round(config.size * LONGEST))]
    if len(dataset) < config.batch:
        raise UserError(
            f"batch={config.batch}, but the split {split} has only {len(dataset)} images"
        )
    starts = range(0, len(dataset) - config.batch + 1, config.batch)[:number]
    return [
        collate([dataset[0, i, 0] for i in range(start, start + config.batch)]) for start in starts
    ]


def their_images(batch: Batch) -> list[Tensor]:
    """What torchvision's models take: f32 RGB in [0, 1], each of its own size."""
    sizes = batch.sizes.tolist()
    return [
        image[:, :height, :width].float() / 255
        for image, (height, width) in zip(batch.images, sizes, strict=True)
    ]


def their_targets(batch: Batch) -> list[dict[str, Tensor]]:
    """The truth as torchvision's models take it: labels from 1, full-size bitmaps; crowds left out, as its reference does."""
    targets, found = batch.targets, []
    assert targets is not None
    assert targets.masks is not None
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        own = targets[torch.nonzero((targets.image_index == i) & ~targets.crowd).squeeze(1)]
        assert own.masks is not None
        bitmaps = torch.from_numpy(rle_to_bitmaps(own.masks.to_rle())).to(torch.uint8)
        masks = torch.zeros((len(own), height, width), dtype=torch.uint8)
        if len(own):
            masks[:] = bitmaps
        found.append({"boxes": own.boxes, "labels": own.labels + 1, "masks": masks})
    return found


def both(batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """What torchvision's models are called with in training, on the batch's device."""
    targets = [
        {k: v.to(batch.images.device) for k, v in target.items()} for target in their_targets(batch)
    ]
    return their_images(batch), targets


def spread(model: Any) -> Any:
    """Gives a torchvision detector random weights whose features stay of order one and whose scores and boxes differ. -> the model."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d) and "backbone.body" in name:
            # Small variances, as trained weights have them: there the eps matters.
            with torch.no_grad():
                stats = cast(Any, module)
                stats.running_mean.normal_(0, 0.1)
                stats.running_var.uniform_(0.5e-3, 1.5e-3)
                stats.bias.normal_(0, 0.1)
                last = name.endswith("bn3") or (
                    name.endswith("bn2")
                    and not hasattr(model.get_submodule(name.rsplit(".", 1)[0]), "bn3")
                )
                stats.weight.uniform_(0.8, 1.2).mul_(1e-3**0.5 * (0.2 if last else 1))
        elif isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                stats = cast(Any, module)
                stats.running_mean.normal_(0, 0.05)
                stats.running_var.uniform_(0.5, 1.5)
                stats.bias.normal_(0, 0.05)
    box = model.roi_heads.box_predictor
    with torch.no_grad():
        for layer, factor in {
            model.rpn.head.cls_logits: 5,
            model.rpn.head.bbox_pred: 3,
            box.bbox_pred: 20,
            box.cls_score: 30,
        }.items():
            layer.weight *= factor
            nn.init.normal_(layer.bias, 0, 0.05)
    return model.eval()


def centre(model: Any, image: Tensor, labels: list[int] | None = None) -> None:
    """Class scores read the eight directions in which the regions of an image, f32 [3, H, W], differ most, and so differ themselves.

    labels: those that exist (all).
    """
    layer, seen = model.roi_heads.box_predictor.cls_score, []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model([image])
        handle.remove()
        (features,) = seen
        exists = list(range(len(layer.bias))) if labels is None else labels
        middle = features.mean(dim=0)
        _, size, directions = torch.linalg.svd(features - middle, full_matrices=False)
        read = directions[:8] * (len(features) ** 0.5 / size[:8, None])
        layer.weight[exists] = torch.randn((len(exists), 8)) @ read
        layer.bias[exists] = -(layer.weight[exists] @ middle)
