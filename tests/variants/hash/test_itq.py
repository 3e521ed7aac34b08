"""ITQ against faiss, against the paper's steps and PCA in numpy, and on degenerate vectors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskseg.errors import UserError
from maskseg.variants.hash import itq
from maskseg.variants.hash.itq import ITQ, ITQResult, fit_rotation
from maskseg.variants.hash.layer import HashLayer


def correlated(
    count: int, channels: int, generator: torch.Generator, clusters: bool = False
) -> Tensor:
    """Vectors with decreasing variances along rotated directions around a non-zero mean.

    Normally distributed, or in two clusters along each direction.
    """
    spread = torch.exp(-torch.arange(channels) / (channels / 8))
    turn = torch.linalg.qr(torch.randn((channels, channels), generator=generator))[0]
    values = torch.randn((count, channels), generator=generator)
    if clusters:
        values = torch.where(values > 0, 1.0, -1.0) + 0.3 * torch.randn(
            (count, channels), generator=generator
        )
    return values * spread @ turn + torch.randn(channels, generator=generator)


def fitted(
    vectors: Tensor, bits: int, normalise: bool = False, seed: int = 0, **keys: int
) -> tuple[HashLayer, ITQResult]:
    layer = HashLayer(vectors.shape[1], bits, normalise)
    fitter = ITQ(layer, seed=seed, **keys)
    fitter.update(vectors)
    fitter.fit()
    assert fitter.result is not None
    return layer, fitter.result


def error(values: np.ndarray) -> float:
    """The mean of |sgn(v) - v|^2."""
    return float(((np.where(values > 0, 1, -1) - values) ** 2).sum(axis=1).mean())


def own_values(layer: HashLayer, fit: ITQResult, vectors: Tensor) -> np.ndarray:
    """V R of each vector, in the scale of the vectors."""
    logits = layer.logits(vectors[:, :, None, None])[:, :, 0, 0] / fit.weight.norm(dim=1).mean()
    return logits.detach().double().numpy()


@pytest.mark.parametrize("bits", [8, 32])
def test_quantises_as_well_as_faiss(bits: int, generator: torch.Generator) -> None:
    faiss = pytest.importorskip("faiss")
    theirs, clusters = (faiss.ITQTransform(256, bits, True) for _ in range(2))
    vectors = correlated(10_000, 256, generator)
    unit = F.normalize(vectors - vectors.mean(dim=0), dim=1)  # the input of faiss
    theirs.train(vectors.numpy())
    assert error(own_values(*fitted(unit, bits), unit)) == pytest.approx(
        error(theirs.pca_then_itq.apply(unit.numpy())), rel=0.02
    )
    # All rotations of normal vectors are equally good. For clustered vectors one rotation is much
    # better; ours must be as good as that of faiss.
    vectors = correlated(10_000, 256, generator, clusters=True)
    unit = F.normalize(vectors - vectors.mean(dim=0), dim=1)
    clusters.train(vectors.numpy())
    assert error(own_values(*fitted(unit, bits), unit)) < 1.02 * error(
        clusters.pca_then_itq.apply(unit.numpy())
    )


def by_the_paper(
    projected: np.ndarray, rng: np.random.Generator, iterations: int = 50
) -> np.ndarray:
    """V R by section 2.2: B = sgn(VR), then R = S' S^T with the SVD B^T V = S W S'^T."""
    rotation = np.linalg.qr(rng.normal(size=(projected.shape[1],) * 2))[0]
    for _ in range(iterations):
        one, _, other = np.linalg.svd(np.sign(projected @ rotation).T @ projected)
        rotation = other.T @ one.T
    return projected @ rotation


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_quantises_as_well_as_the_papers_steps(bits: int, generator: torch.Generator) -> None:
    vectors = correlated(5000, 64, generator, clusters=True)
    exact = vectors.double().numpy()
    projected = (exact - exact.mean(axis=0)) @ np.linalg.svd(
        exact - exact.mean(axis=0), full_matrices=False
    )[2][:bits].T
    projected /= projected.std()
    # The result depends on the initialization: compare the best of a few of each.
    expected = min(error(by_the_paper(projected, np.random.default_rng(seed))) for seed in range(8))
    result = min(fitted(vectors, bits, seed=seed)[1].errors[-1] for seed in range(8))
    assert result == pytest.approx(expected, rel=0.02)
    turned = projected @ np.linalg.qr(np.random.default_rng(0).normal(size=(bits, bits)))[0]
    assert result < 0.75 * error(turned)


@pytest.mark.parametrize("bits", [1, 8, 24])
def test_the_convolution_is_mean_pca_and_rotation(bits: int, generator: torch.Generator) -> None:
    features = correlated(4000, 40, generator).T.reshape(1, 40, 50, 80)
    layer = HashLayer(40, bits)
    fitter = ITQ(layer)
    fitter.update(layer.vectors(features))
    fitter.fit()
    x = features.double().flatten(2)[0].T.numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    mean = x.mean(axis=0)
    directions = np.linalg.svd(x - mean, full_matrices=False)[2][:bits].T
    assert fitter.result is not None
    weight = fitter.result.weight.double().numpy().T
    scale = 1 / ((x - mean) @ directions).std()
    rotation = directions.T @ weight / scale
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(bits), atol=1e-5)
    np.testing.assert_allclose(
        directions @ rotation * scale, weight, atol=1e-5 * scale
    )  # W lies in the PCA subspace
    logits = ((x - mean) @ directions @ rotation) * scale
    sure = np.abs(logits) > 1e-5
    codes = (layer.logits(features) > 0)[0].flatten(1).T.numpy()
    assert (codes == (logits > 0))[sure].all()
    assert sure.mean() > 0.999
    assert (fitter.result.bits.numpy() == (logits > 0))[sure].all()
    assert fitter.result.errors[-1] == pytest.approx(error(logits), rel=1e-4)


def test_errors_fall(generator: torch.Generator) -> None:
    _, fit = fitted(correlated(3000, 64, generator), 16, iterations=60)
    errors = np.array(fit.errors)
    assert len(errors) == 60
    assert (np.diff(errors) <= 1e-9 * errors[0]).all()
    assert errors[-1] < 0.97 * errors[0]
    assert fit.metrics()["quantisation_error"] == errors[-1]


def test_a_rotation_that_is_known(generator: torch.Generator) -> None:
    # Rotated corners of a cube: a rotation without error exists.
    corners = torch.where(torch.rand((500, 3), generator=generator) < 0.5, 1.0, -1.0).double()
    turn = torch.linalg.qr(torch.randn((3, 3), generator=generator, dtype=torch.float64))[0]
    result = [
        fit_rotation(corners @ turn, 50, torch.Generator().manual_seed(seed)) for seed in range(5)
    ]
    rotation, errors = min(result, key=lambda one: one[1][-1])
    assert errors[-1] < 1e-9
    torch.testing.assert_close(
        (corners @ turn @ rotation).abs(), torch.ones(500, 3, dtype=torch.float64)
    )


@pytest.mark.parametrize("max_samples", [50_000, 700])
def test_chunk_sizes_change_nothing(
    max_samples: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(itq, "CHUNK_SIZE", 1024)
    vectors = correlated(5000, 24, generator)
    result = []
    for sizes in ([5000], [1, 99, 2500, 0, 2400], [1000] * 5):
        fitter = ITQ(HashLayer(24, 8, False), max_samples)
        for piece in torch.split(vectors, sizes):
            fitter.update(piece)
        fitter.fit()
        assert fitter.count == 5000
        result.append(fitter)
    for fitter in result:
        exact = vectors.double()
        torch.testing.assert_close(fitter.sum / 5000, exact.mean(dim=0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            fitter.outer / 5000, exact.T @ exact / 5000, rtol=1e-12, atol=1e-12
        )
        assert torch.equal(fitter.reservoir, result[0].reservoir)
        assert fitter.result is not None
        assert result[0].result is not None
        torch.testing.assert_close(fitter.result.weight, result[0].result.weight)
        torch.testing.assert_close(fitter.result.bias, result[0].result.bias)
    assert len(result[0].reservoir) == min(max_samples, 5000)


def test_the_reservoir_is_a_uniform_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(itq, "CHUNK_SIZE", 300)
    numbers = torch.arange(2000.0)[:, None]  # each vector is its own index
    times = torch.zeros(2000)
    draws = []
    for seed in range(100):
        fitter = ITQ(HashLayer(1, 1, False), max_samples=200, iterations=1, seed=seed)
        fitter.update(numbers)
        fitter.fit()
        drawn = fitter.reservoir[:, 0].long()
        assert drawn.tolist() == sorted(set(drawn.tolist()))
        assert len(drawn) == 200
        times[drawn] += 1
        draws.append(drawn)
    assert not torch.equal(draws[0], draws[1])
    share = times.view(20, 100).mean(dim=1) / 100
    # Five standard deviations of a binomial share; draws without replacement vary less.
    assert (share - 0.1).abs().max() < 5 * (0.1 * 0.9 / 10_000) ** 0.5


def test_the_result_depends_on_the_seed_alone(generator: torch.Generator) -> None:
    vectors = correlated(2000, 24, generator)
    first, again, other = (fitted(vectors, 6, seed=seed, max_samples=500)[1] for seed in (3, 3, 4))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert first.errors == again.errors
    assert not torch.equal(first.weight, other.weight)


def test_mean_and_directions_use_all_vectors(generator: torch.Generator) -> None:
    vectors = torch.randn((3000, 4), generator=generator) * torch.tensor([10.0, 5.0, 0.1, 0.1]) + 7
    layer, fit = fitted(vectors, 2, max_samples=2)
    # The reservoir of two vectors determines only the rotation, not the mean and the directions.
    covariance = np.cov(vectors.double().numpy().T)
    directions = np.linalg.eigh(covariance)[1][:, ::-1][:, :2]
    weight = fit.weight.double().numpy().T
    np.testing.assert_allclose(
        directions @ (directions.T @ weight), weight, atol=1e-5 * np.abs(weight).max()
    )
    middle = vectors.double().mean(dim=0).float()[None, :, None, None]
    assert layer.logits(middle).abs().max() < 1e-4 * float(fit.weight.abs().max())


def fit_with_warnings(vectors: Tensor, bits: int) -> tuple[HashLayer, ITQResult, str]:
    """Layer, result and the text of the warnings."""
    with warnings.catch_warnings(record=True) as result:
        warnings.simplefilter("always")
        layer, fit = fitted(vectors, bits)
    return layer, fit, " ".join(str(w.message) for w in result)


def degenerate(generator: torch.Generator) -> dict[str, tuple[Tensor, int, str]]:
    flat = torch.randn((300, 2), generator=generator) @ torch.randn((2, 16), generator=generator)
    constant = torch.randn((1, 16), generator=generator).expand(300, 16)
    return {
        "few": (torch.randn((5, 16), generator=generator), 8, "8 bits from 5 feature vectors"),
        "one": (torch.randn((1, 16), generator=generator), 8, "8 bits from 1 feature vectors"),
        "flat": (flat, 8, "8 bits from feature vectors that span 2 directions"),
        "flat, far away": (flat + 50, 8, "8 bits from feature vectors that span 2 directions"),
        "zeros": (torch.zeros((30, 16)), 8, "8 bits from feature vectors that span 0 directions"),
        "constant": (constant, 2, "2 bits from feature vectors that span 0 directions"),
        "more bits than channels": (
            torch.randn((300, 16), generator=generator),
            40,
            "40 bits from feature vectors that span 16 directions",
        ),
    }


@pytest.mark.parametrize("name", list(degenerate(torch.Generator())))
def test_degenerate_vectors(name: str, generator: torch.Generator) -> None:
    vectors, bits, warning = degenerate(generator)[name]
    layer, fit, messages = fit_with_warnings(vectors, bits)
    assert warning in messages
    assert "some bits are redundant" in messages
    assert len(fit.errors) == 50
    assert np.isfinite(fit.errors).all()
    assert all(np.isfinite(value) for value in fit.metrics().values())
    for tensor in (layer.conv.weight, layer.conv.bias, layer(vectors[:, :, None, None])):
        assert tensor is not None
        assert torch.isfinite(tensor).all()
    assert fit.bits.shape == (len(vectors), bits)


def test_sufficient_vectors_give_no_warning(generator: torch.Generator) -> None:
    assert fit_with_warnings(correlated(500, 16, generator), 16)[2] == ""


def test_no_vector() -> None:
    fitter = ITQ(HashLayer(4, 2))
    fitter.update(torch.zeros(0, 4))
    with pytest.raises(UserError, match="there is no feature vector to learn from"):
        fitter.fit()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    vectors = torch.zeros(10, 4)
    vectors[7, 2] = value
    with pytest.raises(UserError, match="itq: the features contain values that are not finite"):
        ITQ(HashLayer(4, 2)).update(vectors)


@pytest.mark.parametrize("keys", [{"max_samples": 0}, {"iterations": 0}])
def test_invalid_arguments(keys: dict[str, int]) -> None:
    with pytest.raises(UserError, match="max_samples and iterations must be at least 1"):
        ITQ(HashLayer(4, 2), **keys)


def test_update_drops_gradients(generator: torch.Generator) -> None:
    layer = HashLayer(8, 4)
    fitter = ITQ(layer)
    fitter.update(torch.randn((50, 8), generator=generator, requires_grad=True))
    fitter.fit()
    assert not fitter.reservoir.requires_grad
    assert layer.conv.weight.is_leaf
    assert layer.conv.weight.requires_grad
