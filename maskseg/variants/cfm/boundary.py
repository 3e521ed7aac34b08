"""The artificial boundary: what setting the pixels outside of a segment to the mean changes in the features inside of it.

Masked pixels have an edge that is not in the image, and the convolutions see it. Features that are masked after the convolutions (convolutional
feature masking) are those of the image in every cell of the segment: their difference is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from maskseg.models.rcnn import PixelModel
from maskseg.structures import Batch, Features, FeatureSpec
from maskseg.variants.cfm.projection import cell_of_pixels, project
from maskseg.visualization import detections, segments
from maskseg.visualization.curves import COLOURS, rendered
from maskseg.visualization.detections import Picture

Bools = NDArray[np.bool_]
Floats = NDArray[np.floating[Any]]

EDGES = (
    0.0,
    4.0,
    8.0,
    16.0,
    32.0,
    64.0,
    128.0,
)  # pixels, of the bins of distance; beyond the last one is a bin too
BLOCK = 2**22  # distances that are looked at together
_LINE = 3  # pixels of an outline in a tile
_COLOUR_MAP = "magma"


def masked(batch: Batch, inside: Tensor, mean: Tensor) -> Batch:
    """A batch of one with the pixels outside of a segment set to the mean, rounded to grey levels.

    inside: bool [H, W], no larger than the batch's frame, beyond which all is outside; mean: f32 [3, 1, 1], RGB in 0..255.
    """
    height, width = batch.images.shape[2:]
    kept = F.pad(inside, (0, width - inside.shape[1], 0, height - inside.shape[0])).to(
        batch.images.device
    )
    return replace(batch, images=torch.where(kept, batch.images, mean.round().to(batch.images)))


@torch.no_grad()
def differences(
    model: PixelModel, batch: Batch, inside: Tensor, features: Features | None = None
) -> dict[str, Tensor]:
    """|f(image) - f(masked image)| / |f(image)| in each cell, over the channels, f32 [h, w] by level; NaN where f(image) is 0.

    batch: of one image; inside: bool [H, W], the segment, in the network's pixels; features: of the image, where they are known.
    """
    whole = model.features(batch) if features is None else features
    other = model.features(masked(batch, inside, model.pixel_mean))
    found = {}
    for name, feature in whole.items():
        length = feature[0].float().norm(dim=0)
        found[name] = (feature[0].float() - other[name][0].float()).norm(dim=0) / torch.where(
            length > 0, length, torch.nan
        )
    return found


def distances(inside: Tensor, shape: tuple[int, int], at: FeatureSpec) -> Tensor:
    """How far from the centre of each cell of a map the nearest pixel outside of the segment is, f32 [h, w], in pixels.

    inside: bool [H, W]; NaN in cells whose centre lies outside of the segment or the image, infinity where nothing is outside. The border of the
    image is none of the segment's.
    """
    near = (
        F.max_pool2d(F.pad((~inside)[None].float(), (1, 1, 1, 1)), 3, 1)[0] > 0
    )  # outside, and what touches it
    own = F.max_pool2d(F.pad(inside[None].float(), (1, 1, 1, 1)), 3, 1)[0] > 0
    border = (
        torch.nonzero(near & own & ~inside).float() + 0.5
    )  # only the pixels at the border can be the nearest
    rows, columns = torch.nonzero(
        project(inside[None], shape, at.stride, at.centre, "nearest")[0]
    ).unbind(1)
    out = torch.full(shape, torch.nan)
    if len(rows) == 0:
        return out
    centres = torch.stack([rows, columns], dim=1) * float(at.stride) + at.centre
    found = []
    for part in torch.split(centres, max(1, BLOCK // max(len(border), 1))):
        apart = ((part[:, None] - border).abs() - 0.5).clamp(min=0)  # to the pixel's square
        found.append(
            apart.square().sum(dim=2).amin(dim=1).sqrt()
            if len(border)
            else torch.full((len(part),), torch.inf)
        )
    out[rows, columns] = torch.cat(found)
    return out


@dataclass
class BoundaryStudy:
    """Relative differences of cells inside of segments, summed by level and by bins of the distance to the segment's border.

    edges: in pixels, ascending from 0; the last bin has no end. sums, counts: f64 [bins] by level.
    """

    edges: Sequence[float] = EDGES
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, difference: Mapping[str, Tensor], inside: Tensor, levels: Mapping[str, FeatureSpec]
    ) -> None:
        """difference: f32 [h, w] by level, see `differences`; inside: bool [H, W], the segment. Cells without a number are left out."""
        bins = torch.tensor([*self.edges[1:]])
        for name, at in levels.items():
            values = difference[name].cpu()
            apart = distances(inside, (values.shape[0], values.shape[1]), at)
            known = apart.isfinite() & values.isfinite()
            place = torch.bucketize(apart[known], bins, right=True)
            for table, weights in (
                (self.sums, values[known].double()),
                (self.counts, torch.ones(int(known.sum()), dtype=torch.float64)),
            ):
                table[name] = table.get(name, 0) + torch.bincount(place, weights, len(self.edges))

    def numbers(self) -> dict[str, dict[str, float | None]]:
        """The mean difference by level and bin (`0-4`, ..., `128-`), None where there was no cell."""
        ends = [*(f"{e:g}" for e in self.edges[1:]), ""]
        keys = [f"{start:g}-{end}" for start, end in zip(self.edges, ends, strict=True)]
        return {
            name: {
                key: (s / n if n else None)
                for key, s, n in zip(keys, sums.tolist(), self.counts[name].tolist(), strict=True)
            }
            for name, sums in self.sums.items()
        }


def plot_boundary(numbers: Mapping[str, Mapping[str, float | None]]) -> Picture:
    """A line a level: the mean difference over the distance to the border; that of masked features is 0. numbers: `BoundaryStudy.numbers`. -> RGB."""
    from matplotlib.figure import Figure  # half a second, and only needed here

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis: Any = figure.subplots()
    bins = list(next(iter(numbers.values()), {}))
    for (name, values), colour in zip(numbers.items(), COLOURS, strict=False):
        points = [(i, values[key]) for i, key in enumerate(bins) if values[key] is not None]
        axis.plot(
            [i for i, _ in points],
            [v for _, v in points],
            color=colour,
            marker="o",
            markersize=5,
            linewidth=1.6,
            label=f"pixels masked: {name}",
        )
    axis.plot(
        range(len(bins)),
        [0] * len(bins),
        color="#555555",
        linestyle="--",
        linewidth=1.6,
        label="features masked",
    )
    axis.set_xticks(
        range(len(bins)),
        [
            f"over {key[:-1]}" if key.endswith("-") else key.replace("-", "\N{EN DASH}")
            for key in bins
        ],
    )
    axis.set_xlabel("distance from the cell's centre to the segment's border, pixels", fontsize=10)
    axis.set_ylabel("|f(image) - f(masked)| / |f(image)|", fontsize=10)
    axis.tick_params(labelsize=9)
    axis.set_ylim(bottom=-0.02)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return rendered(figure)


def boundary_picture(
    image: Picture,
    inside: Bools,
    mean: Sequence[float],
    difference: Mapping[str, Tensor],
    levels: Mapping[str, FeatureSpec],
) -> Picture:
    """The image, the masked image and, for each level, the relative difference of the features, all with the segment's outline. -> uint8 RGB.

    image: uint8 RGB [H, W, 3]; inside: bool [H, W]; mean: RGB in 0..255; difference: f32 [h, w] by level. Colours end at a difference of 1.
    """
    cut = np.where(inside[..., None], image, np.round(mean).astype(np.uint8))
    tiles = {"image, segment": outlined(image, inside), "pixels masked": outlined(cut, inside)}
    for name, at in levels.items():
        tiles[f"{name}, stride {at.stride}: difference"] = outlined(
            heat(difference[name].cpu().numpy(), at, image.shape[:2], 1.0), inside
        )
    last = list(tiles)[-1]
    tiles[last] = np.hstack([tiles[last], colour_bar(1.0, "share of |f|", tiles[last].shape[0])])
    return sheet(tiles, 3)


def sheet(tiles: Mapping[str, Picture], columns: int) -> Picture:
    """Pictures of one height under their titles, in rows on white, those of a column aligned at their left sides. -> uint8 RGB."""
    titled = [segments._titled(tile, title, segments._TITLE) for title, tile in tiles.items()]
    wide = [
        max(tile.shape[1] for tile in titled[c::columns])
        for c in range(columns)
        if titled[c::columns]
    ]
    padded = [
        np.pad(t, ((0, 0), (0, wide[i % columns] - t.shape[1]), (0, 0)), constant_values=255)
        for i, t in enumerate(titled)
    ]
    return segments._sheet(padded, columns)


def heat(values: Floats, at: FeatureSpec, shape: Sequence[int], top: float) -> Picture:
    """A map of numbers on cells [h, w], 0 to `top`, as colours over the pixels of an image of `shape`, each that of the cell whose centre is nearest;
    grey where there is no number. -> uint8 RGB [H, W, 3]."""
    from matplotlib import colormaps

    scaled = np.ma.masked_invalid(values / top if top > 0 else np.zeros_like(values))
    colours = colormaps[_COLOUR_MAP].with_extremes(bad="#808080")(scaled.clip(0, 1))
    return on_pixels((255 * colours[..., :3]).round().astype(np.uint8), at, shape)


def on_pixels(cells: NDArray[Any], at: FeatureSpec, shape: Sequence[int]) -> NDArray[Any]:
    """[h, w, ...] on the cells of a map -> [H, W, ...] on the pixels of an image of `shape`, each that of the cell whose centre is nearest."""
    rows, columns = (
        cell_of_pixels(side, count, at.stride, at.centre).numpy()
        for side, count in zip(shape, cells.shape, strict=False)
    )
    return np.asarray(cells[rows[:, None], columns])


def outlined(image: Picture, inside: Bools) -> Picture:
    """The image, its longer side scaled to 720 pixels, with the outline of a segment, bool [H, W], white between dark rims."""
    canvas, (labels,) = segments._scaled(image, [inside.astype(np.int32)])
    canvas[segments._outlines(labels, 2 * _LINE)] //= 3
    canvas[segments._outlines(1 - labels, 1)] //= 3
    canvas[segments._outlines(labels, _LINE)] = 255
    return canvas


def colour_bar(top: float, text: str, height: int) -> Picture:
    """The colours of `heat` from 0, below, to `top`, with numbers and a text above. -> uint8 RGB [height, ., 3]."""
    size = segments._TITLE
    font = detections._font(size)
    high, low = round(1.8 * size), height - size
    ramp = heat(
        np.linspace(top, 0, low - high)[:, None], FeatureSpec(1, 0.5, 1), (low - high, size), top
    )
    width = round(max(font.getlength(text) + size, 4 * size))
    sheet = Image.new("RGB", (width, height), segments._PAPER)
    draw = ImageDraw.Draw(sheet)
    sheet.paste(Image.fromarray(ramp), (size // 2, high))
    draw.text((size // 2, 0.7 * size), text, fill=detections._INK, font=font, anchor="lm")
    for share in (0.0, 0.5, 1.0):
        draw.text(
            (2 * size, high + (1 - share) * (low - high)),
            f"{share * top:.3g}",
            fill=detections._INK,
            font=font,
            anchor="lm",
        )
    return np.asarray(sheet)
