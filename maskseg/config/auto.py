"""The usual numbers for keys with the value `auto`, where there are no training data."""

from __future__ import annotations

AUTO = "auto"
_USUAL: dict[str, object] = {
    "size": 800,
    "sizes": [[32], [64], [128], [256], [512]],
    "max_detections": 100,
    "pre_nms_top_n": 1000,
    "post_nms_top_n": 1000,
    "weights": None,
}


def replace_auto(node: object) -> object:
    """Plain nested values with usual numbers instead of `auto`, for the keys that may have it."""
    if isinstance(node, list):
        return [replace_auto(value) for value in node]
    if not isinstance(node, dict):
        return node
    values = {}
    for key, value in node.items():
        is_open = value == AUTO and key in _USUAL and not _is_own_size(key, node)
        values[key] = _USUAL[key] if is_open else replace_auto(value)
    return values


def _is_own_size(key: str, node: dict[str, object]) -> bool:
    """Whether a key is the `size` of a dataset that makes its images, which is always a number."""
    return key == "size" and "train_transforms" in node and "size_range" not in node
