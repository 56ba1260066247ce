"""The dates of a scene of any size, read by strips of rows.

    plain     PNG, JPEG, BMP and plain TIFF up to 4,096 x 4,096     whole, by image_io's rules
    raster    larger ones, GeoTIFF and all else that GDAL opens     by strips, through rasterio

    read(top, bottom)    before, after: (3, n, W) uint8;  valid: (n, W) bool, both have data

What has no data is black on both dates, so that the border of one is no change. rasterio is an
extra (requirements-geo.txt) and is imported where a file needs it.
"""

import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mapping.grids import Grid, grid_of, overlap, warped
from pairs.bands import AS_STORED, Reading
from pairs.gdal import RasterBands, open_raster
from pairs.headers import OTHER, PNG, Header, header_of
from pairs.images import (
    FORMATS,
    MAX_PIXELS,
    ORIENTATION,
    Pixels,
    orientation_of,
    read_pixels,
    read_size,
)
from pairs.sealed import sidecars, world_file
from runtime.errors import UserError

MAX_PLAIN = 2**24  # pixels of an image that is rather decoded whole: 4,096 x 4,096
_GEO_WORDS = ("<SRS", "<GeoTransform", "<GCPList", 'domain="RPC"', "<GeodataXform")  # of .aux.xml

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]
DateRows = tuple[Bytes, Bools]
PairRows = tuple[Bytes, Bytes, Bools]


class SceneFault(UserError):
    """A fault of the files of one scene: others may be sound."""


class PlainImage:
    """An image without coordinates, decoded whole.

    Args:
        path: of the file.
        reading: how its bands become RGB bytes.
    """

    def __init__(self, path: Path, reading: Reading) -> None:
        _check_header(path)
        self.path, self.reading = path, reading
        self.grid = Grid(*read_size(path))

    @cached_property
    def found(self) -> Pixels:
        """The pixels, decoded at the first call."""
        return read_pixels(self.path, self.reading, stretch=True)

    @property
    def bands(self) -> str:
        """The bands in use, in words."""
        return self.found.bands

    @property
    def notes(self) -> list[str]:
        """What the user should know of how it is read."""
        return _notes(self.path, self.found.stretched, self.found.remarks)

    def read(self, top: int, bottom: int) -> tuple[Bytes, Bools]:
        """Return rows (3, n, W) and where they have data (n, W)."""
        rgb, valid = self.found.rgb[top:bottom], self.found.valid
        rows = rgb.transpose(2, 0, 1).copy()  # Pillow's memory may not be written to
        return rows, np.ones(rgb.shape[:2], dtype=bool) if valid is None else valid[top:bottom]


class Raster:
    """One date through GDAL: three bands, scaled to 8 bits, and its mask of data.

    Args:
        path: named in errors.
        source: an open rasterio dataset.
        reading: how its bands become RGB bytes; without a scale, what has more than 8 bits is
            stretched between percentiles of each band.

    Raises:
        UserError: it does not tell which bands are red, green and blue, or has no such band.
    """

    def __init__(self, path: Path, source: Any, reading: Reading) -> None:
        self.path = path
        self.source = source
        self.grid = grid_of(path, source)
        self.resampled = ""
        self._raster = RasterBands(path, source, reading, _check_header(path))
        self.palette = self._raster.rendering.palette

    @cached_property
    def notes(self) -> list[str]:
        """What the user should know of how it is read, after a look at its pixels."""
        rendering, stretched = self._raster.rendering, ""
        if rendering.alpha or rendering.is_open:
            thin = self._raster.thinned()
            rendering.look(thin[0])
            stretched = rendering.fit(*thin) if rendering.is_open else ""
        lines = _notes(self.path, stretched, rendering.remarks)
        return lines + [self.resampled] * bool(self.resampled)

    @property
    def bands(self) -> str:
        """The bands in use, in words."""
        return self._raster.rendering.describe()

    def read(self, top: int, bottom: int) -> tuple[Bytes, Bools]:
        """Return rows (3, n, W) and where they have data (n, W)."""
        if self._raster.rendering.is_open:
            self.notes  # noqa: B018 (the look fixes the range)
        self._raster.source = self.source
        return self._raster.read(((top, bottom), (0, self.grid.width)))


