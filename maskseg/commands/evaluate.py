"""COCO evaluation of a checkpoint, on the data it was validated with or on other data.
Writes metrics.json, per_class.json, detections.json, validation.png and other pictures; of models that cut images into segments or label pixels
also segmentation_iou/... and semantic/... .

  python tools/evaluate.py checkpoint=runs/scenes_r18/TIME output=DIR
  python tools/evaluate.py checkpoint=best.pt output=DIR split=train evaluation.max_images=500
  python tools/evaluate.py checkpoint=best.pt output=DIR data=custom data.val_json=VAL.json data.images=IMAGES
  python tools/evaluate.py checkpoint=best.pt output=DIR evaluation.backend=faster trainer.precision=bf16
  python tools/evaluate.py checkpoint=best.pt output=DIR model.classifier.max_detections=300 model.classifier.score_threshold=0.01

With experiment=... segments are evaluated beside other ways to cut an image; keys of configs/segments.yaml, and the experiment's:

  python tools/evaluate.py experiment=hash_bsds data.root=DIR data.split=test output=DIR
  python tools/evaluate.py experiment=hash_bsds data.root=DIR output=DIR checkpoint=HASH sweep=[100,200]
  python tools/evaluate.py experiment=scenes_hash_r18 checkpoint=HASH output=DIR base=egs sweep=[250,400,700]

Other keys: those of the checkpoint's own config (config.yaml beside it).
"""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path
from typing import Any

from maskseg import config as configs
from maskseg.annotation.classifier import ImageClassifier
from maskseg.config.restore import checkpoint_word, open_data, trained_model
from maskseg.data.datasets.coco import CocoSource
from maskseg.engine.distributed import Group, processes
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.engine.run_folder import made_folder
from maskseg.errors import UserError
from maskseg.evaluation.coco_results import write_results
from maskseg.files import write_json
from maskseg.inference.validation import Processes, Validation
from maskseg.models.fuse import for_inference
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.structures import Categories
from maskseg.variants.cfm.prepare import prepare_segments


def validation(
    config: Any, source: CocoSource, split: str, categories: Categories, group: Group | None = None
) -> Validation:
    """The evaluation of `split` as `config.evaluation` says, shared out over the processes."""
    numbers, group = config.evaluation, group or Group()
    if numbers.batch < 1:
        raise UserError(f"evaluation.batch must be at least 1, not {numbers.batch}")
    source.file(split)
    counts = {len(points) for points in categories.keypoints if points}
    if numbers.oks_sigmas is not None and len(numbers.oks_sigmas) not in counts:
        raise UserError(
            f"evaluation.oks_sigmas has {len(numbers.oks_sigmas)} numbers, but the classes have {sorted(counts) or 'no'} keypoints"
        )
    return Validation(
        lambda: source.test_loader(
            split, numbers.batch, numbers.max_images, group.rank, group.world
        ),
        lambda: source.file(split).to_dict(),
        categories,
        numbers.max_detections,
        numbers.backend,
        numbers.pictures,
        numbers.min_score,
        lambda image_id: source.picture(split, image_id),
        Processes(group.rank, group.gather),
        numbers.oks_sigmas,
    )


def evaluate(words: list[str]) -> dict[str, float]:
    """What `tools/evaluate.py` does with its key=value words: writes metrics.json, per_class.json, detections.json and pictures into `output`.

    Under torchrun the images are shared out. Raises UserError before anything is written where checkpoint, data or keys are wrong.
    """
    model, config, categories = trained_model(checkpoint_word(words, "evaluate"), words, "evaluate")
    own_data = configs.names_data(words)
    configs.require(config, "output")
    if not isinstance(model, GeneralizedRCNN | ImageClassifier):
        raise UserError(
            "the checkpoint's model finds segments and no objects: experiment=... evaluates them (tools/evaluate.py --help)"
        )
    device = pick_device(config.trainer.device)
    with processes(device) as group:
        source = open_data(config, categories, group, own_data)
        check = validation(config, source, config.split, categories, group)
        source.semantic_maps(config.split)
        prepare_segments(model, source, [config.split], config, group, words)
        output = made_folder(Path(config.output))
        check.pictures = config.pictures
        metrics = check(
            for_inference(model.to(device), inference_dtype(config.trainer.precision)), 0
        )
        if group.main:
            write_json(
                output / "metrics.json",
                {k: v if math.isfinite(v) else None for k, v in metrics.items()},
            )
            write_json(output / "per_class.json", check.per_class())
            if check.evaluator is not None:
                write_results(output / "detections.json", check.evaluator.rows)
            pictures = [
                *(["detections.json"] if check.evaluator is not None else []),
                *check.save(output),
            ]
            print(check.table)
            print(f"written to {output}: metrics.json, per_class.json, {', '.join(pictures)}")
        group.wait()
    return metrics


def main(arguments: list[str]) -> None:
    """Entry point of `tools/evaluate.py`: with an experiment, segments are evaluated (`maskseg.variants.hash.fit`)."""
    if any(argument.startswith("experiment=") for argument in arguments):
        import_module("maskseg.variants.hash.fit").evaluate(arguments)
    else:
        evaluate(arguments)
