"""Identification of torchvision's published weights by their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torchvision.models import get_model_weights
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights

NAMES = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn")
EPS = 1e-5
BLOCK_SIZE = 1 << 20


def norm_eps(path: Path) -> float:
    """Return the eps of the frozen norms that the weights in a file need.

    It is 0 for the files that torchvision itself runs so (COCO_V1 of the first Faster, Mask and
    Keypoint R-CNN), else 1e-5.
    """
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_SIZE):
            sha256.update(block)
    digest = sha256.hexdigest()
    for name in NAMES:
        for weights in get_model_weights(name):
            if digest.startswith(_hash_prefix(weights.url)):
                is_legacy = weights is KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY
                return EPS if is_legacy else 0.0
    return EPS


def _hash_prefix(url: str) -> str:
    """Return the start of the file's SHA-256, which torch appends to the file name."""
    return url.rsplit("-", 1)[1].removesuffix(".pth")
