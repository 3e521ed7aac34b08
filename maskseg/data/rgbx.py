"""Images in Pillow's layout with four bytes per pixel.

Images are uint8 [3, H, W] everywhere. Those of `load_pixels` only have other strides, (1, 4 W, 4):
red, green and blue of a pixel are adjacent, and the fourth byte has no meaning. Decoding, resizing
and batching take a third of the time that one plane per channel takes.

The functions here accept images with any strides and return the same values for all, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

_ROWS = 64  # rows copied at a time; they stay in the processor's cache

_MAX_WHOLE = 2**24  # pixels of an image that is converted at once

# torch resizes uint8 in integer arithmetic only with these instruction sets. Elsewhere it computes
# in floating point, where the rounding may depend on the layout.
_RESIZES_UINT8 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def from_pillow(image: Image.Image) -> Tensor:
    """Convert a Pillow image of mode RGB to uint8 [3, H, W]."""
    width, height = image.size
    if width * height <= _MAX_WHOLE:
        raw = bytearray(image.tobytes("raw", "RGBX"))  # writable, as torch.frombuffer requires
    else:
        raw = _to_bytes_in_strips(image)
    return torch.frombuffer(raw, dtype=torch.uint8).view(height, width, 4).permute(2, 0, 1)[:3]


def _to_bytes_in_strips(image: Image.Image) -> bytearray:
    """Return the bytes of a large image, without a second and a third copy of them all."""
    width, height = image.size
    raw = bytearray(4 * width * height)
    rows = max(1, _MAX_WHOLE // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = image.crop((0, top, width, bottom)).tobytes("raw", "RGBX")
        raw[4 * width * top : 4 * width * bottom] = strip
    return raw


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize an image with torchvision's bilinear filter and antialiasing.

    image: uint8 [3, H, W]. Returns uint8 [3, height, width].
    """
    rgbx = _rgbx_view(image) if _RESIZES_UINT8 else None
    if rgbx is None:
        return torch.as_tensor(F.resize(image.contiguous(), [height, width], antialias=True))
    return torch.as_tensor(F.resize(rgbx, [height, width], antialias=True))[:3]


def flip(image: Tensor, dim: int) -> Tensor:
    """Flip an image [3, H, W]; dim: -1 for left-right, -2 for up-down."""
    rgbx = _rgbx_view(image)
    if rgbx is None:
        return image.flip(dim)
    pixels = rgbx.permute(1, 2, 0).view(torch.int32).flip(dim - 1)  # moves whole pixels
    return pixels.view(torch.uint8).permute(2, 0, 1)[:3]


def copy_to_planes(canvas: Tensor, image: Tensor) -> None:
    """Copy an image into `canvas`, uint8 [3, H, W] with one plane per channel.

    The canvas may be a window of a batch.
    """
    rgbx = _rgbx_view(image)
    if rgbx is None:
        canvas.copy_(image)
        return
    pixels: NDArray[np.uint32] = rgbx.permute(1, 2, 0).numpy().view("<u4")[..., 0]
    # Shifting 32-bit pixels and keeping the low byte takes a third of the time of strided reads.
    for top in range(0, len(pixels), _ROWS):
        red, green, blue = canvas[:, top : top + _ROWS].numpy()
        rows = pixels[top : top + _ROWS]
        shifted = rows >> 8
        red[:] = rows
        green[:] = shifted
        blue[:] = shifted >> 8


def _rgbx_view(image: Tensor) -> Tensor | None:
    """Return the image with its fourth byte, uint8 [4, H, W]; None if it is stored differently."""
    _, height, width = image.shape
    channel_stride, row_stride, pixel_stride = image.stride()
    start = image.storage_offset()
    stop = start + (height - 1) * row_stride + width * 4
    is_rgbx = (
        (channel_stride, pixel_stride) == (1, 4)
        and row_stride % 4 == 0
        and start % 4 == 0
        and height * width > 0
        and stop <= image.untyped_storage().nbytes()
    )
    if not is_rgbx:
        return None
    return image.as_strided((4, height, width), image.stride())
