"""Check of the files and folders that the group `data` names, before any of them is read.

Mistakes such as a folder in place of a JSON file are reported with the key and what to write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from maskseg.errors import UserError
from maskseg.files.similar import suggest_path

_SPLITS = ("train", "val")
_MAX_NAMED = 3  # files in a message
# What a file of another kind probably is.
_KINDS = {
    ".yaml": "a data.yaml of ultralytics and YOLO labels are not read: export the labels as COCO",
    ".yml": "a data.yaml of ultralytics and YOLO labels are not read: export the labels as COCO",
    ".txt": "YOLO labels are not read: export them as COCO",
    ".xml": "XML files of Pascal VOC are not read: export the labels as COCO, or see data=voc",
    ".csv": "tables are not read: export the labels as COCO",
    ".zip": "unpack the archive and name the JSON file in it",
    ".gz": "unpack the archive and name the JSON file in it",
    ".jsonl": "it must be one JSON object with images, annotations and categories",
}


def check_data_paths(data: Mapping[str, object], files_exist: bool) -> None:
    """Raise UserError for a JSON file that is a folder or of another kind, and the reverse.

    data: the keys of the group; files_exist: the files must be there already, because the dataset
    does not make them.
    """
    root = data.get("root")
    if files_exist and isinstance(root, str) and not Path(root).exists():
        raise UserError(
            f"data.root={root}: there is no such folder{suggest_path(Path(root))}; data.root=DIR "
            "names the folder of the dataset"
        )
    for split in _SPLITS:
        names = data.get(f"{split}_json")
        files = names if isinstance(names, list) else [names]
        images = _images_of(data, split)
        for name in files:
            if isinstance(name, str) and name:
                _check_json(f"data.{split}_json", Path(name), images, files_exist)
        if names and images is not None and data.get("check_images") is not False:
            _check_folder(*images, files_exist)


def _images_of(data: Mapping[str, object], split: str) -> tuple[str, Path] | None:
    """The key and the folder of the images of a split, None where it is not set."""
    folder = data.get(f"{split}_images")
    if not isinstance(folder, str) or not folder:
        return None
    key = "data.images" if folder == data.get("images") else f"data.{split}_images"
    return key, Path(folder)


def _check_json(key: str, path: Path, images: tuple[str, Path] | None, files_exist: bool) -> None:
    if path.is_dir():
        if images is not None and images[1].is_file():
            raise UserError(
                f"{key}={path} is a folder and {images[0]}={images[1]} a file: write "
                f"{key}={images[1]} {images[0]}={path}"
            )
        raise UserError(f"{key}={path} is a folder: {_name_json(key, path)}")
    if not path.is_file():
        if files_exist:
            hint = suggest_path(path, (".json",)) or f"; {key} names a COCO JSON file"
            raise UserError(f"{key}={path}: cannot be read (No such file or directory){hint}")
        return
    suffix = path.suffix.lower()
    if suffix != ".json" and not _looks_like_json(path):
        advice = _KINDS.get(suffix, f"{key} names a JSON file, data.images the folder of images")
        raise UserError(f"{key}={path} is no COCO JSON file; {advice}")


def _name_json(key: str, folder: Path) -> str:
    """Which file of a folder to name instead of the folder."""
    files = [path for place in (folder, folder.parent) for path in sorted(place.glob("*.json"))]
    if not files:
        return "name the COCO JSON file; data.images=... names the folder of the images"
    named = " or ".join(f"{key}={file}" for file in files[:_MAX_NAMED])
    return f"write {named}"


def _check_folder(key: str, path: Path, files_exist: bool) -> None:
    if path.is_file():
        raise UserError(f"{key}={path} is a file: name the folder that the images are in")
    if files_exist and not path.exists():
        raise UserError(f"{key}={path}: there is no such folder{suggest_path(path)}")


def _looks_like_json(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError:  # reported by whoever reads it
        return True
    return start.startswith((b"{", b"["))
