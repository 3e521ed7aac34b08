"""File names of a COCO file that do not name a file as they are, but do so in another spelling."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from maskseg.data.image_files import check_name, safe_join
from maskseg.errors import UserError

_BACKSLASHES = "file name with backslashes, read as folders"
_ESCAPES = "file name with or without %-escapes, found in the other spelling"
_UNICODE = "file name whose Unicode form differs from the file's"
_URL = "image without a file_name, found by its coco_url"


def name_from_url(url: object) -> str | None:
    """Return the last folder and the name of a URL, as LVIS needs it; None for anything else."""
    if not isinstance(url, str):
        return None
    try:
        parts = [part for part in urlsplit(url).path.split("/") if part]
    except ValueError:
        return None
    return "/".join(parts[-2:]) or None


def find_name(root: Path, stated: str, is_from_url: bool) -> tuple[str, str] | None:
    """Return the name of the file that a stated name means, and the kind of the difference.

    is_from_url: the name is of `name_from_url`; its folder may be missing.
    Returns None where the stated name is right, or where no spelling of it names a file.
    """
    if is_from_url:
        names = (stated, stated.rpartition("/")[2])
        return next(((name, _URL) for name in names if is_image_name(root, name)), None)
    if stated.isascii() and not set(stated) & set("\\% "):
        return None
    if not _is_safe(stated) or is_image_name(root, stated):
        return None
    for name, kind in _spellings(stated):
        if is_image_name(root, name):
            return name, kind
    return None


def _spellings(stated: str) -> Iterator[tuple[str, str]]:
    """The other spellings of a name, with the kind of the difference."""
    slashes = stated.replace("\\", "/")
    bases = [
        (stated, _UNICODE),
        (slashes, _BACKSLASHES),
        (unquote(stated), _ESCAPES),
        (unquote(slashes), _ESCAPES),
        (quote(stated), _ESCAPES),
        (quote(slashes), _ESCAPES),
    ]
    seen = {stated}
    for base, kind in bases:
        forms = (base, *(unicodedata.normalize(form, base) for form in ("NFC", "NFD")))
        for name in forms:
            if name not in seen:
                seen.add(name)
                yield name, kind


def shorter_names(name: str) -> Iterator[str]:
    """A name without its first folder, without its first two, and so on to the bare name."""
    parts = [part for part in unquote(name.replace("\\", "/")).split("/") if part]
    for first in range(1, len(parts)):
        yield "/".join(parts[first:])


def _is_safe(name: str) -> bool:
    try:
        check_name(name)
    except UserError:
        return False
    return True


def is_image_name(root: Path, name: str) -> bool:
    """Whether the name is safe and there is a file of this name below the folder."""
    try:
        return os.path.isfile(safe_join(root, check_name(name)))  # noqa: PTH113 - long names
    except UserError:
        return False


def hint_for_missing(root: Path, name: str) -> str:
    """Return what the folder has instead of a missing file, "" for nothing similar."""
    base = name.replace("\\", "/").rpartition("/")[2]
    if not root.is_dir():
        return "; there is no such folder: see data.images"
    if base != name and is_image_name(root, base):
        return f"; {root} has {base}: file_name repeats a part of data.images, or adds one"
    folder = root / name.replace("\\", "/").rpartition("/")[0]
    wanted = Path(base).stem.casefold()
    try:
        entries = sorted(entry.name for entry in os.scandir(folder))
    except (OSError, ValueError):
        return ""
    similar = [entry for entry in entries if Path(entry).stem.casefold() == wanted]
    return f"; the folder has {similar[0]}" if similar else ""
