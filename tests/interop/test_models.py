"""Model configs for converted weights."""

from __future__ import annotations

import pytest
import torch

from maskseg import config as configs
from maskseg.interop.classes import coco_categories, person_categories
from maskseg.models.rcnn import GeneralizedRCNN

OTHERS = {"cfm", "cfm_vgg16", "hash_net", "image_classifier"}  # models without converted weights
MODELS = sorted({p.stem for p in (configs.config_folder() / "model").glob("[!_]*.yaml")} - OTHERS)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_builds(name: str) -> None:
    config = configs.compose(
        "train",
        [f"model={name}", "experiment=coco_r50_fpn_3x", "model.backbone.trunk.weights=null"],
    )
    configs.set_categories(config, person_categories() if "keypoint" in name else coco_categories())
    with torch.device("meta"):
        model = configs.build_model(config)
    assert isinstance(model, GeneralizedRCNN)
    assert list(model.heads) == (["keypoint"] if "keypoint" in name else ["mask"])


def test_the_names_that_the_converter_gives_are_there() -> None:
    known = {f"torchvision_{k}" for k in ("mask_rcnn", "mask_rcnn_v2", "keypoint_rcnn")}
    known |= {f"detectron2_{k}_rcnn{x}" for k in ("mask", "keypoint") for x in ("", "_x101")}
    assert known <= set(MODELS)
