"""Comparison of segmentation methods: the input of each method, and the written results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.data.single_image import SingleImage
from maskseg.data.transforms import ResizeShortestEdge
from maskseg.errors import UserError
from maskseg.evaluation.segmentation_iou import SegmentationIoU
from maskseg.structures import FeatureSpec
from maskseg.superpixels.methods import SLIC, Felzenszwalb, neighbours
from maskseg.variants.hash.merging import cluster_features, merge_labels
from maskseg.variants.hash.net import SegmentationNet
from maskseg.variants.hash.segmenter import HashSegmenter
from maskseg.variants.hash.study import (
    METHODS,
    SegmentStudy,
    extract_features,
    flatten_metrics,
    format_table,
)

SCALES = [1, 20, 100, 500]


class Colours(nn.Module):
    """Features that are the mean color of 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = {"c2": FeatureSpec(4, 2.0, 3)}
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"c2": F.avg_pool2d(images, 4)}


def net(normalise: bool = True, **keys: Any) -> SegmentationNet:
    torch.manual_seed(0)
    trunk = Colours()
    return SegmentationNet(
        trunk, HashSegmenter("c2", trunk.levels["c2"], SLIC(20), 6, normalise, **keys)
    ).eval()


def study(
    model: SegmentationNet,
    prepare: SingleImage | None = None,
    sweep: list[int] | None = None,
    **keys: Any,
) -> SegmentStudy:
    return SegmentStudy(
        model, model.segmenter, prepare or SingleImage(), sweep or [12, 30], SCALES, **keys
    )  # type: ignore[arg-type]


@pytest.fixture
def picture(generator: torch.Generator) -> Tensor:
    """Colored patches with a little noise, uint8 RGB [3, 48, 64]."""
    patches = F.interpolate(
        torch.rand((1, 3, 3, 4), generator=generator) * 200, size=(48, 64), mode="nearest"
    )[0]
    return (patches + 30 * torch.rand((3, 48, 64), generator=generator)).to(torch.uint8)


def image_of(picture: Tensor) -> np.ndarray:
    return np.ascontiguousarray(picture.permute(1, 2, 0).numpy())


TRUTH = np.kron(np.arange(12).reshape(3, 4), np.ones((16, 16), dtype=int))


@pytest.mark.parametrize("base", ["slic", "egs"])
def test_segments_of_each_method(base: str, picture: Tensor) -> None:
    model = net()
    segment_study = study(model, base=base, sweep=[12, 60])
    results = segment_study.add(picture, [TRUTH])
    image = image_of(picture)
    numbers = segment_study.metrics()
    assert list(numbers) == list(METHODS)
    for value, (superpixels, segments) in results.items():
        np.testing.assert_array_equal(
            superpixels, (SLIC(value) if base == "slic" else Felzenszwalb(scale=value))(image)
        )
        count = int(segments.max()) + 1
        # The segmenter predicts the same segments for a batch with these superpixels.
        batch = SingleImage()(picture)
        batch.__dict__["superpixels"] = torch.from_numpy(superpixels)[None]
        (given,) = model.predict(batch).segments.masks.label_maps()  # type: ignore[union-attr]
        pairs = set(zip(given.ravel().tolist(), segments.ravel().tolist(), strict=True))
        assert len(pairs) == count == len(set(given.ravel().tolist()))
        expected = {"hash": segments, "superpixels": superpixels, "slic": SLIC(count)(image)}
        expected["egs"] = min(
            (Felzenszwalb(scale=k)(image) for k in SCALES),
            key=lambda labels: abs(np.log((labels.max() + 1) / count)),
        )
        for method, labels in expected.items():
            alone = SegmentationIoU()
            alone.add(labels, [TRUTH])
            assert numbers[method][value] == alone.compute(), method
        best = min(
            abs(np.log((labels.max() + 1) / count))
            for labels in clusterings(model, picture, superpixels)
        )
        assert abs(np.log(numbers["kmeans"][value]["num_segments"] / count)) == pytest.approx(best)


def clusterings(
    model: SegmentationNet, picture: Tensor, superpixels: np.ndarray
) -> list[np.ndarray]:
    """The superpixels merged by k-means on their mean features, for several k.

    The means are the segmenter's, as rounding differences can change the k-means seeds.
    """
    extracted = extract_features(model, model.segmenter, SingleImage()(picture))  # type: ignore[arg-type]
    means = (
        model.segmenter.superpixel_means(extracted.features, superpixels, extracted.frame)
        .detach()
        .numpy()
    )  # type: ignore[operator, union-attr]
    ks = [
        k
        for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, len(means))
        if k <= len(means)
    ]
    return [
        merge_labels(cluster_features(means, k), neighbours(superpixels))[superpixels] for k in ks
    ]


