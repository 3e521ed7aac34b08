"""Iterative quantisation: a projection whose signs keep what is alike alike (Gong and Lazebnik, "Iterative Quantization", CVPR 2011)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.variants.hash.codes import statistics
from maskseg.variants.hash.layer import HashLayer

_PIECE = 8192  # vectors at a time
_RANK, _ROUNDING = (
    1e-10,
    1e-13,
)  # of the largest variance, and of the vectors' mean square: a direction with less holds rounding alone


@dataclass(frozen=True)
class Fit:
    """weight [b, C] and bias [b], f32: bit i of x is weight[i] @ x + bias[i] > 0, with mean, PCA and rotation in them. errors: after each iteration
    |sgn(VR) - VR|^2 of a vector, the mean (eq. 2), V scaled to a deviation of one; bits: bool [n, b], the codes of the vectors it was learnt from."""

    weight: Tensor
    bias: Tensor
    errors: list[float] = field(repr=False)
    bits: Tensor = field(repr=False)

    def numbers(self) -> dict[str, float]:
        """The quantisation error and what `ops.codes.statistics` says of the bits."""
        return {"quantisation_error": self.errors[-1], **statistics(self.bits)}


class ITQ:
    """Learns a hash layer's weights from feature vectors that come in pieces: a `Fitter`.

    Mean and covariance are those of all vectors, in f64; the rotation is learnt from `kept` of them, drawn evenly (all, where there are fewer).
    So any number fits in memory: C x C and kept x C values. The result is a function of the vectors, their order and `seed`.

    Fewer vectors than bits, or vectors that span fewer directions than bits, give a warning: some bits then repeat what others say.
    """

    def __init__(
        self, layer: HashLayer, kept: int = 50_000, iterations: int = 50, seed: int = 0
    ) -> None:
        if kept < 1 or iterations < 1:
            raise UserError(
                f"itq: kept and iterations must be at least 1, got {kept} and {iterations}"
            )
        self.layer, self.kept, self.iterations = layer, kept, iterations
        channels = layer.conv.in_channels
        self.generator = torch.Generator().manual_seed(seed)
        self.count = 0
        self.sum, self.outer = (
            torch.zeros(channels, dtype=torch.float64),
            torch.zeros(channels, channels, dtype=torch.float64),
        )
        self.pieces, self.keys, self.held = (
            [torch.zeros(0, channels)],
            [torch.zeros(0, dtype=torch.float64)],
            0,
        )
        self.result: Fit | None = None

    def update(self, vectors: Tensor) -> None:
        """vectors: f32 [n, C], as `HashLayer.vectors` gives them. Raises UserError for values that are not finite."""
        for piece in torch.split(vectors.detach().cpu().float(), _PIECE):
            exact = piece.double()
            if not bool(torch.isfinite(exact).all()):
                raise UserError(
                    "itq: the features hold values that are not finite; was the backbone trained, and are its weights whole?"
                )
            self.count += len(piece)
            self.sum += exact.sum(dim=0)
            self.outer += exact.T @ exact
            self._keep(piece)

    def _keep(self, piece: Tensor) -> None:
        """An even draw of all that has come so far: those with the smallest of random keys."""
        self.pieces.append(piece)
        self.keys.append(torch.rand(len(piece), generator=self.generator, dtype=torch.float64))
        self.held += len(piece)
        if self.held > self.kept + max(self.kept // 4, _PIECE):
            _ = self.sample

    @property
    def sample(self) -> Tensor:
        """The vectors that are kept, f32 [n, C], in the order in which they came."""
        sample, keys = torch.cat(self.pieces), torch.cat(self.keys)
        if len(keys) > self.kept:
            first = keys.argsort()[: self.kept].sort().values
            sample, keys = sample[first], keys[first]
        self.pieces, self.keys, self.held = [sample], [keys], len(keys)
        return sample

    def fit(self) -> None:
        """Writes the weights into the layer. Raises UserError where no vector has come."""
        if not self.count:
            raise UserError("itq: there is no feature vector to learn from")
        mean = self.sum / self.count
        covariance = self.outer / self.count - mean[:, None] * mean
        self.result = solve(
            self.sample,
            mean,
            covariance,
            self.layer.bits,
            self.iterations,
            self.generator,
            self.count,
        )
        self.layer.set(self.result.weight, self.result.bias)


def solve(
    sample: Tensor,
    mean: Tensor,
    covariance: Tensor,
    bits: int,
    iterations: int,
    generator: torch.Generator,
    count: int,
) -> Fit:
    """PCA of the covariance [C, C] to `bits` directions, then the rotation that quantises the sample [n, C] best. count: of all vectors."""
    directions, rank = _principal(covariance, bits, float(covariance.trace() + mean @ mean))
    if count < bits or rank < bits:
        why = (
            f"{count} feature vectors"
            if count < bits
            else f"feature vectors that span {rank} directions"
        )
        warnings.warn(
            f"itq: {bits} bits from {why}; some bits repeat what others say (fewer bits say as much)",
            stacklevel=3,
        )
    projected = torch.cat(
        [(piece.double() - mean) @ directions for piece in torch.split(sample, _PIECE)]
    )
    deviation = projected.pow(2).mean().sqrt()
    scale = 1 / float(deviation) if float(deviation) > 0 else 1.0
    rotation, errors = rotate(projected * scale, iterations, generator)
    weight = (directions @ rotation * scale).T
    bias = -weight @ mean
    weight, bias = weight.float(), bias.float()
    return Fit(weight, bias, errors, sample @ weight.T + bias > 0)


def _principal(covariance: Tensor, bits: int, power: float) -> tuple[Tensor, int]:
    """The directions of the largest variance, f64 [C, bits], and how many of them have any; missing ones are zeros.
    power: the vectors' mean square."""
    variance, directions = torch.linalg.eigh(covariance)
    variance, directions = variance.flip(0)[:bits], directions.flip(1)[:, :bits]
    there = variance > max(_RANK * float(variance[0]), _ROUNDING * power)
    wanted = torch.zeros(len(covariance), bits, dtype=torch.float64)
    wanted[:, : len(variance)] = directions * there
    return wanted, int(there.sum())


def rotate(
    projected: Tensor, iterations: int, generator: torch.Generator
) -> tuple[Tensor, list[float]]:
    """V [n, b] -> R [b, b], orthogonal, that makes |sgn(VR) - VR|^2 small: B = sgn(VR), then the R next to B (orthogonal Procrustes), in turn
    (section 2.2). Also the error of a vector after each turn."""
    bits = projected.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(bits, bits, generator=generator, dtype=torch.float64))
    errors = []
    length = projected.pow(2).sum()
    for _ in range(iterations):
        turned = projected @ rotation
        left, _, right = torch.linalg.svd(projected.T @ torch.where(turned > 0, 1.0, -1.0).double())
        rotation = left @ right
        # |B - VR|^2 = |B|^2 + |V|^2 - 2 <B, VR>, and sgn(VR) is the B for which the last is the sum of |VR|
        errors.append(
            float(
                (projected.numel() + length - 2 * (projected @ rotation).abs().sum())
                / max(len(projected), 1)
            )
        )
    return rotation, errors
