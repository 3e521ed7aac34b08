"""Image files -> uint8 RGB, whatever they hold; every refusal names the file.

What a pixel becomes: palettes are looked up, grey is repeated, 1 bit is 0 or 255, CMYK and YCbCr are converted by Pillow (no colour profile);
alpha is dropped, not blended, as OpenCV and detectron2 do; 16-bit grey is divided by 257 (0..65535 -> 0..255, whatever range the file uses);
16-bit colour is cut to its high byte by Pillow. Of several frames the first is taken. 32-bit grey has no agreed range: it is refused.

Orientation: a camera's EXIF tag is applied, so that the picture stands as a viewer shows it, and as annotation tools see it. Some data sets
were annotated on the stored pixels instead. Their JSON says so: it states the size of the stored picture. A picture is therefore turned only
if that gives the stated size, and boxes stay aligned in both cases. Where both frames have one size (square pictures; turns by 180 degrees
and mirrored ones) the tag is applied.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from maskseg.data.rgbx import from_pillow
from maskseg.errors import UserError

MAX_PIXELS = 178_956_970  # Pillow's own cap, 0.5 GiB as RGB
Size = tuple[int, int]  # height, width

# JPEG covers the MPO files of phones. No EPS (runs Ghostscript), no formats that wrap others (ICO, ICNS).
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000")
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURN_BACK = {**_TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def load_image(path: str | Path, max_pixels: int = MAX_PIXELS, size: Size | None = None) -> Tensor:
    """The picture as uint8 RGB [3, H, W]. `size` (height, width) is what the annotations state, see above.

    Raises UserError for a file that is missing, damaged, cut short, larger than `max_pixels` (refused before anything is decoded), or of
    another size than `size`.
    """
    return load_pixels(path, max_pixels, size).contiguous()


def load_pixels(path: str | Path, max_pixels: int = MAX_PIXELS, size: Size | None = None) -> Tensor:
    """What `load_image` gives, four bytes a pixel (`data.pixels`): faster to make, and to go on with. Raises UserError as it does."""
    with _open(path, max_pixels) as image:
        height, width, turn = _orient(image, path, size)
        try:
            rgb = _to_rgb(image, path)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # decoders raise almost anything on damaged data: OSError, SyntaxError, struct.error, zlib.error ...
            raise UserError(f"{path}: the image is damaged or cut short ({error})") from error
    rgb = rgb if turn is None else rgb.transpose(turn)
    if rgb.size != (width, height):
        raise UserError(
            f"{path}: the image is {rgb.size[1]} x {rgb.size[0]} (height x width), its header says {height} x {width}"
        )
    return from_pillow(rgb)


def image_size(path: str | Path, max_pixels: int = MAX_PIXELS, size: Size | None = None) -> Size:
    """(height, width) of what `load_image` gives for the same arguments, from the header alone. Raises UserError as it does."""
    with _open(path, max_pixels) as image:
        return _orient(image, path, size)[:2]


def _open(path: str | Path, max_pixels: int) -> Image.Image:
    """The file with its header read and judged."""
    if not os.path.isfile(path):  # noqa: PTH113 - unlike Path.is_file, False for every name that cannot be one
        raise UserError(f"{path}: no such image file")
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = (
            max_pixels  # Pillow refuses by a cap of its own, for the whole process
        )
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
            f"{path}: the image has {height} x {width} pixels, data.max_pixels is {max_pixels}; {advice}"
        )
    return image


def _orient(
    image: Image.Image, path: str | Path, size: Size | None
) -> tuple[int, int, Image.Transpose | None]:
    """Height, width and what to do with the decoded picture, so that it has the stated size."""
    tag = _orientation(image)
    width, height = image.size
    turns_itself = image.format == "TIFF"  # Pillow applies the tag of TIFF files while it decodes
    if turns_itself:
        width, height = image.tag_v2[256], image.tag_v2[257]  # type: ignore[attr-defined]
    stored = (height, width)
    turned = (width, height) if tag >= 5 else stored
    if size is None or tuple(size) == turned:
        return *turned, None if turns_itself else _TURNS.get(tag)
    if tuple(size) == stored:
        return *stored, _TURN_BACK.get(tag) if turns_itself else None
    either = (
        ""
        if turned == stored
        else f", {turned[0]} x {turned[1]} once its EXIF orientation is applied"
    )
    raise UserError(
        f"{path}: the image is {height} x {width} (height x width){either}, the annotations say {size[0]} x {size[1]}"
    )


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; 1 where there is none or the tag cannot be read."""
    try:
        # The base class's method: that of PNG files would decode the whole picture to look for a tag behind it.
        tag = int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data is no reason to lose the picture
        return 1
    return tag if tag in _TURNS else 1


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    image.load()
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        values: NDArray[np.int64] = np.asarray(image).astype(np.int64)
        if values.min() >= 0 and values.max() <= 65535:
            return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert(
                "RGB"
            )  # 128: to the nearest
    if image.mode.startswith(("I", "F")):
        raise UserError(
            f"{path}: 32-bit grey (mode {image.mode}) has no agreed range; convert it to 8 or 16 bits"
        )
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())  # colours there are multiplied by alpha
    return image.convert("RGB")


@lru_cache(maxsize=64)
def _resolved(root: str) -> str:
    """The folder with its links followed, once; root: an absolute path, as the working folder may change."""
    return os.path.realpath(root)


def check_name(file_name: object) -> str:
    """The name itself if it can only lie below a folder. Raises UserError for one that is empty, absolute, has `..` or a NUL byte."""
    if not isinstance(file_name, str) or not file_name:
        raise UserError(f"file name {file_name!r} is no name")
    if "\0" in file_name:
        raise UserError(f"file name {file_name!r} holds a NUL byte")
    if file_name[0] in "/\\" or Path(file_name).drive:
        raise UserError(
            f"file name {file_name!r} is absolute; names are relative to the image folder"
        )
    if ".." in re.split(r"[/\\]", file_name):
        raise UserError(f"file name {file_name!r} has a '..': it may lead out of the image folder")
    return file_name


def safe_join(root: str | Path, file_name: str) -> Path:
    """The path of `file_name` below `root`, symbolic links followed. The folder itself may be a link; it is resolved once.

    Raises UserError for names that `check_name` refuses and for links that lead out of the folder.
    """
    folder = _resolved(os.path.abspath(root))  # noqa: PTH100
    try:
        path = os.path.join(folder, check_name(file_name))  # noqa: PTH118 - this runs for every image
        plain = (
            file_name != "." and "/" not in file_name and "\\" not in file_name
        )  # one look then, instead of one at each folder on the way
        if not plain or os.path.islink(os.fsencode(path)):  # noqa: PTH114
            path = os.path.realpath(path)
    except (ValueError, OSError) as error:
        raise UserError(f"file name {file_name!r} cannot be used ({error})") from error
    if not path.startswith(folder.rstrip(os.sep) + os.sep):
        raise UserError(f"file name {file_name!r} is a link that leads out of {folder}")
    return Path(path)
