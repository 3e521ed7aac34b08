"""One-vs-rest SVMs: SciPy's optimizer, values by hand, final gradients, sampling and warnings."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maskseg.errors import UserError
from maskseg.variants.cfm import svm
from maskseg.variants.cfm.svm import ABSENT_MARGIN, OneVsRestSVM, SVMFit


def fitted(vectors: Tensor, labels: Tensor, classes: int, **keys: Any) -> tuple[nn.Linear, SVMFit]:
    layer = nn.Linear(vectors.shape[1], classes)
    fitter = OneVsRestSVM(layer, **keys)
    fitter.update(vectors, labels)
    fitter.fit()
    assert fitter.result is not None
    return layer, fitter.result


def clusters(
    count: int, channels: int, classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Overlapping classes and background, far from the origin, as features after a ReLU are."""
    labels = torch.randint(classes + 1, (count,), generator=generator)
    centres = torch.randn((classes + 1, channels), generator=generator)
    return torch.relu(
        2 + centres[labels] + 1.5 * torch.randn((count, channels), generator=generator)
    ), labels


def objective(weight: Any, bias: Any, scaled: Any, signs: Any, cost: Any, constant: float) -> Any:
    """Compute the objective of one class; the weight of the bias is bias / constant."""
    slack = (1 - signs * (scaled @ weight + bias)).clip(0)
    return (weight @ weight + (bias / constant) ** 2) / 2 + (cost * slack**2).sum()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"cost": 1.0, "positive_weight": 1.0},
        {"cost": 0.03, "positive_weight": 5.0, "norm": 3.0, "intercept_scaling": 1.0},
    ],
)
def test_the_minimum_equals_scipys(keys: dict[str, float], generator: torch.Generator) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    vectors, labels = clusters(300, 7, 4, generator)
    labels[:20] = -1  # dropped
    layer, result = fitted(vectors, labels, 4, **keys)
    used = vectors[20:].double().numpy()
    classes = labels[20:].numpy()
    scale = keys.get("norm", 20.0) / np.linalg.norm(used, axis=1).mean()
    constant = keys.get("intercept_scaling", 10.0)
    for k in range(4):
        signs = np.where(classes == k, 1.0, -1.0)
        cost = keys.get("cost", 1e-3) * np.where(
            classes == k, keys.get("positive_weight", 2.0), 1.0
        )

        def value(
            x: np.ndarray, signs: np.ndarray = signs, cost: np.ndarray = cost
        ) -> tuple[float, np.ndarray]:
            slack = np.maximum(1 - signs * (scale * used @ x[:-1] + constant * x[-1]), 0)
            slope = x - 2 * np.append(
                scale * used.T @ (cost * signs * slack), constant * (cost * signs * slack).sum()
            )
            return objective(x[:-1], constant * x[-1], scale * used, signs, cost, constant), slope

        best = optimize.minimize(
            value,
            np.zeros(8),
            jac=True,
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-11, "maxiter": 5000},
        )
        assert result.objective[k] == pytest.approx(best.fun, rel=1e-9)
        np.testing.assert_allclose(
            layer.weight[k].detach().numpy(), scale * best.x[:-1], rtol=1e-4, atol=1e-5
        )
        assert layer.bias[k].item() == pytest.approx(constant * best.x[-1], rel=1e-4, abs=1e-5)
        margins = used @ layer.weight[k].detach().double().numpy() + layer.bias[k].item()
        assert result.error[k] == pytest.approx(((margins > 0) != (signs > 0)).mean())
        assert result.missed[k] == pytest.approx((margins[signs > 0] <= 0).mean())
        assert result.positives[k] == (signs > 0).sum()


@pytest.mark.parametrize("cost", [1e-4, 1e-2, 1.0, 100.0])
def test_the_gradient_at_the_end_is_zero(cost: float, generator: torch.Generator) -> None:
    vectors, labels = clusters(2000, 40, 5, generator)
    layer, result = fitted(vectors, labels, 5, cost=cost)
    scale = 20 / vectors.double().norm(dim=1).mean()
    for k in range(5):
        signs = torch.where(labels == k, 1.0, -1.0).double()
        costs = cost * torch.where(labels == k, 2.0, 1.0).double()
        lengths = []
        for share in (0.0, 1.0):
            weight = (share * layer.weight[k].detach().double() / scale).requires_grad_()
            bias = (share * layer.bias[k].detach().double()).requires_grad_()
            gradients = torch.autograd.grad(
                objective(weight, bias, scale * vectors.double(), signs, costs, 10.0),
                (weight, bias),
            )
            lengths.append(
                float((gradients[0].square().sum() + (10 * gradients[1]).square()).sqrt())
            )
        assert lengths[1] < 3e-6 * lengths[0]  # the layer's weights are rounded to f32
        assert result.gradient[k] < 1e-7
    assert all(
        later <= earlier for earlier, later in zip(result.steps[:-1], result.steps[1:], strict=True)
    )
    assert result.steps[-1] == pytest.approx(sum(result.objective))


