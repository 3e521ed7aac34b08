"""Pictures as Pillow holds them, four bytes a pixel, which is three times as fast to decode, resize and batch as one plane a channel.

A picture is uint8 [3, H, W] everywhere; what `load_pixels` gives only has other strides (1, 4 W, 4): red, green and blue lie side by side, and
the fourth byte says nothing. Every function here takes pictures of any strides and gives the same values for them, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

_ROWS = 64  # at a time: so many stay in a processor's cache
_NATIVE = torch.backends.cpu.get_cpu_capability() in (
    "AVX2",
    "AVX512",
)  # elsewhere uint8 is resized as floats, which may round by the layout


def from_pillow(image: Image.Image) -> Tensor:
    """A Pillow picture of mode RGB as uint8 [3, H, W]."""
    width, height = image.size
    raw = bytearray(image.tobytes("raw", "RGBX"))  # writable, as tensors have to be
    return torch.frombuffer(raw, dtype=torch.uint8).view(height, width, 4).permute(2, 0, 1)[:3]


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear with antialiasing, torchvision's; image: uint8 [3, H, W] -> [3, height, width]."""
    four = _four(image) if _NATIVE else None
    if four is None:
        return torch.as_tensor(F.resize(image.contiguous(), [height, width], antialias=True))
    return torch.as_tensor(F.resize(four, [height, width], antialias=True))[:3]


def flip(image: Tensor, dim: int) -> Tensor:
    """The picture [3, H, W] mirrored, dim: -1 left to right, -2 upside down."""
    four = _four(image)
    if four is None:
        return image.flip(dim)
    pixels = four.permute(1, 2, 0).view(torch.int32).flip(dim - 1)  # whole pixels at a time
    return pixels.view(torch.uint8).permute(2, 0, 1)[:3]


def put(canvas: Tensor, image: Tensor) -> None:
    """Copies the picture into `canvas`, uint8 [3, H, W] of planes (a window of a batch)."""
    four = _four(image)
    if four is None:
        canvas.copy_(image)
        return
    words: NDArray[Any] = four.permute(1, 2, 0).numpy().view("<u4")[..., 0]
    for top in range(
        0, len(words), _ROWS
    ):  # shifted words: three times as fast as picking every fourth byte
        planes, rest = canvas[:, top : top + _ROWS].numpy(), words[top : top + _ROWS]
        planes[0] = rest
        planes[1] = rest = rest >> 8
        planes[2] = rest >> 8


def _four(image: Tensor) -> Tensor | None:
    """The picture with its fourth byte, uint8 [4, H, W]; None for one that is not stored that way."""
    _, height, width = image.shape
    across, down, along = image.stride()
    start = image.storage_offset()
    last = start + (height - 1) * down + width * 4
    if (
        (across, along) != (1, 4)
        or down % 4
        or start % 4
        or not height * width
        or last > image.untyped_storage().nbytes()
    ):
        return None
    return image.as_strided((4, height, width), (across, down, along))
