"""Average precision of image classification: torchmetrics, literals, ties, merged processes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MultilabelAveragePrecision

from maskseg.evaluation.classification import ImageClassAP, average_precision


def accumulate(scores: Tensor, present: Tensor) -> ImageClassAP:
    evaluator = ImageClassAP(scores.shape[1])
    evaluator.add(scores, present)
    return evaluator


@pytest.mark.parametrize("ties", [False, True])
def test_equal_to_torchmetrics(generator: torch.Generator, ties: bool) -> None:
    present = torch.rand((57, 6), generator=generator) < torch.tensor(
        [0.05, 0.1, 0.3, 0.5, 0.9, 0.0]
    )
    present[3, 0] = True
    scores = (torch.rand((57, 6), generator=generator) + 0.4 * present).clamp(max=1)
    scores = (scores * 5).round() / 5 if ties else scores
    evaluator = accumulate(scores, present)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the class without an image
        each = MultilabelAveragePrecision(6, average=None)(scores, present.long())
        macro = MultilabelAveragePrecision(5, average="macro")(scores[:, :5], present[:, :5].long())
    rows = evaluator.per_class()
    assert [row["AP"] for row in rows[:5]] == pytest.approx(each[:5].tolist(), abs=1e-6)
    assert rows[5] == {"label": 5, "AP": -1.0, "images": 0}
    assert evaluator.compute()["mAP"] == pytest.approx(float(macro), abs=1e-6)


def test_literals() -> None:
    def ap(scores: list[float], present: list[int]) -> float:
        return average_precision(np.array(scores), np.array(present, dtype=bool))

    assert ap([0.9, 0.8, 0.7], [1, 0, 1]) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert ap([0.1, 0.2], [1, 0]) == 0.5
    assert ap([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 0]) == 0.25  # one threshold, whatever their order
    assert ap([0.3], [1]) == 1.0
    assert ap([0.3], [0]) == -1.0
    assert ap([], []) == -1.0


def test_merging_in_any_order(generator: torch.Generator) -> None:
    scores = torch.rand((20, 3), generator=generator)
    present = torch.rand((20, 3), generator=generator) < 0.4
    parts = [accumulate(scores[a:b], present[a:b]).state() for a, b in ((12, 20), (0, 5), (5, 12))]
    merged = ImageClassAP(3)
    for part in parts:
        merged.merge(part)
    assert len(merged) == 20
    assert merged.per_class() == accumulate(scores, present).per_class()


def test_no_positives() -> None:
    assert ImageClassAP(2).compute() == {"mAP": -1.0}
    assert accumulate(torch.rand(3, 2), torch.zeros((3, 2), dtype=torch.bool)).compute() == {
        "mAP": -1.0
    }


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match=r"must both be \[N, 2\], got \[1, 3\]"):
        ImageClassAP(2).add(torch.rand(1, 3), torch.ones((1, 3), dtype=torch.bool))
    with pytest.raises(ValueError, match="not finite"):
        accumulate(torch.tensor([[float("nan")]]), torch.ones((1, 1), dtype=torch.bool))


def test_table() -> None:
    text = accumulate(
        torch.tensor([[0.9, 0.1], [0.2, 0.3]]), torch.tensor([[True, False], [False, False]])
    ).table(["disc", "giraffe"])
    assert "classes of 2 images: mAP 1.000" in text
    assert ["disc", "1.000", "1"] in [line.split() for line in text.splitlines()]
    assert ["giraffe", "-", "0"] in [line.split() for line in text.splitlines()]
