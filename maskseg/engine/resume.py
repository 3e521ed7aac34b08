"""Checks that a checkpoint still means the same on the data at hand: its classes and data files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskseg.engine.checkpoint import Checkpoint
from maskseg.errors import UserError
from maskseg.structures import Categories

DIVISION = "data.val_fraction"  # the key of the hash of a division of the training file
_MAX_NAMED = 5  # classes in a message


def checkpoint_categories(checkpoint: Checkpoint) -> Categories | None:
    """The classes of a checkpoint, None where it has none, such as one of converted weights."""
    try:
        return Categories.from_dict(checkpoint["categories"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def check_categories(checkpoint: Checkpoint, categories: Categories, name: str) -> None:
    """Check that the classes of the data are those of the checkpoint that is resumed.

    name: of the checkpoint, for the message. Raises UserError, which names the classes that differ.
    """
    trained = checkpoint_categories(checkpoint)
    if trained is None:
        return
    changes = category_changes(trained, categories)
    if changes:
        named = "; ".join(changes[:_MAX_NAMED])
        more = f" and {len(changes) - _MAX_NAMED} more" if len(changes) > _MAX_NAMED else ""
        raise UserError(
            f"{name}: the classes of the data are not those of the checkpoint: {named}{more}; "
            "resume with its data, or start a new run from it by trainer.init"
        )


def category_changes(old: Categories, new: Categories) -> list[str]:
    """What differs between two lists of classes, one text per class; [] where labels agree."""
    old_ids = dict(zip(old.names, old.ids, strict=True))
    new_ids = dict(zip(new.names, new.ids, strict=True))
    changes = []
    for class_name, old_id in old_ids.items():
        if class_name not in new_ids:
            changes.append(f"{class_name!r} (id {old_id}) is missing")
        elif new_ids[class_name] != old_id:
            changes.append(f"{class_name!r} had id {old_id} and has id {new_ids[class_name]}")
    for class_name, new_id in new_ids.items():
        if class_name not in old_ids:
            changes.append(f"{class_name!r} (id {new_id}) is new")
    if not changes and (old.names, old.ids) != (new.names, new.ids):
        changes.append("their order")
    if not changes and (old.keypoints, old.num_stuff) != (new.keypoints, new.num_stuff):
        changes.append("their keypoints, or which of them are stuff")
    return changes


def moved_labels(old: Categories, new: Categories) -> list[str]:
    """The labels that mean another class than before, where both lists have the class.

    Weights of a class head that are loaded by their shape then belong to another class.
    """
    if len(old) != len(new):
        return []  # the class heads have other shapes
    pairs = enumerate(zip(old.names, new.names, strict=True))
    return [
        f"label {label} was {old_name!r} and is {new_name!r}"
        for label, (old_name, new_name) in pairs
        if old_name != new_name and (old_name in new.names or new_name in old.names)
    ]


def hash_files(files: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Hashes (SHA-256) of the contents of data files, by their config key.

    Of several files of a key, their order counts. Keys without files, or with a missing file, are
    left out.
    """
    hashes = {}
    for key, names in files.items():
        paths = [Path(name) for name in names]
        if paths and all(path.is_file() for path in paths):
            digests = [_hash_file(path) for path in paths]
            hashes[key] = hashlib.sha256("".join(digests).encode()).hexdigest()
    return hashes


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def changed_files(checkpoint: Checkpoint, hashes: Mapping[str, str]) -> list[str]:
    """The keys whose files have another content than when the checkpoint was written.

    Among them is `DIVISION` where the division of the training file into training and validation
    images is another one, or where only one of the two trainings has such a division.
    """
    saved = checkpoint.get("data_files")
    if not isinstance(saved, dict):
        return []
    changed = [key for key, value in hashes.items() if key in saved and saved[key] != value]
    if (DIVISION in saved) != (DIVISION in hashes):
        changed.append(DIVISION)
    return changed
