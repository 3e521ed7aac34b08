"""The hash layer: logits, soft codes and vectors agree with each other."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.variants.hash.layer import HashLayer


@pytest.mark.parametrize("normalise", [True, False])
def test_outputs_agree(normalise: bool, generator: torch.Generator) -> None:
    features = 3 * torch.randn((2, 6, 4, 5), generator=generator)
    layer = HashLayer(6, 9, normalise)
    weight, bias = torch.randn((9, 6), generator=generator), torch.randn(9, generator=generator)
    layer.set_weights(weight, bias)
    x = features / features.norm(dim=1, keepdim=True) if normalise else features
    logits = torch.einsum("bc,nchw->nbhw", weight, x) + bias[:, None, None]
    torch.testing.assert_close(layer.logits(features), logits)
    torch.testing.assert_close(layer(features), 1 / (1 + (-logits).exp()))
    vectors = layer.vectors(features)
    assert vectors.shape == (2 * 4 * 5, 6)
    torch.testing.assert_close(vectors.view(2, 4, 5, 6).movedim(3, 1), x)
    rows = layer.logits(features).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(vectors @ weight.T + bias, rows)


def test_normalised_codes_ignore_the_length_of_a_vector(generator: torch.Generator) -> None:
    features = torch.randn((1, 8, 3, 3), generator=generator)
    layer = HashLayer(8, 16)
    torch.testing.assert_close(layer(features), layer(50 * features))
    assert torch.isfinite(layer(torch.zeros(1, 8, 1, 1))).all()  # a zero vector has no direction


@pytest.mark.parametrize("normalise", [True, False])
def test_initial_logits_have_unit_standard_deviation(
    normalise: bool, generator: torch.Generator
) -> None:
    torch.manual_seed(0)
    layer = HashLayer(256, 64, normalise)
    features = torch.randn((1, 256, 20, 20), generator=generator)
    assert 0.9 < float(layer.logits(features).detach().std()) < 1.1
    assert not layer.conv.bias.any()  # type: ignore[union-attr]


def test_features_of_half_precision(generator: torch.Generator) -> None:
    features = torch.randn((1, 8, 5, 5), generator=generator)
    layer = HashLayer(8, 4)
    expected = layer(features)
    for model in (layer, HashLayer(8, 4).bfloat16()):
        model.load_state_dict(layer.state_dict())
        result = model(features.bfloat16())
        assert result.dtype == torch.float32
        torch.testing.assert_close(result, expected, atol=0.03, rtol=0)
    assert layer.vectors(features.bfloat16()).dtype == torch.float32


def test_gradients_reach_weights_and_features(generator: torch.Generator) -> None:
    features = torch.randn((1, 8, 3, 3), generator=generator).requires_grad_()
    layer = HashLayer(8, 4)
    F.binary_cross_entropy(layer(features), torch.ones(1, 4, 3, 3)).backward()
    for tensor in (features, layer.conv.weight, layer.conv.bias):
        assert tensor is not None
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize("bits", [0, -1, 65])
def test_invalid_bits(bits: int) -> None:
    with pytest.raises(UserError, match=f"bits must be 1 to 64, not {bits}"):
        HashLayer(8, bits)
