"""Read image files as uint8 RGB; every error names the file.

Conversion: palettes are looked up, gray is repeated, 1 bit becomes 0 or 255, and CMYK and YCbCr are
converted by Pillow (without color profiles). Alpha is dropped, not blended, as in OpenCV and
detectron2. 16-bit gray is divided by 257 (0..65535 -> 0..255, whatever range the file uses); Pillow
keeps the high byte of 16-bit color. Only the first frame of an animation is read. 32-bit gray has
no agreed range and is refused.

Orientation: a camera's EXIF orientation is applied, so that the image is upright, as in viewers and
annotation tools. Some datasets were annotated on the stored pixels instead; their JSON states the
size of the stored image. The orientation is therefore applied only if this yields the stated size,
and boxes stay aligned in both cases. If both sizes are equal (square images, rotations by 180
degrees and flips), the orientation is applied.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.rgbx import from_pillow
from maskseg.errors import UserError

MAX_PIXELS = 178_956_970  # Pillow's own limit, 0.5 GiB as RGB
Size = tuple[int, int]  # height, width

# JPEG covers the MPO files of phones. EPS is excluded because it runs Ghostscript, and ICO and ICNS
# because they embed files of other formats.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
_ORIENTATION = 0x0112  # EXIF tag
_BLOCK = 2**16  # pixels that are converted at a time
_SWAPS_SIDES = 5  # orientations from 5 on swap height and width
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STORED = {**_UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the inverse


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS, size: Size | None = None) -> Tensor:
    """Read an image as uint8 RGB [3, H, W].

    size: (height, width) that the annotations state; it decides whether the EXIF orientation is
    applied (see the module's docstring).

    Raises UserError for a file that is missing, damaged, truncated, larger than `max_pixels`
    (checked before anything is decoded), or of another size than `size`.
    """
    return load_pixels(path, max_pixels, size).contiguous()


def load_pixels(path: str | Path, max_pixels: int = MAX_PIXELS, size: Size | None = None) -> Tensor:
    """Read an image with four bytes per pixel (see `maskseg.data.rgbx`).

    The values are those of `load_image`; this layout is faster to create and to process. Raises
    UserError like `load_image`.
    """
    with _open(path, max_pixels) as image:
        height, width, transpose = _orient(image, path, size)
        try:
            rgb = to_rgb(image, path)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            # On damaged data decoders raise OSError, SyntaxError, struct.error, zlib.error ...
            raise UserError(f"{path}: the image is damaged or truncated ({error})") from error
    del image  # a large image in another mode would stay in memory
    rgb = rgb if transpose is None else rgb.transpose(transpose)
    if rgb.size != (width, height):
        raise UserError(
            f"{path}: the image is {rgb.size[1]} x {rgb.size[0]} (height x width), "
            f"its header states {height} x {width}"
        )
    return from_pillow(rgb)


@dataclass(frozen=True)
class ImageHeader:
    """What the header of a file states about the image that `load_image` reads.

    is_deep: the file has more than 8 bits per channel.
    """

    height: int
    width: int
    is_deep: bool


def image_size(path: str | Path, max_pixels: int = MAX_PIXELS, size: Size | None = None) -> Size:
    """Return (height, width) of the image that `load_image` reads, from the header alone.

    Raises UserError like `load_image`, except for damage behind the header.
    """
    header = read_header(path, max_pixels, size)
    return header.height, header.width


def read_header(
    path: str | Path, max_pixels: int = MAX_PIXELS, size: Size | None = None
) -> ImageHeader:
    """Return what the header of an image file states. Raises UserError like `image_size`."""
    with _open(path, max_pixels) as image:
        height, width, _ = _orient(image, path, size)
        return ImageHeader(height, width, _is_deep(image))


def _is_deep(image: Image.Image) -> bool:
    """Whether an image has 16 bits per channel, by the raw mode of its decoder, such as RGB;16B."""
    tiles = getattr(image, "tile", ())  # Pillow's stubs lack it
    return image.mode.startswith("I") or any(";16" in str(tile[3]) for tile in tiles)


def max_value(path: str | Path, max_pixels: int = MAX_PIXELS) -> int:
    """Return the largest value of a 16-bit image, 0..65535.

    Of 16-bit color only the high byte is known, and the low one is taken to be 255. Raises
    UserError for an image that cannot be read.
    """
    with _open(path, max_pixels) as image:
        try:
            values = np.asarray(image)
        except MemoryError:
            raise
        except Exception as error:  # damaged data, see `load_pixels`
            raise UserError(f"{path}: the image is damaged or truncated ({error})") from error
    largest = int(values.max(initial=0))
    return largest * 256 + 255 if values.dtype == np.uint8 else largest


def _open(path: str | Path, max_pixels: int) -> Image.Image:
    """Open the file and check its header."""
    if not os.path.isfile(path):  # noqa: PTH113 - Path.is_file raises for some invalid names
        raise UserError(f"{path}: no such image file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        # Pillow checks its own limit, which is global to the process.
        Image.MAX_IMAGE_PIXELS = max_pixels
    advice = "raise data.max_pixels if it is meant to be that large"
    try:
        image = Image.open(path, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(
            f"{path}: the image is larger than data.max_pixels={max_pixels} ({error}); {advice}"
        ) from error
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{path}: not an image that can be read ({error})") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise UserError(
            f"{path}: the image has {height} x {width} pixels, "
            f"data.max_pixels is {max_pixels}; {advice}"
        )
    return image


def _orient(
    image: Image.Image, path: str | Path, size: Size | None
) -> tuple[int, int, Image.Transpose | None]:
    """Return height, width, and the transposition of the decoded image that yields them.

    Raises UserError if neither orientation has the stated size.
    """
    orientation = _read_orientation(image)
    width, height = image.size
    pillow_rotates = image.format == "TIFF"  # Pillow applies the tag of TIFF files while decoding
    if pillow_rotates:
        width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
    stored = (height, width)
    upright = (width, height) if orientation >= _SWAPS_SIDES else stored
    if size is None or tuple(size) == upright:
        return *upright, None if pillow_rotates else _UPRIGHT.get(orientation)
    if tuple(size) == stored:
        return *stored, _STORED.get(orientation) if pillow_rotates else None
    rotated = ""
    if upright != stored:
        rotated = f", {upright[0]} x {upright[1]} after its EXIF orientation is applied"
    raise UserError(
        f"{path}: the image is {height} x {width} (height x width){rotated}, "
        f"the annotations state {size[0]} x {size[1]}"
    )


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1..8; 1 if it is absent or cannot be read."""
    try:
        # Use the method of the base class: that of PNG files decodes the whole image to look for a
        # tag behind the pixels.
        orientation = int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # an image with damaged EXIF data is still usable
        return 1
    return orientation if orientation in _UPRIGHT else 1


def to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Decode an image and convert it to mode RGB, as the module's docstring describes.

    name: of the image, for messages. Raises UserError for 32-bit gray, and the decoder's own
    exceptions for damaged data.
    """
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        gray = to_8_bits(np.asarray(image))
        if gray is not None:
            return Image.fromarray(gray).convert("RGB")
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"{name}: 32-bit gray (mode {image.mode}) has no agreed range; "
            "convert it to 8 or 16 bits"
        )
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())  # undoes the multiplication by alpha
    return image.convert("RGB")


def to_8_bits(values: NDArray[np.integer]) -> NDArray[np.uint8] | None:
    """Divide values [H, W] or [H, W, C] by 257 and round; None if they are not within 0..65535.

    Works on a few rows at a time, as the intermediate values take eight bytes each.
    """
    gray = np.empty(values.shape, dtype=np.uint8)
    rows = max(1, _BLOCK // max(1, values.shape[1]))
    for top in range(0, len(values), rows):
        block = values[top : top + rows].astype(np.int64)
        if block.min() < 0 or block.max() > 65535:
            return None
        gray[top : top + rows] = (block + 128) // 257  # + 128 rounds to the nearest
    return gray


@lru_cache(maxsize=64)
def _resolve(root: str) -> str:
    """Return the folder with symbolic links resolved; cached.

    root: an absolute path, because the working directory may change.
    """
    return os.path.realpath(root)


def check_name(file_name: object) -> str:
    """Return the file name if it can only refer to a file inside the image folder.

    Raises UserError for a name that is empty, absolute, contains `..` or a NUL byte, or is not
    valid Unicode.
    """
    if not isinstance(file_name, str) or not file_name:
        raise UserError(f"file name {file_name!r} is not a name")
    if "\0" in file_name:
        raise UserError(f"file name {file_name!r} contains a NUL byte")
    try:
        os.fsencode(file_name)
    except UnicodeEncodeError as error:
        raise UserError(f"file name {file_name!r} is not valid Unicode") from error
    if file_name[0] in "/\\" or Path(file_name).drive:
        raise UserError(
            f"file name {file_name!r} is absolute; names are relative to the image folder"
        )
    if ".." in re.split(r"[/\\]", file_name):
        raise UserError(f"file name {file_name!r} has a '..': it may lead out of the image folder")
    return file_name


def safe_join(root: str | Path, file_name: str) -> Path:
    """Return the path of `file_name` below `root`, with symbolic links resolved.

    The folder itself may be a link; it is resolved once. Raises UserError for names that
    `check_name` refuses and for links that lead out of the folder.
    """
    folder = _resolve(os.path.abspath(root))  # noqa: PTH100
    try:
        path = os.path.join(folder, check_name(file_name))  # noqa: PTH118 - runs for every image
        # For a file directly in the folder, one system call replaces one per folder on the way.
        is_plain = file_name != "." and "/" not in file_name and "\\" not in file_name
        if not is_plain or os.path.islink(os.fsencode(path)):  # noqa: PTH114
            path = os.path.realpath(path)
    except (ValueError, OSError) as error:
        raise UserError(f"file name {file_name!r} cannot be used ({error})") from error
    if not path.startswith(folder.rstrip(os.sep) + os.sep):
        raise UserError(f"file name {file_name!r} is a link that leads out of {folder}")
    return Path(path)
