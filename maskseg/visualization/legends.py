"""Legends of the colors of classes above an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from maskseg.evaluation.table import truncate_name
from maskseg.visualization.colours import class_colour
from maskseg.visualization.layout import HeadingText, RGBImage, add_heading

MAX_CLASSES = 24  # in a legend: those with most objects


def add_class_legend(image: RGBImage, labels: Iterable[int], names: Sequence[str]) -> RGBImage:
    """Put the colors and names of the classes of objects above an image.

    labels: of the objects that are drawn; names: K class names. Of more than 24 classes, those with
    most objects are shown, and the number of the others. Without objects, the image is unchanged.
    """
    texts = class_texts(labels, names)
    size = min(30, max(16, round(image.shape[1] / 70)))
    return add_heading(texts, image, size) if texts else image


def class_texts(labels: Iterable[int], names: Sequence[str]) -> list[HeadingText]:
    """The entries of a legend of classes. The arguments are those of `add_class_legend`."""
    counts = Counter(labels)
    shown = sorted(label for label, _ in counts.most_common(MAX_CLASSES))
    texts = [HeadingText(_find_name(label, names), class_colour(label)) for label in shown]
    if len(counts) > len(shown):
        texts.append(HeadingText(f"and {len(counts) - len(shown):,} more classes", None))
    return texts


def _find_name(label: int, names: Sequence[str]) -> str:
    return truncate_name(names[label] if 0 <= label < len(names) else f"class {label}")
