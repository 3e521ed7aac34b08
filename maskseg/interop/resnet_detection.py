"""Detection of the ResNet trunk in a state dict."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# Number of blocks in the third stage, and the shape of the second convolution of the first block
# without its kernel -> name of a ResNet with bottlenecks.
_BOTTLENECKS = {
    (6, 64, 64): "resnet50",
    (23, 64, 64): "resnet101",
    (6, 128, 4): "resnext50_32x4d",
    (23, 256, 8): "resnext101_32x8d",
}
# Number of blocks in the third stage -> name of a ResNet with basic blocks.
_BASIC = {2: "resnet18", 6: "resnet34"}


def detect_trunk(state: Mapping[str, Tensor], block: str, first: int) -> str | None:
    """Return the trunk's name in `models.backbones.resnet`, or None for an unknown trunk.

    block: pattern of a block's prefix such as `layer{}.{}.`, filled with stage and block number.
    first: number of the first stage.
    """
    second_conv = state.get(f"{block.format(first, 0)}conv2.weight")
    num_blocks = 0
    while f"{block.format(first + 2, num_blocks)}conv1.weight" in state:
        num_blocks += 1
    if second_conv is None or second_conv.dim() != 4:
        return None
    if f"{block.format(first, 0)}conv3.weight" not in state:
        return _BASIC.get(num_blocks)
    return _BOTTLENECKS.get((num_blocks, second_conv.shape[0], second_conv.shape[1]))


def has_statistics(state: Mapping[str, Tensor], prefix: str) -> bool:
    """Return whether the norms under a prefix track running statistics, i.e. count batches."""
    return any(name.startswith(prefix) and name.endswith(".num_batches_tracked") for name in state)
