"""With torchvision's weights and settings the model gives torchvision's detections, losses and gradients, on real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from maskseg.interop.torchvision import from_torchvision, our_name
from maskseg.masks import FileMasks, Polygons, SoftMasks
from maskseg.modules.anchors import AnchorGenerator
from maskseg.modules.box_head import BoxClassifier, FCTrunk
from maskseg.modules.fpn import FPN
from maskseg.modules.mask_head import MaskHead
from maskseg.modules.pooling import MultiLevelRoIAlign
from maskseg.modules.resnet import ResNet
from maskseg.modules.rpn import RPN, RPNHead
from maskseg.modules.sampling import RegionSampler
from maskseg.ops.paste import paste_crop
from maskseg.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Targets

K = 80
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
EVERYTHING = 10**6  # a quota that no image fills: both sides draw all anchors and regions there are
WIDE, TALL = "000000025560.jpg", "000000322864.jpg"  # 640 x 480 and 427 x 640, with objects cut off at the bottom and at the right
SETTINGS = [("resnet50", 0.0), ("resnet18", 1e-5)]


def torchvision_model(trunk: str, eps: float) -> MaskRCNN:
    """Random weights, scaled so that features stay of order one, scores and boxes differ and a hundred detections survive."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name=trunk, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5)
    model = MaskRCNN(
        backbone,
        K + 1,
        min_size=640,  # the images' longer side is 640: they keep their size
        max_size=640,
        rpn_pre_nms_top_n_train=400,
        rpn_post_nms_top_n_train=300,
        rpn_batch_size_per_image=EVERYTHING,
        box_batch_size_per_image=EVERYTHING,
        box_positive_fraction=0.5,
    )
    last = "bn3" if trunk == "resnet50" else "bn2"
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = eps
            # Small variances, as trained weights have them: there the eps matters.
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5e-3, 1.5e-3)
            module.bias.normal_(0, 0.1)
            module.weight.uniform_(0.8, 1.2).mul_(1e-3**0.5 * (0.2 if name.endswith(last) else 1))
    scales = {model.rpn.head.cls_logits: 5, model.rpn.head.bbox_pred: 3, model.roi_heads.box_predictor.bbox_pred: 20}
    with torch.no_grad():
        for layer, factor in (scales | {model.roi_heads.box_predictor.cls_score: 30}).items():
            layer.weight *= factor
            nn.init.normal_(layer.bias, 0, 0.05)
    return model.eval()


def our_model(trunk: str, eps: float) -> GeneralizedRCNN:
    """The same stages with torchvision's rules."""
    return GeneralizedRCNN(
        FPN(ResNet(trunk, norm="FrozenBN", norm_eps=eps)),
        RPN(
            RPNHead(),
            AnchorGenerator(rounded=True, stride_from="image"),
            STRIDES | {"p6": 64},
            train_limits={"per_level": 400, "per_image": 300},
            test_limits={"per_level": 1000, "per_image": 1000},
            num_samples=EVERYTHING,
            min_size=1e-3,
            beta=1 / 9,
        ),
        RegionSampler(K, EVERYTHING, 0.5),
        BoxClassifier(MultiLevelRoIAlign(STRIDES, 7, 2, aligned=False), FCTrunk(), K, beta=1 / 9, min_size=1e-2),
        {"mask": MaskHead(MultiLevelRoIAlign(STRIDES, 14, 2, aligned=False), K, target_rule="roi_align", paste_rule="torchvision")},
    ).eval()


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda p: f"{p[0]}-eps{p[1]:g}")
def models(request: pytest.FixtureRequest) -> tuple[GeneralizedRCNN, MaskRCNN]:
    """Ours and torchvision's, with the same weights."""
    theirs, ours = torchvision_model(*request.param), our_model(*request.param)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return ours, theirs


