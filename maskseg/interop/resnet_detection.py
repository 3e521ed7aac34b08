"""Which ResNet a state dict holds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

# Blocks in the third stage, and the shape of the first block's second convolution without its kernel: bottlenecks, then basic blocks.
_BOTTLENECKS = {
    (6, 64, 64): "resnet50",
    (23, 64, 64): "resnet101",
    (6, 128, 4): "resnext50_32x4d",
    (23, 256, 8): "resnext101_32x8d",
}
_BASIC = {2: "resnet18", 6: "resnet34"}


def trunk_name(state: Mapping[str, Tensor], block: str, first: int) -> str | None:
    """The trunk's name in `modules.resnet`; None for another one. block: `layer{}.{}.`, filled with stage and block; first: stages count from it."""
    second = state.get(f"{block.format(first, 0)}conv2.weight")
    blocks = 0
    while f"{block.format(first + 2, blocks)}conv1.weight" in state:
        blocks += 1
    if second is None or second.dim() != 4:
        return None
    if f"{block.format(first, 0)}conv3.weight" not in state:
        return _BASIC.get(blocks)
    return _BOTTLENECKS.get((blocks, second.shape[0], second.shape[1]))


def has_statistics(state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether the norms there learn their statistics: they then count their batches."""
    return any(name.startswith(prefix) and name.endswith(".num_batches_tracked") for name in state)
