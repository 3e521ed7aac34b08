"""Proposal of masks for a data set with boxes or image labels. Implements `tools/annotate.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from maskseg import config as configs
from maskseg.annotation.activation_maps import (
    ActivationMapper,
    ClassActivationMaps,
    Side,
    TorchvisionClassifier,
    build_classifier,
)
from maskseg.annotation.cam import CAMModel
from maskseg.annotation.classifier import ImageClassifier
from maskseg.annotation.grabcut import Bools
from maskseg.annotation.imagenet import members_of
from maskseg.annotation.jobs import (
    MODES,
    AnnotationJob,
    MaskRequest,
    annotation_jobs,
    run_jobs,
    sha256_of,
)
from maskseg.annotation.pictures import Example, contact_sheet
from maskseg.annotation.study import (
    CountsByImage,
    ProposeMasks,
    ScoreTechniques,
    TechniqueScores,
    best_scores,
    format_study,
    request_maps,
    save_study,
    summarize,
)
from maskseg.annotation.techniques import (
    CAM_TECHNIQUES,
    DEFAULT_THRESHOLDS,
    WITH_THRESHOLD,
    Technique,
    TechniqueFields,
    all_techniques,
)
from maskseg.annotation.write import (
    ProposedMask,
    class_annotations,
    object_annotations,
    write_annotations,
)
from maskseg.config import Config
from maskseg.config.restore import open_data, trained_model
from maskseg.data.coco.file import CocoFile
from maskseg.data.datasets.coco import CocoSource
from maskseg.engine.checkpoint import checkpoint_path
from maskseg.engine.precision import pick_device
from maskseg.errors import UserError, warn_if_not_drawn
from maskseg.files.outputs import check_outputs, record_outputs
from maskseg.visualization.layout import save_image_atomically

MAX_LISTED = 5  # annotations or images listed in a warning
MasksByImage = Mapping[int, Sequence[ProposedMask]]  # results of `ProposeMasks` by image id


def annotate(overrides: list[str]) -> None:
    """Run `tools/annotate.py`.

    overrides: key=value arguments of the command line. Raises UserError before anything is written
    if data, keys or weights are invalid.
    """
    config = configs.compose("annotate", overrides)
    configs.require_keys(config, "output")
    _check_config(config)
    source = open_data(config)
    output = Path(config.output)
    check_outputs([output], source.json_files(), tool="annotate", overwrite=config.overwrite)
    run = _AnnotationRun(config, source, output)
    with record_outputs([output, *run.side_outputs().values()], "annotate"):
        technique = run.select_technique()
        table = run.write_table() if _has_table(config) else ""
        if technique is not None:
            run.write_masks(technique)
    if table:
        print(table)
    for journal in run.journals:
        journal.unlink(missing_ok=True)


class _AnnotationRun:
    """One run of the tool. journals: the files from which an interrupted run resumes."""

    def __init__(self, config: Config, source: CocoSource, output: Path) -> None:
        self.config = config
        self.source = source
        self.output = output
        self.journals: list[Path] = []
        self._files: dict[str, CocoFile] = {}
        self._reported_classes: set[str] = set()
        self._counts: dict[str, CountsByImage] = {}
        self.checksums = _classifier_checksums(config)
        self._check_side_outputs()
        self.file = self._file(config.split)
        self.maps = self._build_maps(self.file)

    def _check_side_outputs(self) -> None:
        """Raise UserError for files beside the output that would be replaced.

        Those of an interrupted run, which has left a journal, are its own.
        """
        parts = ("masks", "table", "tuning")
        if not any(self._journal_path(part).exists() for part in parts):
            inputs = [*self.source.json_files(), self.config.checkpoint, self.config.weights]
            paths = self.side_outputs().values()
            check_outputs(paths, inputs, tool="annotate", overwrite=self.config.overwrite)

    def _journal_path(self, part: str) -> Path:
        return self.output.with_name(f".{self.output.name}.{part}")

    def select_technique(self) -> Technique | None:
        """The configured technique, or for `auto` the best one on images with masks.

        None for `all`, which compares techniques without writing masks.
        """
        name = self.config.technique
        if name in CAM_TECHNIQUES and self.maps is None:
            raise UserError(
                f"technique {name} needs a classifier: checkpoint=RUN, "
                "or classifier=NAME weights=..."
            )
        if name == "all":
            return None
        if name != "auto":
            return _configured_technique(self.config)
        split = self._tuning_split()
        rows, count = self._score_techniques(split, self.config.tune_images)
        best = best_scores(rows, self.config.by)
        means = ", ".join(f"{key} {value:.3f}" for key, value in best.means.items())
        print(
            f"{best.technique.label} is the best technique on {count} images of "
            f"{self._file(split).path} ({means})",
            flush=True,
        )
        return best.technique

    def _tuning_split(self) -> str:
        """The other split if it has masks, to tune on different images; else the same split."""
        for split in ("train", "val"):
            if split != self.config.split and self._has_ground_truth(split):
                return split
        return str(self.config.split)

    def write_table(self) -> str:
        """Score all techniques at all thresholds; write numbers and curves beside the output.

        Returns the text to print.
        """
        rows, _ = self._score_techniques(self.config.split)
        names = self.file.categories.names
        paths = self.side_outputs()
        table = paths["table.json"]
        curves = paths["curves.png"]
        save_study(rows, names, table, curves)
        return f"{format_study(rows, names, self.config.by)}\nwritten: {table}, {curves}"

    def write_masks(self, technique: Technique) -> None:
        """Write the masks of all images, and the contact sheet."""
        jobs = list(self._jobs(self.config.split, ground_truth=False))
        self._check_requests(jobs)
        as_polygons = self.config.segmentation == "polygons"
        work = ProposeMasks(technique, self.maps if technique.needs_map else None, as_polygons)
        journal, settings, workers = self._journal("masks", self.config.split)
        settings |= {f"technique.{key}": value for key, value in technique.to_dict().items()}
        settings["segmentation"] = self.config.segmentation
        settings["masks"] = self.config.masks
        masks = run_jobs(jobs, work, journal, settings, workers, "masks")
        _warn_about_fallbacks(masks, self.config.by, technique)
        write_annotations(self.output, self._content(masks))
        count = sum(row["area"] > 0 for rows in masks.values() for row in rows)
        message = f"{self.output}: {count} masks in {len(jobs)} images ({technique.label})"
        if self.config.pictures:
            sheet = self.side_outputs()["pictures.png"]
            with warn_if_not_drawn(str(sheet)):
                save_image_atomically(contact_sheet(self._examples(technique, work.maps)), sheet)
                message += f"; {sheet}"
        print(message)

    def _check_requests(self, jobs: Sequence[AnnotationJob]) -> None:
        """Raise UserError where the file has all masks already."""
        if self.config.masks == "all" or any(job.requests for job in jobs):
            return
        if self.file.num_annotations:
            raise UserError(
                f"{self.file.path}: there is no {self.config.by} without a mask; masks=all makes "
                "new masks for those that have one"
            )

    def _content(self, masks: MasksByImage) -> dict[str, object]:
        """The COCO content to write."""
        if self.config.by == "object":
            by_annotation = {}
            for rows in masks.values():
                for row in rows:
                    by_annotation[row["id"]] = row
            return object_annotations(self.file, by_annotation)
        by_image = {}
        for image_id, rows in masks.items():
            by_image[image_id] = [row for row in rows if row["area"]]
        return class_annotations(self.file, by_image, self.config.masks == "missing")

    def _examples(self, technique: Technique, maps: ActivationMapper | None) -> list[Example]:
        """The request with the largest box of each of the first images that have requests."""
        jobs = self._jobs(self.config.split, ground_truth=False)
        ground_truth_jobs = self._jobs(self.config.split, ground_truth=True)
        examples: list[Example] = []
        for job, ground_truth_job in zip(jobs, ground_truth_jobs, strict=True):
            if job.requests:
                examples.append(self._example(technique, maps, job, ground_truth_job))
            if len(examples) == self.config.pictures:
                break
        return examples

    def _example(
        self,
        technique: Technique,
        maps: ActivationMapper | None,
        job: AnnotationJob,
        ground_truth_job: AnnotationJob,
    ) -> Example:
        image = job.load()
        largest = max(range(len(job.requests)), key=lambda i: _box_area(job.requests[i].box))
        request = job.requests[largest]
        _, class_map = request_maps(maps, image, job)[largest]
        result = technique(image, request.box, class_map)
        size = (job.height, job.width)
        foreground_map = technique.foreground_map(request.box, class_map, *size)
        return Example(
            title=f"{self.file.categories.names[request.label]}, {job.file_name}",
            image=image,
            mask=result.mask,
            box=request.box,
            map=foreground_map,
            trimap=technique.trimap(request.box, foreground_map, *size),
            ground_truth=_find_ground_truth(ground_truth_job, request),
            note=result.fallback_reason,
        )

    def _score_techniques(
        self, split: str, max_images: int | None = None
    ) -> tuple[list[TechniqueScores], int]:
        """Score every technique on the first `max_images` images of a split that have masks.

        Returns the scores and the number of images. The table's images are processed only once.
        """
        file = self._file(split)
        maps = self.maps if file is self.file else self._build_maps(file)
        thresholds = list(self.config.thresholds)
        techniques = all_techniques(thresholds, maps is not None, **_technique_fields(self.config))
        work = ScoreTechniques(tuple(techniques), maps)
        part = "table" if split == self.config.split and _has_table(self.config) else "tuning"
        if part not in self._counts:
            candidates = (job for job in self._jobs(split, ground_truth=True) if job.requests)
            jobs = list(islice(candidates, max_images if part == "tuning" else None))
            if not jobs:
                raise UserError(f"{file.path}: there are no masks to compare techniques with")
            journal, settings, workers = self._journal(part, split)
            self._counts[part] = run_jobs(jobs, work, journal, settings, workers, "techniques")
        counts = dict(islice(self._counts[part].items(), max_images))
        rows = summarize(counts, work.techniques, len(file.categories), self.config.min_area)
        return rows, len(counts)

    def _has_ground_truth(self, split: str) -> bool:
        if self.source.split(split).json is None:
            return False
        return any(job.requests for job in self._jobs(split, ground_truth=True))

    def _file(self, split: str) -> CocoFile:
        """The file of a split with its own categories, independent of the other split's.

        Prints the warnings about its content. Raises UserError.
        """
        if split in self._files:
            return self._files[split]
        self.source.split(split).single_file()  # raises UserError for several files
        file = self.source.read_file(split, None)
        self._files[split] = file
        names = {record.file_name for record in file.images}
        root = Path(self.source.split(split).images or "").resolve()
        for side_output in self.side_outputs().values():
            path = side_output.resolve()
            if path.is_relative_to(root) and path.relative_to(root).as_posix() in names:
                raise UserError(f"{path} is an image of the data: choose another output")
        if file.report.warnings:
            print(file.report.text(), flush=True)
        return file

    def _jobs(self, split: str, ground_truth: bool) -> Iterator[AnnotationJob]:
        return annotation_jobs(
            self._file(split),
            self.source.split(split).images or "",
            self.source.reading.max_pixels,
            self.config.by,
            ground_truth,
            self.source.reading.max_images,
            only_missing=not ground_truth and self.config.masks == "missing",
        )

    def _build_maps(self, file: CocoFile) -> ClassActivationMaps | None:
        """Activation maps of the classes in a file, or None without a configured classifier.

        Classes that the classifier does not know are reported and have no map. Raises UserError if
        it knows none of them, or cannot be loaded.
        """
        config = self.config
        if not (config.checkpoint or config.classifier):
            return None
        names = file.categories.names
        labels = [label for label, (images, _, _) in enumerate(file.class_counts()) if images]
        build: TrainedClassifier | TorchvisionClassifier
        if config.checkpoint:
            build = TrainedClassifier(str(config.checkpoint), self.checksums["checkpoint"])
            members = build.members([names[label] for label in labels])
        else:
            checksum = self.checksums.get("weights", "")
            build = TorchvisionClassifier(config.classifier, str(config.weights), checksum)
            members = self._torchvision_members(build, file, labels)
        members_by_label = dict(zip(labels, members, strict=True))
        self._report_unknown_classes([names[k] for k, own in members_by_label.items() if not own])
        side = build.side() if config.map_side is None else config.map_side
        all_members = tuple(tuple(members_by_label.get(k, ())) for k in range(len(names)))
        return ClassActivationMaps(build, all_members, side, _device(config))

    def _torchvision_members(
        self, build: TorchvisionClassifier, file: CocoFile, labels: Sequence[int]
    ) -> list[list[int]]:
        """The classifier's classes of each label: by name, or the same index if it has no names.

        Raises UserError if the classifier has no class names and another number of classes.
        """
        names = file.categories.names
        model = build_classifier(build, _device(self.config))
        assert isinstance(model, CAMModel)
        if model.class_names:
            return members_of([names[label] for label in labels])
        num_classes = model.classifier.weight.shape[0]
        if num_classes != len(names):
            raise UserError(
                f"weights={self.config.weights}: {num_classes} classes without names do not match "
                f"the {len(names)} of {file.path}"
            )
        return [[label] for label in labels]

    def _report_unknown_classes(self, names: Sequence[str]) -> None:
        """Warn about classes without an activation map, once per class."""
        unknown = [name for name in names if name not in self._reported_classes]
        if unknown:
            print(
                f"warning: the classifier does not know {', '.join(unknown)}: "
                "no class activation maps for them",
                flush=True,
            )
            self._reported_classes.update(unknown)

    def _journal(self, part: str, split: str) -> tuple[Path, dict[str, object], int]:
        """Path of a journal, the settings that determine its results, number of processes."""
        path = self._journal_path(part)
        self.journals.append(path)
        files = self.source.split(split)
        names = ("by", "checkpoint", "classifier", "weights", "map_side", "device")
        settings: dict[str, object] = {name: self.config[name] for name in names}
        settings |= {f"content of {key}": value for key, value in self.checksums.items()}
        settings |= {
            "split": split,
            "max_images": self.source.reading.max_images,
            "images": str(Path(files.images or "").resolve()),
            "data": sha256_of(Path(files.single_file())),
        }
        if part != "masks":
            settings |= _technique_fields(self.config)
            settings |= {
                "thresholds": list(self.config.thresholds),
                "tune_images": self.config.tune_images,
            }
        return path, settings, self.config.workers

    def side_outputs(self) -> dict[str, Path]:
        """Paths of the files written beside the output, by the suffix of their names."""
        suffixes = []
        if _has_table(self.config):
            suffixes += ["table.json", "curves.png"]
        if self.config.pictures and self.config.technique != "all":
            suffixes += ["pictures.png"]
        stem = self.output.stem
        return {suffix: self.output.with_name(f"{stem}_{suffix}") for suffix in suffixes}


def _has_table(config: Config) -> bool:
    """Whether the run writes the table of all techniques."""
    return bool(config.technique == "all" or config.evaluate)


def _configured_technique(config: Config) -> Technique:
    """The technique that the config describes. Raises UserError."""
    threshold = config.threshold
    if threshold is None:
        threshold = DEFAULT_THRESHOLDS.get(config.technique)
    return Technique(config.technique, threshold, **_technique_fields(config))


def _technique_fields(config: Config) -> TechniqueFields:
    return {
        "iterations": config.iterations,
        "margin": config.margin,
        "side": config.side,
        "normalise": config.normalise,
    }


def _device(config: Config) -> str:
    """The device of the classifier. Raises UserError if it does not exist."""
    return str(pick_device(config.device, "device"))


def _check_config(config: Config) -> None:
    """Raise UserError for invalid values of the config."""
    _device(config)
    choices = {
        "by": MODES,
        "masks": ("missing", "all"),
        "segmentation": ("rle", "polygons"),
        "split": ("train", "val"),
    }
    for key, valid in choices.items():
        if config[key] not in valid:
            raise UserError(f"{key} must be {' or '.join(valid)}, not {config[key]!r}")
    if config.threshold is not None and config.technique not in WITH_THRESHOLD:
        raise UserError(f"technique={config.technique} takes no threshold")
    if config.technique not in ("auto", "all"):
        _configured_technique(config)
    if config.checkpoint and config.classifier:
        raise UserError(
            "checkpoint and classifier are both set: class activation maps come from one of them"
        )


def _classifier_checksums(config: Config) -> dict[str, str]:
    """Content hash of the classifier's checkpoint or weights, by config key."""
    if config.checkpoint:
        return {"checkpoint": sha256_of(checkpoint_path(Path(config.checkpoint)))}
    weights = Path(str(config.weights))
    if config.classifier and weights.is_file():
        return {"weights": sha256_of(weights)}
    return {}


