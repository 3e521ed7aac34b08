"""Masks proposed for a data set of boxes or image labels: what tools/annotate.py does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskseg import config as configs
from maskseg.annotation_study import Measuring, best_of, maps_of, save_study, study, study_text
from maskseg.bottomup.polygons import polygons
from maskseg.bottomup.techniques import OF_MAPS, USUAL, WITH_THRESHOLD, Technique, at_all
from maskseg.data.annotated_json import check_output, class_annotations, object_annotations, write_annotations
from maskseg.data.annotation_jobs import BY, AnnotationJob, annotation_jobs, bitmap_rle, file_mark, work_through
from maskseg.data.class_maps import members_of
from maskseg.data.coco import CocoFile
from maskseg.data.source import CocoSource
from maskseg.errors import UserError
from maskseg.inference.annotation_pictures import Example, contact_sheet, save_whole
from maskseg.inference.class_maps import ClassMaps, Maps, built
from maskseg.pipeline import open_data
from maskseg.trained import trained_model
from maskseg.variants.cam import ActivationModel, CAMModel
from maskseg.variants.image_classifier import ImageClassifier

SHOWN = 5  # annotations that a warning names
Jobs = list[AnnotationJob]


def annotate(words: list[str]) -> None:
    """What `tools/annotate.py` does with its key=value words. Raises UserError before anything is written where data, keys or weights are wrong."""
    config = configs.compose("annotate", words)
    configs.require(config, "output")
    _check(config)
    source, output = open_data(config), Path(config.output)
    check_output(output, source.json.values())
    run = _Run(config, source, output)
    rows = run.table() if config.technique == "all" or config.evaluate else ""
    if config.technique != "all":
        run.masks(run.technique())
    if rows:
        print(rows)
    for journal in run.journals:
        journal.unlink(missing_ok=True)


@dataclass(frozen=True)
class Proposing:
    """A job -> for each mask that is wanted: id, label, segmentation, area, bbox (x, y, width, height) and mask_by, which tells how it came about."""

    technique: Technique
    maps: Maps | None
    as_polygons: bool

    def __call__(self, job: AnnotationJob) -> list[dict[str, Any]]:
        if not job.wanted:
            return []
        image, rows = job.load(), []
        for wanted, score, own in zip(job.wanted, *maps_of(self.maps, image, job), strict=True):
            cut = self.technique(image, wanted.box, own)
            y, x = np.flatnonzero(cut.mask.any(axis=1)), np.flatnonzero(cut.mask.any(axis=0))
            box = [int(x[0]), int(y[0]), int(x[-1] - x[0] + 1), int(y[-1] - y[0] + 1)] if len(x) else [0, 0, 0, 0]
            told = {"technique": self.technique.name, "threshold": self.technique.threshold, "thresholds": self.technique.thresholds()}
            told |= {"score": score, "fallback": cut.fallback or None}
            rows.append(
                {
                    "id": wanted.id,
                    "label": wanted.label,
                    "segmentation": polygons(cut.mask) if self.as_polygons else bitmap_rle(cut.mask),
                    "area": int(cut.mask.sum()),
                    "bbox": box,
                    "mask_by": {key: value for key, value in told.items() if value is not None},
                }
            )
        return rows


class _Run:
    """One call of the tool. journals: what is left of it if it is stopped."""

    def __init__(self, config: Any, source: CocoSource, output: Path) -> None:
        self.config, self.source, self.output = config, source, output
        self.file, self.journals = _own_file(source, config.split), list[Path]()
        self.maps = _maps(config, self.file)

    def technique(self) -> Technique:
        """The one that the keys name, or the best one of those at hand on images that have masks."""
        name, threshold = self.config.technique, self.config.threshold
        if name in OF_MAPS and self.maps is None:
            raise UserError(f"technique {name} needs a classifier: checkpoint=RUN, or classifier=NAME weights=...")
        if name != "auto":
            return Technique(name, USUAL.get(name) if threshold is None else threshold, **self._keys())
        other = "train" if self.config.split == "val" else "val"
        split = other if self.source.json[other] else self.config.split
        file = _own_file(self.source, split)
        jobs = self._with_truth(split, file)[: self.config.tune_images]
        rows = study(jobs, self._measuring(file), *self._journal("tuning", split), len(file.categories), self.config.min_area)
        best = best_of(rows, self.config.by)
        means = ", ".join(f"{key} {value:.3f}" for key, value in best.means.items())
        print(f"{best.technique.text} is the best technique on {len(jobs)} images of {file.path} ({means})", flush=True)
        return best.technique

    def table(self) -> str:
        """All techniques at all thresholds; the numbers and the curves go beside the output."""
        jobs = self._with_truth(self.config.split, self.file)
        rows = study(jobs, self._measuring(self.file), *self._journal("table", self.config.split), len(self.file.categories), self.config.min_area)
        table, curves = (self.output.with_name(f"{self.output.stem}_{part}") for part in ("table.json", "curves.png"))
        save_study(rows, self.file.categories.names, table, curves)
        return f"{study_text(rows, self.file.categories.names, self.config.by)}\nwritten: {table}, {curves}"

    def masks(self, technique: Technique) -> None:
        """The masks of all images, and the contact sheet."""
        jobs = self._jobs(self.config.split, self.file, truth=False)
        work = Proposing(technique, self.maps if technique.needs_map else None, self.config.segmentation == "polygons")
        journal, settings, workers = self._journal("masks", self.config.split)
        settings |= {f"technique.{key}": value for key, value in technique.values().items()} | {"segmentation": self.config.segmentation}
        found = work_through(jobs, work, journal, settings, workers, "masks")
        rows = [row for own in found.values() for row in own]
        _warn(rows)
        if self.config.by == "object":
            content = object_annotations(self.file, {row["id"]: row for row in rows})
        else:
            content = class_annotations(self.file, {image: [_class_row(row) for row in own if row["area"]] for image, own in found.items()})
        write_annotations(self.output, content)
        told = f"{self.output}: {sum(row['area'] > 0 for row in rows)} masks in {len(jobs)} images ({technique.text})"
        if self.config.pictures:
            sheet = self.output.with_name(f"{self.output.stem}_pictures.png")
            save_whole(contact_sheet(self._examples(technique, work.maps)), sheet)
            told += f"; {sheet}"
        print(told)

    def _examples(self, technique: Technique, maps: Maps | None) -> list[Example]:
        """One of each of the first images that have any, the one of the largest box."""
        truths = {(job.image_id, w.id, w.label): w for job in self._jobs(self.config.split, self.file, truth=True) for w in job.wanted}
        examples = []
        for job in [job for job in self._jobs(self.config.split, self.file, truth=False) if job.wanted][: self.config.pictures]:
            image, (height, width) = job.load(), (job.height, job.width)
            at = max(range(len(job.wanted)), key=lambda i: _extent(job.wanted[i].box))
            wanted, own = job.wanted[at], maps_of(maps, image, job)[1][at]
            cut, values = technique(image, wanted.box, own), technique.map(wanted.box, own, height, width)
            codes, true = technique.codes(wanted.box, values, height, width), truths.get((job.image_id, wanted.id, wanted.label))
            truth = None if true is None else true.true_mask()
            title = f"{self.file.categories.names[wanted.label]}, {job.file_name}"
            examples.append(Example(title, image, cut.mask, wanted.box, values, codes, truth, cut.fallback))
        return examples

    def _measuring(self, file: CocoFile) -> Measuring:
        maps = None if self.maps is None else _maps(self.config, file)
        return Measuring(tuple(at_all(list(self.config.thresholds), maps is not None, **self._keys())), maps)

    def _with_truth(self, split: str, file: CocoFile) -> Jobs:
        jobs = [job for job in self._jobs(split, file, truth=True) if job.wanted]
        if not jobs:
            raise UserError(f"{file.path}: there are no masks to compare techniques with")
        return jobs

    def _jobs(self, split: str, file: CocoFile, truth: bool) -> Jobs:
        return annotation_jobs(file, self.source.images[split] or "", self.source.max_pixels, self.config.by, truth, self.source.max_images)

    def _keys(self) -> dict[str, Any]:
        return {key: self.config[key] for key in ("iterations", "margin", "side", "normalise")}

    def _journal(self, part: str, split: str) -> tuple[Path, dict[str, Any], int]:
        """Its file, the settings that its results follow from, and the number of processes."""
        path = self.output.with_name(f".{self.output.name}.{part}")
        self.journals.append(path)
        names = ("by", "checkpoint", "classifier", "weights", "map_side", "device")
        settings = {name: self.config[name] for name in names} | {"split": split, "max_images": self.source.max_images}
        settings |= {"data": file_mark(str(self.source.json[split]))}
        if part != "masks":
            settings |= self._keys() | {"thresholds": list(self.config.thresholds), "tune_images": self.config.tune_images}
        return path, settings, self.config.workers


def _check(config: Any) -> None:
    """Raises UserError for keys whose values cannot be."""
    for key, known in (("by", BY), ("segmentation", ("rle", "polygons")), ("split", ("train", "val"))):
        if config[key] not in known:
            raise UserError(f"{key} must be {' or '.join(known)}, not {config[key]!r}")
    for key, least in (("workers", 0), ("pictures", 0), ("tune_images", 1), ("map_side", 32)):
        if config[key] < least:
            raise UserError(f"{key} must be at least {least}, not {config[key]}")
    thresholds = list(config.thresholds)
    if not thresholds or not all(0 < value < 1 for value in thresholds):
        raise UserError(f"thresholds must be numbers between 0 and 1, not {thresholds}")
    if config.threshold is not None and config.technique not in WITH_THRESHOLD:
        raise UserError(f"technique={config.technique} takes no threshold")
    if config.technique not in ("auto", "all"):
        keys = {key: config[key] for key in ("iterations", "margin", "side", "normalise")}
        Technique(config.technique, USUAL.get(config.technique) if config.threshold is None else config.threshold, **keys)
    if config.checkpoint and config.classifier:
        raise UserError("checkpoint and classifier are both set: one of them gives the class activation maps")


def _own_file(source: CocoSource, split: str) -> CocoFile:
    """The file of a split with its own category ids, whatever the other split's are. Raises UserError."""
    return source._read(split, None)


