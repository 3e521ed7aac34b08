"""Iterative quantization (ITQ): a projection to binary codes that preserves similarity.

Gong and Lazebnik, "Iterative Quantization: A Procrustean Approach to Learning Binary Codes",
CVPR 2011.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskseg.errors import UserError
from maskseg.variants.hash.codes import code_statistics
from maskseg.variants.hash.layer import HashLayer

CHUNK_SIZE = 8192  # vectors processed at a time
# A direction whose variance is below this fraction of the largest variance, or of the vectors'
# mean square, contains rounding errors only.
_RANK_TOLERANCE = 1e-10
_ROUNDING_TOLERANCE = 1e-13


@dataclass(frozen=True)
class ITQResult:
    """A learned projection.

    weight: [b, C] f32, bias: [b] f32. Bit i of the code of x is weight[i] @ x + bias[i] > 0; mean
    subtraction, PCA and rotation are folded into them.
    errors: mean of |sgn(VR) - VR|^2 per vector (eq. 2) after each iteration, V scaled to unit
    standard deviation.
    bits: codes of the vectors that the rotation was learned from, bool [n, b].
    """

    weight: Tensor
    bias: Tensor
    errors: list[float] = field(repr=False)
    bits: Tensor = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """The final quantization error, and the statistics of the codes (`code_statistics`)."""
        return {"quantisation_error": self.errors[-1], **code_statistics(self.bits)}


class ITQ:
    """Learns the weights of a hash layer from feature vectors that arrive in chunks.

    Mean and covariance are accumulated over all vectors in f64. The rotation is learned from a
    uniform random sample of at most `max_samples` vectors. Memory is therefore independent of the
    number of vectors: C x C plus max_samples x C values. The result depends only on the vectors,
    their order and `seed`.

    Fewer vectors than bits, or vectors that span fewer directions than bits, cause a warning:
    some bits are then redundant.
    """

    def __init__(
        self, layer: HashLayer, max_samples: int = 50_000, iterations: int = 50, seed: int = 0
    ) -> None:
        if max_samples < 1 or iterations < 1:
            raise UserError(
                "itq: max_samples and iterations must be at least 1, "
                f"got {max_samples} and {iterations}"
            )
        self.layer = layer
        self.max_samples = max_samples
        self.iterations = iterations
        self.generator = torch.Generator().manual_seed(seed)
        channels = layer.conv.in_channels
        self.count = 0
        self.sum = torch.zeros(channels, dtype=torch.float64)
        self.outer = torch.zeros(channels, channels, dtype=torch.float64)
        self.chunks = [torch.zeros(0, channels)]
        self.sort_keys = [torch.zeros(0, dtype=torch.float64)]
        self.num_held = 0
        self.result: ITQResult | None = None

    def update(self, vectors: Tensor) -> None:
        """Add vectors, f32 [n, C], as returned by `HashLayer.vectors`.

        Raises UserError for values that are not finite.
        """
        for chunk in torch.split(vectors.detach().cpu().float(), CHUNK_SIZE):
            exact = chunk.double()
            if not bool(torch.isfinite(exact).all()):
                raise UserError(
                    "itq: the features contain values that are not finite; was the backbone "
                    "trained, and are its weights complete?"
                )
            self.count += len(chunk)
            self.sum += exact.sum(dim=0)
            self.outer += exact.T @ exact
            self._sample(chunk)

    def _sample(self, chunk: Tensor) -> None:
        """Reservoir sampling: the vectors with the smallest random keys are a uniform sample."""
        self.chunks.append(chunk)
        self.sort_keys.append(torch.rand(len(chunk), generator=self.generator, dtype=torch.float64))
        self.num_held += len(chunk)
        # Trimming costs a sort, so it happens only once enough surplus has accumulated.
        if self.num_held > self.max_samples + max(self.max_samples // 4, CHUNK_SIZE):
            _ = self.reservoir

    @property
    def reservoir(self) -> Tensor:
        """The sampled vectors, f32 [n, C], in the order of their arrival."""
        vectors = torch.cat(self.chunks)
        keys = torch.cat(self.sort_keys)
        if len(keys) > self.max_samples:
            kept = keys.argsort()[: self.max_samples].sort().values
            vectors = vectors[kept]
            keys = keys[kept]
        self.chunks = [vectors]
        self.sort_keys = [keys]
        self.num_held = len(keys)
        return vectors

    def fit(self) -> None:
        """Learn the projection and write it into the layer. Raises UserError without vectors."""
        if not self.count:
            raise UserError("itq: there is no feature vector to learn from")
        mean = self.sum / self.count
        covariance = self.outer / self.count - mean[:, None] * mean
        self.result = solve(
            self.reservoir,
            mean,
            covariance,
            self.layer.bits,
            self.iterations,
            self.generator,
            self.count,
        )
        self.layer.set_weights(self.result.weight, self.result.bias)


def solve(
    sample: Tensor,
    mean: Tensor,
    covariance: Tensor,
    bits: int,
    iterations: int,
    generator: torch.Generator,
    count: int,
) -> ITQResult:
    """PCA of the covariance to `bits` directions, then the rotation with least quantization error.

    sample: [n, C]; mean: [C]; covariance: [C, C]; count: number of vectors behind mean and
    covariance.
    """
    mean_square = float(covariance.trace() + mean @ mean)
    directions, rank = _principal_directions(covariance, bits, mean_square)
    if count < bits or rank < bits:
        if count < bits:
            cause = f"{count} feature vectors"
        else:
            cause = f"feature vectors that span {rank} directions"
        warnings.warn(
            f"itq: {bits} bits from {cause}; some bits are redundant, fewer bits would do",
            stacklevel=3,
        )
    projected = torch.cat(
        [(chunk.double() - mean) @ directions for chunk in torch.split(sample, CHUNK_SIZE)]
    )
    deviation = projected.pow(2).mean().sqrt()
    scale = 1 / float(deviation) if float(deviation) > 0 else 1.0
    rotation, errors = fit_rotation(projected * scale, iterations, generator)
    weight = (directions @ rotation * scale).T
    bias = (-weight @ mean).float()
    weight = weight.float()
    return ITQResult(weight, bias, errors, sample @ weight.T + bias > 0)


def _principal_directions(covariance: Tensor, bits: int, mean_square: float) -> tuple[Tensor, int]:
    """The directions of largest variance, f64 [C, bits], and how many have non-zero variance.

    Directions without variance, and those beyond C, are zeros. mean_square: of the vectors.
    """
    variance, directions = torch.linalg.eigh(covariance)
    variance = variance.flip(0)[:bits]
    directions = directions.flip(1)[:, :bits]
    significant = variance > max(
        _RANK_TOLERANCE * float(variance[0]), _ROUNDING_TOLERANCE * mean_square
    )
    padded = torch.zeros(len(covariance), bits, dtype=torch.float64)
    padded[:, : len(variance)] = directions * significant
    return padded, int(significant.sum())


def fit_rotation(
    projected: Tensor, iterations: int, generator: torch.Generator
) -> tuple[Tensor, list[float]]:
    """Find an orthogonal R [b, b] that makes |sgn(VR) - VR|^2 small for V = projected [n, b].

    Alternates B = sgn(VR) and the orthogonal Procrustes problem for R (section 2.2). Returns R and
    the mean error per vector after each iteration.
    """
    bits = projected.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(bits, bits, generator=generator, dtype=torch.float64))
    errors = []
    squared_norm = projected.pow(2).sum()
    for _ in range(iterations):
        rotated = projected @ rotation
        signs = torch.where(rotated > 0, 1.0, -1.0).double()
        left, _, right = torch.linalg.svd(projected.T @ signs)
        rotation = left @ right
        # |B - VR|^2 = |B|^2 + |V|^2 - 2 <B, VR>, and for B = sgn(VR) the product is sum |VR|.
        product = (projected @ rotation).abs().sum()
        error = (projected.numel() + squared_norm - 2 * product) / max(len(projected), 1)
        errors.append(float(error))
    return rotation, errors
