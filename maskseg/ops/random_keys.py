"""Random numbers that are a function of the image they are for: not of the process, the device or what else is in the batch."""

from __future__ import annotations

from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014), its 64-bit constants as signed integers. Integer tensors wrap around as it needs.
_GAMMA, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


_CELL = 0.125  # pixels


def random_keys(seeds: Tensor, places: Tensor) -> Tensor:
    """Random i64, a hash of both. seeds: i64, of the image and the stage that draws; places: i64, what tells the elements of an image apart."""
    return _mixed(seeds + (places + 1) * _GAMMA)


def box_places(boxes: Tensor) -> Tensor:
    """[B, 4] -> i64 [B], a number of the coordinates alone, to an eighth of a pixel: neither the order of the boxes, nor how many there are, nor
    the last bits of a sum change it."""
    x0, y0, x1, y1 = (boxes / _CELL).round().long().unbind(1)
    return _mixed(_mixed(_mixed(x0 * _GAMMA + y0) * _GAMMA + x1) * _GAMMA + y1)


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _MIX_1
    bits = (bits ^ _shifted(bits, 27)) * _MIX_2
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, zeros from the left (`>>` of signed numbers repeats the sign)."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
