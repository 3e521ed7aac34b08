"""Masks proposed for a data set of boxes or image labels: what tools/annotate.py does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from maskseg import config as configs
from maskseg.annotation.activation_maps import STRIDE, ClassMaps, Maps, Published, Side, built
from maskseg.annotation.cam import CAMModel
from maskseg.annotation.classifier import ImageClassifier
from maskseg.annotation.imagenet import members_of
from maskseg.annotation.jobs import BY, AnnotationJob, annotation_jobs, file_mark, work_through
from maskseg.annotation.pictures import Example, contact_sheet, save_whole
from maskseg.annotation.study import (
    Found,
    Measuring,
    Proposing,
    Row,
    best_of,
    maps_of,
    save_study,
    study,
    study_text,
)
from maskseg.annotation.techniques import OF_MAPS, USUAL, WITH_THRESHOLD, Technique, at_all
from maskseg.annotation.write import (
    check_not_read,
    check_output,
    class_annotations,
    object_annotations,
    write_annotations,
)
from maskseg.config.restore import open_data, trained_model
from maskseg.data.coco.file import CocoFile
from maskseg.data.datasets.coco import CocoSource
from maskseg.engine.checkpoint import checkpoint_path
from maskseg.errors import UserError

SHOWN = 5  # annotations or images that a warning names


def annotate(words: list[str]) -> None:
    """What `tools/annotate.py` does with its key=value words. Raises UserError before anything is written where data, keys or weights are wrong."""
    config = configs.compose("annotate", words)
    configs.require(config, "output")
    _check(config)
    source, output = open_data(config), Path(config.output)
    check_output(output, source.json.values())
    run = _Run(config, source, output)
    technique = run.technique()
    rows = run.table() if _tabled(config) else ""
    if technique is not None:
        run.masks(technique)
    if rows:
        print(rows)
    for journal in run.journals:
        journal.unlink(missing_ok=True)


class _Run:
    """One call of the tool. journals: what is left of it if it is stopped."""

    def __init__(self, config: Any, source: CocoSource, output: Path) -> None:
        self.config, self.source, self.output = config, source, output
        self.journals, self._files, self._told = list[Path](), dict[str, CocoFile](), set[str]()
        self._measured: dict[str, Found] = {}
        self.marks = _marks(config)
        for path in self._beside().values():
            check_not_read(path, [*source.json.values(), config.checkpoint, config.weights], "")
        self.file = self._file(config.split)
        self.maps = self._maps(self.file)

    def technique(self) -> Technique | None:
        """The one that the keys name, or the best one of those at hand on images that have masks; None where all are wanted."""
        name = self.config.technique
        if name in OF_MAPS and self.maps is None:
            raise UserError(
                f"technique {name} needs a classifier: checkpoint=RUN, or classifier=NAME weights=..."
            )
        if name != "auto":
            return None if name == "all" else _technique(self.config)
        split = next(
            (s for s in ("train", "val") if s != self.config.split and self._has_truth(s)),
            self.config.split,
        )
        rows, count = self._study(split, self.config.tune_images)
        best = best_of(rows, self.config.by)
        means = ", ".join(f"{key} {value:.3f}" for key, value in best.means.items())
        print(
            f"{best.technique.text} is the best technique on {count} images of {self._file(split).path} ({means})",
            flush=True,
        )
        return best.technique

    def table(self) -> str:
        """All techniques at all thresholds; the numbers and the curves go beside the output."""
        rows, paths, names = (
            self._study(self.config.split)[0],
            self._beside(),
            self.file.categories.names,
        )
        save_study(rows, names, paths["table.json"], paths["curves.png"])
        return f"{study_text(rows, names, self.config.by)}\nwritten: {paths['table.json']}, {paths['curves.png']}"

    def masks(self, technique: Technique) -> None:
        """The masks of all images, and the contact sheet."""
        jobs = list(self._jobs(self.config.split, truth=False))
        work = Proposing(
            technique,
            self.maps if technique.needs_map else None,
            self.config.segmentation == "polygons",
        )
        journal, settings, workers = self._journal("masks", self.config.split)
        settings |= {f"technique.{key}": value for key, value in technique.values().items()} | {
            "segmentation": self.config.segmentation
        }
        found = work_through(jobs, work, journal, settings, workers, "masks")
        rows = [row for own in found.values() for row in own]
        _warn(found, self.config.by, technique)
        if self.config.by == "object":
            content = object_annotations(self.file, {row["id"]: row for row in rows})
        else:
            content = class_annotations(
                self.file,
                {
                    image: [_class_row(row) for row in own if row["area"]]
                    for image, own in found.items()
                },
            )
        write_annotations(self.output, content)
        told = f"{self.output}: {sum(row['area'] > 0 for row in rows)} masks in {len(jobs)} images ({technique.text})"
        if self.config.pictures:
            sheet = self._beside()["pictures.png"]
            save_whole(contact_sheet(self._examples(technique, work.maps)), sheet)
            told += f"; {sheet}"
        print(told)

    def _examples(self, technique: Technique, maps: Maps | None) -> list[Example]:
        """One of each of the first images that have any, the one of the largest box."""
        both = zip(*(self._jobs(self.config.split, truth) for truth in (False, True)), strict=True)
        examples = []
        for job, true_job in islice(
            ((job, other) for job, other in both if job.wanted), self.config.pictures
        ):
            image, (height, width) = job.load(), (job.height, job.width)
            at = max(range(len(job.wanted)), key=lambda i: _extent(job.wanted[i].box))
            wanted, own = job.wanted[at], maps_of(maps, image, job)[at][1]
            cut, values = (
                technique(image, wanted.box, own),
                technique.map(wanted.box, own, height, width),
            )
            codes = technique.codes(wanted.box, values, height, width)
            truth = next(
                (
                    w.true_mask()
                    for w in true_job.wanted
                    if (w.id, w.label) == (wanted.id, wanted.label)
                ),
                None,
            )
            title = f"{self.file.categories.names[wanted.label]}, {job.file_name}"
            examples.append(
                Example(title, image, cut.mask, wanted.box, values, codes, truth, cut.fallback)
            )
        return examples

    def _study(self, split: str, most: int | None = None) -> tuple[list[Row], int]:
        """Every technique on the (first `most`) images of a split that have masks, and how many there are. Images of the table are looked at once."""
        file, keys = self._file(split), _keys(self.config)
        maps = self.maps if file is self.file else self._maps(file)
        measuring = Measuring(
            tuple(at_all(list(self.config.thresholds), maps is not None, **keys)), maps
        )
        part = "table" if split == self.config.split and _tabled(self.config) else "tuning"
        if part not in self._measured:
            jobs = list(
                islice(
                    (job for job in self._jobs(split, truth=True) if job.wanted),
                    most if part == "tuning" else None,
                )
            )
            if not jobs:
                raise UserError(f"{file.path}: there are no masks to compare techniques with")
            self._measured[part] = work_through(
                jobs, measuring, *self._journal(part, split), "techniques"
            )
        found = dict(islice(self._measured[part].items(), most))
        return study(found, measuring.techniques, len(file.categories), self.config.min_area), len(
            found
        )

    def _has_truth(self, split: str) -> bool:
        return self.source.json[split] is not None and any(
            job.wanted for job in self._jobs(split, truth=True)
        )

    def _file(self, split: str) -> CocoFile:
        """The file of a split with its own category ids, whatever the other split's are; what was mended in it is printed. Raises UserError."""
        if split not in self._files:
            self._files[split] = file = self.source._read(split, None)
            names, root = (
                {record.file_name for record in file.images},
                Path(self.source.images[split] or "").resolve(),
            )
            for path in (path.resolve() for path in self._beside().values()):
                if path.is_relative_to(root) and path.relative_to(root).as_posix() in names:
                    raise UserError(f"{path} is an image of the data: choose another output")
            if file.report.warnings:
                print(file.report.text(), flush=True)
        return self._files[split]

    def _jobs(self, split: str, truth: bool) -> Iterator[AnnotationJob]:
        root = self.source.images[split] or ""
        return annotation_jobs(
            self._file(split),
            root,
            self.source.max_pixels,
            self.config.by,
            truth,
            self.source.max_images,
        )

    def _maps(self, file: CocoFile) -> ClassMaps | None:
        """The class activation maps of the classes that a file shows, by the classifier of the keys; None where they name none.

        Classes that it does not know are told, and have none. Raises UserError where it knows none of them, or cannot be had.
        """
        config, names = self.config, file.categories.names
        if not (config.checkpoint or config.classifier):
            return None
        shown = [label for label, (images, _, _) in enumerate(file.class_counts()) if images]
        build: _Trained | Published
        if config.checkpoint:
            build = _Trained(str(config.checkpoint), self.marks["checkpoint"])
            members = build.members([names[label] for label in shown])
        else:
            build = Published(config.classifier, str(config.weights), self.marks.get("weights", ""))
            model = built(build, config.device)
            classes = model.layer.weight.shape[0] if isinstance(model, CAMModel) else 0
            if not isinstance(model, CAMModel) or (not model.names and classes != len(names)):
                raise UserError(
                    f"weights={config.weights}: {classes} classes without names are not the {len(names)} of {file.path}"
                )
            members = (
                members_of([names[label] for label in shown])
                if model.names
                else [[label] for label in shown]
            )
        every = dict(zip(shown, members, strict=True))
        without = [
            names[label]
            for label, own in every.items()
            if not own and names[label] not in self._told
        ]
        if without:
            print(
                f"warning: the classifier does not know {', '.join(without)}: these have no class activation maps",
                flush=True,
            )
            self._told.update(without)
        side = build.side() if config.map_side is None else config.map_side
        return ClassMaps(
            build,
            tuple(tuple(every.get(label, ())) for label in range(len(names))),
            side,
            config.device,
        )

    def _journal(self, part: str, split: str) -> tuple[Path, dict[str, Any], int]:
        """Its file, the settings that its results follow from, and the number of processes."""
        path = self.output.with_name(f".{self.output.name}.{part}")
        self.journals.append(path)
        names = ("by", "checkpoint", "classifier", "weights", "map_side", "device")
        settings = {name: self.config[name] for name in names} | {
            f"content of {key}": mark for key, mark in self.marks.items()
        }
        settings |= {
            "split": split,
            "max_images": self.source.max_images,
            "images": str(Path(self.source.images[split] or "").resolve()),
        }
        settings |= {"data": file_mark(Path(str(self.source.json[split])))}
        if part != "masks":
            settings |= _keys(self.config) | {
                "thresholds": list(self.config.thresholds),
                "tune_images": self.config.tune_images,
            }
        return path, settings, self.config.workers

    def _beside(self) -> dict[str, Path]:
        """What is written beside the output, by the ends of the names."""
        parts = ["table.json", "curves.png"] if _tabled(self.config) else []
        parts += ["pictures.png"] if self.config.pictures and self.config.technique != "all" else []
        return {part: self.output.with_name(f"{self.output.stem}_{part}") for part in parts}


