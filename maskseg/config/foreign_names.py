"""Settings as other frameworks name them, and the keys that maskseg has for them.

Users of ultralytics, detectron2, mmdetection, torchvision's reference scripts, Lightning and
Hugging Face type the names that they know. The tables turn a name into the key to write instead.
"""

from __future__ import annotations

from collections.abc import Collection

# The value means the same. Of several keys, the first one that the config has is meant.
_KEYS: dict[str, tuple[str, ...]] = {
    # length of a training
    "epochs": ("trainer.epochs", "trainer.max_steps"),
    "epoch": ("trainer.epochs", "trainer.max_steps"),
    "num_epochs": ("trainer.epochs", "trainer.max_steps"),
    "max_epochs": ("trainer.epochs", "trainer.max_steps"),
    "num_train_epochs": ("trainer.epochs", "trainer.max_steps"),
    "iters": ("trainer.max_steps",),
    "iterations": ("trainer.max_steps",),
    "max_iter": ("trainer.max_steps",),
    "max_iters": ("trainer.max_steps",),
    "steps": ("trainer.max_steps",),
    "max_steps": ("trainer.max_steps",),
    # batches and loading
    "batch": ("batch_size", "evaluation.batch"),
    "ims_per_batch": ("batch_size", "evaluation.batch"),
    "samples_per_gpu": ("batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "workers": ("data.num_workers",),
    "num_workers": ("data.num_workers",),
    "workers_per_gpu": ("data.num_workers",),
    "dataloader_num_workers": ("data.num_workers",),
    "accumulate": ("trainer.accumulate_grad_batches",),
    "accumulation_steps": ("trainer.accumulate_grad_batches",),
    "gradient_accumulation_steps": ("trainer.accumulate_grad_batches",),
    # image size and data
    "imgsz": ("data.size",),
    "img": ("data.size",),
    "img_size": ("data.size",),
    "image_size": ("data.size",),
    "imgs": ("data.images", "images"),
    "min_size_train": ("data.size",),
    "min_size_test": ("data.size",),
    "img_scale": ("data.size",),
    "images": ("data.images",),
    "img_dir": ("data.images", "images"),
    "image_dir": ("data.images", "images"),
    "image_root": ("data.images", "images"),
    "images_dir": ("data.images", "images"),
    "img_folder": ("data.images", "images"),
    "img_prefix": ("data.images", "images"),
    "data_root": ("data.root", "data.images"),
    "data_path": ("data.root", "data.images"),
    "dataset_path": ("data.root", "data.images"),
    "json": ("data.train_json", "data.val_json", "file"),
    "ann_file": ("data.train_json", "file"),
    "annotations": ("data.train_json", "file"),
    "train": ("data.train_json",),
    "val": ("data.val_json",),
    "train_json": ("data.train_json",),
    "val_json": ("data.val_json",),
    "nc": ("data.num_classes",),
    "num_classes": ("data.num_classes",),
    # optimization
    "lr": ("optimizer.lr",),
    "lr0": ("optimizer.lr",),
    "base_lr": ("optimizer.lr",),
    "learning_rate": ("optimizer.lr",),
    "lrf": ("scheduler.final_factor",),
    "warmup_iters": ("scheduler.warmup_steps",),
    "warmup_steps": ("scheduler.warmup_steps",),
    "lr_gamma": ("scheduler.gamma",),
    "lr_steps": ("scheduler.milestones",),
    "milestones": ("scheduler.milestones",),
    "momentum": ("optimizer.momentum",),
    "wd": ("optimizer.weight_decay",),
    "weight_decay": ("optimizer.weight_decay",),
    "clip_grad": ("trainer.clip_norm",),
    "grad_clip": ("trainer.clip_norm",),
    "max_grad_norm": ("trainer.clip_norm",),
    "gradient_clip_val": ("trainer.clip_norm",),
    "patience": ("trainer.patience",),
    "ema": ("trainer.ema",),
    "ema_decay": ("trainer.ema",),
    # checkpoints and folders
    "weights": ("checkpoint", "trainer.init"),
    "load_from": ("trainer.init",),
    "pretrained": ("trainer.init", "checkpoint"),
    "init": ("trainer.init",),
    "model": ("checkpoint",),
    "model_path": ("checkpoint", "trainer.init"),
    "ckpt": ("checkpoint", "trainer.init"),
    "ckpt_path": ("checkpoint", "trainer.resume"),
    "run": ("checkpoint",),
    "weights_backbone": ("model.backbone.trunk.weights",),
    "resume": ("trainer.resume",),
    "resume_from": ("trainer.resume",),
    "resume_from_checkpoint": ("trainer.resume",),
    "save_period": ("trainer.checkpoint_every",),
    "checkpoint_period": ("trainer.checkpoint_every",),
    "save_steps": ("trainer.checkpoint_every",),
    "save_every": ("trainer.checkpoint_every",),
    "eval_period": ("trainer.evaluate_every",),
    "eval_steps": ("trainer.evaluate_every",),
    "val_interval": ("trainer.evaluate_every",),
    "print_freq": ("trainer.log_every",),
    "logging_steps": ("trainer.log_every",),
    "log_every_n_steps": ("trainer.log_every",),
    "project": ("run_dir", "output"),
    "save_dir": ("run_dir", "output"),
    "work_dir": ("run_dir", "output"),
    "log_dir": ("run_dir", "output"),
    "output_dir": ("run_dir", "output"),
    "out_dir": ("run_dir", "output"),
    "out": ("output", "run_dir"),
    "output": ("output", "run_dir"),
    "outfile": ("output",),
    "default_root_dir": ("run_dir", "output"),
    "exist_ok": ("overwrite",),
    "force": ("overwrite",),
    # inference
    "source": ("input",),
    "image": ("input",),
    "img_path": ("input",),
    "path": ("input", "file", "data.images"),
    "conf": ("min_score", "model.classifier.score_threshold"),
    "conf_thres": ("min_score", "model.classifier.score_threshold"),
    "confidence_threshold": ("min_score", "model.classifier.score_threshold"),
    "score_thr": ("min_score", "model.classifier.score_threshold"),
    "score_thresh": ("min_score", "model.classifier.score_threshold"),
    "score_thresh_test": ("model.classifier.score_threshold",),
    "threshold": ("min_score", "model.classifier.score_threshold"),
    "iou": ("model.classifier.nms_threshold",),
    "iou_thres": ("model.classifier.nms_threshold",),
    "nms_thresh_test": ("model.classifier.nms_threshold",),
    "max_det": ("model.classifier.max_detections",),
    "detections_per_image": ("model.classifier.max_detections",),
    "box_detections_per_img": ("model.classifier.max_detections",),
    "max_per_img": ("model.classifier.max_detections",),
    # model
    "backbone": ("model.backbone.trunk.name",),
    "freeze": ("model.backbone.trunk.frozen_stages",),
    "freeze_at": ("model.backbone.trunk.frozen_stages",),
    "frozen_stages": ("model.backbone.trunk.frozen_stages",),
    "anchor_sizes": ("model.proposer.anchors.sizes",),
    # machine
    "device": ("trainer.device",),
    "precision": ("trainer.precision",),
    "compile": ("trainer.compile",),
    "plots": ("trainer.plots",),
}
# The setting exists in another form.
_ADVICE = {
    "gpu": "trainer.device=cuda:0 chooses a GPU, torchrun uses several",
    "gpus": "trainer.device=cuda:0 chooses a GPU, torchrun uses several",
    "num_gpus": "torchrun --nproc-per-node N tools/train.py ... uses N GPUs",
    "devices": "torchrun --nproc-per-node N tools/train.py ... uses N GPUs",
    "num_machines": "torchrun --nnodes N tools/train.py ... uses N machines",
    "num_nodes": "torchrun --nnodes N tools/train.py ... uses N machines",
    "accelerator": "trainer.device=cuda, cpu or mps",
    "amp": "trainer.precision=bf16",
    "half": "trainer.precision=fp16",
    "fp16": "trainer.precision=fp16",
    "bf16": "trainer.precision=bf16",
    "cos_lr": "scheduler=cosine",
    "lr_scheduler": "scheduler=cosine or multistep",
    "lr_scheduler_type": "scheduler=cosine or multistep",
    "lr_schedule": "scheduler=cosine or multistep",
    "optim": "optimizer=sgd or adamw",
    "opt": "optimizer=sgd or adamw",
    "warmup_epochs": "scheduler.warmup_steps counts steps",
    "depth": "model.backbone.trunk.name=resnet50",
    "config": "experiment=NAME chooses a whole config, --info lists the names",
    "config_file": "experiment=NAME chooses a whole config, --info lists the names",
    "cfg_file": "experiment=NAME chooses a whole config, --info lists the names",
    "cfg_options": "overrides follow one another: key=value key=value",
    "opts": "overrides follow one another: key=value key=value",
    "task": "the tool is the task: tools/train.py, tools/evaluate.py, tools/predict.py",
    "mode": "the tool is the task: tools/train.py, tools/evaluate.py, tools/predict.py",
    "eval": "tools/evaluate.py checkpoint=RUN output=DIR evaluates a run",
    "eval_only": "tools/evaluate.py checkpoint=RUN output=DIR evaluates a run",
    "test_only": "tools/evaluate.py checkpoint=RUN output=DIR evaluates a run",
    "dataset": "data=NAME chooses a dataset, data=custom your own",
    "datasets": "data=NAME chooses a dataset, data=custom your own",
    "names": "the class names are read from the JSON file",
    "cache": "images are read from the disk in each epoch",
    "save": "the tools always save their results",
    "multirun": "tools/sweep.py --multirun runs a sweep",
    "m": "tools/sweep.py --multirun runs a sweep",
    "verbose": "the tools have one level of output",
    "img_size_test": "data.test_transforms=[...] resizes the images",
}


def find_key(name: str, known: Collection[str]) -> str | None:
    """The key that means the same as a name of another framework, None where there is none.

    name: as it is typed, such as `imgsz`, `SOLVER.BASE_LR` or `--batch-size`; known: the keys of
    the config.
    """
    keys = _BY_PLAIN_NAME.get(_normalize(name), ())
    return next((key for key in keys if key in known), None)


def find_advice(name: str) -> str | None:
    """What to write instead of a name that no single key replaces, None for an unknown name."""
    name = _normalize(name)
    return _SIZE_ADVICE if name in _SIZE_NAMES else _ADVICE_BY_PLAIN_NAME.get(name)


def _normalize(name: str) -> str:
    """`--Batch-Size` -> `batchsize`, `SOLVER.BASE_LR` -> `baselr`."""
    return name.rpartition(".")[2].replace("-", "").replace("_", "").lower()


_BY_PLAIN_NAME = {_normalize(name): keys for name, keys in _KEYS.items()}
_ADVICE_BY_PLAIN_NAME = {_normalize(name): advice for name, advice in _ADVICE.items()}
# Without a key for the size, as in the config of a checkpoint.
_SIZE_ADVICE = "data.test_transforms resizes the images of inference, data.train_transforms others"
_SIZE_NAMES = frozenset(_normalize(name) for name, keys in _KEYS.items() if keys == ("data.size",))


def names() -> list[str]:
    """All names in the tables."""
    return [*_KEYS, *_ADVICE]