def test_two_points() -> None:
    # w^2 / 2 + 2 (1 - w)^2 is minimal at w = 4 / 5; between the points, the bias is 0
    layer, result = fitted(
        torch.tensor([[1.0], [-1.0]]),
        torch.tensor([0, 1]),
        1,
        cost=1.0,
        positive_weight=1.0,
        norm=1.0,
    )
    assert layer.weight.tolist() == [[pytest.approx(0.8)]]
    assert layer.bias.tolist() == [pytest.approx(0.0, abs=1e-7)]
    assert result.objective == [pytest.approx(0.8**2 / 2 + 2 * 0.2**2)]
    # vectors of norm 3, scaled to 1: the same margins
    layer, _ = fitted(
        torch.tensor([[3.0], [-3.0]]),
        torch.tensor([0, 1]),
        1,
        cost=1.0,
        positive_weight=1.0,
        norm=1.0,
    )
    assert layer.weight.tolist() == [[pytest.approx(0.8 / 3)]]


def test_positive_weight_equals_repeated_positives(generator: torch.Generator) -> None:
    vectors, labels = clusters(200, 5, 1, generator)
    vectors = vectors / vectors.norm(dim=1, keepdim=True)  # the mean norm is unchanged
    positive = vectors[labels == 0]
    weighted, _ = fitted(vectors, labels, 1, positive_weight=3.0)
    repeated, _ = fitted(
        torch.cat([vectors, positive, positive]),
        torch.cat([labels, labels.new_zeros(2 * len(positive))]),
        1,
        positive_weight=1.0,
    )
    torch.testing.assert_close(weighted.weight, repeated.weight, rtol=1e-4, atol=1e-6)


def test_separable_classes_are_separated(generator: torch.Generator) -> None:
    vectors, labels = clusters(300, 400, 6, generator)  # more channels than vectors
    layer, result = fitted(vectors, labels, 6, cost=1.0)
    assert result.error == [0.0] * 6
    assert result.missed == [0.0] * 6
    assert result.metrics() == {
        "objective": pytest.approx(sum(result.objective)),
        "error": 0.0,
        "missed": 0.0,
    }
    positive = layer(vectors) > 0
    assert torch.equal(positive, labels[:, None] == torch.arange(6))


