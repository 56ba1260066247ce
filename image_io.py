"""Files to arrays: one rule per kind of file, and a clear error for everything else.

    images    RGB as it is; grey and 1-bit repeated; palettes looked up; alpha dropped; CMYK
              converted; turned as EXIF says; 16-bit and float refused
    labels    grey values as they are; 1-bit as 0/255; palettes as their grey if all their used
              colours are grey, else as indices; RGB with equal channels as one; 16-bit if it fits

A file is always decoded whole: Pillow's `verify` misses damage that decoding meets.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from errors import UserError

IGNORE = 255  # the class index of pixels that do not count
MAX_PIXELS = (
    2**27
)  # refused from the header, before a byte is decoded: 134 million, 11,585 x 11,585
_UNKNOWN = 254  # in a lookup table: a value that is no class
_ORIENTATION, _QUARTER_TURNS = 0x0112, (5, 6, 7, 8)

Bytes = NDArray[np.uint8]


def read_size(path: Path) -> tuple[int, int]:
    """Return (height, width) from the header alone."""
    with _open(path) as image:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION) in _QUARTER_TURNS
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


def read_label(path: Path) -> Bytes:
    """Read a label as (H, W) uint8, the values in the file.

    Raises:
        UserError: unreadable, too large, coloured, or with values above 255.
    """
    with _open(path) as image:
        decoded = _decoded(image, path)
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
                "save it with one channel of class values"
            )
        values = np.asarray(decoded)
        if values.dtype.kind in "iu" and values.min() >= 0:
            if values.max() <= 255:
                return values.astype(np.uint8)
            if set(np.unique(values).tolist()) <= {0, 65535}:
                return np.where(values > 0, 255, 0).astype(np.uint8)
        raise UserError(
            f"{path}: a label of {decoded.mode} pixels up to {values.max()}; save 8 bits"
        )


@dataclass(frozen=True)
class MaskCoding:
    """Which value in a label file means which class: `values[i]` is class i.

    255 means "ignore" where it is not the value of a class.
    """

    values: tuple[int, ...]

    def decode(self, raw: Bytes, path: Path) -> Bytes:
        """Turn file values into class indices, 255 = ignore.

        Args:
            raw: (H, W) uint8, as `read_label` gives it.
            path: named in errors; a JPEG's noise is snapped to the nearest class.

        Raises:
            UserError: a value that is no class.
        """
        if is_jpeg(path):
            raw = self._snapped(raw)
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

    def _snapped(self, raw: Bytes) -> Bytes:
        values = np.array(self.values, dtype=np.int16)
        nearest = np.abs(np.arange(256, dtype=np.int16)[:, None] - values).argmin(1)
        return values[nearest].astype(np.uint8)[raw]


def choose_mask_coding(
    values: Iterable[int],
    num_classes: int,
    asked: Sequence[int] | None = None,
    examples: Mapping[int, Path] | None = None,
) -> MaskCoding:
    """Tell from the values of a whole dataset what they mean.

    Args:
        values: every value that occurs in any label, see `label_values`.
        num_classes: K of the model; 1 is binary and has two values.
        asked: the user's own list, the value of class 0 first.
        examples: a file for each value, to name in errors.

    Raises:
        UserError: the values fit no known coding; it lists them and says what to do.
    """
    classes = max(num_classes, 2)
    found = set(values)
    if asked is not None:
        if len(asked) != classes or len(set(asked)) != classes or not set(asked) <= set(range(256)):
            raise UserError(
                f"--mask-values {','.join(map(str, asked))}: give {classes} different values "
                f"from 0 to 255, class 0 first, for --num-classes {num_classes}"
            )
        known = [tuple(asked)]
    elif num_classes == 1:
        known = [(0, 255), (0, 1)]
    else:
        known = [(0, 128, 255)] if classes == 3 else []
        known += [tuple(range(classes))]
    for coding in known:
        may_ignore = {IGNORE} if asked is not None or num_classes > 1 else set()
        if found <= {*coding, *may_ignore}:
            return MaskCoding(coding)
    strange = min((sorted(found - set(coding)) for coding in known), key=len)
    files = ", ".join(str(examples[v]) for v in strange[:3]) if examples else ""
    remedy = "give the value of class 0, 1, ... as --mask-values"
    if num_classes == 1 and found <= {0, 128, 255}:
        remedy = "--num-classes 3 reads them as none, road, building"
    raise UserError(
        f"labels hold the values {_listed(sorted(found))}; "
        f"expected {' or '.join(','.join(map(str, k)) for k in known)} "
        f"for --num-classes {num_classes}{f' (see {files})' if files else ''}; {remedy}"
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have our own limit
            image = Image.open(path)
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files; what matters raises
            image.load()
            return ImageOps.exif_transpose(image)
    except Exception as error:
        # Pillow raises SyntaxError, OSError, ValueError, struct.error, zlib.error, EOFError, ...
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error) or type(error).__name__).splitlines()[0].replace(str(path), "it")
    return UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it")


def _palette(image: Image.Image) -> Bytes:
    indices = np.asarray(image)
    palette = np.array(image.convert("RGB").getcolors(maxcolors=257) or [], dtype=object)
    colors = [color for _, color in palette]
    if all(len(set(color)) == 1 for color in colors):
        return np.asarray(image.convert("L"))
    return indices


def _listed(values: list[int]) -> str:
    shown = ", ".join(map(str, values[:12]))
    return f"{shown}, ... ({len(values)} in all)" if len(values) > 12 else shown
