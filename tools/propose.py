"""A model's proposals for a data set: python tools/propose.py checkpoint=... output=..."""

from __future__ import annotations

import sys

from maskseg import cli, proposing

USAGE = """
Writes the proposals of a trained model for each image of a data set into one file, and prints how much of the truth they cover. Training from it
(model/proposer=file) spares the proposals' share of each step. The keys are those of configs/propose.yaml and of the checkpoint's own config.

  python tools/propose.py checkpoint=runs/scenes_r18/TIME output=train.proposals
  python tools/propose.py checkpoint=runs/scenes_r18/TIME output=val.proposals split=val
  python tools/propose.py checkpoint=best.pt data=coco data.root=DIR output=coco.proposals model.proposer.test_limits.per_image=2000
  python tools/train.py model/proposer=file data.train_proposals=train.proposals data.val_proposals=val.proposals
  python tools/propose.py checkpoint=best.pt output=gpu.proposals trainer.device=cuda trainer.precision=bf16 evaluation.batch=8
"""


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(proposing.propose, USAGE, argv)


if __name__ == "__main__":
    sys.exit(main())
