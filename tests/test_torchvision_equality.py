"""Equality with torchvision's model: detections, losses, gradients and training.

With the same weights and settings, on synthetic images, and on photographs if available.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from made.detectors import centre, spread
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead as TorchvisionHead
from torchvision.ops import FrozenBatchNorm2d

from maskseg import config as configs
from maskseg.interop.torchvision import from_torchvision, our_name
from maskseg.masks.annotated import AnnotatedMasks, Polygons
from maskseg.masks.predicted import MaskGrids
from maskseg.models.anchors import AnchorGenerator
from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.box_head import BoxHead, BoxHeadMLP
from maskseg.models.mask_head import MaskHead
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.models.region_sampler import RegionSampler
from maskseg.models.roi_pooler import MultiLevelRoIAlign
from maskseg.models.rpn import RPN, AnchorSampler, ProposalLimits, RPNHead
from maskseg.ops.paste import paste_crop
from maskseg.structures import Batch, Targets

K = 80
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}
EVERYTHING = 10**6  # a quota that no image reaches: both models use all anchors and regions
WIDE, TALL = (
    "000000025560.jpg",
    "000000322864.jpg",
)  # 640 x 480 and 427 x 640, with objects cut off at the bottom and at the right; shrunk here
SETTINGS = [("resnet50", 0.0), ("resnet18", 1e-5)]


def torchvision_model(trunk: str, eps: float) -> MaskRCNN:
    """Return torchvision's model with scaled random weights.

    Features are of order one, scores and boxes differ, and a hundred detections remain.
    """
    torch.manual_seed(1 if trunk == "resnet50" else 0)  # two classes are found
    backbone = resnet_fpn_backbone(
        backbone_name=trunk, weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=5
    )
    model = MaskRCNN(
        backbone,
        K + 1,
        min_size=384,  # the longer side of the images is 384, so they are not resized
        max_size=384,
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
            # Small variances, as in trained weights, for which the eps matters.
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5e-3, 1.5e-3)
            module.bias.normal_(0, 0.1)
            module.weight.uniform_(0.8, 1.2).mul_(1e-3**0.5 * (0.2 if name.endswith(last) else 1))
    scales = {
        model.rpn.head.cls_logits: 5,
        model.rpn.head.bbox_pred: 3,
        model.roi_heads.box_predictor.bbox_pred: 20,
    }
    with torch.no_grad():
        for layer, factor in (scales | {model.roi_heads.box_predictor.cls_score: 30}).items():
            layer.weight *= factor
            nn.init.normal_(layer.bias, 0, 0.05)
    return model.eval()


def our_model(trunk: str, eps: float) -> GeneralizedRCNN:
    """Return our model with torchvision's settings."""
    return GeneralizedRCNN(
        FPN(ResNet(trunk, norm="FrozenBN", norm_eps=eps)),
        RPN(
            RPNHead(),
            AnchorGenerator(rounded=True, stride_from="image"),
            STRIDES | {"p6": 64},
            train_limits=ProposalLimits(pre_nms_top_n=400, post_nms_top_n=300),
            test_limits=ProposalLimits(pre_nms_top_n=1000, post_nms_top_n=1000),
            sampler=AnchorSampler(num_samples=EVERYTHING),
            min_size=1e-3,
            beta=1 / 9,
        ),
        RegionSampler(K, EVERYTHING, 0.5),
        BoxHead(
            MultiLevelRoIAlign(STRIDES, 7, 2, aligned=False),
            BoxHeadMLP(),
            K,
            beta=1 / 9,
            min_size=1e-2,
        ),
        {
            "mask": MaskHead(
                MultiLevelRoIAlign(STRIDES, 14, 2, aligned=False),
                K,
                target_mode="roi_align",
                paste_mode="torchvision",
            )
        },
    ).eval()


@pytest.fixture(scope="module", params=SETTINGS, ids=lambda p: f"{p[0]}-eps{p[1]:g}")
def models(request: pytest.FixtureRequest) -> tuple[GeneralizedRCNN, MaskRCNN]:
    """Our model and torchvision's, with the same weights."""
    theirs, ours = torchvision_model(*request.param), our_model(*request.param)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    return ours, theirs


