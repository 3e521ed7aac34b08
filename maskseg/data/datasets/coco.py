"""A dataset of COCO files: its splits, their checked contents and their loaders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Required, Self, TypedDict

import numpy as np
from numpy.typing import NDArray

from maskseg.data.add_superpixels import AddSuperpixels
from maskseg.data.coco.file import CocoFile, ImageRecord, read_coco
from maskseg.data.coco.report import MAX_EXAMPLES, Report, escape_surrogates
from maskseg.data.coco.split import find_shared_images, split_images
from maskseg.data.collate import collate
from maskseg.data.dataset import CocoDataset, select_images
from maskseg.data.datasets.semantic_maps import SemanticMaps, encoding_of
from maskseg.data.datasets.stuff import with_stuff
from maskseg.data.image_files import load_image, safe_join
from maskseg.data.loader import BatchLoader
from maskseg.data.options import ClassOptions, LoaderOptions, ReadOptions, Split
from maskseg.data.proposal_file import ProposalFile
from maskseg.data.readers import Reader, ReadProposals, ReadSemanticMap, SegmentData
from maskseg.data.samplers import Item, StepSampler, aspect_groups, repeat_factors
from maskseg.data.transforms import Transform
from maskseg.errors import UserError
from maskseg.structures import Categories
from maskseg.superpixels.methods import Superpixels


class SourceParts(TypedDict, total=False):
    """The arguments of `CocoSource` but for `root`."""

    train: Required[Split]
    val: Required[Split]
    class_options: ClassOptions | None
    reading: ReadOptions | None
    loading: LoaderOptions | None
    superpixels: Superpixels | None
    segments: SegmentData | None
    categories: Categories | None


class SourceArguments(SourceParts, total=False):
    """The arguments of `CocoSource`."""

    root: str | None


class CocoSource:
    """COCO files for training and validation, either of which may be absent.

    train, val: the files of the two splits. The validation transforms are used whenever images
        are tested, of either split.
    class_options, reading, loading: settings, see `maskseg.data.options`.
    superpixels: image uint8 RGB [H, W, 3] -> label map i32 [H, W]; called on the transformed
        images, in the loader processes.
    segments: segment proposals with masks, which are read and drawn from.
    categories: the classes of a checkpoint, whose order the files then have; by default, the
        classes of the training file.
    root: the folder of the whole dataset, for subclasses.
    """

    def __init__(
        self,
        train: Split,
        val: Split,
        class_options: ClassOptions | None = None,
        reading: ReadOptions | None = None,
        loading: LoaderOptions | None = None,
        superpixels: Superpixels | None = None,
        segments: SegmentData | None = None,
        categories: Categories | None = None,
        root: str | None = None,
    ) -> None:
        self.class_options = class_options or ClassOptions()
        self.reading = reading or ReadOptions()
        if train.json and not val.json and self.reading.val_fraction is not None:
            val = replace(
                train,
                name="val",
                transforms=val.transforms,
                proposals=val.proposals,
                part_of="train",
            )
        self.split_files = {"train": train, "val": val}
        self.loading = loading or LoaderOptions()
        self.superpixels = superpixels
        self.segments = segments
        self.known_categories = categories
        self.root = root
        self.encoding = encoding_of(self.class_options.semantic_encoding)

    @classmethod
    def from_keys(cls, categories: Categories | None = None, **keys: object) -> Self:
        """The source that the flat keys of `configs/data` describe.

        Keys that belong to no setting are arguments of the subclass. Raises TypeError for a key
        that is none of either.
        """
        return cls(**source_arguments(keys), categories=categories)

    def prepare(self) -> None:
        """Make what can be made before the files are read; files of the user's own need nothing."""

    def splits(self) -> list[str]:
        """The names of the splits that have a file."""
        return [name for name, split in self.split_files.items() if split.json]

    @property
    def divides_file(self) -> bool:
        """Whether both splits are parts of the training file (`data.val_fraction`)."""
        return self.split_files["val"].part_of is not None

    def json_files(self) -> list[str]:
        """The JSON files of all splits, without duplicates."""
        files = []
        for split in self.split_files.values():
            files += split.files
        return list(dict.fromkeys(files))

    def data_files(self) -> dict[str, list[str]]:
        """The files that the contents of the splits come from, by their config key.

        Images, and folders of maps and segments, are not among them.
        """
        stuff = self.class_options.stuff_json
        files = {"data.stuff_json": [stuff] if stuff else []}
        for name, split in self.split_files.items():
            files[split.json_key] = split.files
            files[f"data.{name}_proposals"] = [split.proposals] if split.proposals else []
        return files

    def with_transforms_of(self, other: CocoSource) -> CocoSource:
        """This source with the transforms of another one; files that were read are shared."""
        source = copy(self)
        source.split_files = {
            name: replace(split, transforms=other.split(name).transforms)
            for name, split in self.split_files.items()
        }
        return source

    def split(self, name: str) -> Split:
        """The files of a split. Raises UserError for another name than `train` or `val`."""
        if name not in self.split_files:
            raise UserError(f"split={name}: there are {', '.join(self.split_files)}")
        return self.split_files[name]

    def split_hash(self) -> dict[str, str]:
        """The SHA-256 of the names of the validation images, where they are a part of a file."""
        if not self.divides_file:
            return {}
        names = "\n".join(sorted(image.file_name for image in self.val.images))
        digest = hashlib.sha256(names.encode("utf-8", "surrogatepass")).hexdigest()
        return {"data.val_fraction": digest}

    @cached_property
    def train(self) -> CocoFile:
        """The checked training file, or the training images of it. Raises UserError."""
        if self.divides_file:
            return self._parts[0]
        return self.read_file("train", self.known_categories)

    @cached_property
    def _parts(self) -> tuple[CocoFile, CocoFile]:
        """The training and the validation images of the training file."""
        file = self.read_file("train", self.known_categories)
        fraction = self.reading.val_fraction
        assert fraction is not None
        folder = Path(self.split("train").images or "")
        is_val = split_images(file.images, folder, file.has_objects(), fraction)
        parts = []
        for selected in (~is_val, is_val):
            part = f"{int(selected.sum())} of {len(file)} images, data.val_fraction={fraction:g}"
            parts.append(file.select(selected, Report(f"{file.name} ({part})")))
        train, val = parts
        train.report.extend(file.report)
        untrained = [
            f"{name!r}: {validated} objects are validated"
            for name, (_, trained, _), (_, validated, _) in zip(
                file.categories.names, train.class_counts(), val.class_counts(), strict=True
            )
            if validated and not trained
        ]
        if untrained:
            train.report.warn("class without an object among the training images", *untrained)
        return train, val

    @cached_property
    def val(self) -> CocoFile:
        """The checked validation file, or the validation images of the training file.

        Raises UserError. Its classes are in the order of the checkpoint's or the training file's.
        """
        if self.divides_file:
            return self._parts[1]
        known = self.known_categories
        if known is None and self.split("train").json:
            known = self.train.categories
        return self.read_file("val", known)

    def file(self, split: str) -> CocoFile:
        """The checked file of a split. Raises UserError."""
        return self.train if self.split(split).name == "train" else self.val

    @cached_property
    def categories(self) -> Categories:
        """The classes, things before stuff. Raises UserError where the config contradicts them."""
        if self.known_categories is not None:
            return self.known_categories
        file = self.train if self.split("train").json else self.val
        count = self.class_options.num_classes
        if count is not None and count != len(file.categories):
            raise UserError(
                f"data.num_classes={count}, but {file.name} has {len(file.categories)} categories; "
                "leave the key out: the number is read from the file"
            )
        if self.class_options.stuff_json is not None:
            stuff_json = Path(self.class_options.stuff_json)
            return with_stuff(file.categories, stuff_json, self.encoding.stuff)
        self._check_point_ranges(file)
        return file.categories

    def _check_point_ranges(self, file: CocoFile) -> None:
        configured = self.class_options.point_ranges
        if configured is None:
            return
        ranges = [list(point_range) for point_range in file.categories.point_ranges]
        if [list(point_range) for point_range in configured] != ranges:
            raise UserError(
                f"data.point_ranges={configured}, but the keypoints of {file.name} are {ranges}; "
                "leave the key out: the ranges are read from the file"
            )

    def read_file(self, split: str, categories: Categories | None) -> CocoFile:
        """Read and check the file of a split; its classes get the order of `categories`.

        Raises UserError with a report.
        """
        files = self.split(split)
        if not files.json:
            raise UserError(f"data.{split}_json is not set, but it is needed here")
        if not files.images:
            raise UserError(
                f"data.images is not set: the folder that the file names in {files.files[0]} are "
                "relative to"
            )
        return read_coco(
            files.files,
            categories=categories,
            image_root=Path(files.images),
            check_images=self.reading.check_images,
            max_pixels=self.reading.max_pixels,
            crowds=self.reading.crowds,
        )

    def shared_images(self) -> str:
        """A warning about training images that are validation images too; "" where none is.

        Their files are compared by place and, if `check_images`, by content.
        """
        if self.divides_file or len(self.splits()) < 2:
            return ""
        if self.split("val").files == self.split("train").files:
            return (
                "warning: data.val_json is the training file: the metrics are those of training "
                "images"
            )
        train_paths, val_paths = self._image_paths("train"), self._image_paths("val")
        pairs = find_shared_images(train_paths, val_paths, self.reading.check_images)
        if not pairs:
            return ""
        examples = [
            self.val.images[j].file_name
            if self.val.images[j].file_name == self.train.images[i].file_name
            else f"{self.val.images[j].file_name} (training: {self.train.images[i].file_name})"
            for i, j in pairs[:MAX_EXAMPLES]
        ]
        more = f" and {len(pairs) - MAX_EXAMPLES} more" if len(pairs) > MAX_EXAMPLES else ""
        return escape_surrogates(
            f"warning: {len(pairs)} of {len(self.val)} validation images are training images, too, "
            f"so that the metrics are too high: {', '.join(examples)}{more}"
        )

    def _image_paths(self, split: str) -> list[Path]:
        folder = Path(self.split(split).images or "")
        return [folder / image.file_name for image in self.file(split).images]

    def records(self, split: str) -> list[ImageRecord]:
        """The images of a split that are used. Raises UserError."""
        file = self.file(split)
        options = self._options(split)
        indices = select_images(file, options.keep_empty, options.max_images)
        return [file.images[i] for i in indices]

    def images_per_epoch(self) -> float:
        """The number of training images of an epoch, on average. Raises UserError."""
        threshold = self.loading.repeat_threshold
        if not threshold:
            return len(self.records("train"))
        # Not those of a dataset: it opens files of segments and proposals, which are made later.
        options = self._options("train")
        indices = select_images(self.train, options.keep_empty, options.max_images)
        return sum(repeat_factors([self.train.labels(i) for i in indices], threshold))

    def has_objects(self, split: str) -> bool:
        """Whether an image of a split that is used shows an object other than a crowd."""
        has_objects = self.file(split).has_objects()
        options = self._options(split)
        # Without empty images, the first `max_images` are of those with objects.
        first = options.max_images if options.keep_empty else None
        return bool(has_objects[:first].any())

    def _options(self, split: str) -> ReadOptions:
        """A validation uses all images, also those without objects, and never replaces one."""
        if split == "val":
            return replace(self.reading, keep_empty=True, skip_bad=0)
        return self.reading

    def dataset(self, split: str, seed: int = 0) -> CocoDataset:
        """The images of a split with the transforms of the split, for training."""
        transforms = [*self.split(split).transforms, *self._last_transforms(split, training=True)]
        return self.dataset_with(split, transforms, seed, self._options(split).skip_bad)

    def test_dataset(self, split: str) -> CocoDataset:
        """The images of a split with the test transforms; no image is replaced by another."""
        transforms = self.split("val").transforms
        return self.dataset_with(
            split, [*transforms, *self._last_transforms(split, training=False)]
        )

    def dataset_with(
        self, split: str, transforms: Sequence[Transform], seed: int = 0, skip_bad: int = 0
    ) -> CocoDataset:
        """The images of a split with these transforms alone."""
        return CocoDataset(
            self.file(split),
            self.split(split).images or "",
            transforms,
            self.readers(split),
            seed,
            replace(self._options(split), skip_bad=skip_bad),
            self.flip_indices(),
        )

    def readers(self, split: str) -> list[Reader]:
        """What is read beside the images of a split. Raises UserError for files that do not fit."""
        readers: list[Reader] = []
        proposals = self.split(split).proposals
        if proposals is not None:
            sizes = ((r.id, r.height, r.width) for r in self.records(split))
            readers.append(ReadProposals(ProposalFile(proposals, sizes)))
        semantic = self.semantic_maps(split)
        if semantic is not None:
            readers.append(ReadSemanticMap(semantic))
        if self.segments is not None and self.segments.folders[split] is not None:
            readers.append(self.segments.reader(split, self.records(split)))
        return readers

    def _last_transforms(self, split: str, training: bool) -> list[Transform]:
        """What depends on the transformed image."""
        transforms: list[Transform] = []
        if self.segments is not None and self.segments.folders[split] is not None:
            transforms.append(self.segments.transform(self.categories, training))
        if self.superpixels is not None:
            transforms.append(AddSuperpixels(self.superpixels))
        return transforms

    @property
    def has_semantic_labels(self) -> bool:
        """Whether semantic maps hold labels 0..K-1 instead of category ids.

        They do where stuff has labels and where segments are drawn.
        """
        return self.class_options.stuff_json is not None or self.segments is not None

    def semantic_maps(self, split: str) -> SemanticMaps | None:
        """The semantic maps of a split, if it has any. Raises UserError for a missing folder."""
        folder = self.split(split).semantic
        if folder is None:
            return None
        return self._open_maps(
            split, folder, self.categories.ids if self.has_semantic_labels else None
        )

    def _open_maps(self, split: str, folder: str, ids: Sequence[int] | None) -> SemanticMaps:
        key = f"data.{split}_semantic"
        return SemanticMaps(folder, key, self.reading.max_pixels, ids, self.encoding)

    def flip_indices(self) -> list[int]:
        """The keypoint that each one becomes when an image is flipped. Raises UserError."""
        try:
            return self.categories.flip_indices(self.class_options.flip_pairs)
        except ValueError as error:
            raise UserError(f"data.flip_pairs: {error}") from error

    def train_loader(
        self,
        batch_size: int,
        max_steps: int,
        seed: int,
        start_step: int = 0,
        pin: bool = False,
        *,
        rank: int = 0,
        world: int = 1,
        pieces: int = 1,
    ) -> BatchLoader:
        """Batches for the steps `start_step` to `max_steps` - 1.

        For each step there are `pieces` batches (gradient accumulation), which hold the images
        of process `rank` of `world` processes.
        """
        dataset = self.dataset("train", seed)
        threshold = self.loading.repeat_threshold
        sampler = StepSampler(
            len(dataset),
            batch_size,
            max_steps,
            seed,
            start_step,
            aspect_groups(dataset.sizes()) if self.loading.group_by_aspect else None,
            repeat_factors(dataset.labels(), threshold) if threshold else None,
            rank,
            world,
            pieces,
        )
        return self._loader("train", dataset, sampler, pin)

    def test_loader(
        self,
        split: str,
        batch_size: int,
        max_images: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> BatchLoader:
        """The images of a split (at most the first `max_images`), once and in the file's order.

        The test transforms are used. Of the batches, process `rank` gets every `world`-th.
        """
        dataset = self.test_dataset(split)
        count = min(len(dataset), max_images or len(dataset))
        items = [(0, index, 0) for index in range(count)]
        batches = [items[start : start + batch_size] for start in range(0, count, batch_size)]
        return self._loader(split, dataset, batches[rank::world])

    def _loader(
        self,
        split: str,
        dataset: CocoDataset,
        sampler: StepSampler | list[list[Item]],
        pin: bool = False,
    ) -> BatchLoader:
        return BatchLoader(
            self.split(split).key,
            dataset,
            sampler,
            partial(collate, divisor=self.loading.divisor),
            self.loading.num_workers,
            self.loading.timeout,
            pin,
        )

    def picture(self, split: str, image_id: int) -> NDArray[np.uint8]:
        """An image of a split as its file has it: uint8 RGB [H, W, 3]."""
        file = self.file(split)
        record = file.images[file.index_of[image_id]]
        path = safe_join(Path(self.split(split).images or ""), record.file_name)
        image = load_image(path, self.reading.max_pixels, (record.height, record.width))
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def source_arguments(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Flat keys of a data config -> arguments of `CocoSource` or a subclass."""
    values = dict(keys)
    if "size_range" in values:  # with the keys that only other keys refer to
        for key in ("size", "size_range", "min_proposals"):
            values.pop(key, None)
    images = values.pop("images", None)
    arguments: dict[str, Any] = {}
    for name, transforms in (("train", "train_transforms"), ("val", "test_transforms")):
        arguments[name] = Split(
            name,
            json=values.pop(f"{name}_json", None),
            images=values.pop(f"{name}_images", None) or images,
            transforms=tuple(values.pop(transforms, None) or ()),
            proposals=values.pop(f"{name}_proposals", None),
            semantic=values.pop(f"{name}_semantic", None),
        )
    for name, options in (
        ("class_options", ClassOptions),
        ("reading", ReadOptions),
        ("loading", LoaderOptions),
    ):
        present = [field.name for field in fields(options) if field.name in values]
        arguments[name] = options(**{key: values.pop(key) for key in present})
    folders = {name: values.pop(f"{name}_segments", None) for name in ("train", "val")}
    make_segments = values.pop("segment_sampler", None)
    if make_segments is not None:
        arguments["segments"] = make_segments(folders=folders)
    return arguments | values
