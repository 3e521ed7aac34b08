"""Images with four bytes per pixel yield the same values as planes in all operations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from maskseg.data.collate import collate
from maskseg.data.image_files import load_image, load_pixels
from maskseg.data.rgbx import copy_to_planes, flip, from_pillow, resize
from maskseg.data.sample import Sample
from maskseg.data.transforms import (
    ColorJitter,
    Flip,
    RandomCrop,
    ResizeShortestEdge,
    ScaleJitterCrop,
    Transform,
)

SIZES = [(37, 53), (64, 48), (1, 9), (9, 1), (1, 1), (200, 31)]


def pair(height: int, width: int) -> tuple[Tensor, Tensor]:
    """An image of noise with four bytes per pixel, and the same image as planes."""
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return from_pillow(Image.fromarray(pixels)), torch.from_numpy(pixels).permute(
        2, 0, 1
    ).contiguous()


@pytest.mark.parametrize("size", SIZES)
def test_a_pillow_image_keeps_its_values(size: tuple[int, int]) -> None:
    rgbx, planes = pair(*size)
    assert rgbx.shape == planes.shape == (3, *size)
    assert rgbx.dtype == torch.uint8
    assert torch.equal(rgbx, planes)
    rgbx[:, 0, 0] = 7  # the memory is writable and not shared
    assert rgbx[:, 0, 0].tolist() == [7, 7, 7]


@pytest.mark.parametrize("size", SIZES)
def test_a_large_image_is_converted_in_strips(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setattr("maskseg.data.rgbx._MAX_WHOLE", 100)
    in_strips, planes = pair(*size)
    assert torch.equal(in_strips, planes)
    assert in_strips.stride() == (1, 4 * size[1], 4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("to", [(80, 100), (13, 20), (1, 2), (2, 1), (37, 99)])
def test_resized_to_the_same_values(size: tuple[int, int], to: tuple[int, int]) -> None:
    rgbx, planes = pair(*size)
    wanted = F.resize(planes, list(to), antialias=True)
    assert torch.equal(resize(rgbx, *to), wanted)
    assert torch.equal(resize(planes, *to), wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dim", [-1, -2])
def test_flipped_to_the_same_values(size: tuple[int, int], dim: int) -> None:
    rgbx, planes = pair(*size)
    assert torch.equal(flip(rgbx, dim), planes.flip(dim))
    assert torch.equal(flip(planes, dim), planes.flip(dim))


@pytest.mark.parametrize("size", SIZES)
def test_copy_to_a_canvas(size: tuple[int, int]) -> None:
    height, width = size
    for image in pair(*size):
        canvas = torch.full((3, height + 2, width + 3), 9, dtype=torch.uint8)
        copy_to_planes(canvas[:, :height, :width], image)
        assert torch.equal(canvas[:, :height, :width], image)
        assert (canvas[:, height:] == 9).all()
        assert (canvas[:, :, width:] == 9).all()


@pytest.mark.parametrize(
    "window",
    [
        (slice(3, 20), slice(5, 31)),
        (slice(0, 1), slice(None)),
        (slice(36, 37), slice(52, 53)),
        (slice(5, 5), slice(None)),
    ],
)
def test_windows_of_an_image(window: tuple[slice, slice]) -> None:
    rgbx, planes = (image[:, window[0], window[1]] for image in pair(37, 53))
    assert torch.equal(flip(rgbx, -1), planes.flip(-1))
    canvas = torch.zeros(planes.shape, dtype=torch.uint8)
    copy_to_planes(canvas, rgbx)
    assert torch.equal(canvas, planes)
    if planes.numel():
        assert torch.equal(
            resize(rgbx, 30, 40), F.resize(planes.contiguous(), [30, 40], antialias=True)
        )


def test_other_layouts() -> None:
    _, planes = pair(37, 53)
    stored = planes.permute(1, 2, 0).contiguous()
    wide = torch.zeros((37, 53, 4), dtype=torch.uint8)
    wide[..., 1:] = stored
    shifted = wide.permute(2, 0, 1)[1:]  # the fourth byte of the last pixel is outside the memory
    for image in (
        stored.permute(2, 0, 1),
        shifted,
        planes.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    ):
        canvas = torch.zeros(planes.shape, dtype=torch.uint8)
        copy_to_planes(canvas, image)
        assert torch.equal(canvas, planes)
        assert torch.equal(flip(image, -1), planes.flip(-1))
        assert torch.equal(resize(image, 30, 40), F.resize(planes, [30, 40], antialias=True))


@pytest.mark.parametrize(
    "steps",
    [
        [ResizeShortestEdge([60], 90), Flip(1.0, 1.0)],
        [Flip(1.0), ResizeShortestEdge([20], 90), RandomCrop(18)],
        [RandomCrop(30), ResizeShortestEdge([60], 90), Flip(0.0, 1.0)],
        [ScaleJitterCrop(64), Flip(1.0)],
        [ColorJitter(0.4, 0.4, 0.4, 0.1), ResizeShortestEdge([60], 90)],
        [ResizeShortestEdge([60], 90), ColorJitter(0.4, 0.4, 0.4, 0.1)],
        [ResizeShortestEdge([60], 90, "pillow"), Flip(1.0)],
        [Flip(1.0), ResizeShortestEdge([60], 90, "plain")],
        [],
    ],
)
def test_all_transforms_yield_the_same_batch(steps: list[Transform]) -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    batches = []
    for image in pair(37, 53):
        sample = Sample(image, torch.zeros(0, 4), nothing, nothing.bool(), None, 0, "", (37, 53))
        rng = np.random.default_rng(4)
        for step in steps:
            sample = step(sample, rng)
        batches.append(collate([sample, replace(sample, image=sample.image[:, :7, :9])], 8).images)
    assert batches[0].is_contiguous()
    assert torch.equal(*batches)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK"])
def test_files_read_in_both_layouts(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(pair(37, 53)[1].permute(1, 2, 0).numpy()).convert(mode).save(path)
    planes = load_image(path)
    assert planes.is_contiguous()
    assert torch.equal(load_pixels(path), planes)
    assert torch.equal(
        planes.permute(1, 2, 0), torch.from_numpy(np.array(Image.open(path).convert("RGB")))
    )