@pytest.mark.parametrize("normalise", [True, False])
def test_features_in_the_frame_of_the_image(normalise: bool, picture: Tensor) -> None:
    model = net(normalise)
    plain = study(model).extract_features(picture)
    assert (plain.frame.height, plain.frame.width, plain.frame.scale) == (48, 64, (1.0, 1.0))
    features = model.features(SingleImage()(picture))["c2"]
    torch.testing.assert_close(
        plain.features, (F.normalize(features, dim=1) if normalise else features)[0]
    )
    torch.testing.assert_close(plain.codes, model.segmenter.layer(features)[0])  # type: ignore[operator, union-attr]
    # At twice the size there are twice as many cells per side, but the codes hardly change.
    twice = study(model, SingleImage([ResizeShortestEdge([96])])).extract_features(picture)
    assert twice.frame.scale == (2.0, 2.0)
    superpixels = SLIC(12)(image_of(picture))
    codes = [
        model.segmenter.superpixel_means(extracted.codes, superpixels, extracted.frame)
        for extracted in (plain, twice)
    ]  # type: ignore[operator, union-attr]
    assert codes[0].shape == codes[1].shape
    assert (codes[0] - codes[1]).abs().mean() < 0.03
    assert (codes[0] - codes[1].roll(1, dims=0)).abs().mean() > 0.1


def test_a_padded_image_with_two_scales(picture: Tensor) -> None:
    model = net()
    batch = SingleImage([ResizeShortestEdge([25])])(picture[:, :47, :63])
    extracted = extract_features(model, model.segmenter, batch)  # type: ignore[arg-type]
    assert extracted.frame.scale == (
        pytest.approx(25 / 47),
        pytest.approx(batch.sizes[0, 1].item() / 63),
    )
    superpixels = np.zeros((47, 63), dtype=np.int32)
    assert model.segmenter.superpixel_means(
        extracted.codes, superpixels, extracted.frame
    ).shape == (1, 6)  # type: ignore[operator, union-attr]


def test_several_images_with_scope_anywhere(picture: Tensor, generator: torch.Generator) -> None:
    other = torch.randint(0, 256, (3, 33, 21), generator=generator, dtype=torch.uint8)
    segment_study = study(net(scope="anywhere"), sweep=[20])
    for pixels, truths in (
        (picture, [TRUTH, TRUTH // 4]),
        (other, [np.zeros((33, 21), dtype=int)]),
        (other[:, :1, :1], [np.zeros((1, 1), dtype=int)]),
    ):
        segment_study.add(pixels, truths)
    for rows in segment_study.metrics().values():
        assert rows[20]["images_counted"] == 3
        assert 0 < rows[20]["segments"] <= 1


def test_metrics_and_table() -> None:
    values = {
        "segments": 0.5,
        "images": 0.25,
        "best_annotator": 0.75,
        "covering": 0.125,
        "num_segments": 7.5,
        "images_counted": 2.0,
    }
    numbers = {
        "hash": {10: values, 20: values | {"segments": 0.625}},
        "slic": {10: values, 20: values},
    }
    flat = flatten_metrics(numbers)
    assert flat["segmentation_iou/hash/20"] == 0.625
    assert flat["segmentation_iou/slic/10/num_segments"] == 7.5
    assert set(flat) == {
        f"segmentation_iou/{method}/{value}{name}"
        for method in ("hash", "slic")
        for value in (10, 20)
        for name in (
            "",
            "/images",
            "/best_annotator",
            "/covering",
            "/num_segments",
            "/images_counted",
        )
    }
    lines = format_table(numbers, "slic").splitlines()
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == [
        "method",
        "superpixels",
        "segments",
        "IoU:",
        "segments",
        "images",
        "best_annotator",
        "covering",
    ]
    assert lines[2].split() == ["hash", "20", "7.5", "0.6250", "0.2500", "0.7500", "0.1250"]
    assert format_table(numbers, "egs").split()[1] == "scale"


@pytest.mark.parametrize(
    "keys", [{"base": "kmeans"}, {"sweep": [0, 5]}, {"base": "egs", "sweep": [-1]}]
)
def test_invalid_arguments(keys: dict[str, Any]) -> None:
    with pytest.raises(
        UserError,
        match=(
            "segments: base must be slic or egs, "
            "sweep and scales lists of distinct, positive numbers"
        ),
    ):
        study(net(), **keys)


@pytest.mark.parametrize("lists", [([], [1.0]), ([5], [])])
def test_empty_lists(lists: tuple[list[int], list[float]]) -> None:
    model = net()
    with pytest.raises(UserError, match="lists of distinct, positive numbers"):
        SegmentStudy(model, model.segmenter, SingleImage(), *lists)  # type: ignore[arg-type]
