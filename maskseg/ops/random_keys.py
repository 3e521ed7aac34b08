"""Random numbers as a function of the image.

They do not depend on the process, the device or the other images of the batch.
"""

from __future__ import annotations

from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), its 64-bit constants as signed integers. It relies on the
# wrap-around of integer tensors.
_GAMMA = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15

# Coordinates are rounded to this many pixels before they are hashed.
_RESOLUTION = 0.125


def random_keys(seeds: Tensor, places: Tensor) -> Tensor:
    """Hash of seeds and places: random i64.

    seeds: i64, of the image and the stage that samples;
    places: i64, distinguishes the elements of an image.
    """
    return _mix(seeds + (places + 1) * _GAMMA)


def hash_boxes(boxes: Tensor) -> Tensor:
    """Hash of the coordinates of boxes [B, 4], rounded to an eighth of a pixel, i64 [B].

    It depends neither on the order nor on the number of boxes, nor on rounding errors in the last
    bits of the coordinates.
    """
    x0, y0, x1, y1 = (boxes / _RESOLUTION).round().long().unbind(1)
    return _mix(_mix(_mix(x0 * _GAMMA + y0) * _GAMMA + x1) * _GAMMA + y1)


def _mix(bits: Tensor) -> Tensor:
    """The finalizer of SplitMix64."""
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right (`>>` of signed integers repeats the sign bit)."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
