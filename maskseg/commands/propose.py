"""Writes the proposals of a trained model for each image of a dataset into one file.

Prints the recall of the proposals. A training from such a file (model/proposer=file) saves the time
of the region proposal network in each step. The keys are those of configs/propose.yaml and of the
checkpoint's own config.

  python tools/propose.py checkpoint=runs/scenes_r18/TIME output=train.proposals
  python tools/propose.py checkpoint=runs/scenes_r18/TIME output=val.proposals split=val
  python tools/propose.py checkpoint=best.pt data=coco data.root=DIR output=coco.proposals \\
      model.proposer.test_limits.post_nms_top_n=2000
  python tools/train.py model/proposer=file data.train_proposals=train.proposals \\
      data.val_proposals=val.proposals
  python tools/propose.py checkpoint=best.pt output=gpu.proposals trainer.device=cuda \\
      trainer.precision=bf16 evaluation.batch=8

Without a checkpoint: segment proposals with masks, computed from the pixels or imported from the
file of another program, into a folder (configs/propose_segments.yaml).

  python tools/propose.py data=custom data.train_json=TRAIN.json data.images=DIR \\
      output=segments_train
  python tools/propose.py data=coco data.root=DIR output=segments_val split=val \\
      method.max_proposals=1000
  python tools/propose.py data=coco data.root=DIR output=mcg_val split=val input=MCG.json
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config.restore import checkpoint_argument, open_data, trained_model
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.proposal_file import ImageProposals, write_proposals
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.errors import UserError
from maskseg.evaluation.coco_results import to_original
from maskseg.files.outputs import check_outputs, record_outputs
from maskseg.models.fuse import for_inference
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.ops import boxes as box_ops
from maskseg.structures import Batch, Regions

_IOU_THRESHOLDS = (0.5, 0.7)  # of the recall that is printed


def main(arguments: list[str]) -> None:
    """Entry point of `tools/propose.py`.

    Without a checkpoint, segment proposals are written (`maskseg.variants.cfm.propose`).
    """
    has_checkpoint = any(argument.startswith("checkpoint=") for argument in arguments)
    has_output = any(argument.startswith("output=") for argument in arguments)
    if has_checkpoint or not has_output:
        propose(arguments)
    else:
        import_module("maskseg.variants.cfm.propose").propose(arguments)


def propose(arguments: list[str]) -> None:
    """Write the proposals of a checkpoint's model to `output`.

    Raises UserError before anything is written.
    """
    path = checkpoint_argument(arguments, "propose")
    model, config, categories = trained_model(path, arguments, "propose")
    configs.require_keys(config, "output")
    if not isinstance(model, GeneralizedRCNN):
        raise UserError(f"checkpoint={path}: the model has no proposals; it detects no objects")
    if getattr(model.proposer, "needs", None) == "proposals":
        raise UserError(
            f"checkpoint={path}: the model takes its proposals from a file and cannot compute any"
        )
    config.data.keep_empty = True  # a training may use images without objects
    source = open_data(config, categories, may_make=configs.names_data(arguments))
    source.file(config.split)  # raises UserError for a missing split
    output = Path(config.output)
    if not output.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.parent}")
    check_outputs(
        [output], [*source.json_files(), path], tool="propose", overwrite=config.overwrite
    )
    device = pick_device(config.trainer.device)
    recall = _Recall()
    rcnn = for_inference(model.to(device), inference_dtype(config.trainer.precision))
    proposals = _propose_images(rcnn, source, config.split, config.evaluation.batch, device, recall)
    with record_outputs([output], "propose"):
        count = write_proposals(output, proposals, f"{source.split(config.split).json} by {path}")
    megabytes = output.stat().st_size / 1e6
    print(
        f"{output}: {count} proposals of {recall.num_images} images ({megabytes:.1f} MB); "
        f"{recall.summary()}"
    )


def _propose_images(
    rcnn: GeneralizedRCNN,
    source: CocoSource,
    split: str,
    batch_size: int,
    device: torch.device,
    recall: _Recall,
) -> Iterator[ImageProposals]:
    """The proposals of each image of a split, in pixels of the original image."""
    for batch in tqdm(source.test_loader(split, batch_size), desc="proposing", disable=None):
        regions = rcnn.propose(batch.to(device)).to("cpu")
        recall.add(batch, regions)
        for i, image_id in enumerate(batch.image_ids):
            height, width = batch.original_sizes[i].tolist()
            proposals = to_original(regions, i, batch.sizes[i].tolist(), (height, width))
            scores = proposals.scores.clamp(0, 1)
            yield ImageProposals(image_id, height, width, proposals.boxes, scores)


class _Recall:
    """The share of ground-truth objects with a proposal at each IoU threshold; crowds excluded."""

    def __init__(self) -> None:
        self.num_images = 0
        self.num_objects = 0
        self.hits = [0] * len(_IOU_THRESHOLDS)

    def add(self, batch: Batch, regions: Regions) -> None:
        """Count the objects of a batch."""
        assert batch.targets is not None
        self.num_images += len(batch)
        for i in range(len(batch)):
            is_object = (batch.targets.image_index == i) & ~batch.targets.iscrowd
            best_iou = _best_iou(
                batch.targets.boxes[is_object], regions.boxes[regions.image_index == i]
            )
            self.num_objects += len(best_iou)
            for k, threshold in enumerate(_IOU_THRESHOLDS):
                self.hits[k] += int((best_iou >= threshold).sum())

    def summary(self) -> str:
        """The recall, for the console."""
        shares = []
        for hits, threshold in zip(self.hits, _IOU_THRESHOLDS, strict=True):
            shares.append(f"{hits / max(self.num_objects, 1):.3f} at IoU {threshold}")
        return f"recall of {self.num_objects} objects: {', '.join(shares)}"


def _best_iou(gt_boxes: Tensor, boxes: Tensor) -> Tensor:
    """[N, 4] and [M, 4] -> [N] highest IoU of each ground-truth box; 0 without boxes."""
    if not len(boxes):
        return torch.zeros(len(gt_boxes))
    return box_ops.iou(gt_boxes[None], boxes[None])[0].amax(dim=1)
