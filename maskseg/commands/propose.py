"""Writes the proposals of a trained model for each image of a data set into one file, and prints how much of the truth they cover. Training from it
(model/proposer=file) spares the proposals' share of each step. The keys are those of configs/propose.yaml and of the checkpoint's own config.

  python tools/propose.py checkpoint=runs/scenes_r18/TIME output=train.proposals
  python tools/propose.py checkpoint=runs/scenes_r18/TIME output=val.proposals split=val
  python tools/propose.py checkpoint=best.pt data=coco data.root=DIR output=coco.proposals model.proposer.test_limits.per_image=2000
  python tools/train.py model/proposer=file data.train_proposals=train.proposals data.val_proposals=val.proposals
  python tools/propose.py checkpoint=best.pt output=gpu.proposals trainer.device=cuda trainer.precision=bf16 evaluation.batch=8

Without a checkpoint: segments with masks, found in the pixels or taken from another program's file, into a folder (configs/propose_segments.yaml).

  python tools/propose.py data=custom data.train_json=TRAIN.json data.images=DIR output=segments_train
  python tools/propose.py data=coco data.root=DIR output=segments_val split=val method.max_proposals=1000
  python tools/propose.py data=coco data.root=DIR output=mcg_val split=val input=MCG.json
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from maskseg import config as configs
from maskseg.config.restore import checkpoint_word, open_data, trained_model
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.proposal_file import ImageProposals, write_proposals
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.errors import UserError
from maskseg.evaluation.coco_results import to_original
from maskseg.models.fuse import for_inference
from maskseg.models.rcnn import GeneralizedRCNN
from maskseg.ops import boxes as box_ops
from maskseg.structures import Batch, Regions

_RECALL_AT = (0.5, 0.7)


def propose(words: list[str]) -> None:
    """What `tools/propose.py` does with its key=value words. Raises UserError before anything is written."""
    path = checkpoint_word(words, "propose")
    model, config, categories = trained_model(path, words, "propose")
    configs.require(config, "output")
    rcnn = cast(GeneralizedRCNN, model)
    if getattr(rcnn.proposer, "needs", None) == "proposals":
        raise UserError(
            f"checkpoint={path}: the model has no proposer of its own, it takes proposals from a file"
        )
    source = open_data(config, categories, may_make=configs.names_data(words))
    source.file(config.split)
    source.keep_empty, output = (
        True,
        Path(config.output),
    )  # training may keep images without objects, or not
    if not output.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.parent}")
    device = pick_device(config.trainer.device)
    recall = _Recall()
    rcnn = for_inference(rcnn.to(device), inference_dtype(config.trainer.precision))
    found = _proposals(rcnn, source, config.split, config.evaluation.batch, device, recall)
    count = write_proposals(output, found, f"{source.json[config.split]} by {path}")
    print(
        f"{output}: {count} proposals of {recall.images} images ({output.stat().st_size / 1e6:.1f} MB); {recall.text()}"
    )


class _Recall:
    """Which share of the truth some proposal overlaps."""

    def __init__(self) -> None:
        self.images, self.truths, self.hits = 0, 0, [0] * len(_RECALL_AT)

    def add(self, batch: Batch, regions: Regions) -> None:
        assert batch.targets is not None
        self.images += len(batch)
        for i in range(len(batch)):
            truth = batch.targets.boxes[(batch.targets.image_index == i) & ~batch.targets.crowd]
            boxes = regions.boxes[regions.image_index == i]
            best = (
                box_ops.iou(truth[None], boxes[None])[0].amax(dim=1)
                if len(boxes)
                else torch.zeros(len(truth))
            )
            self.truths += len(truth)
            self.hits = [
                hits + int((best >= least).sum())
                for hits, least in zip(self.hits, _RECALL_AT, strict=True)
            ]

    def text(self) -> str:
        shares = (
            f"{hits / max(self.truths, 1):.3f} at IoU {least}"
            for hits, least in zip(self.hits, _RECALL_AT, strict=True)
        )
        return f"recall of {self.truths} objects: {', '.join(shares)}"


def _proposals(
    rcnn: GeneralizedRCNN,
    source: CocoSource,
    split: str,
    size: int,
    device: torch.device,
    recall: _Recall,
) -> Iterator[ImageProposals]:
    for batch in tqdm(source.test_loader(split, size), desc="proposing", disable=None):
        regions = rcnn.propose(batch.to(device)).to("cpu")
        recall.add(batch, regions)
        for i, image_id in enumerate(batch.image_ids):
            height, width = batch.original_sizes[i].tolist()
            own = to_original(regions, i, batch.sizes[i].tolist(), (height, width))
            yield ImageProposals(image_id, height, width, own.boxes, own.scores.clamp(0, 1))


def main(arguments: list[str]) -> None:
    """Entry point of `tools/propose.py`: without a checkpoint, segments are made (`maskseg.variants.cfm.propose`)."""
    has_checkpoint = any(argument.startswith("checkpoint=") for argument in arguments)
    has_output = any(argument.startswith("output=") for argument in arguments)
    if has_checkpoint or not has_output:
        propose(arguments)
    else:
        import_module("maskseg.variants.cfm.propose").propose(arguments)
