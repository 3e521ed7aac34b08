"""The classifier of Mask R-CNN: class scores and box refinement of each region."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.models.interfaces import Pooler
from maskseg.models.layers.norms import conv
from maskseg.ops import boxes as box_ops
from maskseg.ops.losses import mean_count, smooth_l1_sum
from maskseg.ops.nms import best, nms_per_group, top_per_group
from maskseg.structures import Features, Losses, Regions, Samples

MANY = 256  # regions from which on a convolution costs less
PAIR = 64  # (region, class) pairs whose deltas cost as much in one product as a pair costs by itself, with weights that are gathered for it
AT_ONCE = 512  # pairs that are gathered together
FIRST, MORE = (
    16,
    8,
)  # candidates a detection that suppression looks at first; how many times as many where they are not enough


class FCTrunk(nn.Module):
    """3x3 convolutions (none in Mask R-CNN; torchvision's v2 models have 4 with BN), then fully connected layers, over pooled features."""

    def __init__(
        self,
        in_channels: int = 256,
        size: int = 7,
        width: int = 1024,
        layers: int = 2,
        convs: int = 0,
        channels: int = 256,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(
                conv(in_channels if i == 0 else channels, channels, 3, norm, relu=True)
                for i in range(convs)
            )
        )
        for module in self.convs.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.inputs = channels if convs else in_channels, size
        linear = [
            nn.Linear(n, width) for n in [self.inputs[0] * size * size] + [width] * (layers - 1)
        ]
        for layer in linear:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(linear)
        self.width = width

    def fused(self) -> FCTrunk:
        """This trunk, its first linear layer as a convolution over all cells: it reads channels-last features without a copy."""
        linear = self.layers[0]
        assert isinstance(linear, nn.Linear)
        channels, size = self.inputs
        with torch.device("meta"):
            convolution = nn.Conv2d(channels, linear.out_features, size).eval()
        convolution.weight = nn.Parameter(
            linear.weight.view_as(convolution.weight), requires_grad=False
        )
        convolution.bias = linear.bias
        self.layers[0] = convolution
        return self

    def forward(self, pooled: Tensor) -> Tensor:
        """[R, C, size, size] -> [R, width]."""
        x = F.relu(self._first(self.convs(pooled)))
        for layer in list(self.layers)[1:]:
            x = F.relu(layer(x))
        return x

    def _first(self, pooled: Tensor) -> Tensor:
        """[R, C, size, size] -> [R, width]."""
        layer = self.layers[0]
        if isinstance(layer, nn.Conv2d):  # as `folding` makes it
            return cast(Tensor, layer(pooled)).flatten(1)
        if (
            len(pooled) >= MANY
            and pooled.device.type == "cpu"
            and pooled.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
        ):
            # The same sum as a convolution: oneDNN's kernels are up to three times as fast as BLAS' on processors that are not Intel's.
            return F.conv2d(
                pooled,
                cast(Tensor, layer.weight).view(-1, *pooled.shape[1:]),
                cast(Tensor, layer.bias),
            ).flatten(1)
        return cast(Tensor, layer(pooled.flatten(1)))


class BoxClassifier(nn.Module):
    """Softmax over K classes and background, box deltas by class (or one for all: `class_agnostic`).

    box_weights: of dx, dy, dw, dh. beta: of the smooth L1 loss (1/9 in torchvision, 0 in detectron2); both losses are divided by the number of
    regions. Inference: classes with a score above `score_threshold` -> refined, clipped boxes with both sides of at least `min_size` pixels
    (1e-2 in torchvision, any in detectron2) -> NMS within a class -> the best `max_detections` of an image.
    """

    def __init__(
        self,
        pooler: nn.Module,
        trunk: FCTrunk,
        num_classes: int,
        class_agnostic: bool = False,
        box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        beta: float = 0.0,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
        min_size: float = 0.0,
    ) -> None:
        super().__init__()
        self.pooler, self.trunk, self.num_classes = pooler, trunk, num_classes
        self.scores = nn.Linear(trunk.width, num_classes + 1)
        self.deltas = nn.Linear(trunk.width, 4 * (1 if class_agnostic else num_classes))
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.scores.bias)
        nn.init.zeros_(self.deltas.bias)
        a, b, c, d = box_weights
        self.box_weights, self.beta = (float(a), float(b), float(c), float(d)), beta
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.max_detections, self.min_size = max_detections, min_size

    def forward(
        self, features: Features, boxes: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> class logits f32 [R, K + 1] (background last), deltas f32 [R, K or 1, 4]."""
        x = self.trunk(cast(Pooler, self.pooler)(features, boxes, image_index))
        return self.scores(x).float(), self._all_deltas(x)

    def losses(self, features: Features, samples: Samples) -> Losses:
        """`box_class` and `box_regression`."""
        x = self.trunk(cast(Pooler, self.pooler)(features, samples.boxes, samples.image_index))
        logits = self.scores(x).float()
        divisor = mean_count(len(samples), logits)
        foreground = torch.nonzero(samples.labels < self.num_classes).squeeze(1)
        deltas = self._deltas(x, foreground, samples.labels[foreground])
        truth = samples.targets.boxes[samples.matched[foreground]]
        wanted = box_ops.encode(truth, samples.boxes[foreground], self.box_weights)
        return {
            "box_class": F.cross_entropy(logits, samples.labels, reduction="sum") / divisor,
            "box_regression": smooth_l1_sum(deltas, wanted, self.beta) / divisor,
        }

    def predict(self, features: Features, proposals: Regions, sizes: Tensor) -> Regions:
        """Every class of a region is a candidate with a box of its own.

        With many classes and a low threshold there are a million of them, of which the best few thousand decide: a worse candidate suppresses no
        better one. Where they leave an image short of detections, more are looked at, until the result is that of all.
        """
        x = self.trunk(cast(Pooler, self.pooler)(features, proposals.boxes, proposals.image_index))
        scores = self.scores(x).float().softmax(dim=1)[:, :-1]
        row, label = torch.nonzero(scores > self.score_threshold).unbind(1)
        score, image = scores[row, label], proposals.image_index[row]
        number = FIRST * max(1, self.max_detections) * len(sizes)
        while True:
            some = best(score, number)
            found = self._detections(x, proposals, sizes, row[some], label[some], score[some])
            if len(some) == len(score):
                return found
            kept, looked_at, all_ = (
                torch.bincount(i, minlength=len(sizes))
                for i in (found.image_index, image[some], image)
            )
            if bool(((kept == self.max_detections) | (looked_at == all_)).all()):
                return found
            number *= MORE

    def _detections(
        self,
        x: Tensor,
        proposals: Regions,
        sizes: Tensor,
        row: Tensor,
        label: Tensor,
        score: Tensor,
    ) -> Regions:
        """Candidates (the proposal and the class of each, i64 [n], its score) -> those that are left, the best first within an image."""
        image = proposals.image_index[row]
        boxes = box_ops.clip(
            box_ops.decode(self._deltas(x, row, label), proposals.boxes[row], self.box_weights),
            sizes[image],
        )
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = torch.nonzero((sides > 0).all(1) & (sides >= self.min_size).all(1)).squeeze(1)
        keep = keep[
            nms_per_group(
                boxes[keep],
                score[keep],
                image[keep] * self.num_classes + label[keep],
                self.nms_threshold,
            )
        ]
        keep = keep[top_per_group(score[keep], image[keep], self.max_detections)]
        return Regions(boxes[keep], image[keep], score[keep], label[keep])

    def _all_deltas(self, x: Tensor) -> Tensor:
        """[R, width] -> f32 [R, K or 1, 4]."""
        deltas: Tensor = self.deltas(x).float().unflatten(1, (-1, 4))
        return deltas

    def _deltas(self, x: Tensor, row: Tensor, label: Tensor) -> Tensor:
        """Those of the classes `label` [n] of the rows `row` [n] of x [R, width] alone. -> f32 [n, 4]."""
        classes = self.deltas.out_features // 4
        if classes == 1:
            return self._all_deltas(x)[row, 0]
        if len(row) * PAIR >= len(x) * classes:
            return self._all_deltas(x)[row, label]
        weight, bias = self.deltas.weight.view(classes, -1), self.deltas.bias.view(classes, 4)
        found = []
        for rows, labels in zip(
            torch.split(row, AT_ONCE), torch.split(label, AT_ONCE), strict=True
        ):
            # An embedding, as its gradient is summed in a fixed order: that of an index is not, in several threads.
            own, shift = (
                F.embedding(labels, weight).view(len(labels), 4, x.shape[1]),
                F.embedding(labels, bias)[..., None],
            )
            found.append(
                torch.baddbmm(shift.to(x.dtype), own.to(x.dtype), x[rows, :, None]).squeeze(2)
            )
        return torch.cat(found).float()
