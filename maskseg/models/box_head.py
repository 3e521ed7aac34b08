"""The box head of Mask R-CNN: class scores and box refinement of each region."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskseg.models.interfaces import Pooler
from maskseg.models.layers.norms import conv_stack, init_convs
from maskseg.ops import boxes as box_ops
from maskseg.ops.linear import class_linear, flatten_linear
from maskseg.ops.losses import mean_count, smooth_l1_sum
from maskseg.ops.nms import nms_per_group, top_k_with_ties, top_per_group
from maskseg.structures import Features, Losses, Regions, Samples
from maskseg.values import (
    BinCount,
    Fraction,
    LayerCount,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Range,
    Size,
)

# Gathering the weights of single (region, class) pairs is faster than computing the deltas of all
# pairs if fewer than 1/64 of the pairs are needed.
GATHER_COST = 64
GATHER_CHUNK = 512  # pairs whose weights are gathered at a time
# Candidates per possible detection that NMS starts with, and the factor by which their number
# grows while an image lacks detections.
INITIAL_CANDIDATES = 16
CANDIDATE_GROWTH = 8
BoxWeights = tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat]


class BoxHeadMLP(nn.Module):
    """3x3 convolutions, then fully connected layers, over pooled features.

    Mask R-CNN has no convolutions; torchvision's v2 models have 4 with BN.

    in_channels, size: the pooled features are [R, in_channels, size, size].
    width, layers: of the fully connected layers. convs, channels, norm: of the convolutions.
    """

    def __init__(
        self,
        in_channels: Size = 256,
        size: BinCount = 7,
        width: Size = 1024,
        layers: Annotated[int, Range(ge=1, le=100)] = 2,
        convs: LayerCount = 0,
        channels: Size = 256,
        norm: str | None = None,
    ) -> None:
        super().__init__()
        self.convs = conv_stack(in_channels, channels, convs, norm)
        init_convs(self.convs)
        self.channels = channels if convs else in_channels
        self.size = size
        self.width = width
        widths = [self.channels * size * size] + [width] * layers
        linear_layers = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
        for layer in linear_layers:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(linear_layers)

    def fuse(self) -> BoxHeadMLP:
        """Replace the first linear layer by a convolution over all cells, in place.

        It reads channels-last features without a copy.
        """
        linear = self.layers[0]
        assert isinstance(linear, nn.Linear)
        with torch.device("meta"):
            convolution = nn.Conv2d(self.channels, linear.out_features, self.size).eval()
        convolution.weight = nn.Parameter(
            linear.weight.view_as(convolution.weight), requires_grad=False
        )
        convolution.bias = linear.bias
        self.layers[0] = convolution
        return self

    def forward(self, pooled: Tensor) -> Tensor:
        """[R, C, size, size] -> [R, width]."""
        first, *others = self.layers
        x = self.convs(pooled)
        if isinstance(first, nn.Linear):
            x = flatten_linear(x, first.weight, first.bias)
        else:  # the convolution that `fuse` has put there
            x = first(x).flatten(1)
        x = F.relu(x)
        for layer in others:
            x = F.relu(layer(x))
        return x


class BoxHead(nn.Module):
    """A `Classifier`: softmax over K classes and background, and box deltas per class.

    class_agnostic: one box refinement for all classes.
    box_weights: of dx, dy, dw, dh.
    beta: of the smooth L1 loss (1/9 in torchvision, 0 in detectron2). Both losses are divided by
    the number of regions.

    Inference: classes with a score above `score_threshold` -> refined and clipped boxes, of which
    those with a side below `min_size` pixels are dropped (1e-2 in torchvision, 0 in detectron2) ->
    NMS within each class -> the best `max_detections` of each image.
    """

    pooler: Pooler
    adds = None

    def __init__(
        self,
        pooler: Pooler,
        mlp: BoxHeadMLP,
        num_classes: PositiveInt,
        class_agnostic: bool = False,
        box_weights: BoxWeights = (10.0, 10.0, 5.0, 5.0),
        beta: NonNegativeFloat = 0.0,
        score_threshold: Fraction = 0.05,
        nms_threshold: Fraction = 0.5,
        max_detections: PositiveInt = 100,
        min_size: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__()
        self.pooler = pooler
        self.mlp = mlp
        self.num_classes = num_classes
        self.box_classes = 1 if class_agnostic else num_classes
        self.cls_score = nn.Linear(mlp.width, num_classes + 1)
        self.bbox_pred = nn.Linear(mlp.width, 4 * self.box_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)
        weight_x, weight_y, weight_w, weight_h = (float(weight) for weight in box_weights)
        self.box_weights = (weight_x, weight_y, weight_w, weight_h)
        self.beta = beta
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.min_size = min_size

    def forward(
        self, features: Features, boxes: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return class logits f32 [R, K + 1], background last, and deltas f32 [R, K or 1, 4]."""
        x = self.mlp(self.pooler(features, boxes, image_index))
        return self.cls_score(x).float(), self._all_deltas(x)

    def losses(self, features: Features, samples: Samples) -> Losses:
        """Return `box_class` and `box_regression`."""
        x = self.mlp(self.pooler(features, samples.boxes, samples.image_index))
        logits = self.cls_score(x).float()
        divisor = mean_count(len(samples), logits)
        foreground = torch.nonzero(samples.labels < self.num_classes).squeeze(1)
        deltas = self._deltas(x, foreground, samples.labels[foreground])
        matched_boxes = samples.targets.boxes[samples.matched_gt[foreground]]
        target_deltas = box_ops.encode(matched_boxes, samples.boxes[foreground], self.box_weights)
        class_loss = F.cross_entropy(logits, samples.labels, reduction="sum")
        return {
            "box_class": class_loss / divisor,
            "box_regression": smooth_l1_sum(deltas, target_deltas, self.beta) / divisor,
        }

    def predict(self, features: Features, proposals: Regions, sizes: Tensor) -> Regions:
        """Return the detections. Each (region, class) pair is a candidate with its own box.

        With many classes and a low threshold there are a million candidates, but only the best few
        thousand matter, as a candidate never suppresses a better one. NMS starts with these. While
        an image has fewer than `max_detections`, more candidates are added, so that the result
        equals that of all candidates.
        """
        x = self.mlp(self.pooler(features, proposals.boxes, proposals.image_index))
        scores = self.cls_score(x).float().softmax(dim=1)[:, :-1]
        row, label = torch.nonzero(scores > self.score_threshold).unbind(1)
        score = scores[row, label]
        image = proposals.image_index[row]
        num_images = len(sizes)
        num_candidates = torch.bincount(image, minlength=num_images)
        limit = INITIAL_CANDIDATES * max(1, self.max_detections) * num_images
        while True:
            top = top_k_with_ties(score, limit)
            detections = self._detections(x, proposals, sizes, row[top], label[top], score[top])
            if len(top) == len(score):
                return detections
            num_detections = torch.bincount(detections.image_index, minlength=num_images)
            num_used = torch.bincount(image[top], minlength=num_images)
            is_full = num_detections == self.max_detections
            if bool((is_full | (num_used == num_candidates)).all()):
                return detections
            limit *= CANDIDATE_GROWTH

    def _detections(
        self,
        x: Tensor,
        proposals: Regions,
        sizes: Tensor,
        row: Tensor,
        label: Tensor,
        score: Tensor,
    ) -> Regions:
        """Refine the candidates' boxes and apply NMS; best first within an image.

        row, label: i64 [n], proposal and class of each candidate; score: f32 [n].
        """
        image = proposals.image_index[row]
        deltas = self._deltas(x, row, label)
        boxes = box_ops.decode(deltas, proposals.boxes[row], self.box_weights)
        boxes = box_ops.clip(boxes, sizes[image])
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = torch.nonzero((sides > 0).all(1) & (sides >= self.min_size).all(1)).squeeze(1)
        group = image[keep] * self.num_classes + label[keep]
        keep = keep[nms_per_group(boxes[keep], score[keep], group, self.nms_threshold)]
        keep = keep[top_per_group(score[keep], image[keep], self.max_detections)]
        return Regions(boxes[keep], image[keep], score[keep], label[keep])

    def _all_deltas(self, x: Tensor) -> Tensor:
        """[R, width] -> f32 [R, K or 1, 4]."""
        deltas: Tensor = self.bbox_pred(x).float().unflatten(1, (-1, 4))
        return deltas

    def _deltas(self, x: Tensor, row: Tensor, label: Tensor) -> Tensor:
        """Return the deltas f32 [n, 4] of pairs of a row of x [R, width] and a class.

        row, label: i64 [n].
        """
        if self.box_classes == 1:
            return self._all_deltas(x)[row, 0]
        if len(row) * GATHER_COST >= len(x) * self.box_classes:
            return self._all_deltas(x)[row, label]
        weight = self.bbox_pred.weight.view(self.box_classes, 4, -1)
        bias = self.bbox_pred.bias.view(self.box_classes, 4)
        deltas = []
        for rows, labels in zip(
            torch.split(row, GATHER_CHUNK), torch.split(label, GATHER_CHUNK), strict=True
        ):
            deltas.append(class_linear(x[rows, :, None], weight, bias, labels).squeeze(2))
        return torch.cat(deltas).float()
