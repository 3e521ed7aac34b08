"""The artificial boundary: how masking the pixels outside a segment changes the features inside it.

Masked pixels create an edge that is not in the image, and the convolutions see it. Features that
are masked after the convolutions (convolutional feature masking) equal those of the image in every
cell of the segment; their difference is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from maskseg.models.rcnn import PixelModel
from maskseg.structures import Batch, Features, FeatureSpec
from maskseg.variants.cfm.projection import nearest_cells, project
from maskseg.visualization import layout, segments
from maskseg.visualization.layout import LINE_COLOURS, RGBImage, render_figure

Bools = NDArray[np.bool_]
Scalar = TypeVar("Scalar", bound=np.generic)
Floats = NDArray[np.floating]

# Edges of the distance bins in pixels; one more bin lies beyond the last edge.
EDGES = (0.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
BLOCK = 2**22  # distances per block
_LINE = 3  # width of an outline in a tile, pixels
_COLOUR_MAP = "magma"


def mask_outside(batch: Batch, inside: Tensor, mean: Tensor) -> Batch:
    """Set the pixels outside a segment to the mean, rounded to gray levels.

    batch: of one image.
    inside: bool [H, W], no larger than the batch's frame; everything beyond it is outside.
    mean: f32 [3, 1, 1], RGB in 0..255.
    """
    height, width = batch.images.shape[2:]
    padding = (0, width - inside.shape[1], 0, height - inside.shape[0])
    keep = F.pad(inside, padding).to(batch.images.device)
    return replace(batch, images=torch.where(keep, batch.images, mean.round().to(batch.images)))


@torch.no_grad()
def relative_differences(
    model: PixelModel, batch: Batch, inside: Tensor, features: Features | None = None
) -> dict[str, Tensor]:
    """Compute |f(image) - f(masked image)| / |f(image)| in each cell, the norm over the channels.

    batch: of one image; inside: bool [H, W], the segment, in the network's pixels; features: of the
    image, if already computed. -> by level, f32 [h, w], NaN where f(image) is 0.
    """
    features_of_image = model.features(batch) if features is None else features
    features_of_masked = model.features(mask_outside(batch, inside, model.pixel_mean))
    differences = {}
    for name, feature in features_of_image.items():
        whole = feature[0].float()
        masked = features_of_masked[name][0].float()
        length = whole.norm(dim=0)
        differences[name] = (whole - masked).norm(dim=0) / torch.where(
            length > 0, length, torch.nan
        )
    return differences


def border_distances(inside: Tensor, shape: tuple[int, int], spec: FeatureSpec) -> Tensor:
    """Compute the distance of each cell's center to the nearest pixel outside the segment.

    The border of the image does not count as a border of the segment.

    inside: bool [H, W]; shape: (h, w) of the map. -> f32 [h, w], in pixels; NaN in cells whose
    center lies outside the segment or the image, infinity if no pixel is outside.
    """
    near_outside = F.max_pool2d(F.pad((~inside)[None].float(), (1, 1, 1, 1)), 3, 1)[0] > 0
    near_inside = F.max_pool2d(F.pad(inside[None].float(), (1, 1, 1, 1)), 3, 1)[0] > 0
    # Only the outside pixels at the border can be the nearest ones.
    border = torch.nonzero(near_outside & near_inside & ~inside).float() + 0.5
    has_center = project(inside[None], shape, spec.stride, spec.centre, "nearest")[0]
    rows, columns = torch.nonzero(has_center).unbind(1)
    out = torch.full(shape, torch.nan)
    if len(rows) == 0:
        return out
    centres = torch.stack([rows, columns], dim=1) * float(spec.stride) + spec.centre
    distances = []
    for part in torch.split(centres, max(1, BLOCK // max(len(border), 1))):
        if len(border):
            # To the nearest point of the pixel's square.
            offsets = ((part[:, None] - border).abs() - 0.5).clamp(min=0)
            distances.append(offsets.square().sum(dim=2).amin(dim=1).sqrt())
        else:
            distances.append(torch.full((len(part),), torch.inf))
    out[rows, columns] = torch.cat(distances)
    return out


@dataclass
class BoundaryStudy:
    """Sums of relative differences of cells inside segments, by level and distance bin.

    The distance is that to the segment's border.

    edges: in pixels, ascending from 0; the last bin has no upper edge.
    sums, counts: f64 [bins], by level.
    """

    edges: Sequence[float] = EDGES
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, difference: Mapping[str, Tensor], inside: Tensor, levels: Mapping[str, FeatureSpec]
    ) -> None:
        """Add a segment. Cells without a difference are ignored.

        difference: f32 [h, w] by level, see `relative_differences`; inside: bool [H, W], the
        segment.
        """
        edges = torch.tensor([*self.edges[1:]])
        num_bins = len(self.edges)
        for name, spec in levels.items():
            values = difference[name].cpu()
            distance = border_distances(inside, (values.shape[0], values.shape[1]), spec)
            is_valid = distance.isfinite() & values.isfinite()
            bins = torch.bucketize(distance[is_valid], edges, right=True)
            ones = torch.ones(int(is_valid.sum()), dtype=torch.float64)
            sums = torch.bincount(bins, values[is_valid].double(), num_bins)
            counts = torch.bincount(bins, ones, num_bins)
            self.sums[name] = self.sums.get(name, 0) + sums
            self.counts[name] = self.counts.get(name, 0) + counts

    def means(self) -> dict[str, dict[str, float | None]]:
        """Return the mean difference by level and bin (`0-4`, ..., `128-`), None without cells."""
        ends = [*(f"{edge:g}" for edge in self.edges[1:]), ""]
        keys = [f"{start:g}-{end}" for start, end in zip(self.edges, ends, strict=True)]
        means: dict[str, dict[str, float | None]] = {}
        for name, sums in self.sums.items():
            counts = self.counts[name].tolist()
            means[name] = {}
            for key, total, count in zip(keys, sums.tolist(), counts, strict=True):
                means[name][key] = total / count if count else None
        return means


def plot_boundary(means: Mapping[str, Mapping[str, float | None]]) -> RGBImage:
    """Plot the mean difference over the distance to the border, one line per level.

    Another line is that of masked features, which is 0. means: of `BoundaryStudy.means`.
    """
    from matplotlib.figure import Figure  # imported here, as it takes half a second

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    bins = list(next(iter(means.values()), {}))
    for (name, values), colour in zip(means.items(), LINE_COLOURS, strict=False):
        points = {i: value for i, key in enumerate(bins) if (value := values[key]) is not None}
        axis.plot(
            list(points),
            list(points.values()),
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
    axis.set_xticks(range(len(bins)), [_bin_label(key) for key in bins])
    axis.set_xlabel("distance from cell center to segment border, pixels", fontsize=10)
    axis.set_ylabel("|f(image) - f(masked)| / |f(image)|", fontsize=10)
    axis.tick_params(labelsize=9)
    axis.set_ylim(bottom=-0.02)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return render_figure(figure)


def _bin_label(key: str) -> str:
    return f"over {key[:-1]}" if key.endswith("-") else key.replace("-", "\N{EN DASH}")


def draw_boundary_study(
    image: RGBImage,
    inside: Bools,
    mean: Sequence[float],
    difference: Mapping[str, Tensor],
    levels: Mapping[str, FeatureSpec],
) -> RGBImage:
    """Draw the image, the masked image and the relative difference of the features of each level.

    All tiles show the segment's outline. Colors saturate at a difference of 1.

    image: uint8 RGB [H, W, 3]; inside: bool [H, W]; mean: RGB in 0..255; difference: f32 [h, w], by
    level.
    """
    masked = np.where(inside[..., None], image, np.round(mean).astype(np.uint8))
    tiles = {
        "image, segment": draw_outline(image, inside),
        "pixels masked": draw_outline(masked, inside),
    }
    for name, spec in levels.items():
        heatmap = render_heatmap(difference[name].cpu().numpy(), spec, image.shape[:2], 1.0)
        tiles[f"{name}, stride {spec.stride}: difference"] = draw_outline(heatmap, inside)
    last = list(tiles)[-1]
    colour_bar = draw_colour_bar(1.0, "share of |f|", tiles[last].shape[0])
    tiles[last] = np.hstack([tiles[last], colour_bar])
    return arrange_tiles(tiles, 3)


def arrange_tiles(tiles: Mapping[str, RGBImage], columns: int) -> RGBImage:
    """Arrange images of one height under their titles, in rows on white.

    The images of a column are aligned at their left sides.
    """
    titled = [layout.add_title(tile, title, layout.TITLE_SIZE) for title, tile in tiles.items()]
    padded = []
    for index, tile in enumerate(titled):
        tiles_of_column = titled[index % columns :: columns]
        width = max(other.shape[1] for other in tiles_of_column)
        margin = width - tile.shape[1]
        padded.append(np.pad(tile, ((0, 0), (0, margin), (0, 0)), constant_values=255))
    return layout.arrange_grid(padded, columns)


def render_heatmap(
    values: Floats, spec: FeatureSpec, shape: Sequence[int], max_value: float
) -> RGBImage:
    """Render the values of cells as colors over the pixels of an image.

    A pixel shows the cell with the nearest center; gray where the value is NaN.

    values: [h, w], from 0 to `max_value`; shape: (H, W) of the image. -> uint8 RGB [H, W, 3].
    """
    from matplotlib import colormaps

    relative = values / max_value if max_value > 0 else np.zeros_like(values)
    scaled = np.ma.masked_invalid(relative)
    colours = colormaps[_COLOUR_MAP].with_extremes(bad="#808080")(scaled.clip(0, 1))
    return cells_to_pixels((255 * colours[..., :3]).round().astype(np.uint8), spec, shape)


def cells_to_pixels(
    cells: NDArray[Scalar], spec: FeatureSpec, shape: Sequence[int]
) -> NDArray[Scalar]:
    """Assign each pixel the value of the cell with the nearest center.

    cells: [h, w, ...]; shape: (H, W) of the image. -> [H, W, ...].
    """
    rows = nearest_cells(shape[0], cells.shape[0], spec.stride, spec.centre).numpy()
    columns = nearest_cells(shape[1], cells.shape[1], spec.stride, spec.centre).numpy()
    return np.asarray(cells[rows[:, None], columns])


def draw_outline(image: RGBImage, inside: Bools) -> RGBImage:
    """Scale an image to the size of a tile and draw the outline of a segment, bool [H, W].

    The outline is white with a dark rim on both sides.
    """
    canvas, (labels,) = segments.scale_to_tile(image, [inside.astype(np.int32)])
    canvas[segments.outline_pixels(labels, 2 * _LINE)] //= 3
    canvas[segments.outline_pixels(1 - labels, 1)] //= 3
    canvas[segments.outline_pixels(labels, _LINE)] = 255
    return canvas


def draw_colour_bar(max_value: float, title: str, height: int) -> RGBImage:
    """Draw the colors of `render_heatmap` from 0 (bottom) to `max_value`, with numbers and a label.

    -> uint8 RGB [height, width, 3].
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure  # imported here, as it takes half a second

    size = layout.TITLE_SIZE
    width = 6 * size
    # Half a pixel more, so that rounding errors do not make the image a pixel smaller.
    pixel = 1 / layout.FIGURE_DPI  # inches
    figure = Figure(figsize=((width + 0.5) * pixel, (height + 0.5) * pixel))
    area = (0.5 * size / width, size / height, size / width, 1 - 2 * size / height)
    colours = ScalarMappable(Normalize(0, max_value or 1.0), _COLOUR_MAP)
    ticks = [0, max_value / 2, max_value]
    bar = figure.colorbar(colours, cax=figure.add_axes(area), ticks=ticks, format="%.3g")
    bar.set_label(title, fontsize=72 * pixel * size)
    bar.ax.tick_params(labelsize=72 * pixel * size)
    return layout.render_figure(figure)
