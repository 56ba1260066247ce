"""What a PNG or a TIFF says of its pixels, read from its header.

Pillow's `mode` does not tell a 16-bit RGB file from one of 8 bits, nor signed values from unsigned
ones, and it shows the header of a sparse TIFF as pixels. So the header decides who reads a file:

    `odd` is ""       Pillow reads it right
    `odd` says why    rasterio reads it (requirements-geo.txt)
    `fault` says why  nobody here reads it right: refused

Sources: TIFF 6.0, Adobe 1992; BigTIFF, awaresystems.be; PNG, ISO/IEC 15948; GDAL's driver GTiff.
"""

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

PNG, TIFF, OTHER = "PNG", "TIFF", "other"
QUARTER_TURNS = (5, 6, 7, 8)
GREY, RGB, PALETTE = "grey", "RGB", "a palette"

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_COLORS = {0: (GREY, 1), 2: (RGB, 3), 3: (PALETTE, 1), 4: (GREY, 2), 6: (RGB, 4)}
# of TIFF: the tag's number
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 256, 257, 258, 259, 262
_STRIPS, _ORIENTATION, _SAMPLES, _STRIP_BYTES, _PLANAR = 273, 274, 277, 279, 284
_TILES, _TILE_BYTES, _EXTRA, _FORMAT, _NODATA = 324, 325, 338, 339, 42113
# that a reader has to know; of the others, whether they are there
_NEEDED = {
    _SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _STRIPS, _ORIENTATION, _SAMPLES,
    _STRIP_BYTES, _PLANAR, _TILES, _TILE_BYTES, _EXTRA, _FORMAT, _NODATA,
}  # fmt: skip
_GEO = {33550, 33922, 34264, 34735, 50844}  # pixel scale, tie points, transform, keys, RPCs
_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I"}
_TYPES |= {16: "Q", 17: "q", 18: "Q"}  # of BigTIFF
_FORMATS = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "complex", 6: "complex"}
_PHOTOMETRICS = {0: GREY, 1: GREY, 2: RGB, 3: PALETTE, 4: "a mask", 5: "CMYK", 6: "YCbCr"}
_PHOTOMETRICS |= {8: "LAB", 9: "ICC LAB", 10: "ITU LAB", 32803: "a colour filter array"}
_PHOTOMETRICS |= {32844: "LogL", 32845: "LogLuv", 34892: "linear raw"}
# those that every build of Pillow decodes: none, CCITT, LZW, JPEG, deflate, PackBits
_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32946, 32773}
_JPEG = 7
_PAGE, _REDUCED, _MASK = 0, 1, 4  # bits of the subfile type
_MAX_PAGES = 1000
_CHANGED = "a no data value among values that Pillow changes"
MASK, NOTES = ".msk", ".aux.xml"  # GDAL's files beside an image that say what has no data
_MAX_NOTES = 2**24  # bytes of the notes that are looked at


