"""The image classifier: maps and logits, padding, labels, images without objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskseg.annotation.classifier import ImageClassHead, ImageClassifier
from maskseg.errors import UserError
from maskseg.models.backbones.resnet import ResNet
from maskseg.models.fuse import for_inference
from maskseg.structures import Batch, FeatureSpec, Targets, class_presence

SIZES = [(64, 96), (40, 50)]
TRUTH = [[(4, 4, 30, 30, 1), (8, 8, 40, 40, 1)], []]


def make_classifier(
    levels: tuple[str, ...] = ("c4", "c5"), layers: int = 1, norm: str = "GN", channels: int = 16
) -> ImageClassifier:
    torch.manual_seed(0)
    backbone = ResNet("resnet18", norm=norm)
    model = ImageClassifier(
        backbone, ImageClassHead(3, levels, backbone.levels, channels, layers, norm)
    )
    nn.init.normal_(model.head.classifier.weight)
    nn.init.normal_(model.head.classifier.bias)
    return model.eval()


@pytest.mark.parametrize("levels", [("c5",), ("c4", "c5"), ("c3", "c4", "c5")])
@pytest.mark.parametrize("layers", [0, 2])
def test_the_mean_of_a_map_plus_the_bias_is_the_logit(
    make_batch: Callable[..., Batch], levels: tuple[str, ...], layers: int
) -> None:
    model, batch = make_classifier(levels, layers), make_batch(SIZES)
    outputs = model.predict(batch)
    assert outputs.image_maps is not None
    assert outputs.image_scores is not None
    stride = model.level.stride
    assert stride == 2 ** int(levels[0][1])
    assert outputs.image_maps.shape == (2, 3, 64 // stride, 96 // stride)
    for i, (height, width) in enumerate(SIZES):
        own = outputs.image_maps[i, :, : -(-height // stride), : -(-width // stride)]
        assert (own != 0).all()
        assert outputs.image_maps[i].count_nonzero() == own.numel()  # zeros in the padding
        logits = own.mean(dim=(1, 2)) + model.head.classifier.bias
        torch.testing.assert_close(outputs.image_scores[i], logits.sigmoid())
    assert len(outputs.detections) == 0
    assert outputs.image_maps.std() > 0.1


def test_activation_of_images_without_padding(make_batch: Callable[..., Batch]) -> None:
    model, batch = make_classifier(), make_batch([(64, 96), (64, 96)])
    outputs = model.predict(batch)
    logits, maps = model.activation(model.normalise(batch.images))
    torch.testing.assert_close(model.probabilities(logits), outputs.image_scores)
    torch.testing.assert_close(maps, outputs.image_maps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps.mean(dim=(2, 3)) + model.head.classifier.bias, logits)


def test_the_mean_is_that_of_the_images_cells(generator: torch.Generator) -> None:
    head = make_classifier(("c5",), 0).head
    x, sizes = (
        torch.randn((2, 512, 4, 5), generator=generator),
        torch.tensor([[128, 160], [33, 64]]),
    )
    logits, maps = head.scores(x, head.cells(sizes, 4, 5))
    changed = x.clone()
    changed[1, :, 2:] = 1e3
    changed[1, :, :, 2:] = 1e3
    torch.testing.assert_close(head.scores(changed, head.cells(sizes, 4, 5)), (logits, maps))
    alone, _ = head.scores(x[1:, :, :2, :2], None)
    torch.testing.assert_close(logits[1:], alone)


@pytest.mark.parametrize(
    ("level", "size", "expected"),
    [
        (FeatureSpec(16, 0.5, 8), (64, 16), (4, 1)),
        (FeatureSpec(16, 0.5, 8), (65, 17), (5, 2)),  # the center of the fifth cell is at 64.5
        (FeatureSpec(16, 0.5, 8), (1, 1), (1, 1)),
        (
            FeatureSpec(16, 8.0, 8),
            (64, 72),
            (4, 4),
        ),  # the center of the fifth cell is at 72, outside
        (FeatureSpec(16, 8.0, 8), (4, 73), (1, 5)),  # no center inside: the first cell is used
    ],
)
def test_cells_literal(
    level: FeatureSpec, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    cells = ImageClassHead(2, ["x"], {"x": level}, layers=0).cells(torch.tensor([size]), 6, 7)[0]
    assert (int(cells[:, 0].sum()), int(cells[0].sum()), int(cells.sum())) == (
        *expected,
        expected[0] * expected[1],
    )
    assert cells[0, 0]


def test_padding_hardly_matters_to_the_whole_network(make_batch: Callable[..., Batch]) -> None:
    # Exact invariance would need every convolution to see zeros outside the image.
    model = make_classifier(norm="FrozenBN")
    nn.init.zeros_(model.head.classifier.bias)
    with torch.no_grad():
        tight, wide = (
            model.logits_and_maps(make_batch([(192, 192)], padded=padded))[0]
            for padded in ((192, 192), (320, 384))
        )
    assert float((tight - wide).abs().max()) < 0.15 * float(tight.abs().max())


def test_coarser_levels_are_aligned_with_the_finest() -> None:
    at = {
        "a": FeatureSpec(8, 0.5, 1),
        "b": FeatureSpec(16, 4.5, 1),
    }  # cell i of b is centered at cell 2i + 0.5 of a
    head = ImageClassHead(1, ["a", "b"], at, channels=1, layers=0)
    for layer in head.lateral.values():
        nn.init.ones_(layer[0].weight)  # type: ignore[index,arg-type]
    coarse = torch.tensor([[[[0.0, 10.0, 20.0]]]])
    result = head({"a": torch.zeros((1, 1, 1, 6)), "b": coarse})
    assert result.flatten().tolist() == [0.0, 2.5, 7.5, 12.5, 17.5, 20.0]


def test_the_loss_literal(
    make_batch: Callable[..., Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_classifier(), make_batch(SIZES, TRUTH)
    logits = torch.tensor([[0.0, 2.0, -1.0], [1.0, 0.0, 0.0]])
    monkeypatch.setattr(model.head, "scores", lambda *_: (logits, None))
    log = torch.nn.functional.logsigmoid
    expected = (
        -(log(-logits[0, 0]) + log(logits[0, 1]) + log(-logits[0, 2]) + log(-logits[1]).sum()) / 2
    )
    losses = model(batch)
    assert list(losses) == ["image_class"]
    torch.testing.assert_close(losses["image_class"], expected)


def test_classes_of_images() -> None:
    labels, images = torch.tensor([2, 2, 0, 1]), torch.tensor([0, 0, 0, 2])
    crowd = torch.tensor([False, True, False, True])  # a crowd counts for its class
    result = class_presence(Targets(torch.zeros(4, 4), labels, images, crowd), 4, 3)
    assert result.tolist() == [[True, False, True], [False] * 3, [False, True, False], [False] * 3]
    nothing = torch.zeros(0, dtype=torch.int64)
    assert not class_presence(
        Targets(torch.zeros(0, 4), nothing, nothing, nothing.bool()), 2, 3
    ).any()


def test_images_without_objects_train_every_part(
    make_batch: Callable[..., Batch], unreached: Callable[[nn.Module], list[str]]
) -> None:
    model = make_classifier().train()
    loss = model(make_batch(SIZES, [[], []]))["image_class"]
    loss.backward()
    assert unreached(model) == []
    assert torch.isfinite(loss)


def test_validate_is_forward_and_predict(make_batch: Callable[..., Batch]) -> None:
    model, batch = make_classifier(), make_batch(SIZES, TRUTH)
    losses, outputs = model.validate(batch)
    with torch.no_grad():
        torch.testing.assert_close(losses, model(batch))
    outputs_again = model.predict(batch)
    torch.testing.assert_close(outputs.image_scores, outputs_again.image_scores, rtol=0, atol=0)
    torch.testing.assert_close(outputs.image_maps, outputs_again.image_maps, rtol=0, atol=0)
    with pytest.raises(ValueError, match="needs a batch with targets"):
        model(replace(batch, targets=None))


def test_inference_model_and_half_precision(make_batch: Callable[..., Batch]) -> None:
    model, batch = make_classifier(), make_batch(SIZES)
    plain = model.predict(batch)
    folded = for_inference(model).predict(batch)
    torch.testing.assert_close(folded.image_scores, plain.image_scores, rtol=1e-4, atol=1e-5)
    half = for_inference(model, torch.bfloat16).predict(batch)
    assert half.image_scores is not None
    assert half.image_maps is not None
    assert half.image_scores.dtype == half.image_maps.dtype == torch.float32
    torch.testing.assert_close(half.image_scores, plain.image_scores, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.train()(make_batch(SIZES, TRUTH))["image_class"].dtype == torch.float32


def overfit(model: ImageClassifier, batch: Batch, steps: int) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(batch)["image_class"].backward()
        optimizer.step()
    scores = model.eval().predict(batch).image_scores
    assert scores is not None
    return scores


def test_it_overfits_a_few_images(make_batch: Callable[..., Batch]) -> None:
    truth: list[list[Any]] = [
        [(4, 4, 20, 20, k) for k in labels] for labels in ((0,), (1, 2), (), (0, 2))
    ]
    batch = make_batch([(48, 48)] * 4, truth)
    assert batch.targets is not None
    model = make_classifier(channels=128)
    for parameter in model.head.classifier.parameters():
        nn.init.normal_(parameter, std=0.01)
    scores = overfit(model, batch, 24)
    assert ((scores > 0.5) == class_presence(batch.targets, 4, 3)).all()


@pytest.mark.parametrize("levels", [[], ["b", "a"], ["a", "a"]])
def test_levels_that_are_refused(levels: list[str]) -> None:
    with pytest.raises(UserError, match="levels must be distinct and the finest one first"):
        ImageClassHead(2, levels, {"a": FeatureSpec(8, 0.5, 4), "b": FeatureSpec(16, 0.5, 4)})
