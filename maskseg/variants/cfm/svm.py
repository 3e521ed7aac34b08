"""Linear one-vs-rest support vector machines with squared hinge loss.

LIBLINEAR's L2-regularized L2-loss SVM (Fan et al., JMLR 2008), fitted to the features of a network
as in R-CNN (Girshick et al., CVPR 2014, section 2.3).

Class k has the weights w over the vectors x and a constant feature B, and minimizes

    |w|^2 / 2 + cost * sum_i c_i * max(0, 1 - y_i * w @ (x_i, B))^2,   y_i = 1 for label k, else -1,

which is smooth, strongly convex and piecewise quadratic. All classes are solved at once in float64,
by Newton's method with conjugate gradients and an exact line search: every step is a few matrix
products (Keerthi and DeCoste, JMLR 2005).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maskseg.errors import UserError

ABSENT_MARGIN = -1000.0  # margin of a class without positives; its sigmoid is 0
_CHUNK_ROWS = 8192  # vectors per block
_TOLERANCE = 1e-7  # of the gradient, relative to the gradient at zero
_MAX_STEPS = 100
_MAX_PRODUCTS = 500


@dataclass(frozen=True)
class SVMFit:
    """The result of a fit. The margin of x for class k is weight[k] @ x + bias[k].

    weight: f32 [K, C]; bias: f32 [K].
    objective: by class.
    gradient: by class, the final norm of the gradient relative to that at zero.
    positives: by class, the number of positives in the fit.
    error: by class, the share of all vectors on the wrong side.
    missed: by class, the share of positives on the wrong side; 0 if there are none.
    steps: the sum of the objectives at zero and after each step.
    """

    weight: Tensor
    bias: Tensor
    objective: list[float]
    gradient: list[float]
    positives: list[int]
    error: list[float]
    missed: list[float]
    steps: list[float] = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """Return the sum of the objectives, and the means of error and missed over the classes."""
        classes = max(len(self.objective), 1)
        return {
            "objective": sum(self.objective),
            "error": sum(self.error) / classes,
            "missed": sum(self.missed) / classes,
        }


class OneVsRestSVM:
    """Fit the weights of a linear layer to vectors and labels that arrive in batches.

    The result is a function of the vectors, their order and `seed`. A class without positives gets
    weights that never fire, and a warning.

    layer: C -> K.
    cost: of the losses, relative to |w|^2 / 2.
    positive_weight: weight of a positive's loss relative to a negative's.
    norm: the vectors are scaled to this mean norm (R-CNN: 20), all by one factor, which is folded
        into the weights.
    intercept_scaling: the constant feature B; a large one leaves the bias almost unregularized.
    max_samples: at most this many vectors are used, 4 C bytes each (twice as much while they are
        concatenated), and some 50 bytes per class beside. Of more, those of classes and of
        background are sampled uniformly, background gives way first, and each sampled vector is
        weighted by the number of vectors that it represents.
    names: of the classes, for messages.

    Raises UserError for arguments out of range.
    """

    def __init__(
        self,
        layer: nn.Linear,
        cost: float = 1e-3,
        positive_weight: float = 2.0,
        norm: float = 20.0,
        intercept_scaling: float = 10.0,
        max_samples: int = 200_000,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        if not min(cost, positive_weight, norm, intercept_scaling) > 0 or max_samples < 2:
            raise UserError(
                "svm: cost (fit.C), positive_weight, norm and intercept_scaling must be above 0 and"
                f" max_samples at least 2, not {cost}, {positive_weight}, {norm},"
                f" {intercept_scaling} and {max_samples}"
            )
        self.layer = layer
        self.cost = cost
        self.positive_weight = positive_weight
        self.norm = norm
        self.intercept_scaling = intercept_scaling
        self.max_samples = max_samples
        self.names = [str(k) for k in range(layer.out_features)] if names is None else list(names)
        self.generator = torch.Generator().manual_seed(seed)
        # The reservoir, in the batches in which it came.
        self.vectors = [torch.zeros(0, layer.in_features)]
        self.labels = [torch.zeros(0, dtype=torch.int64)]
        self.keys = [torch.zeros(0, dtype=torch.float64)]
        self.held = 0
        # Of all vectors so far: the numbers with labels of classes and of background, and the sum
        # of the norms.
        self.seen = [0, 0]
        self.length = 0.0
        self.result: SVMFit | None = None

    def update(self, vectors: Tensor, labels: Tensor) -> None:
        """Add a batch.

        vectors: f32 [n, C]; labels: i64 [n] in 0..K, K is background; others are dropped.

        Raises UserError for values that are not finite.
        """
        background = self.layer.out_features
        is_valid = (labels >= 0) & (labels <= background)
        vectors = vectors.detach()[is_valid].cpu().float()
        labels = labels[is_valid].cpu()
        if not bool(torch.isfinite(vectors).all()):
            raise UserError(
                "svm: the features contain values that are not finite; was the model trained, and"
                " are its weights intact?"
            )
        negatives = int((labels == background).sum())
        self.seen = [self.seen[0] + len(labels) - negatives, self.seen[1] + negatives]
        self.length += float(vectors.double().norm(dim=1).sum())
        self.vectors.append(vectors)
        self.labels.append(labels)
        self.keys.append(torch.rand(len(labels), generator=self.generator, dtype=torch.float64))
        self.held += len(labels)
        if self.held > self.max_samples + max(self.max_samples // 4, _CHUNK_ROWS):
            self.reservoir()

    def reservoir(self) -> tuple[Tensor, Tensor]:
        """Reduce the vectors to those that the fit uses, and return them in order of arrival.

        The sample consists of the vectors with the smallest random keys. Once a quota has excluded
        a vector, it never grows again, so the sample is the same as one of all vectors at once.

        -> vectors f32 [n, C] and labels i64 [n].
        """
        labels = torch.cat(self.labels)
        keys = torch.cat(self.keys)
        self.vectors = [torch.cat(self.vectors)]
        if len(labels) > self.max_samples:
            is_background = labels == self.layer.out_features
            chosen = []
            for in_group, quota in zip(
                (~is_background, is_background), self._quotas(), strict=True
            ):
                rows = torch.nonzero(in_group).squeeze(1)
                chosen.append(rows[keys[rows].argsort()[:quota]])
            rows = torch.cat(chosen).sort().values
            self.vectors = [self.vectors[0][rows]]
            labels = labels[rows]
            keys = keys[rows]
        self.labels = [labels]
        self.keys = [keys]
        self.held = len(labels)
        return self.vectors[0], labels

    def _quotas(self) -> tuple[int, int]:
        """Return how many vectors of classes and of background are used.

        Background gives way, to no less than half of `max_samples`.
        """
        limit = self.max_samples
        positives = min(self.seen[0], max(limit // 2, limit - self.seen[1]))
        return positives, min(self.seen[1], limit - positives)

    def fit(self) -> None:
        """Solve, and write the weights into the layer. Warns of classes that cannot be learned."""
        vectors, labels = self.reservoir()
        positive = labels[:, None] == torch.arange(self.layer.out_features)
        self._warn(vectors, positive.sum(dim=0))
        is_background = labels == self.layer.out_features
        # How many vectors each sampled vector represents.
        represented = torch.ones(len(labels), dtype=torch.float64)
        for in_group, seen in zip((~is_background, is_background), self.seen, strict=True):
            represented[in_group] = seen / max(int(in_group.sum()), 1)
        cost = self.cost * represented[:, None] * torch.where(positive, self.positive_weight, 1.0)
        scale = self.norm * sum(self.seen) / self.length if self.length > 0 else 1.0
        self.result = solve(vectors, positive, cost, scale, self.intercept_scaling)
        with torch.no_grad():
            self.layer.weight.copy_(self.result.weight)
            self.layer.bias.copy_(self.result.bias)

    def _warn(self, vectors: Tensor, positives: Tensor) -> None:
        """Warn of classes and vectors that nothing can be learned from.

        positives: i64 [K], the number of positives of each class.
        """
        for name, count in zip(self.names, positives.tolist(), strict=True):
            if not count:
                warnings.warn(f"svm: no positives for {name}; it never fires", stacklevel=3)
            elif count == len(vectors):
                warnings.warn(
                    f"svm: only positives for {name}; there are no negatives to learn from",
                    stacklevel=3,
                )
        if len(vectors) > 1 and bool((vectors == vectors[0]).all()):
            warnings.warn(
                "svm: all feature vectors are equal; the classes cannot be told apart", stacklevel=3
            )


def solve(
    vectors: Tensor, positive: Tensor, cost: Tensor, scale: float, intercept_scaling: float
) -> SVMFit:
    """Solve for all classes.

    vectors: f32 [n, C], multiplied by `scale`; positive: bool [n, K]; cost: f64 [n, K], of each
    vector's loss for each class; intercept_scaling: the constant feature B.
    """
    rows = _AugmentedRows(vectors, scale, intercept_scaling)
    signs = torch.where(positive, 1.0, -1.0).double()
    positives = positive.sum(dim=0)
    is_absent = positives == 0
    # Without losses, the weights of classes without positives are zero.
    cost = cost * (positives > 0)
    weight, margins, gradient, steps = _minimize(rows, signs, cost)
    margins[:, is_absent] = ABSENT_MARGIN
    objective = _objective(weight, margins, signs, cost)
    bias = torch.where(is_absent, ABSENT_MARGIN, intercept_scaling * weight[:, -1])
    is_wrong = (margins > 0) != positive
    error = is_wrong.sum(dim=0).double() / max(len(vectors), 1)
    missed = (is_wrong & positive).sum(dim=0).double() / positives.clamp(min=1)
    return SVMFit(
        weight=(scale * weight[:, :-1]).float(),
        bias=bias.float(),
        objective=objective.tolist(),
        gradient=gradient.tolist(),
        positives=positives.tolist(),
        error=error.tolist(),
        missed=missed.tolist(),
        steps=steps,
    )


class _AugmentedRows:
    """The scaled vectors with the constant feature appended: a matrix f64 [n, C + 1].

    It is never held in memory as a whole.
    """

    def __init__(self, vectors: Tensor, scale: float, intercept_scaling: float) -> None:
        self.vectors = vectors
        self.scale = scale
        self.intercept_scaling = intercept_scaling

    def augment(self, chunk: Tensor) -> Tensor:
        """Scale and augment vectors: [m, C] -> f64 [m, C + 1]."""
        constant = torch.full((len(chunk), 1), self.intercept_scaling, dtype=torch.float64)
        return torch.cat([self.scale * chunk.double(), constant], dim=1)

    def margins(self, weight: Tensor) -> Tensor:
        """Multiply the matrix with weights [k, C + 1]: [n, k]."""
        chunks = torch.split(self.vectors, _CHUNK_ROWS)
        return torch.cat([self.augment(chunk) @ weight.T for chunk in chunks])

    def weighted_sums(self, values: Tensor) -> Tensor:
        """Sum the rows, weighted by values [n, k]: [k, C + 1]."""
        out = torch.zeros((values.shape[1], self.vectors.shape[1] + 1), dtype=torch.float64)
        chunks = torch.split(self.vectors, _CHUNK_ROWS)
        for chunk, part in zip(chunks, torch.split(values, _CHUNK_ROWS), strict=True):
            used = part.any(dim=1)  # most vectors have no loss
            out += part[used].T @ self.augment(chunk[used])
        return out

    def hessian_product(self, active: Tensor, weight: Tensor) -> Tensor:
        """Multiply the Hessian with weights [k, C + 1].

        active: [n, k], the costs of the vectors that have a loss, else 0.
        """
        out = weight.clone()
        chunks = torch.split(self.vectors, _CHUNK_ROWS)
        for chunk, part in zip(chunks, torch.split(active, _CHUNK_ROWS), strict=True):
            used = part.any(dim=1)
            rows = self.augment(chunk[used])
            out += (2 * part[used] * (rows @ weight.T)).T @ rows
        return out


def _minimize(
    rows: _AugmentedRows, signs: Tensor, cost: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """Minimize all objectives by Newton's method.

    -> weights [K, C + 1], their margins [n, K], the norms of the gradients [K] relative to those at
    zero, and the sum of the objectives at zero and after each step.
    """
    weight = torch.zeros((signs.shape[1], rows.vectors.shape[1] + 1), dtype=torch.float64)
    margins = torch.zeros_like(cost)
    steps: list[float] = []
    first_norm = torch.zeros(0)
    while True:
        slack = (1 - signs * margins).clamp(min=0)
        gradient = weight - rows.weighted_sums(2 * cost * signs * slack)
        norm = gradient.norm(dim=1)
        if not steps:
            first_norm = norm
        relative = torch.where(first_norm > 0, norm / first_norm, 0.0)
        steps.append(float(_objective(weight, margins, signs, cost).sum()))
        todo = torch.nonzero(relative > _TOLERANCE).squeeze(1)
        if not len(todo) or len(steps) > _MAX_STEPS:
            break
        todo_signs = signs[:, todo]
        todo_cost = cost[:, todo]
        active = todo_cost * (slack[:, todo] > 0)
        tolerance = relative[todo].sqrt().clamp(max=0.1)
        step = _conjugate_gradients(rows, active, -gradient[todo], tolerance)
        step_margins = rows.margins(step)
        length = _line_search(
            weight[todo], step, margins[:, todo], step_margins, todo_signs, todo_cost
        )
        weight[todo] += length[:, None] * step
        margins[:, todo] += length * step_margins
    if len(todo):
        warnings.warn(
            f"svm: after {_MAX_STEPS} steps, the largest gradient is still"
            f" {float(relative.max()):.2g} of that at zero",
            stacklevel=5,
        )
    return weight, margins, relative, steps


def _objective(weight: Tensor, margins: Tensor, signs: Tensor, cost: Tensor) -> Tensor:
    """Compute the objective of each class, f64 [K]."""
    losses = cost * (1 - signs * margins).clamp(min=0).square()
    return weight.square().sum(dim=1) / 2 + losses.sum(dim=0)


def _conjugate_gradients(
    rows: _AugmentedRows, active: Tensor, target: Tensor, tolerance: Tensor
) -> Tensor:
    """Solve Hessian @ x = target for each row [k, C + 1].

    tolerance: [k], the norm of the residual at which a row stops, relative to that of the target.
    """
    solution = torch.zeros_like(target)
    residual = target.clone()
    direction = target.clone()
    power = residual.square().sum(dim=1)
    goal = power * tolerance.square()
    for _ in range(_MAX_PRODUCTS):
        moving = power > goal
        if not moving.any():
            break
        product = rows.hessian_product(active, direction)
        # Not 0 for a moving row: the Hessian is the identity plus a positive semidefinite matrix.
        curvature = torch.where(moving, (direction * product).sum(dim=1), 1.0)
        step = torch.where(moving, power / curvature, 0.0)[:, None]
        solution += step * direction
        residual -= step * product
        new_power = residual.square().sum(dim=1)
        direction = residual + (new_power / torch.where(moving, power, 1.0))[:, None] * direction
        power = new_power
    return solution


def _line_search(
    weight: Tensor,
    step: Tensor,
    margins: Tensor,
    step_margins: Tensor,
    signs: Tensor,
    cost: Tensor,
) -> Tensor:
    """Find the length [k] of each step at which the slope of the objective is 0.

    The slope is piecewise linear and increasing: Newton's method, within a shrinking bracket.
    """
    linear = (weight * step).sum(dim=1)
    square = step.square().sum(dim=1)
    length = torch.ones_like(linear)
    low = torch.zeros_like(linear)
    high = torch.full_like(linear, torch.inf)
    slack_at_zero = (1 - signs * margins).clamp(min=0)
    slope_at_zero = linear - (2 * cost * signs * step_margins * slack_at_zero).sum(dim=0)
    for _ in range(_MAX_STEPS):
        slack = (1 - signs * (margins + length * step_margins)).clamp(min=0)
        slope = linear + length * square - (2 * cost * signs * step_margins * slack).sum(dim=0)
        is_done = slope.abs() <= _TOLERANCE * slope_at_zero.abs()
        if is_done.all():
            break
        low = torch.where(slope < 0, length, low)
        high = torch.where(slope > 0, length, high)
        curvature = square + (2 * cost * step_margins.square() * (slack > 0)).sum(dim=0)
        newton = length - slope / curvature
        in_bracket = (newton > low) & (newton < high)
        halfway = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        length = torch.where(is_done, length, torch.where(in_bracket, newton, halfway))
    return length
