"""Files to arrays: one rule per kind of file, and a clear error for everything else.

    images    RGB as it is; grey and 1-bit repeated; palettes looked up; alpha dropped; CMYK
              converted; turned as EXIF says; 16-bit and float refused
    labels    grey values as they are; 1-bit as 0/255; palettes as their grey if all their used
              colours are grey, else as indices; RGB with equal channels as one; 16-bit if it fits;
              of classes with colours, RGB and palettes as the index of the pixel's colour

A file is always decoded whole: Pillow's `verify` misses damage that decoding meets.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pairs.labels import LEVIR_MCI, Classes, Color
from runtime.errors import UserError

IGNORE = 255  # the class index of pixels that do not count
# refused from the header, before a byte is decoded: 134 million, 11,585 x 11,585
MAX_PIXELS = 2**27
# Pillow goes by the content, not by the name, and would hand an EPS called .png to Ghostscript
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
MAX_JPEG_DOUBT = 0.01  # share of a label's pixels that may lie between two classes
_UNKNOWN = 254  # in a lookup table: a value that is no class
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)

Bytes = NDArray[np.uint8]

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


@dataclass(frozen=True)
class MaskCoding:
    """Which value in a label file means which class: `values[i]` is class i, called `names[i]`.

    255 means "ignore" where it is not the value of a class. Where there are `colors`, those of
    coloured files are the classes' too.
    """

    values: tuple[int, ...]
    names: tuple[str, ...] = ()
    colors: tuple[Color, ...] | None = None

    def read(self, path: Path) -> Bytes:
        """Read a label file as (H, W) uint8 class indices, 255 = ignore.

        Raises:
            UserError: as `read_label` and `decode`.
        """
        return self.decode(read_label(path, self.colors), path)

    def decode(self, raw: Bytes, path: Path) -> Bytes:
        """Turn file values into class indices, 255 = ignore.

        Args:
            raw: (H, W) uint8, as `read_label` gives it.
            path: named in errors; a JPEG's noise is snapped to the nearest class.

        Raises:
            UserError: a value that is no class.
        """
        if is_jpeg(path):
            raw = self._snapped(raw, path)
        table = np.full(256, _UNKNOWN, dtype=np.uint8)
        table[IGNORE] = IGNORE
        table[list(self.values)] = np.arange(len(self.values), dtype=np.uint8)
        classes = table[raw]
        if (classes == _UNKNOWN).any():
            strange = sorted(set(np.unique(raw).tolist()) - set(self.values) - {IGNORE})
            raise UserError(
                f"{path}: values {strange[:8]} are no class; expected "
                f"{', '.join(map(str, self.values))} (--mask-values)"
            )
        return classes

    def _snapped(self, raw: Bytes, path: Path) -> Bytes:
        """Snap each pixel to the nearest value; noise is small but for a few pixels at edges."""
        values = np.array(self.values, dtype=np.int16)
        distance = np.abs(np.arange(256, dtype=np.int16)[:, None] - values)
        is_far = distance.min(1) > np.diff(np.sort(values)).min() / 4
        if is_far[raw].mean() > MAX_JPEG_DOUBT:
            raise UserError(
                f"{path}: a JPEG label whose values do not gather around "
                f"{', '.join(map(str, self.values))} (--mask-values); save labels as PNG"
            )
        return values[distance.argmin(1)].astype(np.uint8)[raw]


def choose_mask_coding(
    values: Iterable[int], classes: Classes, examples: Mapping[int, Path] | None = None
) -> MaskCoding:
    """Tell from the values of a whole dataset what they mean.

    Args:
        values: every value that occurs in any label, see `label_values`.
        classes: what is known of them.
        examples: a file for each value, to name in errors.

    Raises:
        UserError: the values fit no known coding; it lists them and says what to do.
    """
    num_labels, asked = classes.num_labels, classes.values
    found = set(values)
    if asked is not None:
        is_byte = set(asked) <= set(range(256))
        if len(asked) != num_labels or len(set(asked)) != num_labels or not is_byte:
            raise UserError(
                f"--mask-values {','.join(map(str, asked))}: give {num_labels} different values "
                f"from 0 to 255, class 0 first, for --num-classes {classes.num_classes}"
            )
        known = [tuple(asked)]
    elif num_labels == 2:
        known = [(0, 255), (0, 1)]
    else:
        known = [tuple(LEVIR_MCI.values())] if num_labels == 3 and not classes.colors else []
        known += [tuple(range(num_labels))]
    for coding in known:
        may_ignore = {IGNORE} if asked is not None or classes.num_classes > 1 else set()
        # 0 and 255 alone are rather two classes than one class and pixels to ignore
        is_ignored_whole = bool(found - set(coding)) and not found & set(coding[1:])
        if found <= {*coding, *may_ignore} and not is_ignored_whole:
            return MaskCoding(coding, classes.names_for(coding), classes.colors)
    strange = min((sorted(found - set(coding)) for coding in known), key=len)
    files = ", ".join(str(examples[v]) for v in strange[:3]) if examples else ""
    remedy = "give the value of class 0, 1, ... as --mask-values"
    if num_labels == 2 and found <= {0, 128, 255}:
        remedy = "--num-classes 3 reads them as none, road, building"
    raise UserError(
        f"labels hold the values {_listed(sorted(found))}; "
        f"expected {' or '.join(','.join(map(str, k)) for k in known)} "
        f"for --num-classes {classes.num_classes}{f' (see {files})' if files else ''}; {remedy}"
    )


def is_jpeg(path: Path) -> bool:
    """Whether a label of this name carries JPEG's noise."""
    return path.suffix.lower() in (".jpg", ".jpeg")


def label_values(raw: Bytes, path: Path) -> set[int]:
    """Return the values of a label that tell its coding; a JPEG's are noise and tell none.

    Raises:
        UserError: a JPEG whose classes lie closer together than its noise.
    """
    if not is_jpeg(path):
        return set(np.unique(raw).tolist())
    if 0 < raw.max() < 100:
        raise UserError(
            f"{path}: a JPEG label with values up to {raw.max()} only: its noise hides the "
            "classes; save labels as PNG"
        )
    return set()


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


def _listed(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:12]))
    return f"{shown}, ... ({len(values)} in all)" if len(values) > 12 else shown
