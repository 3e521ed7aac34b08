"""Suite `hash`: the cost of a hash layer and of merging superpixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from maskseg.benchmarks.measure import case, machine
from maskseg.benchmarks.results import SuiteResult
from maskseg.config import Config
from maskseg.data.single_image import SingleImage
from maskseg.models.backbones.fpn import FPN
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.fuse import for_inference
from maskseg.structures import Batch, Regions
from maskseg.superpixels.methods import SLIC
from maskseg.variants.hash.itq import ITQ
from maskseg.variants.hash.net import SegmentationNet
from maskseg.variants.hash.segmenter import HashSegmenter

SIZE = (321, 481)  # height and width of BSDS500's images


@torch.no_grad()
def hash(
    config: Config, counts: tuple[int, ...] = (200,), bits: tuple[int, ...] = (8, 32)
) -> SuiteResult:
    """Time a forward pass of one image on the CPU, without and with the hash layer.

    The cases are `trunk` with FPN; the same with the hash layer on c2 and the merging of given
    superpixels; and the superpixels. The codes are fitted to the image, so that superpixels merge.

    config: with `trunk` and `rounds`.

    Returns the suite's cases; agreement: number of segments, and the added time in percent.
    """
    torch.manual_seed(0)
    device = torch.device("cpu")
    pixels = _image()
    cases = []
    for count in counts:
        superpixels = SLIC(count)
        batch = SingleImage()(pixels)
        image = pixels.permute(1, 2, 0).contiguous().numpy()
        labels = torch.full((1, *batch.images.shape[2:]), -1, dtype=torch.int32)
        labels[0, : SIZE[0], : SIZE[1]] = torch.from_numpy(superpixels(image))
        batch = replace(batch, superpixels=labels)
        for length in bits:
            net = _net(config.trunk, superpixels, length, batch)
            runs: dict[str, Callable[[], object]] = {
                "backbone": partial(net.features, batch),
                "backbone, hash and merge": partial(net.predict, batch),
                "superpixels (SLIC)": partial(superpixels, image),
            }
            result = case(
                f"{config.trunk}-FPN, {SIZE[1]} x {SIZE[0]}, {count} superpixels, {length} bits",
                runs,
                config.rounds,
                device,
            )
            segments = net.predict(batch).segments
            assert isinstance(segments, Regions)
            added = 100 * (1 / result["times_faster"]["backbone, hash and merge"] - 1)
            result["agreement"] = {"segments": len(segments), "hash and merge add, percent": added}
            cases.append(result)
    return {"suite": "hash", "machine": machine(device), "cases": cases}


def _image() -> Tensor:
    """Return uint8 RGB [3, 321, 481]: colored patches and noise."""
    patches = torch.rand((1, 3, 8, 12))
    smooth = torch.nn.functional.interpolate(patches, size=SIZE, mode="bicubic")[0]
    noisy = smooth + 0.05 * torch.randn((3, *SIZE))
    return (noisy.clamp(0, 1) * 255).to(torch.uint8)


def _net(trunk: str, superpixels: SLIC, bits: int, batch: Batch) -> SegmentationNet:
    backbone = FPN(ResNet(trunk), extra_levels=["c2"])
    segmenter = HashSegmenter("c2", backbone.levels["c2"], superpixels, bits)
    net = SegmentationNet(backbone, segmenter).eval()
    fitter = ITQ(segmenter.layer)
    fitter.update(segmenter.layer.vectors(net.features(batch)["c2"]))
    fitter.fit()
    return for_inference(net)