@dataclass(frozen=True)
class _Trained:
    """The classifier of a checkpoint that tools/train.py wrote."""

    path: str

    def __call__(self) -> ActivationModel:
        return self.read()[0]

    def read(self) -> tuple[ImageClassifier, list[str]]:
        """The model and the names of its classes. Raises UserError for a checkpoint of something else."""
        model, _, categories = trained_model(Path(self.path), [], "predict")
        if not isinstance(model, ImageClassifier):
            raise UserError(f"checkpoint={self.path} is no classifier of images: tools/train.py experiment=classify_scenes trains one")
        return model, list(categories.names)


@dataclass(frozen=True)
class _Published:
    """A classifier of torchvision's."""

    name: str
    weights: str

    def __call__(self) -> CAMModel:
        return CAMModel(self.name, self.weights)


def _maps(config: Any, file: CocoFile) -> ClassMaps | None:
    """The class activation maps of the classes that a file shows, by the classifier of the keys; None where they name none.

    Raises UserError where the classifier cannot be had, or lacks one of the classes.
    """
    names = file.categories.names
    shown = [label for label in range(len(names)) if any(label in file.annotations(i).labels for i in range(len(file)))]
    wanted = [names[label] for label in shown]
    build: _Trained | _Published
    if config.checkpoint:
        build = _Trained(str(config.checkpoint))
        known = build.read()[1]
        members = _named(known, wanted, f"checkpoint={config.checkpoint}")
    elif config.classifier:
        build = _Published(config.classifier, config.weights)
        model = built(build, config.device)
        classes = model.layer.weight.shape[0] if isinstance(model, CAMModel) else 0
        if not isinstance(model, CAMModel) or (not model.names and classes != len(names)):
            raise UserError(f"weights={config.weights}: {classes} classes without names are not the {len(names)} of {file.path}")
        members = members_of(wanted) if model.names else [[label] for label in shown]
    else:
        return None
    every = dict(zip(shown, members, strict=True))
    return ClassMaps(build, tuple(tuple(every.get(label, ())) for label in range(len(names))), config.map_side, config.device)


def _named(known: Sequence[str], wanted: Sequence[str], what: str) -> list[list[int]]:
    without = [name for name in wanted if name not in known]
    if without:
        raise UserError(f"{what} does not know {', '.join(without)}")
    return [[known.index(name)] for name in wanted]


def _class_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "id"}


def _extent(box: Sequence[float] | None) -> float:
    return 0.0 if box is None else (box[2] - box[0]) * (box[3] - box[1])


def _warn(rows: Sequence[Mapping[str, Any]]) -> None:
    """Says which masks are none of the technique's own."""
    kinds: dict[str, list[int]] = {}
    for row in rows:
        if "fallback" in row["mask_by"]:
            kinds.setdefault(row["mask_by"]["fallback"], []).append(row["id"])
    for kind, ids in kinds.items():
        told = f" (annotations {', '.join(map(str, ids[:SHOWN]))}{' ...' if len(ids) > SHOWN else ''})" if any(ids) else ""
        print(f"warning: {len(ids)} of {len(rows)} masks: {kind}, they are the box's ellipse, or what the map says{told}", flush=True)
