"""torchvision's Mask R-CNN and ours, with the same weights, images and settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from maskseg import config as configs
from maskseg.config import Config
from maskseg.config.restore import open_data
from maskseg.data.collate import collate
from maskseg.data.transforms import ResizeShortestEdge
from maskseg.errors import UserError
from maskseg.interop.torchvision import from_torchvision
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Categories, Losses

CLASSES = 90  # labels of torchvision's COCO models, without the background
MAX_ASPECT = 1333 / 800  # longest side over shorter side of the resized images

Target = dict[str, Tensor]  # the objects of one image: boxes, labels and masks


def models(
    trunk: str, size: int, trainable: bool = False
) -> tuple[detection.MaskRCNN, GeneralizedRCNN]:
    """Build torchvision's model and ours, in evaluation mode, with equal random weights.

    Args:
        trunk: name of the ResNet.
        size: shorter side of the images in pixels.
        trainable: use the weights that a training starts with, and trainable norms. Otherwise the
            weights are such that about a hundred objects are detected in an image.
    """
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if trainable else FrozenBatchNorm2d
    frozen_stages = 0 if trainable else 2
    backbone = resnet_fpn_backbone(
        backbone_name=trunk, weights=None, norm_layer=norm, trainable_layers=5 - frozen_stages
    )
    theirs = detection.MaskRCNN(
        backbone, CLASSES + 1, min_size=size, max_size=round(size * MAX_ASPECT)
    ).eval()
    settings = [
        f"name={trunk}",
        f"frozen_stages={frozen_stages}",
        f"norm={'BN' if trainable else 'FrozenBN'}",
        "norm_eps=1e-5",
    ]
    config = configs.compose(
        "train",
        [
            "experiment=coco_r50_fpn_1x",
            "model=torchvision_mask_rcnn",
            *(f"model.backbone.trunk.{setting}" for setting in settings),
        ],
    )
    configs.set_categories(
        config, Categories(tuple(map(str, range(CLASSES))), tuple(range(CLASSES)))
    )
    ours = configs.build_model(config, pretrained=False).eval()
    assert isinstance(ours, GeneralizedRCNN)
    if not trainable:
        randomize_weights(theirs)
    return theirs, copy_weights(theirs, ours)


def copy_weights(theirs: detection.FasterRCNN, ours: GeneralizedRCNN) -> GeneralizedRCNN:
    """Load the weights of torchvision's model into ours, and return it."""
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return ours


def batches(config: Config, split: str, number: int) -> list[Batch]:
    """Load the first `number` batches of a split, with ground truth.

    config: with `data`, `batch` (batch size) and `size` (shorter side in pixels).

    Raises UserError if the split has too few images.
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
    resize = ResizeShortestEdge([config.size], round(config.size * MAX_ASPECT))
    dataset = source.dataset_with(split, [resize])
    if len(dataset) < config.batch:
        raise UserError(
            f"batch={config.batch}, but the split {split} has only {len(dataset)} images"
        )
    starts = range(0, len(dataset) - config.batch + 1, config.batch)[:number]
    result = []
    for start in starts:
        samples = [dataset[0, index, 0] for index in range(start, start + config.batch)]
        result.append(collate(samples))
    return result


def torchvision_images(batch: Batch) -> list[Tensor]:
    """Convert a batch to the input of torchvision's models: f32 RGB in [0, 1], without padding."""
    sizes = batch.sizes.tolist()
    return [
        image[:, :height, :width].float() / 255
        for image, (height, width) in zip(batch.images, sizes, strict=True)
    ]


def torchvision_targets(batch: Batch) -> list[Target]:
    """Convert the ground truth to torchvision's: labels from 1 and full-size bitmaps.

    Crowds are dropped, as in torchvision's reference code.
    """
    targets = batch.targets
    result = []
    assert targets is not None
    assert targets.masks is not None
    for i, (height, width) in enumerate(batch.sizes.tolist()):
        objects = targets[torch.nonzero((targets.image_index == i) & ~targets.iscrowd).squeeze(1)]
        assert objects.masks is not None
        bitmaps = torch.from_numpy(objects.masks.to_bitmaps()).to(torch.uint8)
        masks = torch.zeros((len(objects), height, width), dtype=torch.uint8)
        if len(objects):
            masks[:] = bitmaps
        result.append({"boxes": objects.boxes, "labels": objects.labels + 1, "masks": masks})
    return result


def torchvision_inputs(batch: Batch) -> tuple[list[Tensor], list[Target]]:
    """Return the training inputs of torchvision's models, on the batch's device."""
    device = batch.images.device

    def to_device(target: Target) -> Target:
        return {key: value.to(device) for key, value in target.items()}

    return torchvision_images(batch), [to_device(t) for t in torchvision_targets(batch)]


def torchvision_losses(model: detection.FasterRCNN, batch: Batch) -> Losses:
    """Return the losses of torchvision's model for a batch of ours."""
    losses: Losses = model(*torchvision_inputs(batch))
    return losses


def randomize_weights(model: detection.FasterRCNN) -> detection.FasterRCNN:
    """Set random weights with features of order one, and scores and boxes that vary.

    model: any detector of torchvision with two stages. Returns it, in evaluation mode.
    """
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d) and "backbone.body" in name:
            # Small variances as in trained weights, for which the eps matters.
            _randomize_norm(module, 0.1, (0.5e-3, 1.5e-3))
            block = model.get_submodule(name.rsplit(".", 1)[0])
            last_norm = "bn3" if hasattr(block, "bn3") else "bn2"
            residual_scale = 0.2 if name.endswith(last_norm) else 1
            with torch.no_grad():
                module.weight.uniform_(0.8, 1.2).mul_(1e-3**0.5 * residual_scale)
        elif isinstance(module, nn.BatchNorm2d):
            _randomize_norm(module, 0.05, (0.5, 1.5))
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


@torch.no_grad()
def _randomize_norm(
    norm: FrozenBatchNorm2d | nn.BatchNorm2d, std: float, variances: tuple[float, float]
) -> None:
    """Set random statistics and biases. std: of the running means and of the biases."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_(0, std)
    norm.running_var.uniform_(*variances)
    norm.bias.normal_(0, std)


def center_scores(
    model: detection.FasterRCNN, image: Tensor, labels: list[int] | None = None
) -> None:
    """Make the class scores of an image's regions vary.

    The scores become random combinations of the eight principal components of the region features.

    Args:
        model: any detector of torchvision with two stages.
        image: f32 [3, H, W].
        labels: labels to change; by default all.
    """
    layer = model.roi_heads.box_predictor.cls_score
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model([image])
        handle.remove()
        (features,) = inputs
        rows = list(range(len(layer.bias))) if labels is None else labels
        mean = features.mean(dim=0)
        _, size, directions = torch.linalg.svd(features - mean, full_matrices=False)
        read = directions[:8] * (len(features) ** 0.5 / size[:8, None])
        layer.weight[rows] = torch.randn((len(rows), 8)) @ read
        layer.bias[rows] = -(layer.weight[rows] @ mean)
