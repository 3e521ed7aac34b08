"""Converts the weights of another framework to a checkpoint, or a checkpoint to torchvision's.

The checkpoint works with tools/evaluate.py, tools/predict.py, maskseg.load and trainer.init. The
file is only read: no code in it is run. docs/weights.md lists the supported models.

  python tools/convert.py source=torchvision weights=maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth \\
      output=mask_r50.pt
  python tools/convert.py source=detectron2 weights=model_final_f10217.pkl output=mask_r50.pt
  python tools/convert.py source=detectron2 weights=model_final.pth output=mine.pt \\
      categories=train.json
  python tools/convert.py source=torchvision weights=finetuned.pth output=mine.pt \\
      model.backbone.trunk.norm_eps=0.0
  python tools/convert.py source=maskseg weights=runs/NAME/TIME output=for_torchvision.pth

Other keys: model=... (one of configs/model) and model.*, for what cannot be inferred from the
tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from maskseg import config as configs
from maskseg.commands.export import export
from maskseg.config import Config
from maskseg.data.coco.categories import parse_categories
from maskseg.data.coco.report import Report
from maskseg.engine.checkpoint import save_checkpoint
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.files.outputs import check_outputs, is_same_file, record_outputs
from maskseg.interop import classes, detectron2, torchvision
from maskseg.interop.state_dict_names import Pairs, describe_names, match_state_dict, translate
from maskseg.interop.torchvision_hashes import norm_eps
from maskseg.interop.weight_files import read_weights
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.models.rpn import RPN
from maskseg.structures import Categories


class Framework(Protocol):
    """The module of `maskseg.interop` for another framework."""

    RESIZE: str  # its method to resize images
    BACKGROUND_FIRST: bool  # whether the background is the first class, else it is the last

    def name_pairs(self, names: Iterable[str]) -> Pairs: ...

    def normalize_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def infer_overrides(self, state: Mapping[str, Tensor]) -> list[str]: ...


FRAMEWORKS: dict[str, Framework] = {"torchvision": torchvision, "detectron2": detectron2}
_BASE_EXPERIMENT = "experiment=coco_r50_fpn_3x"
_KEYPOINT_DATA = [
    "data.train_json=${data.root}/annotations/person_keypoints_train2017.json",
    "data.val_json=${data.root}/annotations/person_keypoints_val2017.json",
]
# Some files lack the counters of batch norms, which inference does not need.
_COUNTER = ".num_batches_tracked"
_MAX_NAMED = 3  # tensors or classes in a message


def main(arguments: list[str]) -> None:
    """Entry point of `tools/convert.py`."""
    convert(arguments)


def convert(arguments: list[str]) -> None:
    """Read `weights`, convert them and write `output`.

    Raises UserError; nothing is written then.
    """
    model_overrides = [argument for argument in arguments if _is_model_override(argument)]
    tool_overrides = [argument for argument in arguments if not _is_model_override(argument)]
    settings = configs.compose("convert", tool_overrides)
    configs.require_keys(settings, "source", "weights", "output")
    weights = Path(settings.weights)
    output = Path(settings.output)
    if settings.source not in (*FRAMEWORKS, "maskseg"):
        raise UserError(
            f"source must be {', '.join(FRAMEWORKS)} or maskseg, not {settings.source!r}"
        )
    if output.is_dir() or is_same_file(output, weights):
        raise UserError(f"output={output}: must be a file other than the weights")
    check_outputs(
        [output], [weights, settings.categories], tool="convert", overwrite=settings.overwrite
    )
    with record_outputs([output], "convert"):
        if settings.source == "maskseg":
            export(weights, output, arguments)
        else:
            _import(settings.source, weights, output, settings.categories, model_overrides)


def _is_model_override(argument: str) -> bool:
    return argument.lstrip("~+").startswith(("model=", "model.", "model/", "data.", "data="))


def _import(
    source: str, weights: Path, output: Path, category_file: str | None, overrides: list[str]
) -> None:
    """Convert the weights of a framework to a checkpoint. Raises UserError."""
    framework = FRAMEWORKS[source]
    state = read_weights(weights)
    named_state = framework.normalize_state_dict(state) if source == "torchvision" else state
    overrides = [*_infer_overrides(source, named_state, weights, overrides), *overrides]
    num_classes = classes.num_classes(state)
    if num_classes is None:
        raise UserError(
            f"{weights}: no roi_heads.box_predictor.cls_score.bias of two numbers or more: these "
            "are not the weights of a detector"
        )
    has_keypoints = any(".keypoint_head." in name for name in state)
    known_categories = read_categories(Path(category_file)) if category_file else None
    categories, rows = classes.resolve_classes(num_classes, has_keypoints, known_categories)
    keypoint_data = _KEYPOINT_DATA if has_keypoints else []
    config = configs.compose("train", [_BASE_EXPERIMENT, *keypoint_data, *overrides])
    config.name = output.stem
    _set_resize_method(framework.RESIZE, config)
    configs.set_categories(config, categories)
    model = configs.build_model(config, pretrained=False)
    tensors = _convert_tensors(source, state, model, config, rows, num_classes, weights)
    model.load_state_dict(tensors)
    checkpoint = {
        "config": configs.to_yaml(config),
        "categories": categories.to_dict(),
        "source": source,
        "model": model.state_dict(),
        "step": 0,
        "metrics": {},
    }
    save_checkpoint(output, checkpoint)
    names = ", ".join(categories.names[:_MAX_NAMED])
    if len(categories) > _MAX_NAMED:
        names += " ..."
    print(f"{weights}: {len(tensors)} tensors, {len(categories)} classes ({names})")
    print(f"config: {' '.join(overrides)}")
    print(f"written to {output}")


def _set_resize_method(method: str, config: Config) -> None:
    """Resize images with the method of the other framework."""
    for step in (*config.data.train_transforms, *config.data.test_transforms):
        if step.get("_target_", "").endswith(".ResizeShortestEdge") and "method" not in step:
            configs.set_key(step, "method", method)


def _infer_overrides(
    source: str, state: Mapping[str, Tensor], weights: Path, given: Sequence[str]
) -> list[str]:
    """The config overrides that the tensors imply, without the keys that the user gives.

    Raises UserError where they imply nothing and the user does not name the model.
    """
    overrides = FRAMEWORKS[source].infer_overrides(state)
    if source == "torchvision" and overrides:
        overrides.append(f"model.backbone.trunk.norm_eps={norm_eps(weights)}")
    names_model = any(override.startswith("model=") for override in given)
    if not overrides and not names_model:
        hint = "model=NAME names a model that cannot be inferred from the tensors"
        for name, framework in FRAMEWORKS.items():
            if name != source and framework.infer_overrides(state):
                hint = f"it looks like source={name}"
        first_names = ", ".join(list(state)[:_MAX_NAMED])
        raise UserError(
            f"{weights}: not a known ResNet-FPN detector of {source}, its first tensors are "
            f"{first_names}; {hint}"
        )
    given_keys = {override.partition("=")[0] for override in given}
    return [override for override in overrides if override.partition("=")[0] not in given_keys]


def _convert_tensors(
    source: str,
    state: Mapping[str, Tensor],
    model: nn.Module,
    config: Config,
    rows: list[int],
    num_classes: int,
    weights: Path,
) -> dict[str, Tensor]:
    """The state dict of the model, with the tensors of the other framework.

    rows: of the classes, without the background; num_classes: of the file, without the background.
    Raises UserError that lists tensors that are missing, left over or of another shape.
    """
    framework = FRAMEWORKS[source]
    expected = model.state_dict()
    pairs = framework.name_pairs(expected)
    named_state = framework.normalize_state_dict(state)
    tensors, missing, unexpected = match_state_dict(named_state, expected, pairs)
    background = num_classes
    if framework.BACKGROUND_FIRST:
        background = 0
        rows = [row + 1 for row in rows]
    try:
        tensors = classes.select_class_rows(tensors, rows, background)
    except (IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{weights}: the tensors with one row per class do not fit each other ({reason})"
        ) from error
    misshapen = []
    for name, tensor in tensors.items():
        shape = expected[name].shape
        if tensor.shape != shape:
            misshapen.append(
                f"{translate(name, pairs)} {list(tensor.shape)} instead of {list(shape)}"
            )
    lists = {
        "missing": [name for name in missing if not name.endswith(_COUNTER)],
        "left_over": [name for name in unexpected if not name.endswith(_COUNTER)],
        "of_another_shape": misshapen,
    }
    if any(lists.values()):
        raise UserError(
            f"{weights} does not fit {config.model.backbone.trunk.name} as {source} builds it: "
            f"{describe_names(**lists)}"
        )
    if source == "detectron2":
        tensors = _convert_from_detectron2(tensors, state, model, config)
    return {**expected, **tensors}


def _convert_from_detectron2(
    tensors: dict[str, Tensor], state: Mapping[str, Tensor], model: nn.Module, config: Config
) -> dict[str, Tensor]:
    """Convert from BGR to RGB, and to the order of our anchors. Raises UserError."""
    anchors = config.model.proposer.anchors
    num_sizes = len(anchors.sizes[0])
    assert isinstance(model, GeneralizedRCNN)
    assert isinstance(model.proposer, RPN)
    detectron2.check_anchors(state, model.proposer.anchors.cell_anchors, num_sizes)
    if detectron2.takes_bgr(state):
        tensors = detectron2.to_rgb(tensors)
    return detectron2.reorder_anchors(tensors, num_sizes, len(anchors.aspect_ratios))


def read_categories(path: Path) -> Categories:
    """Read the classes of a COCO file; everything else in it is ignored. Raises UserError."""
    report = Report(str(path))
    try:
        entries = parse_json(path.read_text(encoding="utf-8"))["categories"]
        categories = parse_categories(list(entries), report)
    except OSError as error:
        raise UserError(f"categories={path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"categories={path}: not a COCO JSON file with a list of categories"
        ) from error
    if report.errors:
        raise UserError(report.text())
    if not len(categories):
        raise UserError(f"categories={path}: there are none")
    return categories
