"""A checked COCO file and its folder of images -> samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maskseg.data.coco.file import CocoFile
from maskseg.data.datasets.semantic_maps import SemanticMaps
from maskseg.data.image_files import MAX_PIXELS, load_pixels, safe_join
from maskseg.data.proposal_file import ProposalFile
from maskseg.data.sample import Sample
from maskseg.data.samplers import Item
from maskseg.data.transforms import Transform
from maskseg.errors import UserError
from maskseg.masks.annotated import FileMasks
from maskseg.superpixels.methods import Superpixels
from maskseg.variants.cfm.draw import draw_segments
from maskseg.variants.cfm.sampling import SegmentSampler
from maskseg.variants.cfm.store import SegmentStore


class CocoDataset(Dataset[Sample]):
    """Samples by (epoch, index, repetition): what the transforms draw is a function of the seed and these three alone.

    keep_empty: images without objects (crowds do not count) stay; max_images: only the first so many are used. mirrored: which keypoint each
    one is in a mirror (by their names if not given). proposals: a file of them (`data.proposals`), read with the images. semantic: maps of the
    pixels' categories, read with the images. superpixels: image uint8 RGB [H, W, 3] -> label map i32 [H, W], called on what the transforms gave.
    segments: a store of proposals with masks; draw: which of them are learnt from (`data.segment_sampling`), of what the transforms gave.
    drawn_only: the others are left out.
    skip_bad: with more than 0, an image that cannot be read is replaced by another one, which says so in `Sample.skipped`; who counts
    them stops beyond that number. With 0 it raises UserError.
    """

    def __init__(
        self,
        file: CocoFile,
        image_root: Path | str,
        transforms: Sequence[Transform] = (),
        seed: int = 0,
        keep_empty: bool = True,
        skip_bad: int = 0,
        max_pixels: int = MAX_PIXELS,
        max_images: int | None = None,
        mirrored: Sequence[int] = (),
        proposals: str | None = None,
        semantic: SemanticMaps | None = None,
        superpixels: Superpixels | None = None,
        segments: SegmentStore | None = None,
        draw: SegmentSampler | None = None,
        drawn_only: bool = True,
    ) -> None:
        self.file, self.root, self.transforms = file, Path(image_root), list(transforms)
        self.seed, self.skip_bad, self.max_pixels = seed, skip_bad, max_pixels
        self.semantic, self.superpixels = semantic, superpixels
        self.segments, self.draw, self.drawn_only = segments, draw, drawn_only
        self.mirrored = torch.tensor(mirrored or file.categories.mirrored(), dtype=torch.int64)
        with_objects = file.has_objects()
        self.images = [i for i in range(len(file.images)) if keep_empty or with_objects[i]][
            :max_images
        ]
        if not self.images:
            raise UserError(
                f"{file.path}: no image is left to use (data.keep_empty=true keeps those without objects)"
            )
        records = [file.images[i] for i in self.images]
        self.proposals = (
            None
            if proposals is None
            else ProposalFile(proposals, ((r.id, r.height, r.width) for r in records))
        )

    def __len__(self) -> int:
        return len(self.images)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image, as the file states them."""
        return [(self.file.images[i].height, self.file.images[i].width) for i in self.images]

    def labels(self) -> list[list[int]]:
        """The labels of each image's objects, crowds left out."""
        return [self.file.labels(i) for i in self.images]

    def __getitem__(self, item: Item) -> Sample:
        epoch, index, repetition = item
        rng = np.random.default_rng([self.seed, epoch, index, repetition])
        skipped: list[str] = []
        while True:
            try:
                sample = self._read(self.images[index], tuple(skipped))
                break
            except UserError as error:
                if not self.skip_bad or len(skipped) >= self.skip_bad:
                    raise
                skipped.append(str(error))
                index = int(rng.integers(len(self)))
        for transform in self.transforms:
            sample = transform(sample, rng)
        if self.draw is not None and sample.segments is not None:
            sample = draw_segments(sample, self.draw, rng, self.drawn_only)
        # Of the item, not of the stream after the transforms, which may change what they draw.
        seed = np.random.default_rng([self.seed, epoch, item[1], repetition, 1]).integers(2**62)
        return replace(
            sample,
            seed=int(seed),
            superpixels=None if self.superpixels is None else self._superpixels(sample.image),
        )

    def _superpixels(self, image: Tensor) -> Tensor:
        assert self.superpixels is not None
        return torch.from_numpy(
            self.superpixels(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        )

    def _read(self, index: int, skipped: tuple[str, ...]) -> Sample:
        record, truth = self.file.images[index], self.file.annotations(index)
        image = load_pixels(
            safe_join(self.root, record.file_name), self.max_pixels, (record.height, record.width)
        )
        shapes = [s for s in truth.shapes if s is not None]
        points = None if truth.keypoints is None else torch.as_tensor(truth.keypoints)
        masks = (
            FileMasks.from_file(shapes, record.height, record.width)
            if len(shapes) == len(truth.shapes)
            else None
        )
        with (
            warnings.catch_warnings()
        ):  # the arrays may be views of the file's, which nobody writes to
            warnings.simplefilter("ignore", UserWarning)
            return Sample(
                image,
                torch.as_tensor(truth.boxes, dtype=torch.float32).reshape(-1, 4).clone(),
                torch.as_tensor(truth.labels, dtype=torch.int64).clone(),
                torch.as_tensor(truth.crowd, dtype=torch.bool).clone(),
                masks,
                record.id,
                record.file_name,
                (record.height, record.width),
                skipped,
                keypoints=points,
                proposals=None
                if self.proposals is None
                else self.proposals.of(record.id, record.height, record.width),
                mirrored=None if points is None else self.mirrored,
                semantic=None
                if self.semantic is None
                else self.semantic.of(record.file_name, record.height, record.width),
                segments=None
                if self.segments is None
                else self.segments.of(record.id, record.height, record.width),
            )
