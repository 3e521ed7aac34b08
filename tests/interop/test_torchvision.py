"""Conversion of torchvision's detectors, both ways: equal detections, and weights that load."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made.detectors import centre, old_names, published, small
from PIL import Image
from torch import Tensor
from torchvision.models import detection
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import box_iou

import maskseg
from maskseg import cli
from maskseg import config as configs
from maskseg.commands.convert import convert
from maskseg.commands.evaluate import evaluate
from maskseg.commands.predict import predict
from maskseg.commands.train import train
from maskseg.engine.checkpoint import load_checkpoint, save_checkpoint
from maskseg.interop import torchvision_hashes as published_files
from maskseg.masks.predicted import MaskGrids
from maskseg.ops.paste import paste_crop
from maskseg.structures import Batch, Regions

PICTURES = ("000000025560.jpg", "000000322864.jpg")  # 640 x 480 and 427 x 640
HEIGHT, WIDTH = 288, 384  # of the crops, so that no resizing is needed


@pytest.fixture(scope="module")
def images(shared_data: Path) -> list[Tensor]:
    """Crops of two real photographs, not resized."""
    found = []
    for name in PICTURES:
        with Image.open(shared_data / "coco_tiny" / "val2017" / name) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        found.append(pixels[:, 100 : 100 + HEIGHT, :WIDTH])
    return found


def to_batch(images: list[Tensor]) -> Batch:
    sizes = torch.tensor([[HEIGHT, WIDTH]] * len(images))
    return Batch(torch.stack(images), sizes, sizes, list(range(len(images))), ["", ""])


def soft_mask(own: Regions, i: int, height: int, width: int) -> Tensor:
    masks = own.masks
    assert isinstance(masks, MaskGrids)
    values, left, top = paste_crop(
        masks.grids[i], own.boxes[i], height, width, masks.paste_mode, masks.interpolation
    )
    full = torch.zeros((height, width))
    full[top : top + values.shape[0], left : left + values.shape[1]] = values
    return full


def in_the_order_of(boxes: Tensor, labels: Tensor, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's detections in our order; those with equal scores may be swapped."""
    distance = (boxes[:, None] - others["boxes"]).abs().amax(dim=2) + 1e4 * (
        labels[:, None] != others["labels"]
    )
    row = distance.argmin(dim=1)
    assert sorted(row.tolist()) == list(range(len(others["boxes"])))
    return {k: v[row] for k, v in others.items()}


def compare(checkpoint: Path, theirs: Any, images: list[Tensor], ids: bool) -> None:
    """Assert equal detections. ids: torchvision's labels are COCO's ids."""
    predictor = maskseg.load(checkpoint, device="cpu")
    found = predictor.model.predict(to_batch(images)).detections
    with torch.no_grad():
        wanted: list[dict[str, Tensor]] = theirs([i.float() / 255 for i in images])
    for i, theirs_ in enumerate(wanted):
        own = found[found.image_index == i]
        assert own.labels is not None
        assert len(own) == len(theirs_["boxes"]) >= 30
        labels = [predictor.categories.ids[k] if ids else k + 1 for k in own.labels.tolist()]
        theirs_ = in_the_order_of(own.boxes, torch.tensor(labels), theirs_)
        assert labels == theirs_["labels"].tolist()
        assert len(set(labels)) > 1 or len(predictor.categories) == 1
        assert (own.boxes - theirs_["boxes"]).abs().max() < 1e-2
        assert (own.scores - theirs_["scores"]).abs().max() < 1e-3
        if "masks" in theirs_:
            worst = max(
                (soft_mask(own, j, HEIGHT, WIDTH) - theirs_["masks"][j, 0]).abs().max().item()
                for j in range(len(own))
            )
            assert worst < 1e-3
        if "keypoints" in theirs_:
            assert own.keypoints is not None
            near = (own.keypoints[..., :2] - theirs_["keypoints"][..., :2]).norm(dim=2) < 1e-2
            assert near.float().mean() > 0.99  # the two highest cells of a heatmap may be swapped