@pytest.mark.parametrize("kept", [10_000, 400])
def test_chunks_do_not_change_the_result(
    kept: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, labels = clusters(1000, 12, 3, generator)
    result = []
    for piece, sizes in ((8192, [1000]), (50, [1, 99, 0, 500, 400]), (50, [10] * 100)):
        monkeypatch.setattr(svm, "_CHUNK_ROWS", piece)
        fitter = OneVsRestSVM(nn.Linear(12, 3), max_samples=kept)
        for batch in zip(torch.split(vectors, sizes), torch.split(labels, sizes), strict=True):
            fitter.update(*batch)
        fitter.fit()
        result.append(fitter)
    for fitter in result:
        assert fitter.held == min(kept, 1000)
        assert all(
            torch.equal(a, b)
            for a, b in zip(fitter.reservoir(), result[0].reservoir(), strict=True)
        )
        torch.testing.assert_close(
            fitter.layer.weight, result[0].layer.weight, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(fitter.layer.bias, result[0].layer.bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("positives", "background", "kept"),
    [
        (30, 500, (30, 170)),
        (150, 500, (100, 100)),
        (500, 30, (170, 30)),
        (500, 500, (100, 100)),
        (60, 60, (60, 60)),
        (500, 0, (200, 0)),
    ],
)
def test_background_gives_way_first(
    positives: int, background: int, kept: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svm, "_CHUNK_ROWS", 20)
    labels = torch.cat([torch.zeros(positives), torch.full((background,), 2)]).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(float(len(labels)))[:, None]  # each vector is its index
    times = torch.zeros(len(labels))
    seeds = 40
    for seed in range(seeds):
        fitter = OneVsRestSVM(nn.Linear(1, 2), max_samples=200, seed=seed)
        for rows in torch.split(order, 17):
            fitter.update(numbers[rows], labels[rows])
        vectors, classes = fitter.reservoir()
        assert ((classes == 0).sum(), (classes == 2).sum()) == kept
        place = torch.argsort(order)[vectors[:, 0].long()]
        assert torch.equal(place, place.sort().values)
        times[vectors[:, 0].long()] += 1
    for rows, number in ((labels == 0, kept[0]), (labels == 2, kept[1])):
        # Uniform: within five standard deviations of the binomial share of early and late vectors.
        if rows.any():
            share = number / int(rows.sum())
            for half in times[rows].chunk(2):
                assert (
                    abs(float(half.mean()) / seeds - share)
                    <= 5 * (share * (1 - share) / seeds / len(half)) ** 0.5
                )


def test_sampled_vectors_are_weighted_by_what_they_represent(generator: torch.Generator) -> None:
    things, _ = clusters(40, 6, 1, generator)
    wall = torch.rand((1, 6), generator=generator).expand(
        900, 6
    )  # all equal: the problem is the same for any sample
    vectors = torch.cat([things, wall])
    labels = torch.cat([torch.zeros(40), torch.ones(900)]).long()
    whole, some = (fitted(vectors, labels, 1, max_samples=kept) for kept in (1000, 100))
    assert some[1].positives == [40]
    torch.testing.assert_close(whole[0].weight, some[0].weight, rtol=1e-4, atol=1e-7)
    assert whole[1].objective == pytest.approx(some[1].objective)


def fit_with_warnings(
    vectors: Tensor, labels: Tensor, classes: int, **keys: Any
) -> tuple[nn.Linear, SVMFit, str]:
    """Fit, and return the layer, the result and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer, result = fitted(vectors, labels, classes, **keys)
    return layer, result, " | ".join(str(w.message) for w in caught)


def test_a_class_without_positives_never_fires(generator: torch.Generator) -> None:
    vectors, labels = clusters(100, 6, 3, generator)
    rest = labels != 1
    layer, result, text = fit_with_warnings(
        vectors[rest], labels[rest], 3, names=["disc", "box", "star"]
    )
    assert text == "svm: no positives for box; it never fires"
    assert layer.weight[1].tolist() == [0.0] * 6
    assert layer.bias[1] == ABSENT_MARGIN
    assert (result.positives[1], result.error[1], result.missed[1]) == (0, 0.0, 0.0)
    assert (layer(1e3 * vectors).sigmoid()[:, 1] == 0).all()
    others, _ = fitted(
        vectors[rest], torch.where(labels[rest] == 0, 0, torch.where(labels[rest] == 2, 1, 2)), 2
    )
    torch.testing.assert_close(layer.weight[[0, 2]], others.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "labels", "warning"),
    [
        (
            torch.zeros(0, 4),
            [],
            "no positives for 0; it never fires | svm: no positives for 1; it never fires",
        ),
        (
            torch.rand(3, 4),
            [2, 2, 2],
            "no positives for 0; it never fires | svm: no positives for 1; it never fires",
        ),
        (
            torch.rand(3, 4),
            [0, 0, 0],
            "only positives for 0; there are no negatives to learn from"
            " | svm: no positives for 1; it never fires",
        ),
        (
            torch.ones(4, 4),
            [0, 1, 2, 2],
            "all feature vectors are equal; the classes cannot be told apart",
        ),
        (torch.zeros(4, 4), [0, 1, 2, 2], "all feature vectors are equal"),
        (torch.ones(1, 4), [0], "no positives for 1"),
    ],
)
def test_degenerate_data_give_warnings(vectors: Tensor, labels: list[int], warning: str) -> None:
    layer, result, text = fit_with_warnings(vectors, torch.tensor(labels, dtype=torch.int64), 2)
    assert f"svm: {warning}" in text
    assert torch.isfinite(layer.weight).all()
    assert torch.isfinite(layer.bias).all()
    assert all(
        np.isfinite(value)
        for value in (
            *result.objective,
            *result.gradient,
            *result.error,
            *result.missed,
            *result.steps,
        )
    )


def test_ordinary_data_give_no_warning(generator: torch.Generator) -> None:
    assert fit_with_warnings(*clusters(200, 8, 3, generator), 3)[2] == ""


def test_an_early_stop_is_reported(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svm, "_MAX_STEPS", 1)
    assert (
        "svm: after 1 steps, the largest gradient is still"
        in fit_with_warnings(*clusters(200, 8, 3, generator), 3)[2]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    vectors = torch.zeros(10, 4)
    vectors[7, 2] = value
    with pytest.raises(UserError, match="svm: the features contain values that are not finite"):
        OneVsRestSVM(nn.Linear(4, 2)).update(vectors, torch.zeros(10, dtype=torch.int64))


@pytest.mark.parametrize(
    "keys",
    [
        {"cost": 0.0},
        {"positive_weight": -1.0},
        {"norm": 0.0},
        {"intercept_scaling": 0.0},
        {"max_samples": 1},
    ],
)
def test_invalid_arguments(keys: dict[str, Any]) -> None:
    with pytest.raises(
        UserError,
        match=r"svm: cost \(fit\.C\), positive_weight, norm and intercept_scaling must be above 0"
        r" and max_samples at least 2",
    ):
        OneVsRestSVM(nn.Linear(4, 2), **keys)


def test_vectors_are_detached(generator: torch.Generator) -> None:
    vectors, labels = clusters(50, 8, 2, generator)
    layer = nn.Linear(8, 2)
    fitter = OneVsRestSVM(layer)
    fitter.update(vectors.requires_grad_(), labels)
    fitter.fit()
    assert not fitter.reservoir()[0].requires_grad
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