@dataclass(frozen=True)
class TrainedClassifier:
    """Builder of the classifier of a checkpoint from tools/train.py.

    checksum: of the file, so that builders of different contents differ.
    """

    path: str
    checksum: str

    def __call__(self) -> ImageClassifier:
        model, _, _ = _load_classifier(self)
        return model

    def side(self) -> Side:
        """The input size of the classifier's test transforms."""
        _, _, config = _load_classifier(self)
        for step in config.data.test_transforms:
            if str(step["_target_"]).endswith(".ResizeShortestEdge"):
                return int(step.sizes[0]), int(step.max_size)
        return None

    def members(self, names: Sequence[str]) -> list[list[int]]:
        """The classifier's class of each name, [] if there is none.

        Raises UserError if it knows none of the names.
        """
        _, class_names, _ = _load_classifier(self)
        if names and set(names).isdisjoint(class_names):
            raise UserError(f"checkpoint={self.path} does not know {', '.join(names)}")
        return [[class_names.index(name)] if name in class_names else [] for name in names]


@cache
def _load_classifier(build: TrainedClassifier) -> tuple[ImageClassifier, list[str], Config]:
    """Load the model, the names of its classes and its config; cached, once per process.

    Raises UserError if the checkpoint is not that of a classifier.
    """
    model, config, categories = trained_model(Path(build.path), [], "predict")
    if not isinstance(model, ImageClassifier):
        raise UserError(
            f"checkpoint={build.path} is not an image classifier: "
            "tools/train.py experiment=classify_scenes trains one"
        )
    return model, list(categories.names), config