LIMIT = "model.classifier.max_detections=30"
SIZE = {"min_size": HEIGHT, "max_size": WIDTH}
BUILDERS = ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"]


# The default suite has the same with a ResNet-18: below, and in test_torchvision_equality.
@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_there_and_back(
    tmp_path: Path, images: list[Tensor], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    theirs = published(name, **SIZE, box_detections_per_img=30)
    centre(theirs, images[0].float() / 255)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    convert(
        [
            "source=torchvision",
            f"weights={tmp_path / 'theirs.pth'}",
            f"output={tmp_path / 'ours.pt'}",
            LIMIT,
        ]
    )
    said = capsys.readouterr().out
    assert "model.backbone.trunk.name=resnet50" in said
    assert f"{1 if 'keypoint' in name else 80} classes (person" in said
    compare(tmp_path / "ours.pt", theirs, images, ids=True)
    convert(
        ["source=maskseg", f"weights={tmp_path / 'ours.pt'}", f"output={tmp_path / 'again.pth'}"]
    )
    said = capsys.readouterr().out
    num_classes = 2 if "keypoint" in name else 91
    assert (
        f"detection.{name}(weights=None, weights_backbone=None, num_classes={num_classes}, "
        "box_detections_per_img=30)"
    ) in said
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    state = theirs.state_dict()
    getattr(detection, name)(weights=None, weights_backbone=None).load_state_dict(
        again, strict=True
    )
    rowed = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
    assert {k for k in again if not torch.equal(again[k], state[k])} <= {
        k for k in state if k.startswith(rowed)
    }


def words(tmp_path: Path, *more: str) -> list[str]:
    return [
        "source=torchvision",
        f"weights={tmp_path / 'theirs.pth'}",
        f"output={tmp_path / 'ours.pt'}",
        *more,
    ]


@pytest.fixture
def categories(tmp_path: Path) -> str:
    """Argument with a COCO file of three classes."""
    path = tmp_path / "classes.json"
    path.write_text(
        json.dumps(
            {"categories": [{"id": 7, "name": "c"}, {"id": 2, "name": "b"}, {"id": 1, "name": "a"}]}
        )
    )
    return f"categories={path}"


@pytest.mark.parametrize("eps", [pytest.param(1e-5, marks=pytest.mark.slow), 0.0])
def test_classes_and_norms_of_ones_own(
    tmp_path: Path, images: list[Tensor], categories: str, eps: float
) -> None:
    theirs = small(num_classes=4, **SIZE, box_detections_per_img=30)
    overwrite_eps(theirs, eps)
    centre(theirs, images[0].float() / 255)
    # A checkpoint of torchvision's reference script, of a model inside DistributedDataParallel.
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    content = {"model": state, "args": argparse.Namespace(lr=0.02), "epoch": 3}
    torch.save(content, tmp_path / "theirs.pth")
    convert(
        words(tmp_path, categories, LIMIT, *([] if eps else ["model.backbone.trunk.norm_eps=0.0"]))
    )
    assert load_checkpoint(tmp_path / "ours.pt")["categories"] == {
        "names": ["a", "b", "c"],
        "ids": [1, 2, 7],
    }
    compare(tmp_path / "ours.pt", theirs, images, ids=False)
    # Back: the norms of torchvision have an eps of 1e-5.
    convert(
        ["source=maskseg", f"weights={tmp_path / 'ours.pt'}", f"output={tmp_path / 'again.pth'}"]
    )
    again = detection.MaskRCNN(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None),
        4,
        **SIZE,
        box_detections_per_img=30,
    ).eval()
    again.load_state_dict(torch.load(tmp_path / "again.pth", weights_only=True), strict=True)
    with torch.no_grad():
        for one, other in zip(
            theirs([i.float() / 255 for i in images]),
            again([i.float() / 255 for i in images]),
            strict=True,
        ):
            other = in_the_order_of(one["boxes"], one["labels"], other)
            assert one["labels"].tolist() == other["labels"].tolist()
            assert (one["boxes"] - other["boxes"]).abs().max() < 1e-2


