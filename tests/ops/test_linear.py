"""Linear layers of selected outputs and of flattened cells, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from maskseg.ops.linear import MIN_CONV_ROWS, class_linear, flatten_linear


@pytest.mark.parametrize("rows", [0, 3, MIN_CONV_ROWS])
def test_flatten_linear_equals_a_linear_layer(generator: torch.Generator, rows: int) -> None:
    layer = nn.Linear(2 * 3 * 3, 5)
    x = torch.randn((rows, 2, 3, 3), generator=generator)
    expected = layer(x.flatten(1))
    torch.testing.assert_close(flatten_linear(x, layer.weight, layer.bias), expected)


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("points", [1, 7])
def test_class_linear_equals_the_outputs_of_the_class(
    generator: torch.Generator, rows: int, points: int
) -> None:
    weight = torch.randn((4, 2, 8), generator=generator, requires_grad=True)
    bias = torch.randn((4, 2), generator=generator, requires_grad=True)
    x = torch.randn((rows, 8, points), generator=generator)
    label = torch.randint(4, (rows,), generator=generator)
    outputs = class_linear(x, weight, bias, label)
    all_outputs = F.conv1d(x, weight.flatten(0, 1)[..., None], bias.flatten())
    expected = all_outputs.unflatten(1, (4, 2))[torch.arange(rows), label]
    torch.testing.assert_close(outputs, expected)
    gradients = torch.autograd.grad(outputs.square().sum(), (weight, bias))
    expected_gradients = torch.autograd.grad(expected.square().sum(), (weight, bias))
    torch.testing.assert_close(gradients, expected_gradients)
