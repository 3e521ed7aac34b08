"""Proposals for a data set: python tools/propose.py output=... [checkpoint=...]"""

from __future__ import annotations

import sys

from maskseg import cli, proposing, segment_proposing

USAGE = """
Writes the proposals of a trained model for each image of a data set into one file, and prints how much of the truth they cover. Training from it
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


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(_propose, USAGE, argv)


def _propose(words: list[str]) -> None:
    own = any(word.startswith("checkpoint=") for word in words) or not any(word.startswith("output=") for word in words)
    (proposing if own else segment_proposing).propose(words)


if __name__ == "__main__":
    sys.exit(main())