# Variant of the synthetic images for training: no mask cell is close to the kink of a ReLU.
TRAIN_VARIANT = 3
SHAPES = {WIDE: (288, 384), TALL: (384, 250)}


def load(folder: Path, name: str) -> Tensor:
    with Image.open(folder / name) as image:
        height, width = SHAPES[name]
        shrunk = image.convert("RGB").resize((width, height))
        return torch.from_numpy(np.array(shrunk)).permute(2, 0, 1).contiguous()


def outlines(name: str, variant: int = 0) -> list[NDArray[np.float64]]:
    """Return seven polygons in a synthetic image, each f64 [points, 2].

    Some overlap each other, two are cut off by the border.
    """
    height, width = SHAPES[name]
    rng = np.random.default_rng(height + variant)
    found = []
    for i in range(7):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 14))
        radius = rng.uniform(0.5, 1, 14) * rng.uniform(20, 100)
        centre = (
            rng.uniform(0.2, 0.8, 2) * (width, height)
            if i < 5
            else np.array([width - 10.0, rng.uniform(0.3, 0.7) * height])
        )
        points = centre + np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
        found.append(points.clip(0, (width, height)))
    return found


def make(name: str, variant: int = 0) -> Tensor:
    """Return a synthetic image of the photograph's size: noise at four scales, and shapes."""
    height, width = SHAPES[name]
    generator = torch.Generator().manual_seed(height)
    pixels = torch.zeros(1, 3, height, width)
    for cells in (4, 16, 64, 256):
        noise = torch.randn((1, 3, cells, cells), generator=generator)
        pixels += (
            nn.functional.interpolate(noise, (height, width), mode="bilinear") * 40 / cells**0.25
        )
    picture = Image.fromarray((pixels[0] + 120).clamp(0, 255).byte().permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    for i, points in enumerate(outlines(name, variant)):
        pen.polygon(
            [tuple(p) for p in points.tolist()], fill=(40 + 30 * i, 220 - 25 * i, 90 + 20 * (i % 4))
        )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


@pytest.fixture(params=["made", "photographs"])
def pictures(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """Two images by name."""
    if request.param == "made":
        return {name: make(name) for name in SHAPES}
    folder: Path = request.getfixturevalue("shared_data") / "coco_tiny" / "val2017"
    return {name: load(folder, name) for name in SHAPES}


def to_batch(images: list[Tensor], targets: Targets | None = None) -> Batch:
    sizes = torch.tensor([i.shape[-2:] for i in images])
    height, width = (-(-int(side) // 32) * 32 for side in sizes.amax(dim=0))
    pixels = torch.zeros((len(images), 3, height, width), dtype=torch.uint8)
    for canvas, image in zip(pixels, images, strict=True):
        canvas[:, : image.shape[1], : image.shape[2]] = image
    return Batch(
        pixels,
        sizes,
        sizes,
        list(range(len(images))),
        [str(i) for i in range(len(images))],
        targets,
    )


def compare(models: tuple[GeneralizedRCNN, MaskRCNN], images: list[Tensor]) -> dict[str, float]:
    """Return the largest differences of boxes, scores and pasted masks.

    Assert that counts and labels are equal.
    """
    ours, theirs = models
    found = ours.predict(to_batch(images)).detections
    worst = {"box": 0.0, "score": 0.0, "mask": 0.0}
    assert found.labels is not None
    with torch.no_grad():
        wanted: list[dict[str, Tensor]] = theirs([i.float() / 255 for i in images])
    for i, (theirs_, image) in enumerate(zip(wanted, images, strict=True)):
        own = found[found.image_index == i]
        assert isinstance(own.masks, MaskGrids)
        assert own.labels is not None
        assert len(own) == len(theirs_["boxes"]) == 100
        assert len(own.labels.unique()) > 1
        assert own.labels.tolist() == (theirs_["labels"] - 1).tolist()
        worst["box"] = max(worst["box"], (own.boxes - theirs_["boxes"]).abs().max().item())
        worst["score"] = max(worst["score"], (own.scores - theirs_["scores"]).abs().max().item())
        height, width = image.shape[-2:]
        for grid, box, mask in zip(own.masks.grids, own.boxes, theirs_["masks"][:, 0], strict=True):
            values, left, top = paste_crop(
                grid, box, height, width, own.masks.paste_mode, own.masks.interpolation
            )
            mask = mask.clone()
            mask[top : top + values.shape[0], left : left + values.shape[1]] -= values
            worst["mask"] = max(worst["mask"], mask.abs().max().item())
    return worst


@pytest.mark.parametrize(
    ("models", "pictures", "names", "padded"),
    [
        # The coarsest map is 5 x 6 cells for 288 pixels: anchors are 57 pixels apart, not 64.
        pytest.param(SETTINGS[1], "made", [WIDE], (288, 384), id="resnet18-made-inexact-p6"),
        pytest.param(SETTINGS[1], "made", [TALL], (384, 256), id="resnet18-made-padded"),
        pytest.param(SETTINGS[0], "made", [WIDE, TALL], (384, 384), id="resnet50-made-two-sizes"),
        pytest.param(
            SETTINGS[0], "photographs", [WIDE], (288, 384), id="resnet50-photographs-inexact-p6"
        ),
        pytest.param(
            SETTINGS[1],
            "photographs",
            [WIDE, TALL],
            (384, 384),
            id="resnet18-photographs-two-sizes",
        ),
    ],
    indirect=["models", "pictures"],
)
def test_detections_equal_torchvision(
    models: tuple[GeneralizedRCNN, MaskRCNN],
    pictures: dict[str, Tensor],
    names: list[str],
    padded: tuple[int, int],
) -> None:
    images = [pictures[n] for n in names]
    assert to_batch(images).images.shape[-2:] == padded
    worst = compare(models, images)
    assert worst["box"] < 1e-2
    assert worst["score"] < 1e-4
    assert worst["mask"] < 1e-4


Found = list[tuple[dict[str, Any], list[dict[str, Any]]]]


def made_annotations(names: list[str], variant: int) -> Found:
    """The same for the polygons of synthetic images."""
    found = []
    for name in names:
        rows = []
        for i, points in enumerate(outlines(name, variant)):
            low, high = points.min(axis=0), points.max(axis=0)
            rows.append(
                {
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "label": (11 * i + len(found)) % K,
                    "segmentation": [points.ravel().tolist()],
                }
            )
        found.append(({"height": SHAPES[name][0], "width": SHAPES[name][1]}, rows))
    return found


def annotations(
    shared_data: Path, names: list[str]
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Return each image's record with its annotations; categories are converted to labels."""
    content = json.loads(
        (shared_data / "coco_tiny" / "annotations" / "instances_val2017.json").read_text()
    )
    label = {c["id"]: i for i, c in enumerate(content["categories"])}
    assert len(label) == K
    images = {i["file_name"]: i for i in content["images"]}
    rows = [
        [
            a | {"label": label[a["category_id"]]}
            for a in content["annotations"]
            if a["image_id"] == images[n]["id"]
        ]
        for n in names
    ]
    assert all(a["iscrowd"] == 0 for r in rows for a in r)
    return [shrink(images[n], r) for n, r in zip(names, rows, strict=True)]


def shrink(
    image: dict[str, Any], rows: list[dict[str, Any]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scale the annotations of a photograph to its size here."""
    height, width = SHAPES[image["file_name"]]
    factors = np.array([width / image["width"], height / image["height"]])
    scaled = []
    for row in rows:
        polygons = [np.reshape(p, (-1, 2)) * factors for p in row["segmentation"]]
        box = np.reshape(row["bbox"], (2, 2)) * factors
        shapes = [polygon.ravel().tolist() for polygon in polygons]
        scaled.append(row | {"bbox": box.ravel().tolist(), "segmentation": shapes})
    return {"height": height, "width": width}, scaled


def both_targets(
    found: list[tuple[dict[str, Any], list[dict[str, Any]]]],
) -> tuple[Targets, list[dict[str, Tensor]]]:
    """Return the ground truth as ours (polygons) and as torchvision's (bitmaps)."""
    masks, theirs = [], []
    for image, rows in found:
        height, width = image["height"], image["width"]
        polygons = [
            Polygons(tuple(np.array(p, dtype=np.float64).reshape(-1, 2) for p in a["segmentation"]))
            for a in rows
        ]
        masks.append(AnnotatedMasks.from_file(polygons, height, width))
        bitmaps = [
            coco_mask.decode(
                coco_mask.merge(coco_mask.frPyObjects(a["segmentation"], height, width))
            )
            for a in rows
        ]
        boxes = torch.tensor([a["bbox"] for a in rows])
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["label"] + 1 for a in rows])
        theirs.append(
            {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(np.stack(bitmaps))}
        )
    image_index = torch.cat([torch.full((len(t["boxes"]),), i) for i, t in enumerate(theirs)])
    boxes, labels = (
        torch.cat([t["boxes"] for t in theirs]),
        torch.cat([t["labels"] - 1 for t in theirs]),
    )
    iscrowd = torch.zeros(len(boxes), dtype=torch.bool)
    targets = Targets(boxes, labels, image_index, iscrowd, AnnotatedMasks.cat(masks))
    return targets, theirs


TERMS = {
    "rpn_objectness": "loss_objectness",
    "rpn_box": "loss_rpn_box_reg",
    "box_class": "loss_classifier",
    "box_regression": "loss_box_reg",
    "mask": "loss_mask",
}


def compare_training(
    models: tuple[GeneralizedRCNN, MaskRCNN], images: list[Tensor], truth: Found
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the relative difference of each loss, and of each gradient by norm."""
    ours, theirs = models
    targets, their_targets = both_targets(truth)
    try:
        losses = ours.train()(to_batch(images, targets))
        wanted = theirs.train()([i.float() / 255 for i in images], their_targets)
        assert set(losses) == set(TERMS)
        assert set(wanted) == set(TERMS.values())
        assert all(v.item() > 1e-4 for v in wanted.values())
        sum(losses.values()).backward()
        sum(wanted.values()).backward()
        of_losses = {
            name: abs(losses[name].item() / wanted[theirs_].item() - 1)
            for name, theirs_ in TERMS.items()
        }
        their_gradients = from_torchvision({n: p.grad for n, p in theirs.named_parameters()})
        our_gradients = {n: p.grad for n, p in ours.named_parameters()}
        assert set(our_gradients) == set(their_gradients)
        of_gradients = {
            n: ((our_gradients[n] - g).norm() / g.norm()).item() for n, g in their_gradients.items()
        }
    finally:
        for model in models:
            model.eval().zero_grad()
    return of_losses, of_gradients


@pytest.mark.parametrize("models", SETTINGS[1:], indirect=True, ids=["resnet18"])
def test_losses_and_gradients_equal_torchvision(
    models: tuple[GeneralizedRCNN, MaskRCNN],
    pictures: dict[str, Tensor],
    request: pytest.FixtureRequest,
) -> None:
    """Two images of different size; both models use every anchor and region."""
    names = [WIDE, TALL]
    if torch.equal(pictures[WIDE], make(WIDE)):
        images, truth = (
            [make(name, TRAIN_VARIANT) for name in names],
            made_annotations(names, TRAIN_VARIANT),
        )
    else:
        images, truth = (
            [pictures[name] for name in names],
            annotations(request.getfixturevalue("shared_data"), names),
        )
    losses, gradients = compare_training(models, images, truth)
    assert max(losses.values()) < 1e-4
    assert max(gradients.values()) < 1e-3


def test_three_steps_of_training_equal_torchvision() -> None:
    """Return the losses of each step, and the change of the weights."""
    ours, theirs = our_model("resnet18", 1e-5), torchvision_model("resnet18", 1e-5)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    start = {n: p.detach().clone() for n, p in ours.named_parameters()}
    targets, their_targets = both_targets(made_annotations([TALL], TRAIN_VARIANT))
    image = make(TALL, TRAIN_VARIANT)
    optimizers = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1e-3, 0.9)
        for m in (ours.train(), theirs.train())
    ]
    for _ in range(3):
        losses, wanted = (
            ours(to_batch([image], targets)),
            theirs([image.float() / 255], their_targets),
        )
        for name, theirs_ in TERMS.items():
            assert losses[name].item() == pytest.approx(wanted[theirs_].item(), rel=1e-3), name
        for optimizer, terms in zip(optimizers, (losses, wanted), strict=True):
            optimizer.zero_grad()
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 5.0)
            optimizer.step()
    end = from_torchvision(theirs.state_dict())
    moved = {n: (end[n] - p).norm().item() for n, p in start.items() if not torch.equal(end[n], p)}
    assert len(moved) > 60
    for name, distance in moved.items():
        assert (ours.get_parameter(name) - end[name]).norm().item() < 0.01 * distance, name


def by_config(model: str, *words: str) -> GeneralizedRCNN:
    """Build our model from the installed config for torchvision's weights."""
    config = configs.compose(
        "train",
        [
            "experiment=coco_r50_fpn_1x",
            f"model={model}",
            "model.backbone.trunk.name=resnet18",
            *words,
        ],
    )
    ranges = [[0, 17]] if "keypoint" in model else None
    for key, value in {"num_classes": 1 if ranges else K, "point_ranges": ranges}.items():
        configs.set_key(config, f"data.{key}", value)
    built = configs.build_model(config, pretrained=False)
    assert isinstance(built, GeneralizedRCNN)
    return built.eval()


def test_detections_of_the_second_version_equal_torchvision() -> None:
    """maskrcnn_resnet50_fpn_v2 with a ResNet-18.

    It has norms in all parts, two convolutions in the RPN and four in the box head.
    """
    torch.manual_seed(0)
    body = torchvision.models.resnet18(norm_layer=nn.BatchNorm2d)
    backbone = _resnet_fpn_extractor(body, 5, norm_layer=nn.BatchNorm2d)
    box = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d)
    mask = MaskRCNNHeads(256, [256] * 4, 1, norm_layer=nn.BatchNorm2d)
    head = TorchvisionHead(256, 3, conv_depth=2)
    theirs = spread(
        MaskRCNN(
            backbone, K + 1, min_size=384, max_size=384, rpn_head=head, box_head=box, mask_head=mask
        )
    )
    image = make(TALL)
    centre(theirs, image.float() / 255)
    ours = by_config("torchvision_mask_rcnn_v2")
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    worst = compare((ours, theirs), [image])
    assert worst["box"] < 1e-2
    assert worst["score"] < 1e-4
    assert worst["mask"] < 1e-4


def test_keypoints_equal_torchvision() -> None:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    theirs = spread(
        KeypointRCNN(backbone, 2, min_size=384, max_size=384, box_detections_per_img=20)
    )
    image = make(TALL)
    centre(theirs, image.float() / 255)
    ours = by_config(
        "torchvision_keypoint_rcnn",
        "model.backbone.trunk.norm_eps=1e-5",
        "model.classifier.max_detections=20",
    )
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    found = ours.predict(to_batch([image])).detections
    with torch.no_grad():
        (wanted,) = theirs([image.float() / 255])
    assert len(found) == len(wanted["boxes"]) == 20
    assert found.keypoints is not None
    assert (found.boxes - wanted["boxes"]).abs().max() < 1e-2
    assert (found.scores - wanted["scores"]).abs().max() < 1e-4
    near = (found.keypoints[..., :2] - wanted["keypoints"][..., :2]).norm(dim=2) < 1e-2
    assert near.float().mean() > 0.99  # the two highest cells of a heatmap may be swapped


def test_every_tensor_is_renamed_once(models: tuple[GeneralizedRCNN, MaskRCNN]) -> None:
    ours, theirs = models
    names = [our_name(n) for n in theirs.state_dict()]
    assert sorted(names) == sorted(ours.state_dict())
    with pytest.raises(KeyError, match="has no counterpart in this model"):
        our_name("roi_heads.other_head.0.weight")
