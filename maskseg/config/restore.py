"""What a config or a checkpoint describes: datasets, trained models and predictors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from maskseg import config as configs
from maskseg.config import Config
from maskseg.config.overrides import key_of
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.single_image import SingleImage
from maskseg.engine.checkpoint import (
    FROM_OBJECTS,
    best_threshold,
    checkpoint_path,
    inference_weights,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)
from maskseg.engine.distributed import DistributedContext, run_while_others_wait
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.errors import Shown, UserError
from maskseg.inference.class_filter import ClassChoice
from maskseg.inference.prediction import PLOT_MIN_SCORE
from maskseg.inference.predictor import Predictor
from maskseg.models.fuse import for_inference
from maskseg.structures import Categories

# Keys that a config of `predict` has, and that a predictor takes as arguments or does not have.
_ARGUMENTS = {
    "checkpoint": "the argument run",
    "trainer.device": "the argument device",
    "min_score": "the argument min_score",
    "input": "the argument of the predictor, load(run)(images)",
    "output": "the argument of prediction.save",
    "overwrite": "the argument overwrite of prediction.save",
}


def trained_model(
    path: Path, overrides: Sequence[str], tool: str, base: Config | None = None
) -> tuple[nn.Module, Config, Categories]:
    """Load a checkpoint. -> the model in evaluation mode, its config and its classes.

    overrides: the command line; tool: the name of the tool, whose keys the config gets.
    base: a config with parts that the model gets where it has none of that name; their weights
        are initial ones, not the checkpoint's.
    Raises UserError.
    """
    path = checkpoint_path(path)
    checkpoint = load_checkpoint(path)
    if checkpoint.get(FROM_OBJECTS) is True:
        raise UserError(
            f"{path}: the model was built in Python and is not described in the checkpoint: "
            "maskseg.training.Training(...).load reads its weights into the same model"
        )
    try:
        categories = Categories.from_dict(checkpoint["categories"])
        text = checkpoint["config"]
        if not isinstance(text, str):
            raise TypeError(f"the config is a {type(text).__name__}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: the checkpoint lacks its config or categories ({error})"
        ) from error
    config = configs.from_checkpoint(text, overrides, tool, base)
    if "min_score" in config and config.min_score is None:
        threshold = best_threshold(checkpoint)
        config.min_score = PLOT_MIN_SCORE if threshold is None else threshold
    model = configs.build_model(config, configs.CHECKPOINT_TARGETS, pretrained=False)
    weights = inference_weights(checkpoint)
    if base is not None:
        added = tuple(f"{name}." for name in base.model)
        initial = model.state_dict()
        weights = {name: weight for name, weight in weights.items() if not name.startswith(added)}
        weights |= {name: weight for name, weight in initial.items() if name.startswith(added)}
    load_weights(model, weights, str(path))
    return model.eval(), config, categories


def load_predictor(
    path: Path,
    device: str = "auto",
    overrides: Sequence[str] = (),
    min_score: float | None = None,
    classes: ClassChoice | None = None,
) -> Predictor:
    """The predictor of a checkpoint or run folder.

    overrides: of the checkpoint's config; the others as in `build_predictor`. Raises UserError,
    also for overrides without an effect here.
    """
    keys = dict.fromkeys(key_of(override) for override in overrides)
    arguments = [f"{key} is {_ARGUMENTS[key]}" for key in keys if key in _ARGUMENTS]
    if arguments:
        raise UserError(f"load: no key of the model: {'; '.join(arguments)}")
    model, config, categories = trained_model(path, overrides, "predict")
    return build_predictor(model, config, categories, device, min_score, classes)


def build_predictor(
    model: nn.Module,
    config: Config,
    categories: Categories,
    device: str,
    min_score: float | None = None,
    classes: ClassChoice | None = None,
) -> Predictor:
    """The predictor of a model: its form for inference, with the transforms of the validation.

    config: with the keys of `predict`, whose `min_score` is that of plots.
    min_score, classes: of the objects that it returns, see `Predictor`. Raises UserError.
    """
    prepare = single_image(config)
    torch_device = pick_device(device)
    dtype = inference_dtype(config.trainer.precision)
    fused = for_inference(model.to(torch_device), dtype)
    # Of the tool `predict`; by default the best threshold of the checkpoint.
    drawn_from = config.get("min_score")
    plot_min_score = PLOT_MIN_SCORE if drawn_from is None else drawn_from
    return Predictor(fused, categories, prepare, torch_device, min_score, classes, plot_min_score)


def single_image(config: Config) -> SingleImage:
    """What turns one image into a batch, as in a validation. Raises UserError."""
    transforms = [configs.build(t, configs.CHECKPOINT_TARGETS) for t in config.data.test_transforms]
    return SingleImage(transforms, config.data.divisor, config.data.max_pixels)


def checkpoint_argument(arguments: Sequence[str], tool: str) -> Path:
    """The checkpoint that the command line names. Raises UserError where it names none.

    Raises Shown for the option `--info`, which needs no checkpoint.
    The other arguments can only be read with the config of the checkpoint.
    """
    path = configs.find_path(arguments, "checkpoint")
    if path:
        return Path(path)
    if configs.SHOW_GROUPS in arguments:
        raise Shown(configs.describe_groups(configs.group_choices(arguments)))
    raise UserError(
        f"checkpoint=... is missing: a .pt file or a run folder (tools/{tool}.py --help)"
    )


def open_data(
    config: Config,
    categories: Categories | None = None,
    context: DistributedContext | None = None,
    may_make: bool = True,
) -> CocoSource:
    """Open the dataset of `config.data`.

    categories: the classes of a checkpoint; by default, those of the data.
    may_make: make the files of a dataset that can be made, such as the synthetic one. Not where
        the config of a checkpoint names the folder: the author of the checkpoint would choose
        what is written on this machine.
    Raises UserError.
    """
    source = configs.build_source(config.data, categories)
    if not isinstance(source, CocoSource):
        raise UserError(
            "the dataset is one of segments only: tools/fit_hash.py and tools/evaluate.py "
            "experiment=... read it"
        )
    context = context or DistributedContext()
    if not may_make:
        check_exists(source)
    else:  # the processes of one machine share its disk
        run_while_others_wait(context, context.local_main, source.prepare)
    context.barrier()
    return source


def check_exists(source: CocoSource) -> None:
    """Raise UserError for a JSON of the dataset that does not exist."""
    for name in source.splits():
        split = source.split(name)
        if not all(Path(file).is_file() for file in split.files):
            raise UserError(
                f"{split.key}: there is no such file; data=NAME names the dataset, and makes one "
                "that can be made (for a resume: tools/check_data.py data=NAME)"
            )


def training_config(config: Config) -> Config:
    """The keys of a training that a tool's config has, without those of the tool."""
    return configs.select_keys(config, configs.compose("train", []))


