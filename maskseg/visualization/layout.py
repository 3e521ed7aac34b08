"""Building blocks of all visualizations: colors, fonts, titles, grids, rendering and saving.

All images are uint8 RGB arrays [H, W, 3].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from maskseg.errors import UserError
from maskseg.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RGBImage = NDArray[np.uint8]  # [H, W, 3]
Colour = tuple[int, int, int]  # RGB, 0..255

MIN_READABLE_SIDE = 640  # px: with a longer side of at least this, the text on an image is legible
TILE_SIDE = 720  # px of the longer side of an image in a panel
TITLE_SIZE = TILE_SIDE // 24  # px of the text above such an image
GAP = 8  # px between the images of a grid

PAPER: Colour = (255, 255, 255)
INK: Colour = (30, 30, 30)
FRAME: Colour = (150, 150, 150)  # around areas that may be as white as the paper
# The colors of Okabe and Ito, which color-blind readers can tell apart, and two more for crowded
# images.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (213, 94, 0),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (0, 114, 178),
    (150, 120, 255),
    (136, 34, 85),
)
# Colors of plotted lines: six of Okabe and Ito without their yellow, which is faint on white, and
# six of Tol and of matplotlib.
LINE_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#332288",
    "#999933",
    "#44AA99",
    "#8C564B",
    "#9467BD",
)
FIGURE_DPI = 110  # of plots


def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font at `size` pixels."""
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def fit_text(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Truncate a text to `width` pixels; an ellipsis marks the cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def scaled_size(shape: Sequence[int], longest: int) -> tuple[int, int]:
    """(width, height) of an image [height, width, ...] scaled to a longer side of `longest` px."""
    scale = longest / max(shape[:2])
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def shrink(image: RGBImage, longest: int) -> RGBImage:
    """Scale an image down to a longer side of `longest` pixels; smaller images are unchanged."""
    scale = longest / max(image.shape[:2])
    if scale >= 1:
        return image
    size = scaled_size(image.shape, longest)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def enlarge(image: RGBImage, factor: int) -> RGBImage:
    """Return a writable copy of an image, enlarged bicubically by an integer factor."""
    if factor == 1:
        return image.copy()
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.array(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def resize_nearest(image: RGBImage, size: tuple[int, int]) -> RGBImage:
    """Resize an image to (width, height) by nearest neighbour, so that its pixels stay sharp."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST))


def add_title(image: RGBImage, title: str, size: int) -> RGBImage:
    """Put a title of `size` pixels above an image, truncated to the width of the image."""
    font = load_font(size)
    top = round(1.5 * size)
    sheet = Image.new("RGB", (image.shape[1], image.shape[0] + top), PAPER)
    text = fit_text(title, font, image.shape[1])
    ImageDraw.Draw(sheet).text((0, 0.7 * size), text, fill=INK, font=font, anchor="lm")
    sheet.paste(Image.fromarray(image), (0, top))
    return np.asarray(sheet)


class HeadingText(NamedTuple):
    """A text of a heading, after a field of its color if it has one."""

    text: str
    colour: Colour | None


def add_heading(texts: Sequence[HeadingText], image: RGBImage, size: int) -> RGBImage:
    """Put texts of `size` pixels above an image, wrapped into lines; the widest one always fits."""
    font = load_font(size)
    gap = size // 2
    field = round(1.3 * size)  # width of a field of color
    widths = []
    for text, colour in texts:
        widths.append(math.ceil(font.getlength(text)) + (field + gap if colour else 0))
    sheet_width = max(image.shape[1], 4 * gap + max(widths))
    places = []
    line = 0
    x = gap
    for width in widths:
        if x > gap and x + width + gap > sheet_width:
            line += 1
            x = gap
        places.append((x, line))
        x += width + 3 * gap
    line_height = round(1.7 * size)
    top = (line + 1) * line_height + gap // 2
    sheet = Image.new("RGB", (sheet_width, top + image.shape[0]), PAPER)
    draw = ImageDraw.Draw(sheet)
    for (x, line), (text, colour) in zip(places, texts, strict=True):
        middle = gap // 2 + line * line_height + line_height // 2
        if colour:
            swatch = (x, middle - size // 2, x + field, middle + size // 2)
            draw.rectangle(swatch, fill=colour, outline=INK)
            x += field + gap
        draw.text((x, middle), text, fill=INK, font=font, anchor="lm")
    sheet.paste(Image.fromarray(image), (0, top))
    return np.asarray(sheet)


def side_by_side(left: RGBImage, right: RGBImage, titles: tuple[str, str] = ("", "")) -> RGBImage:
    """Put two images next to each other on white, each below its title, aligned at the top."""
    tallest = max(left.shape[0], right.shape[0])
    font = load_font(max(14, round(tallest / 36)))
    top = round(font.size * 1.9) if any(titles) else GAP
    width = left.shape[1] + right.shape[1] + 3 * GAP
    sheet = Image.new("RGB", (width, top + tallest + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    x = GAP
    for image, title in zip((left, right), titles, strict=True):
        text = fit_text(title, font, image.shape[1])
        draw.text((x, top / 2), text, fill=INK, font=font, anchor="lm")
        sheet.paste(Image.fromarray(image), (x, top))
        x += image.shape[1] + GAP
    return np.asarray(sheet)


def mosaic(images: Sequence[RGBImage], columns: int, *, cell: int = 1600) -> RGBImage:
    """Arrange images in rows on white, each centered in its cell.

    Images whose longer side exceeds `cell` pixels are shrunk to it. Raises ValueError without an
    image or a column.
    """
    if not images or columns < 1:
        raise ValueError("a mosaic needs at least one image and one column")
    images = [shrink(image, cell) for image in images]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    widths = [_max_size(images[c::columns], axis=1) for c in range(columns)]
    heights = [_max_size(images[r * columns : (r + 1) * columns], axis=0) for r in range(rows)]
    height = sum(heights) + (rows + 1) * GAP
    width = sum(widths) + (columns + 1) * GAP
    sheet = np.full((height, width, 3), PAPER, dtype=np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        h, w = image.shape[:2]
        y = sum(heights[:row]) + (row + 1) * GAP + (heights[row] - h) // 2
        x = sum(widths[:column]) + (column + 1) * GAP + (widths[column] - w) // 2
        sheet[y : y + h, x : x + w] = image
    return sheet


def _max_size(images: Sequence[RGBImage], axis: int) -> int:
    """The largest height (axis 0) or width (axis 1)."""
    return int(max(image.shape[axis] for image in images))


def arrange_grid(tiles: Sequence[RGBImage], columns: int) -> RGBImage:
    """Arrange tiles in a mosaic at their own size."""
    return mosaic(tiles, columns, cell=max((max(tile.shape) for tile in tiles), default=1))


def arrange_panel(tiles: Mapping[str, RGBImage], columns: int) -> RGBImage:
    """Arrange images in rows below their titles.

    tiles: title -> image; images whose longer side exceeds 720 pixels are shrunk to it.
    """
    titled = [
        add_title(shrink(tile, TILE_SIDE), title, TITLE_SIZE) for title, tile in tiles.items()
    ]
    return arrange_grid(titled, columns)


def plain_text(text: str) -> str:
    """A text that matplotlib shows as it is: no mathematics between dollars, no hidden label."""
    escaped = text.replace("$", "\\$")
    return f" {escaped}" if text.startswith("_") else escaped


def render_figure(figure: Figure) -> RGBImage:
    """Render a matplotlib figure at 110 dpi; works without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(FIGURE_DPI)
    canvas: Any = FigureCanvasAgg(figure)  # its methods have no type hints
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_image(image: RGBImage, path: Path | str) -> None:
    """Write an image as PNG, whatever the suffix of the path, and create missing folders.

    Raises UserError if the file cannot be written.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write the image to {path}: {error.strerror or error}") from error


def save_image_atomically(image: RGBImage, path: Path) -> None:
    """Write an image as PNG; the file appears complete or not at all.

    Raises UserError if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write the image to {path}: {error.strerror or error}") from error
    with replacing(path, "the image") as file:
        Image.fromarray(image).save(file, format="PNG")
