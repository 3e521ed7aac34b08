"""A checked COCO file and its folder of images -> samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from maskseg.data.coco.file import CocoFile, rectangle
from maskseg.data.image_files import load_pixels, safe_join
from maskseg.data.options import ReadOptions
from maskseg.data.readers import Reader
from maskseg.data.sample import Sample
from maskseg.data.samplers import Item
from maskseg.data.transforms import Transform
from maskseg.errors import UserError
from maskseg.masks.annotated import AnnotatedMasks


def select_images(file: CocoFile, keep_empty: bool, max_images: int | None) -> list[int]:
    """The indices of the images that are used. Raises UserError if there is none."""
    has_objects = file.has_objects()
    indices = [i for i in range(len(file.images)) if keep_empty or has_objects[i]]
    if not indices:
        raise UserError(
            f"{file.name}: no image is left to use "
            "(data.keep_empty=true keeps those without objects)"
        )
    return indices[:max_images]


class CocoDataset(Dataset[Sample]):
    """Samples by (epoch, index, repetition).

    What the transforms draw at random depends on the seed and these three numbers alone.

    readers: add to each sample what else belongs to its image, before the transforms.
    options: which images are used and how they are read. With `skip_bad` > 0, an image that
        cannot be read is replaced by another one, with a message in `Sample.read_errors`; the
        caller stops when there are more than `skip_bad`. With 0, UserError is raised.
    flip_indices: the keypoint that each one becomes when the image is flipped; by default,
        by the names of the keypoints.
    """

    def __init__(
        self,
        file: CocoFile,
        image_root: Path | str,
        transforms: Sequence[Transform] = (),
        readers: Sequence[Reader] = (),
        seed: int = 0,
        options: ReadOptions | None = None,
        flip_indices: Sequence[int] = (),
    ) -> None:
        self.file = file
        self.root = Path(image_root)
        self.transforms = list(transforms)
        self.readers = list(readers)
        self.seed = seed
        self.options = options or ReadOptions()
        indices = flip_indices or file.categories.flip_indices()
        self.flip_indices = torch.tensor(indices, dtype=torch.int64)
        self.images = select_images(file, self.options.keep_empty, self.options.max_images)

    def __len__(self) -> int:
        return len(self.images)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each image, as the JSON states them."""
        return [(self.file.images[i].height, self.file.images[i].width) for i in self.images]

    def labels(self) -> list[list[int]]:
        """The labels of each image's objects, without crowds."""
        return [self.file.labels(i) for i in self.images]

    def __getitem__(self, item: Item) -> Sample:
        epoch, index, repetition = item
        rng = np.random.default_rng([self.seed, epoch, index, repetition])
        sample = self._read_or_replace(index, rng)
        for transform in self.transforms:
            sample = transform(sample, rng)
        # From the item, not from the stream above: changed transforms must not change what the
        # model draws.
        generator = np.random.default_rng([self.seed, epoch, index, repetition, 1])
        return replace(sample, seed=int(generator.integers(2**62)))

    def _read_or_replace(self, index: int, rng: np.random.Generator) -> Sample:
        """The image of this index, or a random one instead of an unreadable one."""
        errors: list[str] = []
        while True:
            try:
                return self._read(self.images[index], tuple(errors))
            except UserError as error:
                if len(errors) >= self.options.skip_bad:
                    raise
                errors.append(str(error))
                index = int(rng.integers(len(self)))

    def _read(self, index: int, errors: tuple[str, ...]) -> Sample:
        record = self.file.images[index]
        truth = self.file.annotations(index)
        size = (record.height, record.width)
        image = load_pixels(safe_join(self.root, record.file_name), self.options.max_pixels, size)
        # Crowds are never learned: those without a mask must not take away the objects' masks.
        filled = [
            rectangle(box) if shape is None and crowd and self.file.fills_crowds else shape
            for shape, box, crowd in zip(truth.shapes, truth.boxes, truth.crowd, strict=True)
        ]
        shapes = [shape for shape in filled if shape is not None]
        masks = None
        if len(shapes) == len(truth.shapes):
            masks = AnnotatedMasks.from_file(shapes, record.height, record.width)
        # The arrays may be read-only views of the file's arrays; nothing writes to them.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            points = None if truth.keypoints is None else torch.as_tensor(truth.keypoints)
            sample = Sample(
                image=image,
                boxes=torch.as_tensor(truth.boxes, dtype=torch.float32).reshape(-1, 4).clone(),
                labels=torch.as_tensor(truth.labels, dtype=torch.int64).clone(),
                iscrowd=torch.as_tensor(truth.crowd, dtype=torch.bool).clone(),
                masks=masks,
                image_id=record.id,
                file_name=record.file_name,
                original_size=size,
                read_errors=errors,
                keypoints=points,
                flip_indices=None if points is None else self.flip_indices,
            )
        for reader in self.readers:
            sample = reader(sample)
        return sample
