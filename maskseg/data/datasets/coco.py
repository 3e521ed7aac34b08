"""A data set as the tools see it: where its files are, its splits, its loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskseg.data.coco.file import CocoFile, ImageRecord, read_coco
from maskseg.data.collate import collate
from maskseg.data.dataset import CocoDataset
from maskseg.data.datasets.semantic_maps import SemanticMaps, encoding_of
from maskseg.data.datasets.stuff import with_stuff
from maskseg.data.image_files import MAX_PIXELS, load_image, safe_join
from maskseg.data.loader import BatchLoader
from maskseg.data.samplers import Item, StepSampler, aspect_groups, repeat_factors
from maskseg.data.transforms import Transform
from maskseg.errors import UserError
from maskseg.structures import Categories
from maskseg.superpixels.methods import Superpixels
from maskseg.variants.cfm.sampling import SegmentSampler
from maskseg.variants.cfm.store import SegmentStore

_LEAST = {"max_images": 1, "skip_bad": 0, "num_workers": 0, "divisor": 1}


def check_numbers(least: Mapping[str, int], **values: int | None) -> None:
    """Raises UserError for a key of the data whose value is no whole number, or below its least one; max_images may be None."""
    for name, value in values.items():
        if not (value is None and name == "max_images") and (
            type(value) is not int or value < least[name]
        ):
            raise UserError(
                f"data.{name} must be a whole number of at least {least[name]}, not {value!r}"
            )


class CocoSource:
    """COCO files for training and validation, either of which may be absent, and their folders of images.

    num_classes, point_ranges: read from the data; what differs from it is an error. flip_pairs: names of keypoints that change places in a
    mirror, those named left and right if not given. num_workers: loader processes, which change nothing but
    the speed; timeout: seconds after which a loader process that gives nothing is an error. group_by_aspect: portrait and landscape
    images never share a batch. repeat_threshold: LVIS's repeat factors, for classes in a smaller share of the images; 0 for none.
    train_proposals, val_proposals: files of `data.proposals`. train_semantic, val_semantic: folders of semantic maps (`data.semantic`). superpixels:
    what cuts the transformed images into superpixels, in the loader's processes. train_segments, val_segments: stores of segment proposals
    (`data.segment_store`); segment_sampler: (num_things, num_classes) -> what draws from them. stuff_json: a file that names classes of stuff,
    which are then classes behind the things'; with it or a segment_sampler, semantic maps hold labels; semantic_encoding: how the files' values
    stand for category ids, one of `data.semantic.ENCODINGS`. max_images: only the first so many of each split.
    Other keys: `CocoDataset`.
    """

    def __init__(
        self,
        train_json: str | None = None,
        val_json: str | None = None,
        train_images: str | None = None,
        val_images: str | None = None,
        images: str | None = None,
        train_transforms: Sequence[Transform] = (),
        test_transforms: Sequence[Transform] = (),
        num_classes: int | None = None,
        point_ranges: Sequence[Sequence[int]] | None = None,
        flip_pairs: Sequence[Sequence[str]] | None = None,
        keep_empty: bool = True,
        check_images: bool = True,
        max_pixels: int = MAX_PIXELS,
        skip_bad: int = 0,
        train_proposals: str | None = None,
        val_proposals: str | None = None,
        train_semantic: str | None = None,
        val_semantic: str | None = None,
        superpixels: Superpixels | None = None,
        train_segments: str | None = None,
        val_segments: str | None = None,
        segment_sampler: Callable[..., SegmentSampler] | None = None,
        stuff_json: str | None = None,
        num_things: int | None = None,
        max_images: int | None = None,
        group_by_aspect: bool = True,
        repeat_threshold: float = 0.0,
        num_workers: int = 2,
        timeout: float = 120.0,
        divisor: int = 32,
        root: str | None = None,
        semantic_encoding: str = "ids",
    ) -> None:
        check_numbers(
            _LEAST,
            max_images=max_images,
            skip_bad=skip_bad,
            num_workers=num_workers,
            divisor=divisor,
        )
        self.root, self.encoding = root, encoding_of(semantic_encoding)
        self.json, self.proposals = (
            {"train": train_json, "val": val_json},
            {"train": train_proposals, "val": val_proposals},
        )
        self.segments, self.segment_sampler = (
            {"train": train_segments, "val": val_segments},
            segment_sampler,
        )
        self.stuff_json, self.num_things = stuff_json, num_things
        self.semantic, self.superpixels = (
            {"train": train_semantic, "val": val_semantic},
            superpixels,
        )
        self.images = {"train": train_images or images, "val": val_images or images}
        self.transforms = {"train": list(train_transforms), "val": list(test_transforms)}
        self.point_ranges, self.flip_pairs = point_ranges, flip_pairs
        self.num_classes, self.keep_empty, self.check_images = num_classes, keep_empty, check_images
        self.max_pixels, self.skip_bad, self.max_images = max_pixels, skip_bad, max_images
        self.group_by_aspect, self.repeat_threshold = group_by_aspect, repeat_threshold
        self.num_workers, self.timeout, self.divisor = num_workers, timeout, divisor
        self.known: Categories | None = None
        self._with_stuff: tuple[Categories, Categories] | None = (
            None  # the things, and what `stuff_json` made of them
        )

    def prepare(self) -> None:
        """Makes what can be made before the files are read; nothing for files of the user's own."""

    def splits(self) -> list[str]:
        """Which of `train` and `val` have a file."""
        return [split for split, path in self.json.items() if path]

    @cached_property
    def train(self) -> CocoFile:
        """The checked training file. Raises UserError."""
        return self._read("train", self.known)

    @cached_property
    def val(self) -> CocoFile:
        """The checked validation file, its classes in the order of the training file's (or of a checkpoint's). Raises UserError."""
        return self._read(
            "val", self.known or (self.train.categories if self.json["train"] else None)
        )

    def name(self, split: str) -> str:
        """What messages call a split: the key that names its file."""
        return f"data.{split}_json={self.json[split]}"

    def file(self, split: str) -> CocoFile:
        """The checked file of a split. Raises UserError."""
        if split not in self.json:
            raise UserError(f"split={split}: there are {', '.join(self.json)}")
        return self.train if split == "train" else self.val

    @property
    def categories(self) -> Categories:
        """The classes, of the training file if there is one. Raises UserError where `num_classes` says otherwise."""
        if self.known is not None:
            return self.known
        file = self.train if self.json["train"] else self.val
        if self.num_classes is not None and self.num_classes != len(file.categories):
            raise UserError(
                f"data.num_classes={self.num_classes}, but {file.path} has {len(file.categories)} categories; leave it out: it is read"
            )
        if self.stuff_json is not None:
            if self._with_stuff is None or self._with_stuff[0] is not file.categories:
                self._with_stuff = (
                    file.categories,
                    with_stuff(file.categories, Path(self.stuff_json), self.encoding.stuff),
                )
            return self._with_stuff[1]
        ranges = [list(r) for r in file.categories.point_ranges]
        if self.point_ranges is not None and [list(r) for r in self.point_ranges] != ranges:
            raise UserError(
                f"data.point_ranges={self.point_ranges}, but the keypoints of {file.path} are {ranges}; leave it out: it is read"
            )
        return file.categories

    def _read(self, split: str, categories: Categories | None) -> CocoFile:
        path, folder = self.json[split], self.images[split]
        if not path:
            raise UserError(f"data.{split}_json is not set, and this needs it")
        if not folder:
            raise UserError(
                f"data.images is not set: the folder that the file names in {path} are relative to"
            )
        return read_coco(
            path,
            categories=categories,
            image_root=Path(folder),
            check_images=self.check_images,
            max_pixels=self.max_pixels,
        )

    def dataset(self, split: str, seed: int = 0) -> CocoDataset:
        """The images of a split with its transforms; for validation all of them, without a random choice."""
        file = self.file(split)
        keep_empty = self.keep_empty or split == "val"
        folder = self.images[split] or ""
        skip_bad = self.skip_bad if split == "train" else 0
        more = (
            self.max_images,
            self.mirrored(),
            self.proposals[split],
            self.semantic_maps(split),
            self.superpixels,
        )
        draw = (
            None
            if self.segment_sampler is None
            else self.segment_sampler(self.categories.num_things, len(self.categories))
        )
        segments = self.segment_store(split)
        return CocoDataset(
            file,
            folder,
            self.transforms[split],
            seed,
            keep_empty,
            skip_bad,
            self.max_pixels,
            *more,
            segments,
            draw,
        )

    def segment_store(self, split: str) -> SegmentStore | None:
        """The store of a split's segments, where one is named. Raises UserError for one that is not whole."""
        folder = self.segments[split]
        return (
            None
            if folder is None
            else SegmentStore(folder, [(i.id, i.height, i.width) for i in self.records(split)])
        )

    def records(self, split: str) -> list[ImageRecord]:
        """The images that a data set of the split has."""
        file = self.file(split)
        kept = zip(file.images, file.has_objects(), strict=True)
        return [record for record, some in kept if self.keep_empty or split == "val" or bool(some)][
            : self.max_images
        ]

    @property
    def labelled(self) -> bool:
        """Whether semantic maps have labels, not category ids: where stuff has labels, and where segments are drawn, which may be things alone."""
        return self.stuff_json is not None or self.segment_sampler is not None

    def semantic_maps(self, split: str) -> SemanticMaps | None:
        """Those of a split, where it has any. Raises UserError for a folder that is not there."""
        folder = self.semantic[split]
        ids = self.categories.ids if self.labelled else None
        return None if folder is None else self._maps(split, folder, ids)

    def _maps(self, split: str, folder: str, ids: Sequence[int] | None) -> SemanticMaps:
        return SemanticMaps(folder, f"data.{split}_semantic", self.max_pixels, ids, self.encoding)

    def mirrored(self) -> list[int]:
        """Which keypoint each one is in a mirror. Raises UserError for `flip_pairs` that are not."""
        try:
            return self.categories.mirrored(self.flip_pairs)
        except ValueError as error:
            raise UserError(f"data.flip_pairs: {error}") from error

    def train_loader(
        self,
        total_batch: int,
        max_steps: int,
        seed: int,
        start_step: int = 0,
        pin: bool = False,
        *,
        rank: int = 0,
        world: int = 1,
        pieces: int = 1,
    ) -> BatchLoader:
        """Batches for steps `start_step` .. `max_steps` - 1: of each step, `pieces` batches that hold the share of process `rank` of `world`."""
        dataset = self.dataset("train", seed)
        sampler = StepSampler(
            len(dataset),
            total_batch,
            max_steps,
            seed,
            start_step,
            aspect_groups(dataset.sizes()) if self.group_by_aspect else None,
            repeat_factors(dataset.labels(), self.repeat_threshold)
            if self.repeat_threshold
            else None,
            rank,
            world,
            pieces,
        )
        return self._loader("train", dataset, sampler, pin)

    def test_loader(
        self, split: str, batch: int, most: int | None = None, rank: int = 0, world: int = 1
    ) -> BatchLoader:
        """The (first `most`) images of a split once, in the file's order, with the test transforms; of its batches those of process `rank`."""
        dataset = self.dataset(split)
        dataset.transforms, dataset.skip_bad = (
            self.transforms["val"],
            0,
        )  # no image may stand in for one that is tested
        dataset.drawn_only = False
        items = [(0, i, 0) for i in range(min(len(dataset), most or len(dataset)))]
        return self._loader(
            split, dataset, [items[i : i + batch] for i in range(0, len(items), batch)][rank::world]
        )

    def _loader(
        self,
        split: str,
        dataset: CocoDataset,
        sampler: StepSampler | list[list[Item]],
        pin: bool = False,
    ) -> BatchLoader:
        return BatchLoader(
            self.name(split),
            dataset,
            sampler,
            partial(collate, divisor=self.divisor),
            self.num_workers,
            self.timeout,
            pin,
        )

    def picture(self, split: str, image_id: int) -> NDArray[np.uint8]:
        """uint8 RGB [H, W, 3]: an image of a split as its file has it."""
        file = self.file(split)
        record = file.images[file.index_of[image_id]]
        image = load_image(
            safe_join(Path(self.images[split] or ""), record.file_name),
            self.max_pixels,
            (record.height, record.width),
        )
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy())
