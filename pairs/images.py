"""Files to arrays: one rule per kind of file, and a clear error for everything else.

    images    RGB as it is; grey and 1-bit repeated; palettes looked up; alpha dropped; CMYK
              converted; turned as EXIF says; 16-bit and float refused
    labels    grey values as they are; 1-bit as 0/255; palettes as their grey if all their used
              colours are grey, else as indices; RGB with equal channels as one; 16-bit if it fits;
              of classes with colours, RGB and palettes as the index of the pixel's colour

A file is always decoded whole: Pillow's `verify` misses damage that decoding meets.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from runtime.errors import UserError

IGNORE = 255  # the class index of pixels that do not count
# refused from the header, before a byte is decoded: 134 million, 11,585 x 11,585
MAX_PIXELS = 2**27
# Pillow goes by the content, not by the name, and would hand an EPS called .png to Ghostscript
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)

Bytes = NDArray[np.uint8]
Color = tuple[int, int, int]

# Set once for the process: `catch_warnings` around each file is not safe in threads, where it can
# leave the filters changed for good.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd files; what matters raises


def read_size(path: Path) -> tuple[int, int]:
    """Return (height, width) from the header alone."""
    with _open(path) as image:
        width, height = image.size
        try:
            # Pillow turns a TIFF's size itself, and decodes a whole PNG in search of EXIF behind
            # its pixels: 3 ms at 1024 x 1024
            is_plain = image.format == "TIFF" or (
                image.format == "PNG" and "exif" not in image.info
            )
            turned = not is_plain and image.getexif().get(_ORIENTATION) in _QUARTER_TURNS
        except Exception as error:
            raise _unreadable(path, error) from None
    return (width, height) if turned else (height, width)


def read_image(path: Path) -> Bytes:
    """Read an image as (H, W, 3) uint8 RGB.

    Raises:
        UserError: unreadable, too large, or of more than 8 bits.
    """
    with _open(path) as image:
        if image.mode not in ("RGB", "RGBA", "L", "LA", "1", "P", "PA", "CMYK", "YCbCr"):
            raise UserError(
                f"{path}: has {image.mode} pixels, more than 8 bits a channel; "
                "scale it to 8 bits first"
            )
        return np.asarray(_decoded(image, path).convert("RGB"))


def read_label(path: Path, colors: Sequence[Color] | None = None) -> Bytes:
    """Read a label as (H, W) uint8: the values in the file, or the indices of its colours.

    Args:
        path: of the file.
        colors: of the classes; None refuses a coloured label.

    Raises:
        UserError: unreadable, too large, of unknown colours, or with values above 255.
    """
    with _open(path) as image:
        decoded = _decoded(image, path)
        if colors is not None and decoded.mode in ("RGB", "RGBA", "P", "PA"):
            return _indices(np.asarray(decoded.convert("RGB")), colors, path)
        if decoded.mode == "P":
            return _palette(decoded)
        if decoded.mode in ("L", "1"):
            return np.asarray(decoded.convert("L"))
        if decoded.mode in ("RGB", "RGBA", "LA"):
            channels = np.asarray(decoded.convert("RGB"))
            if (channels == channels[..., :1]).all():
                return np.ascontiguousarray(channels[..., 0])
            colors = np.unique(channels.reshape(-1, 3), axis=0)[:8].tolist()
            raise UserError(
                f"{path}: a coloured label, with {', '.join(map(str, colors))}; "
                "save it with one channel of class values, or name the colours in classes.json"
            )
        values = np.asarray(decoded)
        if values.dtype.kind in "iu" and values.ndim == 2 and values.min() >= 0:
            if values.max() <= 255:
                return values.astype(np.uint8)
            if set(np.unique(values).tolist()) <= {0, 65535}:
                return np.where(values > 0, 255, 0).astype(np.uint8)
        raise UserError(
            f"{path}: a label of {decoded.mode} pixels up to {values.max()}; save 8 bits"
        )


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"{path}: is gone") from None
    except Exception as error:
        raise _unreadable(path, error) from None
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise UserError(f"{path}: {size} pixels are too many to decode at once; cut it into tiles")
    return image


def _decoded(image: Image.Image, path: Path) -> Image.Image:
    try:
        image.load()
        image.info.pop("transparency", None)  # a palette's, which `convert` would warn of
        return ImageOps.exif_transpose(image)
    except Exception as error:
        # Pillow raises SyntaxError, OSError, ValueError, struct.error, zlib.error, EOFError, ...
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace(str(path), "it")
    reason = reason[:200]
    return UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it")


def _palette(image: Image.Image) -> Bytes:
    indices = np.asarray(image)
    colors = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    used = np.pad(colors, ((0, 256 - len(colors)), (0, 0)))[np.unique(indices)]
    if (used == used[:, :1]).all():
        return np.asarray(image.convert("L"))
    return indices


def _indices(rgb: Bytes, colors: Sequence[Color], path: Path) -> Bytes:
    """Return the index of each pixel's colour."""
    packed = rgb.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    known = np.array(colors, dtype=np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    order = np.argsort(known)
    place = order[np.searchsorted(known, packed, sorter=order).clip(max=len(known) - 1)]
    strange = np.unique(rgb[known[place] != packed], axis=0)[:8].tolist()
    if strange:
        raise UserError(
            f"{path}: the colours {', '.join(map(str, strange))} are no class (classes.json)"
        )
    return place.astype(np.uint8)
