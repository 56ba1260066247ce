"""Image and label files to arrays: one rule per kind of file, and a clear error for all else.

    images    (H, W, 3) uint8 RGB, and where there is data: grey repeated; palettes looked up; CMYK
              converted; turned as EXIF says; more than 8 bits by a scale (`Reading`)
    labels    (H, W) uint8: the values that stand for classes, see label_values.py

No data is where alpha is 0, where all bands hold the no data value of the file, and what its mask
says. What a file is stands in its header (headers.py): Pillow reads what it reads right, rasterio
the rest. A file is always decoded whole: Pillow's `verify` misses damage that decoding meets.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pairs.bands import AS_STORED, Bools, Bytes, Kind, Reading, Rendering
from pairs.gdal import open_bands, read_raster
from pairs.headers import OTHER, PNG, QUARTER_TURNS, TIFF, Header, header_of, png_may_turn
from pairs.label_values import Color, class_values
from runtime.errors import UserError
from runtime.memory import available_memory

IGNORE = 255  # the class index of pixels that do not count
# refused from the header, before a byte is decoded: 134 million, 11,585 x 11,585
MAX_PIXELS = 2**27
BYTES_A_PIXEL = 20  # that decoding takes at the most, with all copies on the way
_LARGE = 2**24  # pixels of an image for which the memory is asked
# Pillow goes by the content, not by the name, and would hand an EPS called .png to Ghostscript
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")
ORIENTATION = 0x0112
_SAMPLE_SIDE = 1024  # of a thinned-out image
_NAMES = {
    "1": ("gray",), "L": ("gray",), "I;16": ("gray",), "I;16B": ("gray",), "I": ("gray",),
    "F": ("gray",), "LA": ("gray", "alpha"), "RGB": ("red", "green", "blue"),
    "RGBA": ("red", "green", "blue", "alpha"), "P": ("palette",),
    "CMYK": ("cyan", "magenta", "yellow", "black"),
}  # fmt: skip
# how numpy shows the pixels for `Image.transpose`'s meaning of each EXIF orientation, (..., H, W)
_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda x: x[..., ::-1],
    3: lambda x: x[..., ::-1, ::-1],
    4: lambda x: x[..., ::-1, :],
    5: lambda x: x.swapaxes(-1, -2),
    6: lambda x: x.swapaxes(-1, -2)[..., ::-1],
    7: lambda x: x[..., ::-1, ::-1].swapaxes(-1, -2),
    8: lambda x: x.swapaxes(-1, -2)[..., ::-1, :],
}
_NO_PALETTE = np.zeros((256, 4), dtype=np.uint8)

_Rows = tuple[NDArray[Any], Any]  # rows of bands, and where they have data

# Set once for the process: `catch_warnings` around each file is not safe in threads, where it can
# leave the filters changed for good.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\.")  # remarks on odd files; what matters raises


@dataclass(frozen=True)
class Pixels:
    """An image as it was read.

    Attributes:
        rgb: (H, W, 3) uint8.
        valid: (H, W), where there is data; None: everywhere.
        bands: which bands of the file they are, in words.
        stretched: the percentiles that became 0 and 255, in words, if any.
        remarks: what is odd about the file.
    """

    rgb: Bytes
    valid: Bools | None = None
    bands: str = ""
    stretched: str = ""
    remarks: tuple[str, ...] = ()

    def stacked(self) -> Bytes:
        """Return (H, W, 3), or with holes (H, W, 4), the last being 0 where there is no data."""
        if self.valid is None:
            return self.rgb
        return np.dstack([self.rgb, self.valid.astype(np.uint8) * 255])


def read_size(path: Path) -> tuple[int, int]:
    """Return (height, width) from the header alone."""
    header = _header(path)
    if header.kind == TIFF:
        return header.size
    with _open(path) as image:
        width, height = image.size
    turned = orientation_of(path, header) in QUARTER_TURNS
    return (width, height) if turned else (height, width)


def num_pixels(path: Path) -> int:
    """Return how many pixels there are to decode, from the header alone."""
    header = _header(path)
    if header.kind != OTHER:
        return header.height * header.width
    with _open(path) as image:
        return image.height * image.width


def orientation_of(path: Path, header: Header) -> int:
    """Return how a file says that its image is turned, as in EXIF: 1 is upright."""
    if header.kind == TIFF:
        return header.orientation
    try:
        if header.kind == PNG:
            with path.open("rb") as file:
                if not png_may_turn(file):  # Pillow decodes it, in search of EXIF behind its pixels
                    return 1
        with Image.open(path, formats=FORMATS) as image:
            return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whoever decodes it says what is wrong
        return 1


def read_image(path: Path, reading: Reading = AS_STORED) -> Bytes:
    """Read an image as (H, W, 3) uint8 RGB.

    Raises:
        UserError: as `read_pixels`.
    """
    return read_pixels(path, reading).rgb


def read_pixels(path: Path, reading: Reading = AS_STORED, *, stretch: bool = False) -> Pixels:
    """Read an image as RGB, with where there is data.

    Args:
        path: of a PNG, JPEG, TIFF, BMP, GIF or WebP.
        reading: which bands, and how they become bytes.
        stretch: take percentiles of this image where nothing says which values become 0 and 255.

    Raises:
        UserError: unreadable, too large, of more than 8 bits without a scale; or it does not say
            which of its bands are red, green and blue, or lacks one that was asked for.
    """
    header = _header(path)
    with _memory_explained(path), _bands(path, header, reading) as (rendering, thin, render):
        if not stretch:
            rendering.refuse_open()
        if rendering.alpha:
            rendering.look(thin()[0])
        stretched = rendering.fit(*thin()) if rendering.is_open else ""
        rgb, valid = render()
        turn = _turn(path, header) if _needs_gdal(header, reading) else lambda rows: rows
        return Pixels(
            np.ascontiguousarray(turn(rgb).transpose(1, 2, 0)),
            None if valid is None or valid.all() else np.ascontiguousarray(turn(valid)),
            rendering.describe(),
            stretched,
            tuple(rendering.remarks),
        )


def read_sample(path: Path, reading: Reading) -> NDArray[np.float64]:
    """Return values of an image's colours (3, N) where it has data, thinned out.

    Raises:
        UserError: as `read_pixels`.
    """
    with _memory_explained(path), _bands(path, _header(path), reading) as (rendering, thin, _):
        return rendering.values(*thin())


@contextmanager
def _bands(
    path: Path, header: Header, reading: Reading
) -> Iterator[tuple[Rendering, Callable[[], _Rows], Callable[[], tuple[Bytes, Bools | None]]]]:
    """Open an image: its rendering, its rows thinned out, and the whole of it as RGB."""
    if _needs_gdal(header, reading):
        with open_bands(path, header, reading) as raster:
            yield raster.rendering, raster.thinned, raster.read
        return
    with _open(path) as image:
        decoded = _decoded(image, path, header)
    is_plain = decoded.mode in ("RGB", "L", "P") and "transparency" not in decoded.info
    if is_plain and reading == AS_STORED and header.nodata is None:  # nearly all files
        whole = decoded if decoded.mode == "RGB" else decoded.convert("RGB")
        rgb = np.asarray(whole).transpose(2, 0, 1)
        palette = _NO_PALETTE if decoded.mode == "P" else None
        kind = Kind(_NAMES[decoded.mode], bits=header.bits, palette=palette)
        yield Rendering(path, kind, reading), lambda: (rgb, None), lambda: (rgb, None)
        return
    rows, kind, valid = _samples(decoded, header, raw=reading.bands is not None)
    rendering = Rendering(path, kind, reading)
    if valid is None:
        valid = np.ones(rows.shape[1:], dtype=bool)
    rows = rows[[band - 1 for band in rendering.needed]]
    if header.nodata is not None:
        colors = [rendering.needed.index(band) for band in set(rendering.colors)]
        valid = valid & (rows[colors] != header.nodata).any(0)
    step = max(1, -(-max(valid.shape) // _SAMPLE_SIDE))
    yield (
        rendering,
        lambda: (rows[:, ::step, ::step], valid[::step, ::step]),
        lambda: rendering.render(rows, valid),
    )


def read_label(path: Path, colors: Sequence[Color] | None = None) -> Bytes:
    """Read a label as (H, W) uint8: the values in the file, or the indices of its colours.

    Args:
        path: of the file.
        colors: of the classes; None refuses a coloured label.

    Raises:
        UserError: unreadable, too large, or as `class_values`.
    """
    header, mask = _header(path), None
    with _memory_explained(path):
        if header.odd or _drops_fourth(header):
            rows, kind, mask = read_raster(path, header)
            turn = _turn(path, header)
            rows, mask = turn(rows), None if mask is None else turn(mask)
        else:
            with _open(path) as image:
                hidden = _hidden_samples(image, path)
                rows, kind, _ = _samples(_decoded(image, path, header), header, raw=True)
            if hidden is not None and (hidden != hidden[0]).any():
                raise UserError(
                    f"{path}: a label with a fourth channel that has no name; save one channel of "
                    "class values"
                )
        return class_values(rows, kind, colors, path, mask)


def is_lossy(path: Path) -> bool:
    """Whether a file's values carry the noise of JPEG or the like, whatever its name is."""
    try:
        return header_of(path).is_lossy
    except OSError:  # gone since it was read
        return path.suffix.lower() in (".jpg", ".jpeg")