def save_fitted(
    path: Path,
    model: nn.Module,
    config: Config,
    categories: Categories,
    metrics: dict[str, float],
) -> None:
    """Save a fitted model as a checkpoint like that of a training.

    config: of `training_config`. Raises UserError.
    """
    checkpoint = {
        "config": configs.to_yaml(config),
        "categories": categories.to_dict(),
        "model": model.state_dict(),
        "step": 0,
        "metrics": metrics,
    }
    save_checkpoint(path, checkpoint)


def prepare_segments(
    model: nn.Module,
    source: CocoSource,
    splits: Sequence[str],
    config: Config,
    context: DistributedContext,
    overrides: Sequence[str] | None = None,
) -> None:
    """Make the segment proposals that the model takes from files and that are missing.

    overrides: the command line, where the config is that of a checkpoint. Segments are then made
        only in a folder that the command line names or that is below the working directory: the
        author of the checkpoint does not choose what is written elsewhere.
    Raises UserError.
    """
    if getattr(getattr(model, "proposer", None), "needs", None) != "segments":
        return
    if source.segments is None:
        raise UserError("data.segment_sampler is not set: it selects the segments to learn from")
    for split in splits:
        folder = source.segments.folders[split]
        if folder is None:
            raise UserError(
                f"data.{split}_segments is not set: the folder that the model takes segments from "
                "(missing ones are made)"
            )
        may_make = (
            overrides is None
            or configs.names_data(overrides, f"data.{split}_segments")
            or Path(folder).resolve().is_relative_to(Path.cwd())
        )
        source.segments.make_missing(source, split, config.model.proposer.method, context, may_make)
        source.dataset(split)  # raises UserError for segments that do not fit the images
