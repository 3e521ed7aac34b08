"""Semantic maps: valid and invalid files, and transforms together with the image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskseg.data.collate import collate
from maskseg.data.datasets.coco import CocoSource
from maskseg.data.datasets.scenes import make_scenes
from maskseg.data.datasets.semantic_maps import SemanticMaps
from maskseg.data.sample import Sample
from maskseg.data.transforms import Flip, RandomCrop, ResizeShortestEdge, ScaleJitterCrop, Transform
from maskseg.errors import UserError
from maskseg.ops.geometry import AxisAlignedTransform

IDS = np.array([[0, 1, 2], [7, 254, 255]])


def write(path: Path, ids: np.ndarray, mode: str = "L") -> None:
    """Write a PNG of category ids; mode `P` with a palette that does not matter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image = image.convert("L").convert("P")
        image.putdata(ids.ravel().tolist())
        image.putpalette([value for i in range(256) for value in (255 - i, i // 2, 3)])
    image.save(path)


@pytest.mark.parametrize(
    ("mode", "ids"),
    [("L", IDS), ("P", IDS), ("I;16", np.array([[0, 255, 256], [32767, 65535, 1]]))],
)
def test_modes(tmp_path: Path, mode: str, ids: np.ndarray) -> None:
    write(tmp_path / "a" / "b.png", ids, mode)
    with Image.open(tmp_path / "a" / "b.png") as image:
        assert image.mode == mode
    found = SemanticMaps(tmp_path, "data.val_semantic").load("a/b.jpg", 2, 3)
    assert (found.dtype, found.shape) == (torch.int16, (2, 3))
    none = 65535 if mode == "I;16" else 255
    assert found.tolist() == np.where(ids == none, -1, ids).tolist()


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.jpeg", "x"])
def test_the_name_is_the_images(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x.png", IDS)
    assert SemanticMaps(tmp_path, "key").load(name, 2, 3).shape == (2, 3)
    write(tmp_path / "x.y.png", IDS[:1])
    assert SemanticMaps(tmp_path, "key").load("x.y.jpg", 1, 3).shape == (1, 3)


def refused(folder: Path, name: str = "a.jpg", size: tuple[int, int] = (2, 3), **keys: int) -> str:
    with pytest.raises(UserError) as raised:
        SemanticMaps(folder, "data.val_semantic", **keys).load(name, *size)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_invalid_files(tmp_path: Path) -> None:
    folder, path = tmp_path / "maps", tmp_path / "maps" / "a.png"
    write(path, IDS)
    assert f"{path}: the semantic map is 2 x 3 (height x width), the image 3 x 2" in refused(
        folder, size=(3, 2)
    )
    assert str(folder / "b.png") in refused(folder, "b.jpg")
    Image.new("RGB", (3, 2)).save(path)
    assert (
        f"{path}: a semantic map has one channel of category ids, this file is of mode RGB"
        in refused(folder)
    )
    for mode in ("LA", "RGBA", "1"):
        Image.new(mode, (3, 2)).save(path)
        assert f"this file is of mode {mode}" in refused(folder)
    write(path, np.full((2, 3), 40_000), "I;16")
    assert f"{path}: category id 40000 of the semantic map is above 32767" in refused(folder)
    Image.new("L", (3, 2)).save(path, format="JPEG")
    assert f"{path}: the semantic map cannot be read" in refused(folder)


@pytest.mark.parametrize("cut", [10, 40, 200])
def test_damaged_files(tmp_path: Path, cut: int) -> None:
    write(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (40, 50)))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:cut])
    assert f"{tmp_path / 'a.png'}: the semantic map cannot be read" in refused(
        tmp_path, size=(40, 50)
    )
    (tmp_path / "a.png").write_bytes(b"")
    assert "cannot be read" in refused(tmp_path, size=(40, 50))


@pytest.mark.parametrize("name", ["../a.jpg", "x/../../a.jpg", "/etc/a.jpg", "..\\a.jpg"])
def test_names_that_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / "a.png", IDS)
    (tmp_path / "maps" / "x").mkdir(parents=True)
    assert "file name" in refused(tmp_path / "maps", name)


