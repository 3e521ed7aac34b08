"""What torchvision's published files are, told by their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torchvision.models import get_model_weights
from torchvision.models.detection import KeypointRCNN_ResNet50_FPN_Weights

NAMES = ("maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn")
EPS = 1e-5


def norm_eps(path: Path) -> float:
    """The eps of the frozen norms: 0 for the files that torchvision itself runs so (COCO_V1 of the first Mask and Keypoint R-CNN), else 1e-5."""
    hash_ = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hash_.update(block)
    published = [weights for name in NAMES for weights in get_model_weights(name)]
    found = [weights for weights in published if hash_.hexdigest().startswith(_prefix(weights.url))]
    return 0.0 if found and found[0] is not KeypointRCNN_ResNet50_FPN_Weights.COCO_LEGACY else EPS


def _prefix(url: str) -> str:
    """The beginning of the file's SHA-256, which torch puts at the end of the name."""
    return url.rsplit("-", 1)[1].removesuffix(".pth")