def _header(path: Path) -> Header:
    """Return the header of a file.

    Raises:
        UserError: it is gone, or cannot be read rightly by anybody here.
    """
    try:
        header = header_of(path)
    except FileNotFoundError:
        raise UserError(f"{path}: is gone") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if header.kind != OTHER:
        _checked(header, path)
    return header


def _checked(header: Header, path: Path) -> Header:
    _check_size(path, header.width, header.height)
    if header.fault:
        raise UserError(
            f"{path}: has {header.fault}, which cannot be read rightly; save one RGB or grey "
            "image of 8 or 16 bits"
        )
    return header


def _check_size(path: Path, width: int, height: int) -> None:
    """Raise UserError if an image has more pixels than can be decoded at once."""
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path}: {width} x {height} pixels are too many to decode at once; cut it into tiles"
        )
    if width * height > _LARGE:
        needed, free = width * height * BYTES_A_PIXEL, available_memory()
        if needed > free:
            raise UserError(
                f"{path}: {width} x {height} pixels may take {needed / 1e9:.1f} GB to decode, but "
                f"{free / 1e9:.1f} GB of memory are free; cut it into tiles"
            )


@contextmanager
def _memory_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise UserError(f"{path}: no memory is left to decode it; cut it into tiles") from None


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise UserError(f"{path}: is gone") from None
    except Exception as error:
        raise _unreadable(path, error) from None
    try:
        _check_size(path, *image.size)
    except UserError:
        image.close()
        raise
    return image