def test_links_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.png", IDS)
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "a.png").symlink_to(tmp_path / "a.png")
    assert "is a link that leads out of" in refused(tmp_path / "maps")


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.val_semantic=.*absent: no such folder of semantic maps"
    ):
        SemanticMaps(tmp_path / "absent", "data.val_semantic")


def test_a_map_that_is_too_large_is_not_decoded(tmp_path: Path) -> None:
    write(tmp_path / "a.png", np.zeros((20, 30)))
    assert str(tmp_path / "a.png") in refused(tmp_path, size=(20, 30), max_pixels=599)
    assert SemanticMaps(tmp_path, "key", 600).load("a.jpg", 20, 30).shape == (20, 30)


BLOCK = 16
LEVELS = 20  # gray levels between consecutive ids


def make_sample(height: int = 96, width: int = 128) -> Sample:
    """Blocks of random ids in 0..11 and -1; the image's gray level is LEVELS * (id + 1)."""
    rng = np.random.default_rng(3)
    ids = np.kron(
        rng.integers(-1, 12, (height // BLOCK, width // BLOCK)), np.ones((BLOCK, BLOCK), dtype=int)
    )
    image = torch.from_numpy((LEVELS * (ids + 1)).astype(np.uint8)).expand(3, -1, -1).clone()
    nothing = torch.zeros(0, dtype=torch.int64)
    semantic = torch.from_numpy(ids.astype(np.int16))
    return Sample(
        image,
        torch.zeros(0, 4),
        nothing,
        nothing.bool(),
        None,
        1,
        "a.png",
        (height, width),
        semantic=semantic,
    )


@pytest.mark.parametrize(
    "transform",
    [Flip(1.0, 0.0), Flip(0.0, 1.0), Flip(1.0, 1.0), RandomCrop(47), RandomCrop(110)],
    ids=["left-right", "up-down", "both", "crop", "crop of one side"],
)
def test_flips_and_crops_transform_image_and_map_alike(transform: Transform) -> None:
    for seed in range(5):
        moved = transform(make_sample(), np.random.default_rng(seed))
        assert moved.semantic is not None
        assert moved.semantic.shape == moved.size
        assert torch.equal(moved.image[0].int(), LEVELS * (moved.semantic.int() + 1))
    assert not torch.equal(moved.image, make_sample().image)


@pytest.mark.parametrize(
    "transform",
    [
        ResizeShortestEdge([192]),
        ResizeShortestEdge([130]),
        ResizeShortestEdge([48]),
        ScaleJitterCrop(90, (0.6, 1.9)),
    ],
    ids=["twice", "larger", "half", "scale and crop"],
)
def test_resizes_transform_image_and_map_alike(transform: Transform) -> None:
    for seed in range(5):
        moved = transform(make_sample(), np.random.default_rng(seed))
        assert moved.semantic is not None
        assert moved.semantic.shape == moved.size
        ids = moved.semantic.int()
        around = [
            ids[2 + y : len(ids) - 2 + y, 2 + x : ids.shape[1] - 2 + x]
            for y in (-2, 2)
            for x in (-2, 2)
        ]
        inside = (
            torch.stack(around).eq(ids[2:-2, 2:-2]).all(dim=0)
        )  # away from borders, which the resize blurs
        off = (moved.image[0].int() - LEVELS * (ids + 1)).abs()
        assert inside.float().mean() > 0.2
        assert off[2:-2, 2:-2][inside].max() <= 1


def test_a_resize_takes_the_pixel_at_the_centre() -> None:
    ids = np.arange(12).reshape(3, 4)
    twice = AxisAlignedTransform.resize(3, 4, 6, 8).sample(ids, -1)
    assert twice.tolist() == np.kron(ids, np.ones((2, 2), dtype=int)).tolist()
    assert AxisAlignedTransform.resize(3, 4, 1, 4).sample(ids, -1).tolist() == [[4, 5, 6, 7]]
    outside = AxisAlignedTransform.crop(-1, 1, 3, 6).sample(ids, -5)
    assert outside.tolist() == [[-5, 4, 5, 6, 7, -5], [-5, 8, 9, 10, 11, -5], [-5] * 6]
    assert ids.tolist() == np.arange(12).reshape(3, 4).tolist()


def test_pixels_outside_of_the_map_have_no_category() -> None:
    sample = make_sample(16, 32)
    moved = sample.transform(
        torch.zeros((3, 17, 33), dtype=torch.uint8), AxisAlignedTransform.crop(-1, -1, 17, 33)
    )
    assert moved.semantic is not None
    assert (moved.semantic[0] == -1).all()
    assert (moved.semantic[:, 0] == -1).all()
    assert torch.equal(moved.semantic[1:, 1:], sample.semantic)  # type: ignore[arg-type]


def test_collate_pads_with_unlabelled_pixels() -> None:
    small, large = make_sample(16, 32), make_sample(48, 64)
    batch = collate([small, large])
    assert batch.semantic is not None
    assert (batch.semantic.dtype, batch.semantic.shape) == (torch.int16, (2, 64, 64))
    assert torch.equal(batch.semantic[0, :16, :32], small.semantic)  # type: ignore[arg-type]
    assert (batch.semantic[0, 16:] == -1).all()
    assert (batch.semantic[0, :, 32:] == -1).all()
    assert batch.superpixels is None
    batch = collate([Sample(**{**vars(small), "semantic": None}), large])
    assert batch.semantic is None  # unless all images have a map, the batch has none


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("semantic") / "scenes"
    make_scenes(folder, num_train=4, num_val=2, size=128, num_workers=0)
    return folder


def source(scenes: Path, **keys: object) -> CocoSource:
    values = {
        "train_json": f"{scenes}/train.json",
        "val_json": f"{scenes}/val.json",
        "images": f"{scenes}/images",
        "num_workers": 0,
    }
    return CocoSource.from_keys(**{**values, "val_semantic": f"{scenes}/stuff", **keys})  # type: ignore[arg-type]


def quarters(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    return (
        2 * (np.arange(height) >= height // 2)[:, None] + (np.arange(width) >= width // 2)
    ).astype(np.int32)


def test_through_the_loader(scenes: Path) -> None:
    # Flipped, so that superpixels computed before the flip would be detected.
    def corner(image: np.ndarray) -> np.ndarray:
        return quarters(image) + 4 * (image[:, :, 0] > image[0, 0, 0]).astype(np.int32)

    flipped = source(scenes, test_transforms=[Flip(1.0, 0.0)], superpixels=corner)
    (batch,) = flipped.test_loader("val", 2)
    assert batch.semantic is not None
    assert batch.superpixels is not None
    for i, name in enumerate(batch.file_names):
        wanted = np.asarray(Image.open((scenes / "stuff" / name).with_suffix(".png")))
        ids = np.where(wanted == 255, -1, wanted.astype(int))[:, ::-1]
        assert batch.semantic[i].tolist() == ids.tolist()
        assert (
            batch.superpixels[i].tolist()
            == corner(batch.images[i].permute(1, 2, 0).numpy()).tolist()
        )
    (train,) = flipped.test_loader("train", 4)
    assert train.semantic is None
    assert train.superpixels is not None


def test_a_missing_map_is_named(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"val_000001\.png: the semantic map cannot be read"):
        next(iter(source(scenes, val_semantic=str(tmp_path)).test_loader("val", 1)))
    with pytest.raises(UserError, match=r"data\.val_semantic=absent: no such folder"):
        source(scenes, val_semantic="absent").test_loader("val", 1)
