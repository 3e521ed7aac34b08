"""Evaluates a checkpoint with the COCO metrics, on the data it was validated with or on other data.

Writes metrics.json, per_class.json, detections.json, validation.png and other images; for models
that cut images into segments or label pixels also segmentation_iou/... and semantic/... .

  python tools/evaluate.py checkpoint=runs/scenes_r18/TIME output=DIR
  python tools/evaluate.py checkpoint=best.pt output=DIR split=train evaluation.max_images=500
  python tools/evaluate.py checkpoint=best.pt output=DIR data=custom data.val_json=VAL.json \\
      data.images=IMAGES
  python tools/evaluate.py checkpoint=best.pt output=DIR evaluation.backend=faster \\
      trainer.precision=bf16
  python tools/evaluate.py checkpoint=best.pt output=DIR model.classifier.max_detections=300 \\
      model.classifier.score_threshold=0.01

With experiment=..., segments are compared with other ways to cut an image (configs/segments.yaml):

  python tools/evaluate.py experiment=hash_bsds data.root=DIR data.split=test output=DIR
  python tools/evaluate.py experiment=hash_bsds data.root=DIR output=DIR checkpoint=HASH \\
      'sweep=[100,200]'
  python tools/evaluate.py experiment=scenes_hash_r18 checkpoint=HASH output=DIR base=egs \\
      'sweep=[250,400,700]'

Other keys: those of the checkpoint's own config (config.yaml beside it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from torch import nn

from maskseg import config as configs
from maskseg.config import Config
from maskseg.config.restore import checkpoint_argument, open_data, prepare_segments, trained_model
from maskseg.data.coco.file import CocoFile
from maskseg.data.datasets.coco import CocoSource
from maskseg.engine.checkpoint import checkpoint_path, load_checkpoint
from maskseg.engine.distributed import DistributedContext, init_distributed
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.engine.resume import DIVISION, changed_files
from maskseg.engine.run_folder import make_folder
from maskseg.errors import UserError
from maskseg.evaluation.coco_results import write_results
from maskseg.files import write_json
from maskseg.files.outputs import check_no_run, check_outputs, record_outputs
from maskseg.inference.validation import SHEETS, Validation, ValidationSettings
from maskseg.models.fuse import for_inference
from maskseg.models.interfaces import TrainableModel
from maskseg.structures import Categories

_MAX_NAMED = 10  # annotations in a message
RESULT_FILES = ("metrics.json", "per_class.json", "detections.json")


def main(arguments: list[str]) -> None:
    """Entry point of `tools/evaluate.py`; with an experiment, segments are compared."""
    if any(argument.startswith("experiment=") for argument in arguments):
        import_module("maskseg.variants.hash.fit").evaluate(arguments)
    else:
        evaluate(arguments)


def evaluate(arguments: list[str]) -> dict[str, float]:
    """Evaluate a checkpoint and write the results to `output`. -> the metrics.

    Under torchrun the images are split over the processes. Raises UserError, before anything is
    written, where the checkpoint, the data or a key is wrong.
    """
    path = checkpoint_argument(arguments, "evaluate")
    model, config, categories = trained_model(path, arguments, "evaluate")
    configs.require_keys(config, "output")
    if not isinstance(model, TrainableModel):
        raise UserError(
            "the checkpoint's model finds segments and no objects: experiment=... evaluates them "
            "(tools/evaluate.py --help)"
        )
    output = Path(config.output)
    check_no_run(output)
    outputs = [output / name for name in [*RESULT_FILES, *(f"{name}.png" for name in SHEETS)]]
    check_outputs(outputs, tool="evaluate", overwrite=config.overwrite)
    device = pick_device(config.trainer.device)
    with init_distributed(device) as context:
        source = open_data(config, categories, context, configs.names_data(arguments))
        if context.main:
            _check_division(path, source)
        validation = build_validation(
            config, source, config.split, categories, context, config.pictures
        )
        check_heads(model, source.file(config.split))
        source.semantic_maps(config.split)  # raises UserError for a missing folder
        prepare_segments(model, source, [config.split], config, context, arguments)
        make_folder(output, "output")
        dtype = inference_dtype(config.trainer.precision)
        metrics = validation(for_inference(model.to(device), dtype), 0)
        if context.main:
            with record_outputs(outputs, "evaluate", config.overwrite, output):
                _write_results(validation, metrics, output)
        context.barrier()
    return metrics


def _check_division(path: Path, source: CocoSource) -> None:
    """Warn where a file is not divided as for the training of the checkpoint."""
    if not source.divides_file:
        return
    checkpoint = load_checkpoint(checkpoint_path(path))
    if DIVISION in changed_files(checkpoint, source.split_hash()):
        print(
            f"warning: {DIVISION}={source.reading.val_fraction:g} of {source.split('train').key} "
            "gives other validation images than those of the checkpoint, which may have been "
            "trained on them",
            flush=True,
        )


def build_validation(
    config: Config,
    source: CocoSource,
    split: str,
    categories: Categories,
    context: DistributedContext | None = None,
    num_images: int | None = None,
) -> Validation:
    """The evaluation of a split by `config.evaluation`; the images are split over the ranks.

    num_images: number of images to draw, instead of `config.evaluation.pictures`.
    """
    settings = config.evaluation
    context = context or DistributedContext()
    source.file(split)  # raises UserError before anything is built
    _check_sigmas(settings.oks_sigmas, categories)
    return Validation(
        lambda: source.test_loader(
            split, settings.batch, settings.max_images, context.rank, context.world_size
        ),
        lambda: source.file(split).to_dict(),
        categories,
        ValidationSettings(
            settings.max_detections,
            settings.backend,
            settings.pictures if num_images is None else num_images,
            settings.min_score,
            settings.oks_sigmas,
        ),
        lambda image_id: source.picture(split, image_id),
        context,
    )


def check_heads(model: nn.Module, file: CocoFile) -> None:
    """Raise UserError where a head of the model needs ground truth that the file does not have."""
    heads = [getattr(model, "classifier", None), *getattr(model, "heads", {}).values()]
    fields = {getattr(head, "adds", None) for head in heads}
    if "masks" in fields and not file.has_masks():
        bare = file.objects_without_masks()
        if not bare:
            raise UserError(f"{file.name}: it has crowds only, without masks that the model needs")
        named = ", ".join(map(str, bare[:_MAX_NAMED]))
        if len(bare) > _MAX_NAMED:
            named += " ..."
        total = sum(instances for _, instances, _ in file.class_counts())
        raise UserError(
            f"{file.name}: {len(bare)} of {total} objects have no mask, which the model needs "
            f"(annotations {named}); ~model/heads@model.heads.mask removes a mask head"
        )
    if "keypoints" in fields and not file.has_keypoints():
        raise UserError(
            f"{file.name}: no object has a visible keypoint, which the keypoint head needs; "
            "~model/heads@model.heads.keypoint removes it"
        )


def _check_sigmas(sigmas: Sequence[float] | None, categories: Categories) -> None:
    """Raise UserError for a number of OKS sigmas that is no class's number of keypoints."""
    counts = {len(points) for points in categories.keypoints if points}
    if sigmas is not None and len(sigmas) not in counts:
        raise UserError(
            f"evaluation.oks_sigmas has {len(sigmas)} numbers, but the classes have "
            f"{sorted(counts) or 'no'} keypoints"
        )


def _write_results(validation: Validation, metrics: dict[str, float], output: Path) -> None:
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    metrics_file, per_class_file, detections_file = RESULT_FILES
    write_json(output / metrics_file, finite)
    write_json(output / per_class_file, validation.per_class())
    files = [metrics_file, per_class_file]
    if validation.evaluator is not None:
        write_results(output / detections_file, validation.evaluator.rows)
        files.append(detections_file)
    files += validation.save(output)
    print(validation.table(str(output / per_class_file)))
    print(f"written to {output}: {', '.join(files)}")