@dataclass(frozen=True)
class Header:
    """What is known of a file's pixels before a byte of them is decoded.

    Attributes:
        kind: PNG, TIFF or OTHER: JPEG, BMP, GIF and WebP have 8 bits, and Pillow reads them.
        height, width: as stored; `orientation` may turn them.
        bands: samples in a pixel.
        bits: of a sample.
        dtype: of a sample, by numpy's name.
        colors: GREY, RGB, PALETTE, "CMYK", ...
        is_white_zero: grey values count from white.
        alpha: the band that is alpha, counted from 1.
        orientation: as in EXIF, 1 = upright.
        nodata: a value that means "no data".
        is_lossy: its values carry the noise of a lossy compression.
        is_placed: has tags of a georeference.
        odd: why Pillow would misread it.
        fault: why nobody reads it right.
    """

    kind: str = OTHER
    height: int = 0
    width: int = 0
    bands: int = 3
    bits: int = 8
    dtype: str = "uint8"
    colors: str = RGB
    is_white_zero: bool = False
    alpha: int | None = None
    orientation: int = 1
    nodata: float | None = None
    is_lossy: bool = False
    is_placed: bool = False
    odd: str = ""
    fault: str = ""

    @property
    def is_byte(self) -> bool:
        """Whether it has 8 bits or fewer, unsigned: nothing has to be scaled."""
        return self.dtype == "uint8"

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the upright image."""
        turned = self.orientation in QUARTER_TURNS
        return (self.width, self.height) if turned else (self.height, self.width)


def _read(start: bytes, tiff: BinaryIO | None) -> Header:
    """Return the header; one that is damaged is of kind OTHER, and Pillow says how.

    A JPEG counts as lossy by its first bytes, whatever its name is.
    """
    try:
        if start.startswith(_PNG_START):
            return _png(start)
        if tiff is not None:
            return _tiff(tiff)
    except (ValueError, LookupError, struct.error, OSError, OverflowError):
        return Header()
    is_webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return Header(is_lossy=start[:2] == b"\xff\xd8" or (is_webp and start[12:16] != b"VP8L"))


def header_of(path: Path) -> Header:
    """Read the header of a file, and look whether GDAL's mask or notes lie beside it.

    Raises:
        OSError: it is not there or cannot be opened.
    """
    with path.open("rb") as file:
        start = file.read(32)
        header = _read(start, file if start[:4] in _TIFF_STARTS else None)
    # os.path, not Path: a fifth of the time, for every file
    if header.nodata is None and os.path.isfile(f"{path}{NOTES}"):  # noqa: PTH113
        header = _noted(header, Path(f"{path}{NOTES}"))
    if os.path.exists(f"{path}{MASK}"):  # noqa: PTH110
        return replace(header, odd=header.odd or f"with a mask beside it ({MASK})")
    return header


def _noted(header: Header, notes: Path) -> Header:
    """Return the header with the no data value that GDAL keeps beside a file, if all bands do."""
    with notes.open("rb") as file:
        text = file.read(_MAX_NOTES)
    found = [_number(value) for value in re.findall(rb"<NoDataValue[^>]*>([^<]*)<", text)]
    if len(set(map(str, found))) > 1:
        return replace(header, odd=header.odd or f"no data values for each band ({notes.name})")
    # one that not all bands have leaves data everywhere
    if not found or (header.kind != OTHER and len(found) != header.bands):
        return header
    changed = header.is_white_zero or header.bits < 8
    return replace(header, nodata=found[0], odd=header.odd or (_CHANGED if changed else ""))


def png_may_turn(file: BinaryIO) -> bool:
    """Whether a PNG has EXIF or XMP anywhere: Pillow finds what stands behind the pixels late."""
    file.seek(len(_PNG_START))
    while len(start := file.read(8)) == 8:
        length, kind = int.from_bytes(start[:4], "big"), start[4:]
        word = file.read(3) if kind in (b"iTXt", b"zTXt", b"tEXt") else b""
        if kind == b"eXIf" or word in (b"XML", b"Raw"):  # "Raw profile type exif": ImageMagick
            return True
        file.seek(length + 4 - len(word), 1)
    return False


def _png(start: bytes) -> Header:
    width, height, bits, color = struct.unpack(">IIBB", start[16:26])
    colors, bands = _PNG_COLORS[color]
    header = Header(
        PNG, height, width, bands, bits, "uint16" if bits == 16 else "uint8", colors,
        alpha=bands if color in (4, 6) else None,
    )  # fmt: skip
    return replace(header, odd=f"{_name(header)} pixels" if bits == 16 and bands > 1 else "")


def _tiff(file: BinaryIO) -> Header:
    tags, pages = _read_tags(file)
    if not tags[_WIDTH][0] or not tags[_HEIGHT][0]:
        raise ValueError("no pixels")
    bits = tags.get(_BITS, (1,))
    formats = tags.get(_FORMAT, (1,))
    bands = tags.get(_SAMPLES, (1,))[0]
    photometric = tags.get(_PHOTOMETRIC, (0,))[0]
    kind = _FORMATS.get(formats[0], "unknown")
    size = next((size for size in (8, 16, 32, 64, 128) if bits[0] <= size), 0)
    extra = tags.get(_EXTRA, ())
    first_extra = bands - len(extra)
    alphas = [first_extra + 1 + i for i, meaning in enumerate(extra) if meaning in (1, 2)]
    compression = tags.get(_COMPRESSION, (1,))[0]
    header = Header(
        TIFF,
        tags[_HEIGHT][0],
        tags[_WIDTH][0],
        bands,
        bits[0],
        f"{kind}{max(size, 16) if kind == 'float' else size}",
        _PHOTOMETRICS.get(photometric, f"photometric {photometric}"),
        is_white_zero=photometric == 0,
        alpha=alphas[0] if alphas else None,
        orientation=tags.get(_ORIENTATION, (1,))[0],
        nodata=_number(tags.get(_NODATA)),
        is_lossy=compression in (6, _JPEG),
        is_placed=bool(_GEO & set(tags)),
    )
    if len(set(bits)) > 1 or len(set(formats)) > 1:
        return replace(header, fault=f"bands of different depth ({', '.join(map(str, bits))} bits)")
    return replace(header, odd=_oddity(header, tags, pages), fault=_fault(header, tags, pages))


def _fault(header: Header, tags: Mapping[int, Any], pages: list[int]) -> str:
    """Say why nobody reads a TIFF right, or ""."""
    if (count := sum(not kind & (_REDUCED | _MASK) for kind in pages)) > 1:
        return f"{count} pages"
    if header.dtype.startswith(("complex", "unknown")):
        return "complex numbers" if header.dtype.startswith("complex") else "an unknown format"
    is_jpeg = tags.get(_COMPRESSION, (1,))[0] in (6, _JPEG)
    plain = {GREY, RGB, PALETTE} | ({"CMYK"} if header.bits == 8 and header.bands == 4 else set())
    if header.colors not in plain | ({"YCbCr"} if is_jpeg and header.bits == 8 else set()):
        return f"{_name(header)} pixels"
    if header.colors == PALETTE and (header.bands > 1 or header.bits > 8):
        return f"a palette of {header.bits} bits and {header.bands} bands"
    if header.is_white_zero and not header.dtype.startswith("uint"):
        return f"{header.dtype} pixels that count from white"
    if header.colors == "CMYK" and _why_odd(header, tags, pages):
        return f"CMYK pixels, {_why_odd(header, tags, pages)}"
    return ""


def _oddity(header: Header, tags: Mapping[int, Any], pages: list[int]) -> str:
    """Say why Pillow would misread a TIFF, or ""."""
    grey = header.colors == GREY
    shapes = {
        "uint8": (grey and header.bands == 1)
        or (grey and header.bands == 2 and header.alpha == 2)
        or header.colors == PALETTE
        or (header.colors in (RGB, "YCbCr") and header.bands == 3)
        or (header.colors in (RGB, "CMYK") and header.bands == 4),
        "uint16": grey and header.bands == 1 and not header.is_white_zero,
    }
    # Pillow mixes up the bytes of compressed ones in big-endian files
    is_raw = tags.get(_COMPRESSION, (1,))[0] == 1
    shapes |= dict.fromkeys(("int16", "int32", "float32"), shapes["uint16"] and is_raw)
    depths = (1, 2, 4, 8) if header.bands == 1 else (8,)
    if not shapes.get(header.dtype) or (header.is_byte and header.bits not in depths):
        bands = f"{header.bands} bands of " if header.bands > 1 else ""
        return f"{bands}{header.bits}-bit {_name(header)} pixels"
    if not header.is_byte and header.bits not in (16, 32):
        return f"{header.bits}-bit pixels"
    if header.nodata is not None and (header.is_white_zero or header.bits < 8):
        return _CHANGED
    return _why_odd(header, tags, pages)


def _why_odd(header: Header, tags: Mapping[int, Any], pages: list[int]) -> str:
    compression = tags.get(_COMPRESSION, (1,))[0]
    if compression not in _COMPRESSIONS:
        return f"compression {compression}"
    if tags.get(_EXTRA, (0,))[0] == 1:
        return "colours multiplied with alpha"  # Pillow divides them again, GDAL does not
    if tags.get(_PLANAR, (1,))[0] != 1 and header.bands > 1:
        return "one plane after the other"
    counts = tags.get(_TILE_BYTES if _TILES in tags else _STRIP_BYTES, ())
    if 0 in tags.get(_TILES, tags.get(_STRIPS, (0,))) or 0 in counts:
        return "sparse"
    if any(kind & _MASK for kind in pages):
        return "with a mask inside"
    return ""


def _name(header: Header) -> str:
    """Return colours and depth in words: "16-bit RGB"."""
    if header.kind == PNG:
        alpha = " + alpha" if header.alpha else ""
        return f"{header.bits}-bit {header.colors}{alpha}"
    return f"{header.dtype} {header.colors}"


def _read_tags(file: BinaryIO) -> tuple[dict[int, Any], list[int]]:
    """Return the tags of the first image of a TIFF, and the subfile type of each.

    Those that nobody needs have no values.

    Raises:
        ValueError, struct.error: it is damaged.
    """
    length = os.fstat(file.fileno()).st_size
    file.seek(0)
    start = file.read(16)
    order, is_big = "<" if start[:2] == b"II" else ">", 43 in start[2:4]
    count_form, pointer, word = ("Q", "Q", 8) if is_big else ("H", "I", 4)
    entry_form = struct.Struct(f"{order}HH{pointer}{word}s")
    (at,) = struct.unpack_from(order + pointer, start, 8 if is_big else 4)

    def values(kind: int, count: int, data: bytes) -> Any:
        form = _TYPES.get(kind)
        if form is None:
            return ()
        size = count * struct.calcsize(order + form)
        if size > length:
            raise ValueError("a tag longer than the file")
        if size > word:
            file.seek(struct.unpack(order + pointer, data)[0])
            data = file.read(size)
        return data[:count] if form == "s" else struct.unpack_from(f"{order}{count}{form}", data)

    first: dict[int, Any] = {}
    pages: list[int] = []
    seen: set[int] = set()
    while at and at not in seen and len(pages) < _MAX_PAGES:
        seen.add(at)
        file.seek(at)
        (count,) = struct.unpack(order + count_form, file.read(struct.calcsize(count_form)))
        size = count * entry_form.size
        if size > length:
            raise ValueError("more tags than the file holds")
        block = file.read(size + word)
        (at,) = struct.unpack_from(order + pointer, block, size)
        page, wanted = _PAGE, {_SUBFILE} if pages else _NEEDED
        for tag, *entry in entry_form.iter_unpack(block[:size]):
            found = values(*entry) if tag in wanted else ()
            if tag == _SUBFILE and found:
                page = found[0]
            if not pages and (found or tag not in wanted):
                first[tag] = found
        pages.append(page)
    return first, pages


def _number(text: bytes | None) -> float | None:
    """Read GDAL's no data value, a number as text."""
    try:
        return float(text.strip(b"\0 ").decode("ascii")) if text else None
    except ValueError:
        return None