@pytest.mark.slow
def test_whole_photographs_are_resized_as_torchvision_does(
    tmp_path: Path, shared_data: Path, images: list[Tensor], categories: str
) -> None:
    theirs = small(num_classes=4, min_size=300, max_size=400, box_detections_per_img=30)
    centre(theirs, images[0].float() / 255)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    resize = "[{_target_:maskseg.data.transforms.ResizeShortestEdge,sizes:[300],max_size:400}]"
    convert(
        words(
            tmp_path,
            categories,
            LIMIT,
            f"data.test_transforms={resize}",
            "model.backbone.trunk.norm_eps=1e-5",
        )
    )
    predictor = maskseg.load(tmp_path / "ours.pt", device="cpu")
    for name in PICTURES:
        path = shared_data / "coco_tiny" / "val2017" / name
        found = predictor(path)
        with torch.no_grad():
            wanted = theirs([predictor.prepare.read(path) / 255])[0]
        same = wanted["labels"] - 1 == found.labels[:, None]
        best = (box_iou(found.boxes, wanted["boxes"]) * same).max(dim=1)
        assert len(found) == 30
        # torchvision resizes floats; the resized pixels here are rounded to integers.
        assert (best.values > 0.98).sum() >= 28
        assert (found.scores - wanted["scores"][best.indices]).abs().median() < 5e-3


