"""Reading image files of all modes as RGB, and errors for damaged files and unsafe names."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from maskseg.data.image_files import check_name, image_size, load_image, safe_join
from maskseg.errors import Interrupted, UserError


def colours(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def load(path: Path, **keys: object) -> np.ndarray:
    tensor = load_image(path, **keys)
    assert str(tensor.dtype) == "torch.uint8"
    assert tensor.is_contiguous()
    assert image_size(path, **keys) == tuple(tensor.shape[1:])
    return tensor.numpy().transpose(1, 2, 0)


def bomb(path: Path, height: int, width: int) -> None:
    """A small PNG file whose header states height x width gray pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    squeeze = zlib.compressobj(9)
    body = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(8)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (7, 5)])
def test_rgb_of_any_shape(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = colours(*shape)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png"), pixels)


def test_jpeg_as_pillow_decodes_it(tmp_path: Path) -> None:
    Image.fromarray(colours(20, 30)).save(tmp_path / "a.jpg")
    np.testing.assert_array_equal(
        load(tmp_path / "a.jpg"), np.asarray(Image.open(tmp_path / "a.jpg"))
    )


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    indices = np.array([[0, 1], [2, 1]], dtype=np.uint8)
    palette = [255, 0, 0, 0, 255, 0, 10, 20, 30]
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette)
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=0)
    image.save(tmp_path / "c.gif")
    expected = np.array(palette, dtype=np.uint8).reshape(3, 3)[indices]
    for name in ("a.png", "b.png", "c.gif"):
        np.testing.assert_array_equal(load(tmp_path / name), expected)


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = np.concatenate([colours(4, 6), np.arange(24, dtype=np.uint8).reshape(4, 6, 1)], axis=2)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(load(tmp_path / "rgba.png"), rgba[..., :3])
    Image.fromarray(rgba).getchannel(0).save(tmp_path / "grey.png")
    Image.merge("LA", (Image.fromarray(rgba[..., 0]), Image.fromarray(rgba[..., 3]))).save(
        tmp_path / "la.png"
    )
    np.testing.assert_array_equal(load(tmp_path / "la.png"), np.repeat(rgba[..., :1], 3, axis=2))
    np.testing.assert_array_equal(load(tmp_path / "grey.png"), np.repeat(rgba[..., :1], 3, axis=2))


