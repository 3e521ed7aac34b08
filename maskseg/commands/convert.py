"""A checkpoint for tools/evaluate.py, tools/predict.py, maskseg.load and trainer.init, out of a file of another framework; or the other way.
The file is only read: nothing in it is run. docs/weights.md says which models are known.

  python tools/convert.py source=torchvision weights=maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth output=mask_r50.pt
  python tools/convert.py source=detectron2 weights=model_final_f10217.pkl output=mask_r50.pt
  python tools/convert.py source=detectron2 weights=model_final.pth output=mine.pt categories=train.json
  python tools/convert.py source=torchvision weights=finetuned.pth output=mine.pt model.backbone.trunk.norm_eps=0.0
  python tools/convert.py source=maskseg weights=runs/NAME/TIME output=for_torchvision.pth

Other keys: model=... (one of configs/model) and model.*, where the tensors do not tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from maskseg import config as configs
from maskseg.commands.export import export
from maskseg.data.coco.categories import file_categories
from maskseg.data.coco.report import Report
from maskseg.engine.checkpoint import save_checkpoint
from maskseg.errors import UserError
from maskseg.files import parse_json
from maskseg.interop import classes, detectron2, torchvision
from maskseg.interop.state_dict_names import Pairs, fit, told, translate
from maskseg.interop.torchvision_hashes import norm_eps
from maskseg.interop.weight_files import read_weights
from maskseg.structures import Categories

SOURCES: dict[str, Any] = {"torchvision": torchvision, "detectron2": detectron2}
COUNTER = ".num_batches_tracked"  # of a norm: some files lack it, and inference does not need it
PEOPLE = [
    f"data.{split}_json=${{data.root}}/annotations/person_keypoints_{split}2017.json"
    for split in ("train", "val")
]


def convert(words: list[str]) -> None:
    """Reads `weights`, writes `output`. Raises UserError, and then nothing is written."""
    own = ("source", "weights", "output", "categories")
    settings = configs.compose(
        "convert", [w for w in words if w.partition("=")[0] in own or not _of_the_model(w)]
    )
    configs.require(settings, "source", "weights", "output")
    weights, output = Path(settings.weights), Path(settings.output)
    if settings.source not in (*SOURCES, "maskseg"):
        raise UserError(f"source must be {', '.join(SOURCES)} or maskseg, not {settings.source!r}")
    if output.is_dir() or (output.exists() and weights.exists() and output.samefile(weights)):
        raise UserError(f"output={output}: a file of its own is needed")
    given = [w for w in words if _of_the_model(w)]
    if settings.source == "maskseg":
        export(weights, output, words)
    else:
        _import(settings.source, weights, output, settings.categories, given)


def _of_the_model(word: str) -> bool:
    return word.lstrip("~+").startswith(("model=", "model.", "model/", "data.", "data="))


def _import(source: str, weights: Path, output: Path, file: str | None, given: list[str]) -> None:
    state = read_weights(weights)
    theirs = SOURCES[source]
    recognised = _recognise(
        source, theirs.modern(state) if source == "torchvision" else state, weights, given
    )
    number = classes.count(state)
    if number is None:
        raise UserError(
            f"{weights}: no roi_heads.box_predictor.cls_score.bias of two numbers or more: no detector's weights"
        )
    keypoints = any(".keypoint_head." in name for name in state)
    categories, rows = classes.choose(
        number, keypoints, read_categories(Path(file)) if file else None
    )
    config = configs.compose(
        "train", ["experiment=coco_r50_fpn_3x", *(PEOPLE if keypoints else []), *recognised, *given]
    )
    config.name = output.stem
    _resize_as(SOURCES[source].RESIZE, config)
    configs.set_categories(config, categories)
    model = configs.build_model(config, pretrained=False)
    converted = _converted(source, state, model, config, rows, number, str(weights))
    model.load_state_dict(converted)
    about = {
        "config": configs.to_yaml(config),
        "categories": categories.to_dict(),
        "source": source,
    }
    save_checkpoint(output, {**about, "model": model.state_dict(), "step": 0, "metrics": {}})
    names = f"{', '.join(categories.names[:3])}{' ...' if len(categories) > 3 else ''}"
    print(f"{weights}: {len(converted)} tensors, {len(categories)} classes ({names})")
    print("as " + " ".join([*recognised, *given]))
    print(f"written to {output}")


def _resize_as(method: str, config: Any) -> None:
    """The pictures are resized as the other framework does it."""
    for step in (*config.data.train_transforms, *config.data.test_transforms):
        if step.get("_target_", "").endswith(".ResizeShortestEdge") and "method" not in step:
            configs.put(step, "method", method)


def _recognise(
    source: str, state: Mapping[str, Tensor], weights: Path, given: Sequence[str]
) -> list[str]:
    """Words for what the tensors tell. Raises UserError where they tell nothing and no model is named."""
    words = cast(list[str], SOURCES[source].recognise(state))
    if source == "torchvision" and words:
        words.append(f"model.backbone.trunk.norm_eps={norm_eps(weights)}")
    named = any(w.startswith("model=") for w in given)
    if not words and not named:
        other = next(
            (
                name
                for name, module in SOURCES.items()
                if name != source and module.recognise(state)
            ),
            None,
        )
        hint = (
            f"it looks like source={other}"
            if other
            else "model=NAME names one that the tensors do not tell"
        )
        first = ", ".join(list(state)[:3])
        raise UserError(
            f"{weights}: no ResNet-FPN detector of {source} that is known here, its first tensors are {first}; {hint}"
        )
    said = {w.partition("=")[0] for w in given}
    return [w for w in words if w.partition("=")[0] not in said]


def _converted(
    source: str,
    state: Mapping[str, Tensor],
    model: nn.Module,
    config: Any,
    rows: list[int],
    number: int,
    weights: str,
) -> dict[str, Tensor]:
    """The model's state dict out of theirs. Raises UserError that lists what is missing, left over or of another shape."""
    theirs, own = SOURCES[source], model.state_dict()
    pairs: Pairs = theirs.pairs(own)
    found, missing, left = fit(theirs.modern(state), own, pairs)
    first = theirs.FIRST_BACKGROUND
    try:
        found = classes.take(
            found, [r + 1 for r in rows] if first else rows, 0 if first else number
        )
    except (IndexError, RuntimeError) as error:
        raise UserError(
            f"{weights}: the tensors with a row a class do not fit each other ({str(error).splitlines()[0]})"
        ) from error
    misshapen = [
        f"{translate(k, pairs)} {list(v.shape)} instead of {list(own[k].shape)}"
        for k, v in found.items()
        if v.shape != own[k].shape
    ]
    missing, left = ([n for n in names if not n.endswith(COUNTER)] for names in (missing, left))
    if missing or left or misshapen:
        lists = {"missing": missing, "left_over": left, "of_another_shape": misshapen}
        raise UserError(
            f"{weights} does not fit {config.model.backbone.trunk.name} as {source} builds it here: {told(**lists)}"
        )
    if source == "detectron2":
        anchors = config.model.proposer.anchors
        sizes = len(anchors.sizes[0])
        detectron2.check_anchors(state, cast(Any, model).proposer.anchors.cells, sizes)
        if detectron2.takes_bgr(state):
            found = detectron2.rgb(found)
        found = detectron2.reorder_anchors(found, sizes, len(anchors.aspect_ratios))
    return {**own, **found}


def read_categories(path: Path) -> Categories:
    """The classes of a COCO file, whatever else it holds. Raises UserError."""
    report = Report(str(path))
    try:
        entries = parse_json(path.read_text(encoding="utf-8"))["categories"]
        found = file_categories(list(entries), report)
    except OSError as error:
        raise UserError(f"categories={path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"categories={path}: no COCO JSON with a list of categories") from error
    if report.errors or not len(found):
        raise UserError(report.text() if report.errors else f"categories={path}: there are none")
    return found


def main(arguments: list[str]) -> None:
    """Entry point of `tools/convert.py`."""
    convert(arguments)