def _tabled(config: Any) -> bool:
    return bool(config.technique == "all" or config.evaluate)


def _technique(config: Any) -> Technique:
    """The one that the keys name. Raises UserError."""
    return Technique(
        config.technique,
        USUAL.get(config.technique) if config.threshold is None else config.threshold,
        **_keys(config),
    )


def _keys(config: Any) -> dict[str, Any]:
    return {key: config[key] for key in ("iterations", "margin", "side", "normalise")}


def _check(config: Any) -> None:
    """Raises UserError for keys whose values cannot be."""
    for key, known in (
        ("by", BY),
        ("segmentation", ("rle", "polygons")),
        ("split", ("train", "val")),
    ):
        if config[key] not in known:
            raise UserError(f"{key} must be {' or '.join(known)}, not {config[key]!r}")
    for key, least in (("workers", 0), ("pictures", 0), ("tune_images", 1)):
        if config[key] < least:
            raise UserError(f"{key} must be at least {least}, not {config[key]}")
    if config.map_side is not None and (
        type(config.map_side) is not int or config.map_side < STRIDE
    ):
        raise UserError(
            f"map_side must be a whole number of at least {STRIDE}, or null, not {config.map_side!r}"
        )
    thresholds = list(config.thresholds)
    if not thresholds or not all(_is_number(value) and 0 < value < 1 for value in thresholds):
        raise UserError(f"thresholds must be numbers between 0 and 1, not {thresholds}")
    if config.threshold is not None and not _is_number(config.threshold):
        raise UserError(f"threshold must be a number, not {config.threshold!r}")
    if config.threshold is not None and config.technique not in WITH_THRESHOLD:
        raise UserError(f"technique={config.technique} takes no threshold")
    if config.technique not in ("auto", "all"):
        _technique(config)
    if config.checkpoint and config.classifier:
        raise UserError(
            "checkpoint and classifier are both set: one of them gives the class activation maps"
        )


