"""Checkpoint -> the proposals of a data set in a file, as `tools/propose.py` does it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from maskseg import config as configs
from maskseg.data.proposals import ImageProposals, write_proposals
from maskseg.data.source import CocoSource
from maskseg.engine.precision import inference_dtype, pick_device
from maskseg.errors import UserError
from maskseg.evaluation.rows import to_original
from maskseg.modules.folding import for_inference
from maskseg.ops import boxes as box_ops
from maskseg.pipeline import open_data
from maskseg.rcnn import GeneralizedRCNN
from maskseg.structures import Batch, Regions
from maskseg.trained import checkpoint_word, trained_model

_RECALL_AT = (0.5, 0.7)


def propose(words: list[str]) -> None:
    """What `tools/propose.py` does with its key=value words. Raises UserError before anything is written."""
    path = checkpoint_word(words, "propose")
    model, config, categories = trained_model(path, words, "propose")
    configs.require(config, "output")
    rcnn = cast(GeneralizedRCNN, model)
    if getattr(rcnn.proposer, "needs", None) == "proposals":
        raise UserError(f"checkpoint={path}: the model has no proposer of its own, it takes proposals from a file")
    source = open_data(config, categories, may_make=configs.names_data(words))
    source.file(config.split)
    source.keep_empty, output = True, Path(config.output)  # training may keep images without objects, or not
    if not output.parent.is_dir():
        raise UserError(f"output={output}: there is no folder {output.parent}")
    device = pick_device(config.trainer.device)
    recall = _Recall()
    rcnn = for_inference(rcnn.to(device), inference_dtype(config.trainer.precision))
    found = _proposals(rcnn, source, config.split, config.evaluation.batch, device, recall)
    count = write_proposals(output, found, f"{source.json[config.split]} by {path}")
    print(f"{output}: {count} proposals of {recall.images} images ({output.stat().st_size / 1e6:.1f} MB); {recall.text()}")


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
            best = box_ops.iou(truth[None], boxes[None])[0].amax(dim=1) if len(boxes) else torch.zeros(len(truth))
            self.truths += len(truth)
            self.hits = [hits + int((best >= least).sum()) for hits, least in zip(self.hits, _RECALL_AT, strict=True)]

    def text(self) -> str:
        shares = (f"{hits / max(self.truths, 1):.3f} at IoU {least}" for hits, least in zip(self.hits, _RECALL_AT, strict=True))
        return f"recall of {self.truths} objects: {', '.join(shares)}"


def _proposals(rcnn: GeneralizedRCNN, source: CocoSource, split: str, size: int, device: torch.device, recall: _Recall) -> Iterator[ImageProposals]:
    for batch in tqdm(source.test_loader(split, size), desc="proposing", disable=None):
        regions = rcnn.propose(batch.to(device)).to("cpu")
        recall.add(batch, regions)
        for i, image_id in enumerate(batch.image_ids):
            height, width = batch.original_sizes[i].tolist()
            own = to_original(regions, i, batch.sizes[i].tolist(), (height, width))
            yield ImageProposals(image_id, height, width, own.boxes, own.scores.clamp(0, 1))
