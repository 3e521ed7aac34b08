"""Checkpoint -> model: evaluation and prediction, as the tools and `maskseg.load` do them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from maskseg import config as configs
from maskseg.data.datasets.coco import CocoSource, check_numbers
from maskseg.data.single_image import SingleImage
from maskseg.engine.checkpoint import best_weights, checkpoint_path, load_checkpoint, load_weights
from maskseg.engine.distributed import Group
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.errors import UserError
from maskseg.inference.predictor import Predictor
from maskseg.models.fuse import for_inference
from maskseg.structures import Categories


def trained_model(
    path: Path, overrides: list[str], own: str, under: Any = None
) -> tuple[nn.Module, Any, Categories]:
    """The model of a checkpoint, its config with the tool's keys, and its classes. under: parts that the model gets where it has none; their
    weights are not the checkpoint's. Raises UserError."""
    path = checkpoint_path(path)
    checkpoint = load_checkpoint(path)
    try:
        categories = Categories.from_dict(checkpoint["categories"])
        text = checkpoint["config"]
        if not isinstance(text, str):
            raise TypeError(f"the config is a {type(text).__name__}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: the checkpoint lacks its config or categories ({error})"
        ) from error
    config = configs.from_checkpoint(text, overrides, own, under)
    model = configs.build_model(config, configs.FROM_CHECKPOINT, pretrained=False)
    weights = best_weights(checkpoint)
    if under is not None:
        added = tuple(f"{name}." for name in under.model)
        weights = {k: v for k, v in weights.items() if not k.startswith(added)}
        weights |= {k: v for k, v in model.state_dict().items() if k.startswith(added)}
    load_weights(model, weights, str(path))
    return model.eval(), config, categories


def load_predictor(
    path: Path, device: str = "auto", overrides: list[str] | None = None
) -> Predictor:
    """The predictor of a checkpoint or run folder. Raises UserError."""
    model, config, categories = trained_model(path, overrides or [], "predict")
    return _predictor(model, config, categories, device)


def single_image(config: Any) -> SingleImage:
    """What makes a batch of one picture as the evaluation would. Raises UserError."""
    check_numbers(
        {"divisor": 1, "max_pixels": 1},
        divisor=config.data.divisor,
        max_pixels=config.data.max_pixels,
    )
    transforms = [configs.build(t, configs.FROM_CHECKPOINT) for t in config.data.test_transforms]
    return SingleImage(transforms, config.data.divisor, config.data.max_pixels)


def _predictor(model: nn.Module, config: Any, categories: Categories, device: str) -> Predictor:
    prepare, place = single_image(config), pick_device(device)
    return Predictor(
        for_inference(model.to(place), inference_dtype(config.trainer.precision)),
        categories,
        prepare,
        place,
    )


def checkpoint_word(words: list[str], tool: str) -> Path:
    """The checkpoint that the command line names; its config is needed to read the rest of the words."""
    path = next((w.partition("=")[2] for w in words if w.startswith("checkpoint=")), "")
    if not path:
        raise UserError(
            f"checkpoint=... is missing: a .pt file or a run folder (tools/{tool}.py --help)"
        )
    return Path(path)


def open_data(
    config: Any, known: Categories | None = None, group: Group | None = None, may_make: bool = True
) -> CocoSource:
    """The data set of `config.data`, read and checked: the classes are those of the data, or `known` ones (a checkpoint's).

    may_make: whether files of a data set that has to be made first are written. Not where a checkpoint's config says where: whoever made
    the checkpoint would choose what is written on this machine.
    """
    source = configs.build(config.data)
    if not isinstance(source, CocoSource):
        raise UserError(
            "the data set is one for measures of segments: tools/fit_hash.py and tools/evaluate.py experiment=... read it"
        )
    source.known = known
    group = group or Group()
    if group.local_main and may_make:
        source.prepare()  # on a disk that the processes of a machine share
    if not may_make:
        check_made(source)
    group.wait()
    return source


def check_made(source: CocoSource) -> None:
    """Raises UserError for a file of the data set that is not there."""
    for split in source.splits():
        if not Path(str(source.json[split])).is_file():
            raise UserError(
                f"{source.name(split)}: there is no such file; data=NAME names the data set, and makes one that can be made"
            )
