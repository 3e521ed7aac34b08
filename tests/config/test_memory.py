"""A config with an absurd size is refused before the memory is taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskseg import config as configs
from maskseg.config.memory import MemoryLimit, machine_memory
from maskseg.errors import UserError


@pytest.mark.parametrize(
    "key",
    [
        "model.classifier.mlp.width",
        "model.backbone.channels",
        "model.heads.mask.channels",
        "model.heads.mask.layers",
    ],
)
@pytest.mark.parametrize("allowed", [configs.TRAIN_TARGETS, configs.CHECKPOINT_TARGETS])
def test_an_absurd_size_is_one_line(key: str, allowed: frozenset[str]) -> None:
    config = configs.compose("train", [])
    configs.set_key(config, "data.num_classes", 3)
    configs.set_key(config, key, 10**9)
    with pytest.raises(UserError, match=r"too large|size calculation overflowed") as raised:
        configs.build_model(config, allowed, pretrained=False)
    assert "\n" not in str(raised.value)


def test_tensors_below_the_limit_are_unchanged() -> None:
    memory = machine_memory()
    assert memory is None or memory > 2**28
    torch.manual_seed(0)
    expected = nn.Linear(100, 100)
    torch.manual_seed(0)
    with MemoryLimit(50_000) as limit:
        layer = nn.Linear(100, 100)
    assert limit.num_bytes == 4 * (100 * 100 + 100)
    assert torch.equal(layer.weight, expected.weight)
    assert torch.equal(layer.bias, expected.bias)
    with MemoryLimit(50_000), pytest.raises(UserError, match=r"more than 8e-05 GB of memory"):
        torch.zeros(10_000, dtype=torch.float64)