def _notes(path: Path, stretched: str, remarks: Iterable[str]) -> list[str]:
    """Return what the user should know of how a file is read."""
    notes = [f"warning: {remark}" for remark in remarks]
    return notes + [f"{path}: {stretched}; --scale LOW,HIGH fixes it"] * bool(stretched)


class Scene:
    """Two dates on one grid, or a series of more, each compared with the one before.

    Attributes:
        dates: the earliest first.
        grid: of the first date, and so of everything that is written.
        is_plain: no date went through GDAL.
    """

    def __init__(self, *dates: PlainImage | Raster) -> None:
        self.dates = dates
        self.grid = dates[0].grid
        self.is_plain = all(isinstance(date, PlainImage) for date in dates)

    @property
    def notes(self) -> list[str]:
        """What the user should know, after a look at the pixels."""
        with _as_scene_fault():
            lines = [note for date in self.dates for note in date.notes]
        lines += [date.grid.remark for date in self.dates]
        bands = [f"bands   {line}" for line in _bands_in_use(self.dates)]
        return list(dict.fromkeys(filter(None, bands + lines)))

    def read(self, top: int, bottom: int) -> PairRows:
        """Return rows of the first two dates."""
        return self.read_pairs(top, bottom)[0]

    def read_pairs(self, top: int, bottom: int) -> list[PairRows]:
        """Return rows of each date and the next: (3, n, W) twice, and where both have data (n, W).

        A date is read once; where it has the same pixels in two pairs it may be one array.
        """
        with _as_scene_fault():
            rows = [date.read(top, bottom) for date in self.dates]
        return [_paired(before, after) for before, after in pairwise(rows)]


def _paired(before: DateRows, after: DateRows) -> PairRows:
    """Make black in both dates what has no data in one of them."""
    valid = before[1] & after[1]
    if valid.all():
        return before[0], after[0], valid
    return before[0] * valid, after[0] * valid, valid


def _bands_in_use(dates: Sequence[PlainImage | Raster]) -> list[str]:
    """Return one line for all dates where they are alike."""
    if len({date.bands for date in dates}) == 1:
        return [dates[0].bands]
    return [f"{date.path}: {date.bands}" for date in dates]


@contextmanager
def open_scene(
    first: Path,
    *later: Path,
    reading: Reading = AS_STORED,
    align: bool = False,
    allow_vrt: bool = False,
) -> Iterator[Scene]:
    """Open the dates; they stay open until the `with` ends.

    Args:
        first: the earliest date, whose grid is the scene's.
        later: the date after it, or several.
        reading: how the bands of all become RGB bytes.
        align: resample later dates onto the grid of the first one, by cubic convolution.
        allow_vrt: open formats that open other files, too.

    Raises:
        SceneFault: a file that cannot be read, two grids that differ, or rasterio is needed and
            not installed.
    """
    with ExitStack() as stack:
        with _as_scene_fault():
            dates = [_open(path, stack, reading, allow_vrt) for path in (first, *later)]
            for number, date in enumerate(dates[1:], 1):
                if not dates[0].grid.matches(date.grid):
                    dates[number] = _aligned(dates[0], date, stack, align)
        yield Scene(*dates)


@contextmanager
def _as_scene_fault() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise SceneFault(str(error)) from None


def _open(path: Path, stack: ExitStack, reading: Reading, allow_vrt: bool) -> PlainImage | Raster:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    reason = _why_raster(path)
    if not reason:
        return PlainImage(path, reading)
    return Raster(path, open_raster(path, reason, stack, reading, allow_vrt=allow_vrt), reading)


def _check_header(path: Path) -> Header:
    """Return a file's header; raise UserError if it says what cannot be read."""
    header = header_of(path)
    if header.fault:
        raise UserError(f"{path}: has {header.fault}, which cannot be read rightly")
    return header