def load(folder: Path, name: str) -> Tensor:
    with Image.open(folder / name) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def to_batch(images: list[Tensor], targets: Targets | None = None) -> Batch:
    sizes = torch.tensor([i.shape[-2:] for i in images])
    height, width = (-(-int(side) // 32) * 32 for side in sizes.amax(dim=0))
    pixels = torch.zeros((len(images), 3, height, width), dtype=torch.uint8)
    for canvas, image in zip(pixels, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return Batch(pixels, sizes, sizes, list(range(len(images))), [str(i) for i in range(len(images))], targets)


def compare(models: tuple[GeneralizedRCNN, MaskRCNN], images: list[Tensor]) -> dict[str, float]:
    """The largest differences of boxes, scores and pasted soft masks; asserts that counts and labels are equal."""
    ours, theirs = models
    found = ours.predict(to_batch(images)).detections
    worst = {"box": 0.0, "score": 0.0, "mask": 0.0}
    assert found.labels is not None
    with torch.no_grad():
        wanted: list[dict[str, Tensor]] = theirs([i.float() / 255 for i in images])
    for i, (theirs_, image) in enumerate(zip(wanted, images, strict=True)):
        own = found[found.image_index == i]
        assert isinstance(own.masks, SoftMasks)
        assert own.labels is not None
        assert len(own) == len(theirs_["boxes"]) == 100
        assert len(own.labels.unique()) > 1
        assert own.labels.tolist() == (theirs_["labels"] - 1).tolist()
        worst["box"] = max(worst["box"], (own.boxes - theirs_["boxes"]).abs().max().item())
        worst["score"] = max(worst["score"], (own.scores - theirs_["scores"]).abs().max().item())
        height, width = image.shape[-2:]
        for grid, box, mask in zip(own.masks.grids, own.boxes, theirs_["masks"][:, 0], strict=True):
            values, left, top = paste_crop(grid, box, height, width, own.masks.paste_rule, own.masks.interpolation)
            mask = mask.clone()
            mask[top : top + values.shape[0], left : left + values.shape[1]] -= values
            worst["mask"] = max(worst["mask"], mask.abs().max().item())
    return worst


@pytest.mark.parametrize(
    ("names", "padded"),
    [
        # The coarsest map is 8 x 10 cells for 480 pixels: anchors are 60 pixels apart, not 64.
        ([WIDE], (480, 640)),
        ([TALL], (640, 448)),
        ([WIDE, TALL], (640, 640)),
    ],
    ids=["inexact-p6", "padded", "two-sizes"],
)
def test_detections_equal_torchvision(models: tuple[GeneralizedRCNN, MaskRCNN], shared_data: Path, names: list[str], padded: tuple[int, int]) -> None:
    folder = shared_data / "coco_tiny" / "val2017"
    images = [load(folder, n) for n in names]
    assert to_batch(images).images.shape[-2:] == padded
    worst = compare(models, images)
    assert worst["box"] < 1e-2
    assert worst["score"] < 1e-4
    assert worst["mask"] < 1e-4


def annotations(shared_data: Path, names: list[str]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each image's record with its annotations, their category already a label."""
    content = json.loads((shared_data / "coco_tiny" / "annotations" / "instances_val2017.json").read_text())
    label = {c["id"]: i for i, c in enumerate(content["categories"])}
    assert len(label) == K
    images = {i["file_name"]: i for i in content["images"]}
    rows = [[a | {"label": label[a["category_id"]]} for a in content["annotations"] if a["image_id"] == images[n]["id"]] for n in names]
    assert all(a["iscrowd"] == 0 for r in rows for a in r)
    return [(images[n], r) for n, r in zip(names, rows, strict=True)]


def both_targets(found: list[tuple[dict[str, Any], list[dict[str, Any]]]]) -> tuple[Targets, list[dict[str, Tensor]]]:
    """The truth as ours (polygons) and as torchvision's (bitmaps)."""
    masks, theirs = [], []
    for image, rows in found:
        height, width = image["height"], image["width"]
        polygons = [Polygons(tuple(np.array(p, dtype=np.float64).reshape(-1, 2) for p in a["segmentation"])) for a in rows]
        masks.append(FileMasks.from_file(polygons, height, width))
        bitmaps = [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], height, width))) for a in rows]
        boxes = torch.tensor([a["bbox"] for a in rows])
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["label"] + 1 for a in rows])
        theirs.append({"boxes": boxes, "labels": labels, "masks": torch.from_numpy(np.stack(bitmaps))})
    image_index = torch.cat([torch.full((len(t["boxes"]),), i) for i, t in enumerate(theirs)])
    boxes, labels = torch.cat([t["boxes"] for t in theirs]), torch.cat([t["labels"] - 1 for t in theirs])
    return Targets(boxes, labels, image_index, torch.zeros(len(boxes), dtype=torch.bool), FileMasks.cat(masks)), theirs


TERMS = {
    "rpn_objectness": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "box_class": "loss_classifier",
    "box_regression": "loss_box_reg",
    "mask": "loss_mask",
}


def compare_training(models: tuple[GeneralizedRCNN, MaskRCNN], shared_data: Path, names: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Relative differences of each loss, and of each gradient, by its norm."""
    ours, theirs = models
    images = [load(shared_data / "coco_tiny" / "val2017", n) for n in names]
    targets, their_targets = both_targets(annotations(shared_data, names))
    try:
        losses = ours.train()(to_batch(images, targets))
        wanted = theirs.train()([i.float() / 255 for i in images], their_targets)
        assert set(losses) == set(TERMS)
        assert set(wanted) == set(TERMS.values())
        assert all(v.item() > 1e-4 for v in wanted.values())
        sum(losses.values()).backward()
        sum(wanted.values()).backward()
        of_losses = {name: abs(losses[name].item() / wanted[theirs_].item() - 1) for name, theirs_ in TERMS.items()}
        their_gradients = from_torchvision({n: p.grad for n, p in theirs.named_parameters()})
        our_gradients = {n: p.grad for n, p in ours.named_parameters()}
        assert set(our_gradients) == set(their_gradients)
        of_gradients = {n: ((our_gradients[n] - g).norm() / g.norm()).item() for n, g in their_gradients.items()}
    finally:
        for model in models:
            model.eval().zero_grad()
    return of_losses, of_gradients


@pytest.mark.parametrize("models", SETTINGS[1:], indirect=True, ids=["resnet18"])
def test_losses_and_gradients_equal_torchvision(models: tuple[GeneralizedRCNN, MaskRCNN], shared_data: Path) -> None:
    """Two images of different size, every anchor and region drawn on both sides."""
    losses, gradients = compare_training(models, shared_data, [WIDE, TALL])
    assert max(losses.values()) < 1e-4
    assert max(gradients.values()) < 1e-3


def test_every_tensor_is_renamed_once(models: tuple[GeneralizedRCNN, MaskRCNN]) -> None:
    ours, theirs = models
    names = [our_name(n) for n in theirs.state_dict()]
    assert sorted(names) == sorted(ours.state_dict())
    with pytest.raises(KeyError, match="has no place in this model"):
        our_name("roi_heads.other_head.0.weight")
