"""Trains a model: python tools/train.py experiment=... key=value"""

from __future__ import annotations

import sys

from maskseg import cli, config, pipeline

USAGE = f"""
Trains a model from COCO-format data. Everything is a key=value; the keys are those of configs/train.yaml and its groups.

  python tools/train.py                                                      the embedded data set, minutes on a CPU
  python tools/train.py experiment=nuclei_r18 data.root=DIR                  real images from scratch
  python tools/train.py experiment=coco_r50_fpn_1x data.root=DIR total_batch=8
  python tools/train.py experiment=coco_r50_fpn_1x data=custom data.train_json=TRAIN.json data.val_json=VAL.json data.images=DIR
  python tools/train.py experiment=scenes_r18 trainer.max_steps=6000 trainer.resume=auto

experiment: {", ".join(config.experiments())}
debug:      smoke (seconds: does every part run?), overfit (does the model learn four images by heart?)
other keys: run_dir, seed, total_batch, trainer.max_steps, trainer.checkpoint_every, trainer.evaluate_every, trainer.precision,
            optimizer.lr, data.num_workers, model.backbone.trunk.weights ...
"""


def main(argv: list[str] | None = None) -> int:
    """Console entry point; -> the exit code."""
    return cli.run(_train, USAGE, argv)


def _train(words: list[str]) -> None:
    run_dir = pipeline.train(config.compose("train", words))
    print(f"run folder: {run_dir}")


if __name__ == "__main__":
    sys.exit(main())
