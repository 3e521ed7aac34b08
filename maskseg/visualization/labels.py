"""Plots what a dataset has: its classes, and the sizes, places and aspect ratios of its objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.file import ObjectArrays
from maskseg.evaluation.table import truncate_name
from maskseg.visualization.colours import as_hex, class_colour
from maskseg.visualization.layout import RGBImage, plain_text, render_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CLASSES = 30  # bars; with more classes, the others are counted in the title
_SMALL = 32  # px: COCO's limits of the square root of the area of small and medium objects
_MEDIUM = 96
_MAX_ASPECT = 16  # of width to height that is plotted
_GRID = 64  # cells of the map of places per side
_BAR = "#4477AA"
_GREY = "#777777"


def draw_labels(objects: ObjectArrays, names: Sequence[str]) -> RGBImage:
    """Plot the objects of a dataset. -> uint8 RGB [H, W, 3].

    names: K class names. The bars of the classes have their colors; of more than 30 classes, the
    most frequent are shown. Sizes are those of boxes in pixels of the files.
    """
    from matplotlib.figure import Figure  # imported here because it takes half a second

    num_bars = min(len(names), MAX_CLASSES)
    figure = Figure(figsize=(15, max(7.5, 1.5 + 0.27 * num_bars)), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1.15, 1, 1))
    _plot_classes(figure.add_subplot(grid[:, 0]), objects.labels, names)
    _plot_sizes(figure.add_subplot(grid[0, 1]), objects.boxes)
    _plot_counts(figure.add_subplot(grid[0, 2]), objects)
    _plot_places(figure.add_subplot(grid[1, 1]), objects)
    _plot_aspects(figure.add_subplot(grid[1, 2]), objects.boxes)
    num_images = len(objects.image_sizes)
    figure.suptitle(
        f"{num_images:,} images, {len(objects.labels):,} objects, {len(names):,} classes",
        fontsize=13,
        x=0.01,
        ha="left",
    )
    return render_figure(figure)


def _plot_classes(axis: Axes, labels: NDArray[np.int64], names: Sequence[str]) -> None:
    counts = np.bincount(labels, minlength=len(names))
    shown = np.arange(len(names))
    title = "objects by class"
    if len(names) > MAX_CLASSES:
        shown = np.argsort(-counts, kind="stable")[:MAX_CLASSES]
        rest = int(counts.sum() - counts[shown].sum())
        title = (
            f"objects by class: the {MAX_CLASSES} most frequent\n"
            f"(and {len(names) - MAX_CLASSES:,} more classes with {rest:,} objects)"
        )
    places = np.arange(len(shown))
    colours = [as_hex(class_colour(label)) for label in shown.tolist()]
    axis.barh(places, counts[shown], color=colours, height=0.75, edgecolor="#333333", linewidth=0.5)
    axis.set_yticks(
        places, [plain_text(truncate_name(names[label])) for label in shown.tolist()], fontsize=9
    )
    top = max(int(counts.max(initial=0)), 1)
    for place, count in zip(places.tolist(), counts[shown].tolist(), strict=True):
        colour = "black" if count else "#D55E00"
        axis.text(count + 0.01 * top, place, f"{count:,}", va="center", fontsize=8, color=colour)
    axis.set_ylim(max(len(shown), 6) - 0.4, -0.6)  # few classes have bars of the usual height
    axis.set_xlim(0, 1.14 * top)
    _style(axis, title, "objects")
    axis.grid(False, axis="y")
    axis.locator_params(axis="x", integer=True)


def _plot_sizes(axis: Axes, boxes: NDArray[np.float64]) -> None:
    """Plot the square roots of the areas of the boxes."""
    sizes = np.sqrt((boxes[:, 2] * boxes[:, 3]).clip(min=1e-6)).clip(min=1)
    lowest = min(float(sizes.min(initial=_SMALL / 2)), _SMALL / 2) / 1.2
    highest = max(float(sizes.max(initial=1)), 2 * _MEDIUM) * 1.2
    axis.hist(sizes, bins=np.geomspace(lowest, highest, 50).tolist(), color=_BAR)
    axis.set_xscale("log")
    shares = [
        np.mean(sizes < _SMALL) if len(sizes) else 0.0,
        np.mean((sizes >= _SMALL) & (sizes < _MEDIUM)) if len(sizes) else 0.0,
        np.mean(sizes >= _MEDIUM) if len(sizes) else 0.0,
    ]
    for border in (_SMALL, _MEDIUM):
        axis.axvline(border, color=_GREY, linewidth=1, linestyle=":")
    borders = np.array([lowest, _SMALL, _MEDIUM, highest])
    places = np.sqrt(borders[:-1] * borders[1:])
    axis.set_xlim(lowest, highest)
    for place, share, name in zip(
        places.tolist(), shares, ("small", "medium", "large"), strict=True
    ):
        axis.text(
            place,
            1.01,
            f"{name}\n{100 * share:.0f} %",
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=_GREY,
        )
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _style(axis, "sizes\n", "square root of the area of the box, pixels of the file")
    axis.locator_params(axis="y", integer=True)


def _plot_counts(axis: Axes, objects: ObjectArrays) -> None:
    """Plot the numbers of objects per image."""
    counts = np.bincount(objects.image_index, minlength=len(objects.image_sizes))
    highest = int(counts.max(initial=1))
    step = max(1, -(-highest // 40))
    axis.hist(counts, bins=(np.arange(0, highest + 2 * step, step) - 0.5).tolist(), color=_BAR)
    num_empty = int((counts == 0).sum())
    mean = float(counts.mean()) if len(counts) else 0.0
    title = f"objects per image: mean {mean:.1f}, at most {highest}\n"
    title += f"{num_empty:,} images without objects" if num_empty else ""
    _style(axis, title, "objects per image")
    axis.set_ylabel("images", fontsize=9)
    axis.locator_params(integer=True)


def _plot_places(axis: Axes, objects: ObjectArrays) -> None:
    """Plot the centers of the boxes, relative to the image."""
    sizes = objects.image_sizes[objects.image_index].astype(np.float64).reshape(-1, 2)
    centres = objects.boxes[:, :2] + objects.boxes[:, 2:] / 2
    x = centres[:, 0] / sizes[:, 1].clip(min=1)
    y = centres[:, 1] / sizes[:, 0].clip(min=1)
    cells = _GRID if len(x) > 4 * _GRID else _GRID // 4
    counts, _, _ = np.histogram2d(y, x, bins=cells, range=((0, 1), (0, 1)))
    axis.set_aspect("equal")
    axis.imshow(np.sqrt(counts), extent=(0, 1, 1, 0), cmap="Blues", interpolation="nearest")
    _style(axis, "places of the centers", "x / width of the image")
    axis.set_ylabel("y / height of the image", fontsize=9)
    axis.grid(False)


def _plot_aspects(axis: Axes, boxes: NDArray[np.float64]) -> None:
    """Plot the ratios of width to height."""
    aspects = boxes[:, 2].clip(min=1e-6) / boxes[:, 3].clip(min=1e-6)
    aspects = aspects.clip(1 / _MAX_ASPECT, _MAX_ASPECT)
    bins = np.geomspace(1 / _MAX_ASPECT, _MAX_ASPECT, 49)
    axis.hist(aspects, bins=bins.tolist(), color=_BAR)
    axis.set_xscale("log", base=2)
    axis.set_xticks(
        [1 / 16, 1 / 4, 1 / 2, 1, 2, 4, 16], ["≤ 1:16", "1:4", "1:2", "1", "2:1", "4:1", "≥ 16:1"]
    )
    axis.axvline(1, color=_GREY, linewidth=1, linestyle=":")
    _style(axis, "aspect ratios", "width : height of the box")
    axis.locator_params(axis="y", integer=True)


def _style(axis: Axes, title: str, label: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(label, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