def test_old_names_and_the_published_eps(
    tmp_path: Path,
    categories: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = small().state_dict()
    assert set(old_names(state)) != set(state)
    torch.save(old_names(state), tmp_path / "theirs.pth", _use_new_zipfile_serialization=False)
    convert(words(tmp_path, categories))
    assert "norm_eps=1e-05" in capsys.readouterr().out
    first = load_checkpoint(tmp_path / "ours.pt")
    prefix = hashlib.sha256((tmp_path / "theirs.pth").read_bytes()).hexdigest()[:8]
    kinds = detection.MaskRCNN_ResNet50_FPN_Weights, detection.KeypointRCNN_ResNet50_FPN_Weights
    for weights, eps in (
        (kinds[0].COCO_V1, 0.0),
        (kinds[1].COCO_LEGACY, 1e-5),
        (kinds[1].COCO_V1, 0.0),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(weights.value, "url", f"https://nowhere/some_model_coco-{prefix}.pth")
            assert published_files.norm_eps(tmp_path / "theirs.pth") == eps
    torch.save(state, tmp_path / "theirs.pth")
    (tmp_path / "ours.pt").unlink()
    convert(words(tmp_path, categories))
    second = load_checkpoint(tmp_path / "ours.pt")
    assert all(torch.equal(v, second["model"][k]) for k, v in first["model"].items())


def refused(given: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Assert exit code 2 and one line on stderr, and return it."""
    capsys.readouterr()
    assert cli.run(convert, "usage", given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_tensors_that_do_not_fit(
    tmp_path: Path, categories: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = small().state_dict()
    state = {
        k: v
        for k, v in whole.items()
        if not k.startswith(("rpn.head.cls_logits", "roi_heads.mask_predictor.conv5"))
    }
    state |= {"extra.weight": torch.zeros(1), "roi_heads.box_head.fc7.bias": torch.zeros(5)}
    torch.save(state, tmp_path / "theirs.pth")
    said = refused(words(tmp_path, categories), capsys)
    assert (
        "4 missing (rpn.head.cls_logits.weight, rpn.head.cls_logits.bias, "
        "roi_heads.mask_predictor.conv5_mask.weight,"
    ) in said
    assert "1 left over (extra.weight)" in said
    assert "1 of another shape (roi_heads.box_head.fc7.bias [5] instead of [1024])" in said
    torch.save(
        {**whole, "roi_heads.mask_predictor.mask_fcn_logits.weight": torch.zeros(2, 256, 1, 1)},
        tmp_path / "theirs.pth",
    )
    assert "do not fit" in refused(words(tmp_path, categories), capsys)
    # A wrong number of classes.
    torch.save(whole, tmp_path / "theirs.pth")
    assert "the model has 3 classes, which are not COCO's: categories=FILE.json" in refused(
        words(tmp_path), capsys
    )
    other = tmp_path / "other.json"
    other.write_text('{"categories": [{"id": 1, "name": "a"}]}')
    assert "the model has 3 classes, the given categories are 1" in refused(
        words(tmp_path, f"categories={other}"), capsys
    )
    other.write_text('{"categories": [{"id": 1}]}')
    assert refused(words(tmp_path, f"categories={tmp_path / 'absent.json'}"), capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "classes.json",
        "other.json",
        "theirs.pth",
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "source=... is missing"),
        (["source=torchvision", "weights=w.pth"], "output=... is missing"),
        (
            ["source=mmdet", "weights=w.pth", "output=o.pt"],
            "source must be torchvision, detectron2 or maskseg, not 'mmdet'",
        ),
        (["source=torchvision", "weights=absent.pth", "output=o.pt"], "absent.pth: no such file"),
        (["source=maskseg", "weights=absent.pt", "output=o.pt"], "absent.pt: no such checkpoint"),
        (
            ["source=torchvision", "weights=w.pth", "output=."],
            "output=.: must be a file other than the weights",
        ),
        (
            ["source=torchvision", "weights=w.pth", "output=w.pth"],
            "output=w.pth: must be a file other than the weights",
        ),
        (
            ["source=torchvision", "weights=w.pth", "output=o.pt"],
            "its first tensors are backbone.x; model=NAME",
        ),
        (["source=torchvision", "weights=w.pth", "outptu=o.pt"], "did you mean 'output'?"),
        (
            ["source=torchvision", "weights=w.pth", "output=o.pt", "model=torchvision"],
            "no roi_heads.box_predictor.cls_score.bias",
        ),
        (["source=detectron2", "weights=t.pth", "output=o.pt"], "it looks like source=torchvision"),
        (
            [
                "source=torchvision",
                "weights=t.pth",
                "output=o.pt",
                "categories=c.json",
                "model=torchvision_mask",
            ],
            "model has no 'torchvision_mask'",
        ),
        (
            [
                "source=torchvision",
                "weights=t.pth",
                "output=o.pt",
                "categories=c.json",
                "model.backbone.chanels=3",
            ],
            "model.backbone.channels",
        ),
        (
            ["source=torchvision", "weights=t.pth", "output=o.pt", "categories=t.pth"],
            "categories=t.pth: not a COCO JSON file",
        ),
        (
            ["source=torchvision", "weights=t.pth", "output=no/such/o.pt", "categories=c.json"],
            "no/such/o.pt",
        ),
    ],
)
def test_words_and_files_that_make_no_sense(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    small_file: bytes,
    given: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"backbone.x": torch.zeros(1)}, "w.pth")
    Path("t.pth").write_bytes(small_file)
    Path("c.json").write_text(
        json.dumps({"categories": [{"id": i, "name": str(i)} for i in (1, 2, 3)]})
    )
    assert told in refused(given, capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "t.pth", "w.pth"]


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "t.pth"
    torch.save(small().state_dict(), path)
    return path.read_bytes()


def test_a_model_that_torchvision_does_not_have(
    tmp_path: Path, categories: str, small_file: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "theirs.pth").write_bytes(small_file)
    convert(words(tmp_path, categories))
    back = ["source=maskseg", f"weights={tmp_path / 'ours.pt'}", f"output={tmp_path / 'again.pth'}"]
    said = refused(
        [*back, "model.classifier.pooler.aligned=true", "model.proposer.anchors.offset=0.5"], capsys
    )
    assert "torchvision cannot express this model" in said
    assert "model.classifier.pooler.aligned=True instead of False" in said
    assert "model.proposer.anchors.offset=0.5 instead of 0.0" in said
    assert "did you mean 'model.classifier.box_weights'" in refused(
        [*back, "model.classifier.box_weight=3"], capsys
    )
    assert not (tmp_path / "again.pth").exists()
    convert(
        [
            *back,
            "model.classifier.nms_threshold=0.4",
            "model.pixel_mean=[127.5,127.5,127.5]",
            "model.classifier.beta=0.0",
        ]
    )
    said = capsys.readouterr().out
    assert "num_classes=4, " in said
    assert "box_nms_thresh=0.4" in said
    assert "image_mean=[0.5, 0.5, 0.5]" in said
    # A head that torchvision does not have.
    (tmp_path / "again.pth").unlink()
    checkpoint = load_checkpoint(tmp_path / "ours.pt")
    checkpoint["config"] = checkpoint["config"].replace("    mask:\n", "    other:\n", 1)
    checkpoint["model"] = {
        k.replace("heads.mask.", "heads.other."): v for k, v in checkpoint["model"].items()
    }
    save_checkpoint(tmp_path / "ours.pt", {k: v for k, v in checkpoint.items() if k != "format"})
    assert "torchvision has no model with the heads other" in refused(back, capsys)


@pytest.mark.slow
def test_a_converted_checkpoint_is_one_of_ours(
    tmp_path: Path, shared_data: Path, small_file: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted weights can be evaluated, used for prediction, and fine-tuned."""
    monkeypatch.chdir(tmp_path)
    Path("theirs.pth").write_bytes(small_file)
    root = shared_data / "coco_tiny"
    truth = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    keep = [c["id"] for c in truth["categories"][:3]]
    truth["categories"] = truth["categories"][:3]
    truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] in keep]
    Path("three.json").write_text(json.dumps(truth))
    convert(words(tmp_path, "categories=three.json"))
    data = [
        "data=custom",
        "data.train_json=three.json",
        "data.val_json=three.json",
        f"data.images={root / 'val2017'}",
        "data.num_workers=0",
    ]
    metrics = evaluate(
        ["checkpoint=ours.pt", "output=out", *data, "evaluation.max_images=2", "trainer.device=cpu"]
    )
    assert 0 <= metrics["segm/AP"] <= 1
    predict(
        [
            "checkpoint=ours.pt",
            f"input={root / 'val2017' / PICTURES[0]}",
            "output=drawn",
            "trainer.device=cpu",
            "min_score=0.0",
        ]
    )
    assert json.loads(Path("drawn/predictions.json").read_text())
    run = [
        "model=torchvision_mask_rcnn",
        "experiment=coco_r50_fpn_1x",
        "model.backbone.trunk.name=resnet18",
        "trainer.init=ours.pt",
        "run_dir=run",
    ]
    run += [
        *data,
        "trainer.max_steps=1",
        "batch_size=1",
        "trainer.device=cpu",
        "evaluation.max_images=1",
    ]
    short = "[{_target_:maskseg.data.transforms.ResizeShortestEdge,sizes:[128],max_size:256}]"
    run += [f"data.train_transforms={short}", f"data.test_transforms={short}"]
    assert load_checkpoint(train(configs.compose("train", run)) / "last.pt")["step"] == 1


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


@pytest.mark.parametrize("source", ["torchvision", "detectron2"])
def test_an_evil_file_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    path, mark = tmp_path / "evil.pkl", tmp_path / "was_run"
    for content in ({"model": {"a": Evil(mark)}, "__author__": "somebody"}, Evil(mark)):
        path.write_bytes(pickle.dumps(content, protocol=2))
        assert "refused, a pickle that" in refused(
            [f"source={source}", f"weights={path}", f"output={tmp_path / 'ours.pt'}"], capsys
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pkl"]