def _is_number(
    value: Any,
) -> bool:  # what stands where the config has null, or in its lists, is not checked when it is read
    return isinstance(value, int | float) and not isinstance(value, bool)


def _marks(config: Any) -> dict[str, str]:
    """What changes with the content of the classifier's file, by the key that names it."""
    if config.checkpoint:
        return {"checkpoint": file_mark(checkpoint_path(Path(config.checkpoint)))}
    weights = Path(str(config.weights))
    return {"weights": file_mark(weights)} if config.classifier and weights.is_file() else {}


@dataclass(frozen=True)
class _Trained:
    """Builds the classifier of a checkpoint that tools/train.py wrote. mark: what changes with the file's content."""

    path: str
    mark: str

    def __call__(self) -> ImageClassifier:
        return _classifier(self)[0]

    def side(self) -> Side:
        """As its tests saw images."""
        for step in _classifier(self)[2].data.test_transforms:
            if str(step._target_).endswith(".ResizeShortestEdge"):
                return int(step.sizes[0]), int(step.max_size)
        return None

    def members(self, names: Sequence[str]) -> list[list[int]]:
        """Its class of each name, [] where it has none. Raises UserError where it has none of them."""
        known = _classifier(self)[1]
        if names and not {*names} & {*known}:
            raise UserError(f"checkpoint={self.path} does not know {', '.join(names)}")
        return [[known.index(name)] if name in known else [] for name in names]