def _why_raster(path: Path) -> str:
    """Return why a file has to be read by strips through GDAL, or "" if it is read whole."""
    if path.suffix.lower() not in {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}:
        return f"a {path.suffix or 'raster'} file"
    header = header_of(path)
    sidecar = _placed_by(path)
    if (sidecar or header.is_placed) and (turn := orientation_of(path, header)) != 1:
        what = f"placed by {sidecar.name}, and" if sidecar else "a GeoTIFF, and"
        raise UserError(f"{path}: {what} its orientation ({turn}) turns it; save it upright")
    if sidecar:
        return f"placed by {sidecar.name}"
    if header.is_placed:
        return "a GeoTIFF"
    height, width = header.size
    turned = header.orientation != 1
    if header.kind == PNG:
        turned = orientation_of(path, header) != 1
    elif header.kind == OTHER:
        try:
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                turned = image.getexif().get(ORIENTATION, 1) != 1
                if image.mode not in ("RGB", "L"):
                    return ""
        except Image.DecompressionBombError:
            return f"more than {2 * MAX_PIXELS / 1e6:.0f} megapixels"
        except Exception:
            return ""  # read_pixels says what is wrong
    num_pixels = height * width
    if turned and num_pixels <= MAX_PIXELS:
        return ""
    if turned:
        raise UserError(
            f"{path}: {num_pixels / 1e6:.0f} megapixels that EXIF turns; save it upright"
        )
    if num_pixels > MAX_PIXELS:
        return f"{num_pixels / 1e6:.0f} megapixels"
    is_large = num_pixels > MAX_PLAIN and not header.fault
    return "a large image" if is_large and importlib.util.find_spec("rasterio") else ""


def _placed_by(path: Path) -> Path | None:
    """Return the sidecar that says where an image lies, if there is one."""
    beside = sidecars(path)
    for file in (p for p in beside if p.name.lower().endswith(".aux.xml") and p.is_file()):
        with file.open("rb") as opened:
            head = opened.read(2**20).decode("utf-8", "replace")
        if any(word in head for word in _GEO_WORDS):
            return file
    rpcs = (p for p in beside if p.name.lower().endswith(("_rpc.txt", ".rpb")))
    return world_file(path) or next(rpcs, None)


def _aligned(
    first: PlainImage | Raster, second: PlainImage | Raster, stack: ExitStack, align: bool
) -> Raster:
    """Return the later date on the grid of the earlier one.

    Raises:
        UserError: it was not asked for, cannot be done, or the two do not overlap.
    """
    sides = f"{first.path} ({first.grid}) and {second.path} ({second.grid})"
    can_align = (
        isinstance(first, Raster)
        and isinstance(second, Raster)
        and first.grid.has_place
        and second.grid.has_place
    )
    if points := first.grid.points or second.grid.points:
        raise UserError(f"{sides} differ, and what places them makes no grid; {points.remedy}")
    if not can_align:
        raise UserError(
            f"{sides} have different pixels, and not both say where they lie, so they cannot be "
            "aligned; give two images of one size, or two georeferenced ones"
        )
    if not align:
        raise UserError(f"{sides} have different grids; --align puts the second on the first's")
    if not overlap(first.grid, second.grid):
        raise UserError(f"{sides} do not overlap")
    from rasterio.enums import Resampling

    assert isinstance(second, Raster)
    source = second.source
    has_alpha = any(c.name == "alpha" for c in source.colorinterp)
    second.resampled = f"{second.path}: resampled, from {second.grid}"
    second.source = stack.enter_context(
        warped(
            source,
            second.grid,
            first.grid,
            # bilinear blurs one date of the two: on drawn pairs masks agree 0.2 to 0.5 % less
            resampling=Resampling.nearest if second.palette is not None else Resampling.cubic,
            add_alpha=source.nodata is None and not has_alpha,
        )
    )
    second.grid = first.grid
    return second