def _find_ground_truth(job: AnnotationJob, request: MaskRequest) -> Bools | None:
    """The ground truth mask of a request, bool [H, W], from the job with ground truth, or None."""
    for candidate in job.requests:
        if (candidate.id, candidate.label) == (request.id, request.label):
            return candidate.ground_truth_mask()
    return None


def _box_area(box: Sequence[float] | None) -> float:
    return 0.0 if box is None else (box[2] - box[0]) * (box[3] - box[1])


def _warn_about_fallbacks(masks: MasksByImage, by: str, technique: Technique) -> None:
    """Warn about masks that came from a fallback."""
    fallback = "the ellipse is used instead"
    if by == "class" and technique.needs_map:
        fallback = "the thresholded map is used instead"
    groups: dict[tuple[str, str], list[int]] = {}
    for image_id, rows in masks.items():
        for row in rows:
            if "fallback" in row["mask_by"]:
                consequence = fallback if row["area"] else "there is no mask"
                group = groups.setdefault((row["mask_by"]["fallback"], consequence), [])
                group.append(row["id"] if by == "object" else image_id)
    total = sum(map(len, masks.values()))
    kind = "annotations" if by == "object" else "images"
    for (reason, consequence), ids in groups.items():
        unique_ids = list(dict.fromkeys(ids))
        listed = ", ".join(map(str, unique_ids[:MAX_LISTED]))
        if len(unique_ids) > MAX_LISTED:
            listed += " ..."
        print(
            f"warning: {len(ids)} of {total} masks: {reason}, {consequence} ({kind} {listed})",
            flush=True,
        )
