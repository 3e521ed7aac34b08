"""The parts of an override of the command line: `key=value`, `group=name`, `group@place=name`."""

from __future__ import annotations


def key_of(override: str) -> str:
    """The key or group of an override: `data` for `data=coco`, `a.b` for `~a.b`."""
    return override.split("=", 1)[0].lstrip("+~").split("@")[0]


def place_of(choice: str) -> str:
    """The place in the config that the choice of a group fills, with dots.

    `model.proposer` for `model/proposer=file`, `model.backbone.trunk` for
    `model/trunk@model.backbone.trunk=resnet`; `=name` may be missing.
    """
    place = choice.split("=", 1)[0].partition("@")[2]
    return place or key_of(choice).replace("/", ".")
