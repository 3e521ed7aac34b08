"""Linear support vector machines, each class against the rest, with the squared hinge loss (LIBLINEAR's L2-loss SVM: Fan et al., JMLR 2008), as R-CNN
fits them to a network's features (Girshick et al., CVPR 2014, section 2.3).

Class k has the weights w over vectors x and a constant feature B, and minimises

    |w|^2 / 2 + cost * sum_i c_i * max(0, 1 - y_i * w @ (x_i, B))^2,    y_i = 1 for label k, else -1,

which is smooth, strongly convex and piecewise quadratic. All classes are solved at once, in f64, by Newton's method with conjugate gradients and an
exact search along each line: every step is a few products of matrices (Keerthi and DeCoste, JMLR 2005).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from maskseg.errors import UserError

NEVER = -1000.0  # the margin of a class of which nothing is known; its sigmoid is 0
_PIECE = 8192  # vectors at a time
_TOLERANCE = 1e-7  # of the gradient, as a share of that at zero
_MOST_STEPS, _MOST_PRODUCTS = 100, 500


@dataclass(frozen=True)
class SVMFit:
    """weight f32 [K, C], bias f32 [K]: the margin of x for class k is weight[k] @ x + bias[k].

    Of each class: the objective; the gradient's length at the end, as a share of that at zero; the positives that were learnt from; error, the share
    of all vectors on the wrong side; missed, that of the positives (0 where there are none). steps: the objectives' sum at zero and after each step.
    """

    weight: Tensor
    bias: Tensor
    objective: list[float]
    gradient: list[float]
    positives: list[int]
    error: list[float]
    missed: list[float]
    steps: list[float] = field(repr=False)

    def numbers(self) -> dict[str, float]:
        """The objectives' sum; error and missed, the means over the classes."""
        classes = max(len(self.objective), 1)
        return {
            "objective": sum(self.objective),
            "error": sum(self.error) / classes,
            "missed": sum(self.missed) / classes,
        }


