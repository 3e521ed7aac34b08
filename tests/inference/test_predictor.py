"""What a predictor takes: images of all kinds, lists, folders and streams."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made.fixed_model import CATEGORIES, FixedModel, random_detections
from PIL import Image, ImageSequence

from maskseg.data.image_files import load_image
from maskseg.data.single_image import SingleImage, read_image
from maskseg.errors import UserError
from maskseg.inference.prediction import Prediction
from maskseg.inference.predictor import Predictor

SIZE = (60, 90)
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
GRAY = RGB[..., 0]


def predictor(**keys: Any) -> Predictor:
    return Predictor(
        FixedModel(random_detections(6, 40, 60)), CATEGORIES, SingleImage(divisor=32), **keys
    )


def pixels_of(image: Any) -> np.ndarray:
    pixels = read_image(image)
    assert pixels.dtype == torch.uint8
    return pixels.permute(1, 2, 0).numpy()


RGBA = np.concatenate([RGB, RGB[..., :1]], axis=2)
GRAY_AS_RGB = GRAY[..., None].repeat(3, axis=2)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (RGB, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (RGB[:, ::-1], RGB[:, ::-1]),
        (RGBA, RGB),
        (RGBA.transpose(2, 0, 1), RGB),
        (GRAY, GRAY_AS_RGB),
        (GRAY[..., None], GRAY_AS_RGB),
        (GRAY[None], GRAY_AS_RGB),
        (RGB[:1], RGB[:1]),  # [1, W, 3]: channels of size 3 come before a channel of size 1
        (RGB[:1, :1], RGB[:1, :1]),
        (RGB[:, :3], RGB[:, :3]),
        (GRAY > 99, (GRAY_AS_RGB > 99) * np.uint8(255)),
        (RGB.astype(np.uint16) * 257, RGB),
        ((RGB.astype(np.int64) * 257 - 100).clip(0).astype(np.uint16), RGB),
        (RGB / 255, RGB),
        (RGB.astype(np.float32) / 255, RGB),
        (torch.from_numpy(RGB), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1) / 255, RGB),
        (torch.from_numpy(GRAY).bool().bfloat16(), (GRAY_AS_RGB > 0) * np.uint8(255)),
        ((torch.from_numpy(RGB) / 255).requires_grad_(), RGB),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(RGBA), RGB),
        (Image.fromarray(GRAY), GRAY_AS_RGB),
        (Image.fromarray(GRAY.astype(np.uint16) * 257), GRAY_AS_RGB),
    ],
)
def test_arrays_tensors_and_pil_images(image: Any, expected: np.ndarray) -> None:
    assert np.array_equal(pixels_of(image), expected)


def test_an_array_is_copied() -> None:
    image = RGB.copy()
    pixels = read_image(image)
    image[:] = 0
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), RGB)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_a_pil_image_is_read_like_its_file(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(GRAY.astype(np.uint16) * 200) if mode == "I;16" else None
    image = image or Image.fromarray(RGB).convert(mode)
    suffix = "tif" if mode in ("CMYK", "YCbCr") else "png"
    image.save(tmp_path / f"a.{suffix}")
    assert torch.equal(read_image(image), load_image(tmp_path / f"a.{suffix}"))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RGB[:3], "may be"),
        (RGB[:3, :4], r"shape \[3, 4, 3\] may be \[H, W, C\] or \[C, H, W\]: make it a PIL image"),
        (GRAY[:1, :, None], r"shape \[1, 90, 1\] may be"),
        (RGBA.transpose(2, 0, 1)[:, :, :3], r"shape \[4, 60, 3\] may be"),
        (RGB[..., :2], r"\[60, 90, 2\] has no dimension of 1 \(gray\), 3 \(RGB\) or 4 \(RGBA\)"),
        (RGB[None], r"not \[1, 60, 90, 3\]; a batch is a list of images"),
        (torch.zeros(0, 3, 4), r"not \[0, 3, 4\]"),
        (GRAY[:0], r"not \[0, 90\]"),
        (RGB.astype(np.int64), "an image of int64 has no agreed range"),
        (RGB.astype(np.float32), r"float32 has values from 0 to 255, instead of 0\.\.1"),
        (np.full(SIZE, np.nan), "values from nan to nan"),
        (np.full(SIZE, -0.1), "instead of"),
        (np.full(SIZE, "a"), "has no agreed range"),
        (Image.fromarray(GRAY.astype(np.float32)), r"32-bit gray \(mode F\)"),
        (Image.new("RGB", (0, 4)), "has no pixels"),
    ],
)
def test_what_is_ambiguous_or_no_image_is_one_clear_line(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        predictor()(image)
    assert "\n" not in str(error.value)


def test_a_damaged_file_behind_a_pil_image(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    Image.fromarray(RGB).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"half\.png: the image cannot be read"):
        predictor()(Image.open(path))


@pytest.mark.parametrize("images", [None, 3, b"a.png", {"a": 1}, {1, 2}, io.BytesIO(b"x")])
def test_what_is_neither_an_image_nor_many(images: Any) -> None:
    with pytest.raises(UserError, match=r"an image is a path, .* not a "):
        predictor()(images)


def assert_same(first: Prediction, second: Prediction) -> None:
    assert torch.allclose(first.boxes, second.boxes)
    assert torch.equal(first.scores, second.scores)
    assert first.rles == second.rles
    assert first.size == second.size


def shades(*values: int) -> list[np.ndarray]:
    """Images of different brightness and of two sizes, in turn."""
    sizes = [SIZE, (40, 120)]
    return [np.full((*sizes[i % 2], 3), v, dtype=np.uint8) for i, v in enumerate(values)]


def test_a_list_is_batched_and_in_order() -> None:
    images = shades(10, 200, 60, 90, 120)
    single = [predictor()(image) for image in images]
    model = predictor()
    predictions = model(images, batch_size=4)
    assert isinstance(predictions, list)
    for one, other in zip(single, predictions, strict=True):
        assert_same(one, other)
    # Images of one padded size go through the model together, and are not padded to another.
    assert isinstance(model.model, FixedModel)
    assert model.model.sizes == [(2, 3, 64, 96), (2, 3, 64, 128), (1, 3, 64, 96)]
    assert model([]) == []
    assert [p.size for p in model(tuple(images[:2]))] == [SIZE, (40, 120)]


def test_a_folder_is_a_list_in_the_order_of_names(tmp_path: Path) -> None:
    for name, image in zip(("b.png", "a.jpg", "c.tif"), shades(10, 20, 30), strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    for folder in (tmp_path, str(tmp_path)):
        predictions = predictor()(folder)
        assert [p.path.name for p in predictions] == ["a.jpg", "b.png", "c.tif"]
        assert_same(predictions[1], predictor()(tmp_path / "b.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no image found"):
        predictor()(tmp_path / "empty")


def test_a_generator_is_read_lazily_and_in_order() -> None:
    taken: list[int] = []

    def images() -> Iterator[np.ndarray]:
        for i, image in enumerate(shades(*range(0, 240, 24))):
            taken.append(i)
            yield image

    stream = predictor()(images(), batch_size=3)
    assert iter(stream) is stream
    assert taken == []
    first = next(stream)
    assert taken == [0, 1, 2]
    rest = list(stream)
    assert len(taken) == 10
    for prediction, image in zip([first, *rest], shades(*range(0, 240, 24)), strict=True):
        assert_same(prediction, predictor()(image))
    one_by_one = predictor()(images(), batch_size=1)
    next(one_by_one)
    assert taken[10:] == [0]


def as_array(buffer: np.ndarray) -> np.ndarray:
    return buffer


@pytest.mark.parametrize("view", [as_array, torch.from_numpy])
def test_a_generator_may_refill_one_buffer(view: Any) -> None:
    values = [0, 80, 160, 240, 40]
    buffer = np.empty((*SIZE, 3), dtype=np.uint8)

    def frames() -> Iterator[Any]:
        for value in values:
            buffer[:] = value
            yield view(buffer)

    predictions = list(predictor()(frames(), batch_size=3))
    for prediction, value in zip(predictions, values, strict=True):
        frame = np.full_like(buffer, value)
        assert_same(prediction, predictor()(frame))
        assert np.array_equal(prediction.image, frame)
    prediction = predictor()(view(buffer))
    prediction.image[:] = 7  # a copy
    buffer[:] = 255
    assert (prediction.image == 40).all()
    assert np.array_equal(np.asarray(prediction.plot()), np.asarray(predictions[4].plot()))


def test_the_frames_of_a_gif(tmp_path: Path) -> None:
    values = [0, 85, 170, 255, 51]
    frames = [Image.fromarray(np.full((*SIZE, 3), value, dtype=np.uint8)) for value in values]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as gif:
        predictions = list(predictor()(ImageSequence.Iterator(gif)))
    for prediction, frame in zip(predictions, frames, strict=True):
        assert_same(prediction, predictor()(frame))
        assert np.array_equal(prediction.image, np.asarray(frame))


def test_pixels_of_a_shape_that_fits_both_ways() -> None:
    image = Image.fromarray(RGB[:3, :4])
    assert np.array_equal(predictor()(image).image, RGB[:3, :4])


def test_a_path_stays_a_path(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    prediction, *_ = predictor()(iter([tmp_path / "a.png"]))
    assert prediction.source == tmp_path / "a.png"


def test_an_error_names_the_image_among_many(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^image 5: an image of int64"):
        predictor()([*shades(1, 2, 3, 4, 5), RGB.astype(np.int64)])
    stream = predictor()(iter([RGB, RGB, None]), batch_size=2)  # type: ignore[list-item]
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(UserError, match=r"^image 2: an image is a path"):
        next(stream)
    with pytest.raises(UserError, match=r"absent\.png: no such image file"):
        predictor()([RGB, tmp_path / "absent.png"])
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        predictor()([RGB], batch_size=0)


def test_names_that_are_no_paths() -> None:
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="no such image file"):
            predictor()(name)


def test_score_and_classes_are_chosen_once() -> None:
    everything = predictor()(RGB)
    chosen = predictor(min_score=0.3, classes=["disc", 3])(RGB)
    expected = everything.filter(0.3, ["disc", 3])
    assert 0 < len(chosen) < len(everything)
    assert_same(chosen, expected)
    assert chosen.plot_min_score == 0.3
    with pytest.raises(UserError, match="did you mean 'star'"):
        predictor(classes="stars")
    for score in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="min_score must be in"):
            predictor(min_score=score)