def test_one_bit(tmp_path: Path) -> None:
    bits = np.array([[True, False, True]])
    Image.fromarray(bits).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "1"
    np.testing.assert_array_equal(load(tmp_path / "a.png")[..., 0], [[255, 0, 255]])


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red = load(tmp_path / "a.jpg").reshape(-1, 3).astype(int).mean(axis=0)
    np.testing.assert_allclose(red, [255, 0, 0], atol=3)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_gray_uses_the_whole_range(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257, 385, 386, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    expected = [[0, 0, 1, 1, 1, 2, 128, 255]]
    for channel in range(3):
        np.testing.assert_array_equal(load(tmp_path / f"a.{suffix}")[..., channel], expected)


@pytest.mark.parametrize("size", [(600, 300), (3, 70000)])
def test_sixteen_bit_gray_of_more_than_a_block(tmp_path: Path, size: tuple[int, int]) -> None:
    values = np.random.default_rng(0).integers(0, 65536, size, dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = ((values.astype(np.int64) + 128) // 257).astype(np.uint8)
    np.testing.assert_array_equal(load(tmp_path / "a.png")[..., 1], expected)


@pytest.mark.parametrize(
    "values", [np.array([[0, 70000]], dtype=np.int32), np.array([[0.5, 1.0]], dtype=np.float32)]
)
def test_32_bit_gray_is_refused(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif.*32-bit"):
        load_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_orientation_is_applied_if_it_yields_the_stated_size(
    tmp_path: Path, tag: int, suffix: str
) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = tag
    plain = Image.fromarray(np.kron(colours(3, 5), np.ones((8, 8, 1), dtype=np.uint8)))
    plain.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    plain.save(tmp_path / f"plain.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    stored = np.asarray(Image.open(tmp_path / f"plain.{suffix}"))
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(load(path), upright)
    np.testing.assert_array_equal(load(path, size=upright.shape[:2]), upright)
    if tag >= 5:  # the stated size shows that the stored pixels were annotated
        assert upright.shape[:2] == (40, 24)
        np.testing.assert_array_equal(load(path, size=(24, 40)), stored)
    for function in (load_image, image_size):
        with pytest.raises(UserError, match=rf"a\.{suffix}.*24 x 40.*annotations state 24 x 41"):
            function(path, size=(24, 41))


def test_boxes_stay_aligned_in_both_frames(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    pixels[2:6, 10:25] = 255  # box in the stored frame: 10 2 25 6
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert (load(tmp_path / "a.png", size=(20, 30))[2:6, 10:25] == 255).all()
    upright = load(tmp_path / "a.png", size=(30, 20))  # rotated clockwise: x' = 20 - y, y' = x
    assert (upright[10:25, 14:18] == 255).all()
    assert upright.sum() == pixels.sum()


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    Image.fromarray(colours(4, 6)).save(
        tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_image(tmp_path / "a.jpg").shape == (3, 4, 6)


def test_an_image_above_the_limit_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb(tmp_path / "bomb.png", 20000, 20000)  # 400 megapixels
    assert (tmp_path / "bomb.png").stat().st_size < 50_000
    Image.fromarray(colours(10, 11)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("the image was decoded"))
    for function in (load_image, image_size):
        with pytest.raises(UserError, match=r"bomb\.png.*400000000 pixels.*data\.max_pixels"):
            function(tmp_path / "bomb.png")
        with pytest.raises(UserError, match=r"a\.png.*10 x 11 pixels, data\.max_pixels is 100"):
            function(tmp_path / "a.png", max_pixels=100)


def test_a_limit_above_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb(tmp_path / "bomb.png", 20000, 20000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    assert image_size(tmp_path / "bomb.png", max_pixels=400_000_000) == (20000, 20000)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
def test_truncated_files(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(colours(50, 60)).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for length in (0, 1, 10, len(data) // 2, len(data) * 9 // 10):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=rf"cut\.{suffix}"):
            load_image(path)


def test_files_that_are_not_images(tmp_path: Path) -> None:
    for name, data in (
        ("text.jpg", b"hello"),
        ("page.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("noise.png", bytes(range(256))),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            load_image(tmp_path / name)
    whole = tmp_path / "flipped.png"
    Image.fromarray(colours(50, 60)).save(whole)
    data = bytearray(whole.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    whole.write_bytes(data)
    with pytest.raises(UserError, match="flipped"):
        load_image(whole)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none.png", tmp_path, tmp_path / ("a" * 300), tmp_path / "a\0b"):
        for function in (load_image, image_size):
            with pytest.raises(UserError, match="no such image"):
                function(path)


@pytest.mark.parametrize(
    "name",
    [
        "../a.png",
        "a/../../b.png",
        "/etc/passwd",
        "..",
        "a\0.png",
        "",
        "..\\a.png",
        "\\a.png",
        3,
        None,
        "\ud800",
    ],
)
def test_unsafe_names(tmp_path: Path, name: object) -> None:
    with pytest.raises(UserError, match="file name"):
        safe_join(tmp_path, name)
    if name != "\ud800":
        with pytest.raises(UserError, match="file name"):
            check_name(name)


def test_links_out_of_the_root(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "root2"
    root.mkdir()
    other.mkdir()
    (other / "secret.png").write_bytes(b"")
    (root / "inner").mkdir()
    (root / "inner" / "a.png").write_bytes(b"")
    (root / "file.png").symlink_to(other / "secret.png")
    (root / "folder").symlink_to(other)
    (root / "good.png").symlink_to(root / "inner" / "a.png")
    (tmp_path / "alias").symlink_to(root)
    for name in ("file.png", "folder/secret.png"):
        with pytest.raises(UserError, match="leads out"):
            safe_join(root, name)
    inside = root.resolve() / "inner" / "a.png"
    assert safe_join(root, "good.png") == inside
    assert safe_join(str(root), "inner/a.png") == inside
    assert safe_join(tmp_path / "alias", "inner/a.png") == inside  # the root itself may be a link
    assert safe_join(root, "not there..png") == root.resolve() / "not there..png"


@pytest.mark.parametrize(
    ("owner", "name"), [(Image, "open"), (Image.Image, "getexif"), (Image.Image, "convert")]
)
def test_a_signal_while_an_image_is_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    # Guards against: SIGTERM ends a long job with "not an image that can be read"
    path = tmp_path / "a.png"
    Image.fromarray(colours(8, 8)).convert("P").save(path)

    def interrupt(*_: object, **__: object) -> None:
        raise Interrupted(15)

    monkeypatch.setattr(owner, name, interrupt)
    with pytest.raises(Interrupted):
        load_image(path)
