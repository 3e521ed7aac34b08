"""A split of one COCO file into training and validation images, and images that two files share.

The side of an image depends on the names of the files and on which of them are copies of each
other, on nothing else: neither on the order of the images, nor on their ids, the seed or the
folder. Adding or removing an image moves at most the images at the border between the sides.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.checks import THREADS, ImageRecord
from maskseg.errors import UserError

_HEAD_BYTES = 1 << 16  # of a file, which are compared before whole files are read
# Roboflow writes its augmented copies of NAME.jpg as NAME_jpg.rf.HASH.jpg.
_ROBOFLOW_COPY = re.compile(r"\.rf\.[0-9A-Za-z]{16,64}(\.\w+)$")

Bools = NDArray[np.bool_]


def split_images(
    images: Sequence[ImageRecord], root: Path, has_objects: Bools, fraction: float
) -> Bools:
    """Choose the validation images of one file, bool [N].

    Copies of one image are on one side: entries with one file name, files of equal content, and
    the copies that Roboflow makes. Images with and without objects are split separately, each in
    the order of the SHA-256 of their names. Both sides have an image with objects.

    root: the folder of the images; has_objects: bool [N].
    Raises UserError where there are no two different images with objects.
    """
    groups = group_copies([image.file_name for image in images], root)
    hashes = [_hash_name(image.file_name) for image in images]
    ordered = sorted(groups, key=lambda group: min(hashes[i] for i in group))
    with_objects = [group for group in ordered if has_objects[group].any()]
    without_objects = [group for group in ordered if not has_objects[group].any()]
    if len(with_objects) < 2:
        raise UserError(
            f"data.val_fraction={fraction:g} needs two different images with objects, but there "
            f"{'is' if len(with_objects) == 1 else 'are'} {len(with_objects)}: set data.val_json, "
            "or data.val_fraction=null to train without a validation"
        )
    is_val = np.zeros(len(images), dtype=bool)
    count = _count_groups(with_objects, fraction)
    chosen = with_objects[: min(max(count, 1), len(with_objects) - 1)]
    chosen += without_objects[: _count_groups(without_objects, fraction)]
    for group in chosen:
        is_val[group] = True
    return is_val


def _count_groups(groups: Sequence[list[int]], fraction: float) -> int:
    """The number of groups, from the first on, that hold about a fraction of all images."""
    target = fraction * sum(map(len, groups))
    total = 0
    for number, group in enumerate(groups):
        if total + len(group) / 2 > target:
            return number
        total += len(group)
    return len(groups)


def group_copies(names: Sequence[str], root: Path) -> list[list[int]]:
    """Group the indices of names that stand for copies of one image.

    Files that cannot be read are copies of no other.
    """
    same_name: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        same_name[_original_name(name)].append(index)
    same_content = find_equal_files([root / name for name in names])
    first = list(range(len(names)))  # a link to an earlier copy; an image without one is its own
    for copies in (*same_name.values(), *same_content):
        roots = [_follow(first, index) for index in copies]
        for root_index in roots:
            first[root_index] = min(roots)
    groups: dict[int, list[int]] = defaultdict(list)
    for index in range(len(names)):
        groups[_follow(first, index)].append(index)
    return list(groups.values())


def _follow(links: Sequence[int], index: int) -> int:
    """The first copy of an image, which links lead to."""
    while links[index] != index:
        index = links[index]
    return index


def find_equal_files(paths: Sequence[Path]) -> list[list[int]]:
    """Group the indices of files with equal contents; files without a copy are in no group.

    Files of equal size are compared by the SHA-256 of their first bytes, then of all bytes. Files
    that cannot be read are left out.
    """
    groups = [list(range(len(paths)))]
    for key in (_size, _hash_head, _hash_content):
        groups = _divide(groups, paths, key)
    return groups


def _divide(
    groups: Sequence[list[int]], paths: Sequence[Path], key: Callable[[Path], Hashable | None]
) -> list[list[int]]:
    """Divide groups by a key of the files; parts with a single file are dropped."""
    indices = [i for group in groups for i in group]
    group_of = {i: number for number, group in enumerate(groups) for i in group}
    with ThreadPoolExecutor(THREADS) as pool:
        keys = list(pool.map(key, (paths[i] for i in indices)))
    parts: dict[tuple[int, Hashable], list[int]] = defaultdict(list)
    for index, value in zip(indices, keys, strict=True):
        if value is not None:
            parts[group_of[index], value].append(index)
    return [part for part in parts.values() if len(part) > 1]


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size or None  # noqa: PTH116 - names that are too long, too
    except (OSError, ValueError):
        return None


def _hash_head(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return hashlib.sha256(file.read(_HEAD_BYTES)).digest()
    except (OSError, ValueError):
        return None


def _hash_content(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except (OSError, ValueError):
        return None


def _normalize(name: str) -> str:
    """A file name in the form that all systems and programs agree on."""
    parts = unicodedata.normalize("NFC", name.replace("\\", "/")).split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def _original_name(name: str) -> str:
    """The name of the image that a file shows, the same for the copies that Roboflow makes."""
    return _ROBOFLOW_COPY.sub(r"\1", _normalize(name))


def _hash_name(name: str) -> bytes:
    return hashlib.sha256(_original_name(name).encode("utf-8", "surrogatepass")).digest()


def find_shared_images(
    first: Sequence[Path], second: Sequence[Path], by_content: bool = True
) -> list[tuple[int, int]]:
    """Pairs of images, as indices, that two lists of files share; the first of each is named.

    by_content: compare the contents of the files, too.
    """
    places: dict[str, int] = {}
    for index, path in enumerate(first):
        places.setdefault(os.path.abspath(path), index)  # noqa: PTH100 - links are not followed
    matches = [places.get(os.path.abspath(path)) for path in second]  # noqa: PTH100
    if by_content:
        for group in find_equal_files([*first, *second]):
            sources = [i for i in group if i < len(first)]
            if sources:
                for copy in (i - len(first) for i in group if i >= len(first)):
                    matches[copy] = sources[0] if matches[copy] is None else matches[copy]
    return [(match, i) for i, match in enumerate(matches) if match is not None]