def _decoded(image: Image.Image, path: Path, header: Header) -> Image.Image:
    try:
        if header.kind != TIFF and image.format != "MPO" and getattr(image, "is_animated", False):
            raise UserError(f"{path}: holds several pictures; save the one that is meant")
        image.load()
        if header.orientation != 1 or header.kind != TIFF:  # else Pillow reads all tags once more
            ImageOps.exif_transpose(image, in_place=True)  # it would copy upright ones, too
        return image
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Pillow raises SyntaxError, OSError, ValueError, struct.error, zlib.error, EOFError, ...
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace(str(path), "it")
    reason = reason[:200]
    return UserError(f"{path}: cannot be read as an image ({reason}); replace or remove it")


def _needs_gdal(header: Header, reading: Reading) -> bool:
    asks_for_fourth = max([*(reading.bands or ()), reading.alpha or 0]) == 4
    return bool(header.odd) or (asks_for_fourth and _drops_fourth(header))


def _drops_fourth(header: Header) -> bool:
    """Whether Pillow drops the fourth of four bands, as it has no meaning."""
    is_without_meaning = header.kind == TIFF and header.bands == 4 and not header.alpha
    return is_without_meaning and header.colors != "CMYK"


def _samples(
    image: Image.Image, header: Header, *, raw: bool
) -> tuple[NDArray[Any], Kind, Bools | None]:
    """Return all samples (n, H, W) of a decoded image, what they are, and where they have data.

    Args:
        image: decoded and turned.
        header: of its file.
        raw: keep palettes and CMYK as stored.
    """
    key = image.info.pop("transparency", None)  # a colour, or the alphas of a palette
    bits = header.bits if header.kind != OTHER else 8
    if image.mode == "PA" or (image.mode not in _NAMES) or (image.mode == "CMYK" and not raw):
        image = image.convert("RGBA" if image.mode in ("PA", "RGBa") else "RGB")
    names, palette = _NAMES[image.mode], None
    if image.mode == "P":
        palette = _palette_of(image, key)
        key = None
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    if image.mode == "I;16B":
        pixels = pixels.astype(np.uint16)
    rows = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    dtype = {"I": header.dtype, "F": "float32"}.get(image.mode, str(pixels.dtype))
    valid = None
    if key is not None and not isinstance(key, bytes):
        steps = 255 // (2**bits - 1) if bits < 8 else 1  # Pillow gives the key as it is stored
        keys = np.array(key).reshape(-1, 1, 1) * steps
        valid = (rows != keys).any(0)
    if image.mode == "L" and bits in (2, 4):  # Pillow spreads them over 0 to 255
        return rows // (255 // (2**bits - 1)), Kind(names, dtype, bits), valid
    return rows, Kind(names, dtype, palette=palette), valid


def _palette_of(image: Image.Image, key: object) -> Bytes:
    """Return the colours (256, 4) of a palette, with alpha."""
    colors = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    table = np.zeros((256, 4), dtype=np.uint8)
    table[: len(colors), :3] = colors
    table[:, 3] = 255
    if isinstance(key, bytes):
        table[: len(key), 3] = np.frombuffer(key, np.uint8)
    elif isinstance(key, int) and 0 <= key < 256:
        table[key, 3] = 0
    return table


def _turn(path: Path, header: Header) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Return what turns rows (..., H, W) upright that rasterio read; Pillow turns by itself."""
    return _TURNS.get(orientation_of(path, header), lambda rows: rows)


def _hidden_samples(image: Image.Image, path: Path) -> Bytes | None:
    """Return the fourth bytes of a BMP of 32 bits, which Pillow drops as they have no meaning."""
    tiles = getattr(image, "tile", None)
    if image.format != "BMP" or not tiles or tiles[0][3][0] != "BGRX":
        return None
    return np.fromfile(path, np.uint8, 4 * image.width * image.height, offset=tiles[0][2])[3::4]