class OneVsRestSVM:
    """Learns a linear layer's weights from vectors that come in pieces with their labels: a `Fitter` that is told the labels too.

    layer: C -> K. cost: of the losses beside |w|^2 / 2. positive_weight: how much a positive's loss counts beside a negative's. norm: the vectors
    are scaled so that this is the mean of their lengths (R-CNN: 20), all by one number, which goes into the weights. constant: B; a large one leaves
    the bias almost free. names: of the classes, for messages.

    kept: at most so many vectors are learnt from, 4 C bytes each (twice as much while they are put together), and some 50 bytes a class beside. Of
    more, those of classes and of background are drawn evenly, background gives way first, and each then counts for as many as it stands for. The
    result is a function of the vectors, their order and `seed`. A class without positives gets weights that never fire, and a warning.
    """

    def __init__(
        self,
        layer: nn.Linear,
        cost: float = 1e-3,
        positive_weight: float = 2.0,
        norm: float = 20.0,
        constant: float = 10.0,
        kept: int = 200_000,
        seed: int = 0,
        names: Sequence[str] | None = None,
    ) -> None:
        if not min(cost, positive_weight, norm, constant) > 0 or kept < 2:
            told = f"{cost}, {positive_weight}, {norm}, {constant} and {kept}"
            raise UserError(
                f"svm: cost (fit.C), positive_weight, norm and constant must be above 0 and kept at least 2, not {told}"
            )
        self.layer, self.cost, self.positive_weight, self.norm, self.constant, self.kept = (
            layer,
            cost,
            positive_weight,
            norm,
            constant,
            kept,
        )
        self.names = [str(k) for k in range(layer.out_features)] if names is None else list(names)
        self.generator = torch.Generator().manual_seed(seed)
        self.vectors, self.labels = (
            [torch.zeros(0, layer.in_features)],
            [torch.zeros(0, dtype=torch.int64)],
        )
        self.keys, self.held = [torch.zeros(0, dtype=torch.float64)], 0
        self.seen, self.length = (
            [0, 0],
            0.0,
        )  # of classes and of background; the sum of the vectors' lengths
        self.result: SVMFit | None = None

    def update(self, vectors: Tensor, labels: Tensor) -> None:
        """vectors: f32 [n, C]; labels: i64 [n] in 0..K, K background, others are left out. Raises UserError for values that are not finite."""
        background = self.layer.out_features
        known = (labels >= 0) & (labels <= background)
        vectors, labels = vectors.detach()[known].cpu().float(), labels[known].cpu()
        if not bool(torch.isfinite(vectors).all()):
            raise UserError(
                "svm: the features hold values that are not finite; was the model trained, and are its weights whole?"
            )
        negatives = int((labels == background).sum())
        self.seen = [self.seen[0] + len(labels) - negatives, self.seen[1] + negatives]
        self.length += float(vectors.double().norm(dim=1).sum())
        self.vectors.append(vectors)
        self.labels.append(labels)
        self.keys.append(torch.rand(len(labels), generator=self.generator, dtype=torch.float64))
        self.held += len(labels)
        if self.held > self.kept + max(self.kept // 4, _PIECE):
            _ = self.sample

    @property
    def sample(self) -> tuple[Tensor, Tensor]:
        """What is learnt from, in the order in which it came: vectors f32 [n, C] and labels i64 [n].

        Those with the smallest of random keys; as more come, neither quota ever grows again once it has left something out, so nothing is missed.
        """
        labels, keys = torch.cat(self.labels), torch.cat(self.keys)
        self.vectors = [torch.cat(self.vectors)]
        if len(labels) > self.kept:
            groups = [
                torch.nonzero((labels == self.layer.out_features) == is_background).squeeze(1)
                for is_background in (False, True)
            ]
            chosen = [
                rows[keys[rows].argsort()[:quota]]
                for rows, quota in zip(groups, self._quotas(), strict=True)
            ]
            rows = torch.cat(chosen).sort().values
            self.vectors, labels, keys = [self.vectors[0][rows]], labels[rows], keys[rows]
        self.labels, self.keys, self.held = [labels], [keys], len(labels)
        return self.vectors[0], labels

    def _quotas(self) -> tuple[int, int]:
        """How many vectors of classes and of background are kept: background gives way, to no less than half of `kept`."""
        positives = min(self.seen[0], max(self.kept // 2, self.kept - self.seen[1]))
        return positives, min(self.seen[1], self.kept - positives)

    def fit(self) -> None:
        """Writes the weights into the layer. Warns of what cannot be learnt."""
        vectors, labels = self.sample
        positive = labels[:, None] == torch.arange(self.layer.out_features)
        self._warn(vectors, positive.sum(dim=0))
        background = labels == self.layer.out_features
        stands_for = torch.ones(len(labels), dtype=torch.float64)
        for group, seen in zip((~background, background), self.seen, strict=True):
            stands_for[group] = seen / max(int(group.sum()), 1)
        cost = self.cost * stands_for[:, None] * torch.where(positive, self.positive_weight, 1.0)
        scale = self.norm * sum(self.seen) / self.length if self.length > 0 else 1.0
        self.result = solve(vectors, positive, cost, scale, self.constant)
        with torch.no_grad():
            self.layer.weight.copy_(self.result.weight)
            self.layer.bias.copy_(self.result.bias)

    def _warn(self, vectors: Tensor, positives: Tensor) -> None:
        """Tells of classes and vectors that nothing can be learnt from. positives: of each class."""
        for name, count in zip(self.names, positives.tolist(), strict=True):
            if not count:
                warnings.warn(f"svm: no positives for {name}; it never fires", stacklevel=3)
            elif count == len(vectors):
                warnings.warn(
                    f"svm: nothing but positives for {name}; nothing says what it is not",
                    stacklevel=3,
                )
        if len(vectors) > 1 and bool((vectors == vectors[0]).all()):
            warnings.warn(
                "svm: all feature vectors are the same; nothing in them tells the classes apart",
                stacklevel=3,
            )


def solve(vectors: Tensor, positive: Tensor, cost: Tensor, scale: float, constant: float) -> SVMFit:
    """vectors f32 [n, C], times `scale`; positive: bool [n, K]; cost: f64 [n, K], of each vector's loss for each class; constant: B."""
    rows, signs = _Rows(vectors, scale, constant), torch.where(positive, 1.0, -1.0).double()
    positives = positive.sum(dim=0)
    cost = cost * (positives > 0)  # without any, the weights are zeros
    found, margins, lengths, steps = _newton(rows, signs, cost)
    margins[:, positives == 0] = NEVER
    objective = _objective(found, margins, signs, cost)
    bias = torch.where(positives == 0, NEVER, constant * found[:, -1])
    wrong = (margins > 0) != positive
    missed = (wrong & positive).sum(dim=0).double() / positives.clamp(min=1)
    return SVMFit(
        (scale * found[:, :-1]).float(),
        bias.float(),
        objective.tolist(),
        lengths.tolist(),
        positives.tolist(),
        (wrong.sum(dim=0).double() / max(len(vectors), 1)).tolist(),
        missed.tolist(),
        steps,
    )


class _Rows:
    """The vectors, scaled, and the constant behind them: a matrix [n, C + 1] in f64 that is never whole in memory."""

    def __init__(self, vectors: Tensor, scale: float, constant: float) -> None:
        self.vectors, self.scale, self.constant = vectors, scale, constant

    def exact(self, piece: Tensor) -> Tensor:
        """[m, C] -> f64 [m, C + 1]."""
        return torch.cat(
            [
                self.scale * piece.double(),
                torch.full((len(piece), 1), self.constant, dtype=torch.float64),
            ],
            dim=1,
        )

    def margins(self, weight: Tensor) -> Tensor:
        """[k, C + 1] -> [n, k]."""
        return torch.cat(
            [self.exact(piece) @ weight.T for piece in torch.split(self.vectors, _PIECE)]
        )

    def sums(self, values: Tensor) -> Tensor:
        """The rows' sums with the values [n, k] as weights: [k, C + 1]."""
        out = torch.zeros((values.shape[1], self.vectors.shape[1] + 1), dtype=torch.float64)
        for piece, part in zip(
            torch.split(self.vectors, _PIECE), torch.split(values, _PIECE), strict=True
        ):
            own = part.any(dim=1)  # most vectors have no loss
            out += part[own].T @ self.exact(piece[own])
        return out

    def curvature(self, active: Tensor, weight: Tensor) -> Tensor:
        """The Hessian's products with weight [k, C + 1]; active: [n, k], the costs of the vectors that have a loss, else 0."""
        out = weight.clone()
        for piece, part in zip(
            torch.split(self.vectors, _PIECE), torch.split(active, _PIECE), strict=True
        ):
            own = part.any(dim=1)
            rows = self.exact(piece[own])
            out += (2 * part[own] * (rows @ weight.T)).T @ rows
        return out


def _newton(rows: _Rows, signs: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor, list[float]]:
    """-> weights [K, C + 1], their margins [n, K], the gradients' lengths [K] as shares of those at zero, the objectives' sum after each step."""
    weight = torch.zeros((signs.shape[1], rows.vectors.shape[1] + 1), dtype=torch.float64)
    margins, steps = torch.zeros_like(cost), list[float]()
    first = torch.zeros(0)
    while True:
        slack = (1 - signs * margins).clamp(min=0)
        gradient = weight - rows.sums(2 * cost * signs * slack)
        first = gradient.norm(dim=1) if not steps else first
        size = torch.where(first > 0, gradient.norm(dim=1) / first, 0.0)
        steps.append(float(_objective(weight, margins, signs, cost).sum()))
        todo = torch.nonzero(size > _TOLERANCE).squeeze(1)
        if not len(todo) or len(steps) > _MOST_STEPS:
            break
        own_signs, own_cost = signs[:, todo], cost[:, todo]
        step = _conjugate_gradients(
            rows, own_cost * (slack[:, todo] > 0), -gradient[todo], size[todo].sqrt().clamp(max=0.1)
        )
        along = rows.margins(step)
        length = _exact_length(weight[todo], step, margins[:, todo], along, own_signs, own_cost)
        weight[todo] += length[:, None] * step
        margins[:, todo] += length * along
    if len(todo):
        warnings.warn(
            f"svm: after {_MOST_STEPS} steps the largest gradient is still {float(size.max()):.2g} of that at zero",
            stacklevel=5,
        )
    return weight, margins, size, steps


def _objective(weight: Tensor, margins: Tensor, signs: Tensor, cost: Tensor) -> Tensor:
    """Of each class, f64 [K]."""
    return weight.square().sum(dim=1) / 2 + (
        cost * (1 - signs * margins).clamp(min=0).square()
    ).sum(dim=0)


def _conjugate_gradients(rows: _Rows, active: Tensor, target: Tensor, tolerance: Tensor) -> Tensor:
    """Solves Hessian @ x = target for each row [k, C + 1], to a remainder of `tolerance` [k] of the target's length."""
    found, rest, search = torch.zeros_like(target), target.clone(), target.clone()
    power = rest.square().sum(dim=1)
    goal = power * tolerance.square()
    for _ in range(_MOST_PRODUCTS):
        moving = power > goal
        if not moving.any():
            break
        product = rows.curvature(active, search)
        # never 0 while it moves: the Hessian is the identity and more
        step = torch.where(
            moving, power / torch.where(moving, (search * product).sum(dim=1), 1.0), 0.0
        )[:, None]
        found += step * search
        rest -= step * product
        after = rest.square().sum(dim=1)
        search = rest + (after / torch.where(moving, power, 1.0))[:, None] * search
        power = after
    return found


def _exact_length(
    weight: Tensor, step: Tensor, margins: Tensor, along: Tensor, signs: Tensor, cost: Tensor
) -> Tensor:
    """How far to go along each step [k]: where the slope is 0. It is piecewise linear and rises: Newton's method, within a bracket that shrinks."""
    linear, square = (weight * step).sum(dim=1), step.square().sum(dim=1)
    length, low, high = (
        torch.ones_like(linear),
        torch.zeros_like(linear),
        torch.full_like(linear, torch.inf),
    )
    start = linear - (2 * cost * signs * along * (1 - signs * margins).clamp(min=0)).sum(dim=0)
    for _ in range(_MOST_STEPS):
        slack = (1 - signs * (margins + length * along)).clamp(min=0)
        slope = linear + length * square - (2 * cost * signs * along * slack).sum(dim=0)
        there = slope.abs() <= _TOLERANCE * start.abs()
        if there.all():
            break
        low, high = torch.where(slope < 0, length, low), torch.where(slope > 0, length, high)
        newton = length - slope / (square + (2 * cost * along.square() * (slack > 0)).sum(dim=0))
        inside = (newton > low) & (newton < high)
        halfway = torch.where(high.isinf(), 2 * length, (low + high) / 2)
        length = torch.where(there, length, torch.where(inside, newton, halfway))
    return length
