"""Segments of the hash layer against brute force over pixels, and the training of its codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.data.region_map import region_map
from maskseg.data.single_image import SingleImage
from maskseg.data.transforms import ResizeShortestEdge
from maskseg.errors import UserError
from maskseg.evaluation.coco_results import to_original
from maskseg.inference.predictor import Predictor
from maskseg.masks.superpixel import SegmentMasks
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.fuse import for_inference
from maskseg.structures import Batch, Categories, FeatureSpec, Outputs, Regions
from maskseg.superpixels.methods import SLIC, neighbours
from maskseg.variants.hash.loss import pair_agreement, region_shares
from maskseg.variants.hash.net import SegmentationNet
from maskseg.variants.hash.segmenter import Frame, HashSegmenter

FEATURE_SPEC = FeatureSpec(4, 2.0, 6)  # cells of 4 x 4 pixels
MakeBatch = Callable[..., Batch]


def segmenter(count: int = 30, **keys: Any) -> HashSegmenter:
    torch.manual_seed(0)
    return HashSegmenter("c2", FEATURE_SPEC, SLIC(count), **({"bits": 3} | keys))


def features_of(batch: Batch, generator: torch.Generator, channels: int = 6) -> dict[str, Tensor]:
    """Smooth noise, so that some superpixels merge."""
    n, _, height, width = batch.images.shape
    coarse = torch.randn(
        (n, channels, max(height // 16, 2), max(width // 16, 2)), generator=generator
    )
    return {
        "c2": F.interpolate(coarse, size=(height // 4, width // 4), mode="bilinear"),
        "c3": torch.zeros(n, 1, 1, 1),
    }


def maps_of(regions: Regions) -> list[np.ndarray]:
    assert isinstance(regions.masks, SegmentMasks)
    return regions.masks.label_maps()


def flooded(codes: np.ndarray, superpixels: np.ndarray, radius: int, scope: str) -> np.ndarray:
    """Segments by flood fill over superpixels, [H, W], numbered in order of appearance."""
    count = len(codes)
    touch = np.zeros((count, count), dtype=bool)
    height, width = superpixels.shape
    for y in range(height):
        for x in range(width):
            for other in ([superpixels[y + 1, x]] if y + 1 < height else []) + (
                [superpixels[y, x + 1]] if x + 1 < width else []
            ):
                touch[superpixels[y, x], other] = touch[other, superpixels[y, x]] = True
    segment = np.full(count, -1)
    for start in range(count):
        number, stack = segment.max() + 1, [start] if segment[start] < 0 else []
        while stack:
            node = stack.pop()
            segment[node] = number
            near = [
                o
                for o in range(count)
                if segment[o] < 0 and (scope == "anywhere" or touch[node, o])
            ]
            stack += [o for o in near if int((codes[o] != codes[node]).sum()) <= radius]
    return segment[superpixels]


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two label maps are the same partition."""
    pairs = set(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
    return len(pairs) == len(set(first.ravel().tolist())) == len(set(second.ravel().tolist()))


SIZES = [(32, 48), (20, 31), (1, 1), (13, 40)]


@pytest.mark.parametrize("radius", [0, 1])
@pytest.mark.parametrize("scope", ["neighbours", "anywhere"])
def test_segments_by_brute_force(
    scope: str, radius: int, make_batch: MakeBatch, generator: torch.Generator
) -> None:
    batch = make_batch(SIZES)
    features = features_of(batch, generator)
    model = segmenter(bits=5, scope=scope, radius=radius)
    with torch.no_grad():
        result = model.predict(features, batch)
        soft = model.layer(features["c2"])
    numbers = []
    for i, ((height, width), label_map) in enumerate(zip(SIZES, maps_of(result), strict=True)):
        superpixels = SLIC(30)(
            np.ascontiguousarray(batch.images[i, :, :height, :width].permute(1, 2, 0).numpy())
        )
        inside = soft[
            i : i + 1, :, : max(1, -(-(height - 2) // 4)), : max(1, -(-(width - 2) // 4))
        ]  # cells whose center lies in the image
        pixels = F.pad(
            F.interpolate(inside, scale_factor=4, mode="bilinear", align_corners=False),
            (0, 4, 0, 4),
            mode="replicate",
        )
        own = pixels[0, :, :height, :width].numpy()
        codes = np.stack(
            [own[:, superpixels == s].mean(axis=1) > 0.5 for s in range(superpixels.max() + 1)]
        )
        expected = flooded(codes, superpixels, radius, scope)
        assert label_map.shape == (height, width)
        assert same_partition(label_map, expected)
        numbers.append((len(codes), expected.max() + 1))
        check_rows(result, i, label_map)
    assert any(
        1 < segments < superpixels for superpixels, segments in numbers
    )  # some superpixels merged, not all


def check_rows(result: Regions, image: int, label_map: np.ndarray) -> None:
    """Compare masks, boxes, scores and order of an image's segments with its label map."""
    rows = torch.nonzero(result.image_index == image).squeeze(1)
    assert result.masks is not None
    areas = [int((label_map == row).sum()) for row in rows.tolist()]
    assert sum(areas) == label_map.size  # every pixel exactly once
    assert result.masks[rows].area().tolist() == areas
    assert areas == sorted(areas, reverse=True)
    assert result.scores[rows].tolist() == pytest.approx([a / label_map.size for a in areas])
    for row in rows.tolist():
        y, x = np.nonzero(label_map == row)
        assert result.boxes[row].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_rows_are_by_image(make_batch: MakeBatch, generator: torch.Generator) -> None:
    batch = make_batch(SIZES)
    result = segmenter().predict(features_of(batch, generator), batch)
    assert (result.image_index.diff() >= 0).all()
    assert result.image_index.unique().tolist() == [0, 1, 2, 3]
    assert (result.boxes.dtype, result.scores.dtype, result.image_index.dtype) == (
        torch.float32,
        torch.float32,
        torch.int64,
    )
    assert result.labels is None
    assert not result.boxes.requires_grad


@pytest.mark.parametrize("scope", ["neighbours", "anywhere"])
def test_images_are_independent(
    scope: str, make_batch: MakeBatch, generator: torch.Generator
) -> None:
    batch = make_batch([(32, 48), (20, 31)])
    features = features_of(batch, generator)
    model = segmenter(scope=scope)
    both = maps_of(model.predict(features, batch))
    first = 0
    for i, (height, width) in enumerate([(32, 48), (20, 31)]):
        one = make_batch([(height, width)], padded=(32, 64))
        one.images[:] = batch.images[i]
        alone = model.predict({"c2": features["c2"][i : i + 1]}, one)
        np.testing.assert_array_equal(maps_of(alone)[0], both[i] - first)
        first += len(alone)


def test_superpixels_of_the_batch_are_used(
    make_batch: MakeBatch, generator: torch.Generator
) -> None:
    batch = make_batch([(32, 48), (20, 31)])
    features = features_of(batch, generator)
    model = segmenter()
    label_map = model.superpixel_maps(batch)
    padded = torch.full((2, *batch.images.shape[2:]), -1, dtype=torch.int32)
    for canvas, own in zip(padded, label_map, strict=True):
        canvas[: own.shape[0], : own.shape[1]] = torch.from_numpy(own)
    model.superpixels = lambda _: pytest.fail(
        "superpixels were computed although the batch has them"
    )  # type: ignore[assignment, misc, return-value]
    given = model.predict(features, replace(batch, superpixels=padded))
    model.superpixels = SLIC(30)
    for own, other in zip(maps_of(given), maps_of(model.predict(features, batch)), strict=True):
        np.testing.assert_array_equal(own, other)
    halves = torch.zeros_like(padded)
    halves[:, :, 16:] = 1
    assert len(model.predict(features, replace(batch, superpixels=halves))) <= 4


def test_means_in_the_frame_of_another_size(generator: torch.Generator) -> None:
    # The network's input has half the height and a third of the width of the image.
    model, maps = segmenter(), torch.randn((6, 5, 4), generator=generator)
    frame = Frame(40, 48, (0.5, 1 / 3))
    expected = F.interpolate(maps[None], size=(40, 48), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(model.upsample_to_frame(maps, frame), expected)
    labels = np.arange(40 * 48, dtype=np.int32).reshape(40, 48) // (8 * 48)
    torch.testing.assert_close(
        model.superpixel_means(maps, labels, frame), expected.view(6, 5, 8 * 48).mean(dim=2).T
    )


def test_segments_in_the_pixels_of_the_file(
    make_batch: MakeBatch, generator: torch.Generator
) -> None:
    batch = make_batch([(32, 48)])
    result = segmenter().predict(features_of(batch, generator), batch)
    (label_map,) = maps_of(result)
    twice = to_original(result, 0, (32, 48), (64, 96))
    np.testing.assert_array_equal(
        maps_of(twice)[0], np.kron(label_map, np.ones((2, 2), dtype=np.int32))
    )
    torch.testing.assert_close(twice.boxes, 2 * result.boxes)
    assert torch.equal(twice.scores, result.scores)


def tiny_net(**keys: Any) -> SegmentationNet:
    """A ResNet-18 with a hash layer on c2."""
    torch.manual_seed(0)
    trunk = ResNet("resnet18", norm="BN")
    return SegmentationNet(trunk, HashSegmenter("c2", trunk.levels["c2"], SLIC(40), **keys)).eval()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_through_the_predictor(dtype: torch.dtype | None, generator: torch.Generator) -> None:
    net = tiny_net()
    image = torch.randint(0, 256, (37, 50, 3), generator=generator, dtype=torch.uint8).numpy()
    predictor = Predictor(
        for_inference(net, dtype), Categories((), ()), SingleImage([ResizeShortestEdge([64], 200)])
    )
    result = predictor(image)
    assert result.segments is not None
    assert result.segments.shape == (37, 50)
    assert result.segments.dtype == torch.int32
    numbers, areas = result.segments.unique(return_counts=True)
    assert numbers.min() == 0
    assert len(numbers) > 1
    assert len(result) == 0
    assert result.masks.shape == (0, 37, 50)
    own = Predictor(net, Categories((), ()), SingleImage())(image)
    assert own.segments is not None
    assert (own.segments.unique(return_counts=True)[1].diff() <= 0).all()  # the largest first
    assert int(areas.sum()) == 37 * 50
    assert predictor(image[:1, :1]).segments.tolist() == [[0]]  # type: ignore[union-attr]


def test_half_precision_changes_few_pixels(
    generator: torch.Generator, make_batch: MakeBatch
) -> None:
    net, batch = tiny_net(), make_batch([(64, 96)])
    batch.images[:] = F.interpolate(
        torch.rand((1, 3, 4, 6), generator=generator) * 255, size=(64, 96), mode="bilinear"
    ).to(torch.uint8)
    soft = [
        model.segmenter.layer(model.features(batch)["c2"])
        for model in (net, for_inference(net), for_inference(net, torch.bfloat16))
    ]
    torch.testing.assert_close(soft[0], soft[1], atol=1e-4, rtol=0)
    assert soft[2].dtype == torch.float32
    assert ((soft[0] > 0.5) == (soft[2] > 0.5)).float().mean() > 0.9
    outputs: Outputs = for_inference(net, torch.bfloat16).predict(batch)
    assert outputs.segments is not None
    assert outputs.segments.boxes.dtype == outputs.segments.scores.dtype == torch.float32


def quarters(make_batch: MakeBatch) -> Batch:
    """A 32 x 32 image with three classes of stuff, each of one color.

    One fills the upper left quarter, one the lower right quarter, one the rest.
    """
    batch = make_batch([(32, 32)], [[]])
    semantic = torch.zeros((1, 32, 32), dtype=torch.int16)
    semantic[:, :16, :16], semantic[:, 16:, 16:] = 1, 2
    colours = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200]], dtype=torch.uint8)
    batch.images[0] = colours[semantic[0].long()].permute(2, 0, 1)
    return replace(batch, semantic=semantic)


class Pixels(nn.Module):
    """Mean colors of 4 x 4 pixels, and noise channels that the layer must learn to ignore."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        colour = F.avg_pool2d(batch.images.float() / 255, 4)
        noise = torch.randn(
            (len(batch), 3, *colour.shape[2:]), generator=torch.Generator().manual_seed(1)
        )
        return {"c2": torch.cat([colour, noise], dim=1)}


@pytest.mark.parametrize("relaxation", ["sigmoid", "straight_through"])
@pytest.mark.parametrize("scope", ["neighbours", "anywhere"])
def test_training_separates_the_regions(relaxation: str, scope: str, make_batch: MakeBatch) -> None:
    blocks = torch.arange(32) // 8
    batch = replace(quarters(make_batch), superpixels=(4 * blocks[:, None] + blocks)[None].int())
    features = Pixels()(batch)
    model = segmenter(bits=4, loss_weight=1.0, relaxation=relaxation, scope=scope, normalise=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    seen: list[float] = []
    for _ in range(60):
        losses = model.losses(features, batch)
        assert set(losses) == {"hash_together", "hash_apart"}
        total = sum(losses.values(), torch.zeros(()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seen.append(float(total.detach()))
    assert seen[-1] < 0.3 * seen[0]
    (result,) = maps_of(model.predict(features, batch))
    assert batch.semantic is not None
    # The two quarters of the third class do not touch.
    expected = batch.semantic[0].numpy().copy()
    if scope == "neighbours":
        expected[16:, :16] = 3
    assert same_partition(result, expected)


def test_the_loss_of_whole_quarters(make_batch: MakeBatch) -> None:
    batch, features = quarters(make_batch), Pixels()
    one, three = (
        segmenter(16, loss_weight=weight, scope="anywhere").losses(features(batch), batch)
        for weight in (1.0, 3.0)
    )
    for name, value in one.items():
        assert float(three[name].detach()) == pytest.approx(3 * float(value.detach()))
    # Each superpixel is a quarter; only the pair (1, 2) lies in the same region.
    model = segmenter(loss_weight=1.0, scope="anywhere", margin=3.0)
    labels = torch.arange(2).repeat_interleave(16)
    given = replace(batch, superpixels=(labels[:, None] * 2 + labels)[None].int())
    codes = model.superpixel_means(
        model.layer(features(batch)["c2"])[0], given.superpixels[0].numpy(), Frame(32, 32)
    )  # type: ignore[index]
    distance = (codes[:, None] + codes - 2 * codes[:, None] * codes).sum(dim=2)
    result = model.losses(features(batch), given)
    torch.testing.assert_close(result["hash_together"], distance[1, 2])
    apart = [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]
    torch.testing.assert_close(
        result["hash_apart"], torch.stack([F.relu(3 - distance[a, b]) for a, b in apart]).mean()
    )


def test_without_a_loss_weight_the_layer_is_frozen(make_batch: MakeBatch) -> None:
    batch = quarters(make_batch)
    model = segmenter()
    assert model.losses(Pixels()(batch), batch) == {}
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in segmenter(loss_weight=0.1).parameters())


@pytest.mark.parametrize("sizes", [[(32, 32)], [(1, 1)], [(1, 1), (20, 31)]])
@pytest.mark.parametrize("scope", ["neighbours", "anywhere"])
def test_images_without_ground_truth_reach_all_parameters(
    sizes: list[tuple[int, int]],
    scope: str,
    make_batch: MakeBatch,
    unreached: Callable[[nn.Module], list[str]],
    generator: torch.Generator,
) -> None:
    batch = make_batch(sizes, [[] for _ in sizes])
    model = segmenter(loss_weight=0.5, scope=scope)
    losses = model.losses(features_of(batch, generator), batch)
    sum(losses.values(), torch.zeros(())).backward()
    assert unreached(model) == []
    assert [float(value.detach()) for value in losses.values()] == [0.0, 0.0]


def test_pairs_are_within_images(make_batch: MakeBatch, generator: torch.Generator) -> None:
    batch = make_batch(
        [(32, 32), (20, 31)], [[(0, 0, 16, 16, 0)], [(3, 3, 20, 18, 1), (0, 0, 10, 10, 0)]]
    )
    batch = replace(batch, semantic=torch.zeros((2, *batch.images.shape[2:]), dtype=torch.int16))
    features = features_of(batch, generator)
    model = segmenter(loss_weight=1.0)
    together = model.losses(features, batch)
    whole = dict.fromkeys(together, 0.0)
    counts = dict.fromkeys(together, 0.0)
    for i, (height, width) in enumerate([(32, 32), (20, 31)]):
        targets = batch.targets
        assert targets is not None
        rows = torch.nonzero(targets.image_index == i).squeeze(1)
        one = make_batch([(height, width)], [[]], padded=(32, 32))
        one.images[:] = batch.images[i]
        own = replace(targets[rows], image_index=torch.zeros(len(rows), dtype=torch.int64))
        one = replace(one, targets=own, semantic=torch.zeros((1, 32, 32), dtype=torch.int16))
        labels = model.superpixel_maps(one)[0]
        pairs = pair_weights(one, labels)
        for name, value in model.losses({"c2": features["c2"][i : i + 1]}, one).items():
            count = pairs[name]
            whole[name] += float(value.detach()) * max(round(count), 1)
            counts[name] += count
    for name, value in together.items():
        assert float(value.detach()) == pytest.approx(
            whole[name] / max(round(counts[name]), 1), rel=1e-4
        )


def pair_weights(batch: Batch, labels: np.ndarray) -> dict[str, float]:
    """Total weight of the neighboring pairs for each term."""
    weights = pair_agreement(
        region_shares(region_map(batch, 0), labels, int(labels.max()) + 1),
        torch.from_numpy(neighbours(labels)),
    ).sum(dim=0)
    return dict(zip(("hash_together", "hash_apart"), weights.tolist(), strict=True))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scope": "far"}, "scope must be neighbours or anywhere"),
        ({"relaxation": "tanh"}, "relaxation sigmoid or straight_through"),
        ({"radius": -1}, "radius and loss_weight must not be negative"),
        ({"loss_weight": -0.5}, "radius and loss_weight must not be negative"),
        ({"bits": 0}, "bits must be 1 to 64"),
    ],
)
def test_invalid_arguments(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        segmenter(**keys)