@cache
def _classifier(build: _Trained) -> tuple[ImageClassifier, list[str], Any]:
    """The model, the names of its classes and its config, read once in a process. Raises UserError for a checkpoint of something else."""
    model, config, categories = trained_model(Path(build.path), [], "predict")
    if not isinstance(model, ImageClassifier):
        raise UserError(
            f"checkpoint={build.path} is no classifier of images: tools/train.py experiment=classify_scenes trains one"
        )
    return model, list(categories.names), config


def _class_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "id"}


def _extent(box: Sequence[float] | None) -> float:
    return 0.0 if box is None else (box[2] - box[0]) * (box[3] - box[1])


def _warn(found: Mapping[int, Sequence[Mapping[str, Any]]], by: str, technique: Technique) -> None:
    """Says which masks are none of the technique's own, and what stands in for them."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for image, rows in found.items():
        for row in (row for row in rows if "fallback" in row["mask_by"]):
            instead = (
                "the map stands in"
                if by == "class" and technique.needs_map
                else "the ellipse stands in"
            )
            kind = row["mask_by"]["fallback"], instead if row["area"] else "there is no mask"
            kinds.setdefault(kind, []).append(row["id"] if by == "object" else image)
    for (why, instead), ids in kinds.items():
        names, what = list(dict.fromkeys(ids)), "annotations" if by == "object" else "images"
        told = f"{what} {', '.join(map(str, names[:SHOWN]))}{' ...' if len(names) > SHOWN else ''}"
        print(
            f"warning: {len(ids)} of {sum(map(len, found.values()))} masks: {why}, {instead} ({told})",
            flush=True,
        )
