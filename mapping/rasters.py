"""Both dates of a scene of any size, read by strips of rows.

    plain     PNG, JPEG, BMP and plain TIFF up to 4,096 x 4,096     whole, by image_io's rules
    raster    larger ones, GeoTIFF and all else that GDAL opens     by strips, through rasterio

    read(top, bottom)    before, after: (3, n, W) uint8;  valid: (n, W) bool, both have data

What has no data is black on both dates, so that the border of one is no change. rasterio is an
extra (requirements-geo.txt) and is imported where a file needs it.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pairs.images import MAX_PIXELS, read_image, read_size
from runtime.errors import UserError

# Rasters have any ending; these are looked for in folders
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".jp2", ".vrt", ".img"}
MAX_PLAIN = 2**24  # pixels of an image that is rather decoded whole: 4,096 x 4,096
PERCENTILES = (2, 98)  # that become 0 and 255 where more than 8 bits come without --scale
_SAMPLE_SIDE = 1024  # of the thinned-out image that percentiles are taken from
_GEO_TAGS = {33550, 33922, 34264, 34735}  # pixel scale, tie points, transform, keys
_MAX_SHIFT = 0.05  # pixels between two grids that count as one

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Grid:
    """Where a scene's pixels lie.

    Attributes:
        height, width: in pixels.
        crs: rasterio's CRS, None where there is none.
        transform: of pixel corners to the CRS's coordinates, an `affine.Affine`; None as well.
    """

    height: int
    width: int
    crs: Any = None
    transform: Any = None

    def __str__(self) -> str:
        size = f"{self.width} x {self.height} pixels"
        if self.transform is None:
            return f"{size}, not georeferenced"
        t = self.transform
        name = self.crs.to_string() if self.crs else "no CRS"
        name = name if len(name) < 60 else f"{name[:57]}..."
        return f"{size} of {t.a:.6g} x {-t.e:.6g} from ({t.c:.10g}, {t.f:.10g}), {name}"

    @property
    def has_place(self) -> bool:
        """Whether its pixels lie on the Earth: a drawing's own coordinates do not."""
        return self.crs is not None and (self.crs.is_geographic or self.crs.is_projected)

    def matches(self, other: "Grid") -> bool:
        """Whether both have the same pixels, to a twentieth of one."""
        if (self.height, self.width, self.crs) != (other.height, other.width, other.crs):
            return False
        if self.transform is None or other.transform is None:
            return self.transform is other.transform
        corners = np.array([(x, y) for x in (0, self.width) for y in (0, self.height)], float).T
        there = place(~self.transform, *place(other.transform, *corners))
        return bool(np.abs(there - corners).max() < _MAX_SHIFT)


def place(transform: Any, x: Any, y: Any) -> NDArray[np.float64]:
    """Apply an `affine.Affine`: (2, ...) of x and y. Its own operator changes with its version."""
    t = transform
    return np.stack([t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f])


class PlainImage:
    """An image without coordinates, decoded whole."""

    note = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pixels = read_image(path).copy()  # Pillow's memory may not be written to
        self.grid = Grid(*self.pixels.shape[:2])

    def read(self, top: int, bottom: int) -> tuple[Bytes, Bools]:
        """Return rows (3, n, W) and where they have data: everywhere."""
        rows = self.pixels[top:bottom]
        return rows.transpose(2, 0, 1), np.ones(rows.shape[:2], dtype=bool)


class Raster:
    """One date through GDAL: three bands, scaled to 8 bits, and its mask of data.

    Args:
        path: named in errors.
        source: an open rasterio dataset.
        bands: red, green and blue counted from 1, or one band for all; None takes what the file
            calls so.
        scale: the values that become 0 and 255; None keeps 8 bits and stretches others between
            percentiles of each band.

    Raises:
        UserError: it does not tell which bands are red, green and blue, or has no such band.
    """

    def __init__(
        self,
        path: Path,
        source: Any,
        bands: Sequence[int] | None,
        scale: Sequence[float] | None,
    ) -> None:
        self.path = path
        self.source = source
        self.bands = _choose_bands(path, source, bands)
        self.palette = _palette_of(source) if bands is None and len(set(self.bands)) == 1 else None
        self.grid = _grid_of(source)
        self.low, self.high = np.zeros((3, 1, 1)), np.full((3, 1, 1), 255.0)
        self.note = ""
        kinds = {source.dtypes[b - 1] for b in self.bands}
        self.is_scaled = scale is not None or kinds != {"uint8"}
        if any(kind.startswith("complex") for kind in kinds):
            raise UserError(f"{path}: has complex numbers; give their magnitude")
        if scale is not None:
            self.low[:], self.high[:] = scale
        elif self.is_scaled:
            self._stretch(", ".join(sorted(kinds)))

    def _stretch(self, kind: str) -> None:
        """Take the percentiles of each band from a thinned-out image."""
        factor = max(1.0, max(self.source.shape) / _SAMPLE_SIDE)
        shape = [max(1, int(side / factor)) for side in self.source.shape]
        try:
            sample = self.source.read(self.bands, out_shape=(3, *shape), masked=True)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        values = sample.astype(np.float64).filled(np.nan)
        if not np.isfinite(values).any((1, 2)).all():
            raise UserError(f"{self.path}: a band has no data at all")
        values[~np.isfinite(values)] = np.nan
        low, high = np.nanpercentile(values, PERCENTILES, axis=(1, 2), keepdims=True)
        self.low, self.high = low, np.maximum(high, low + 1e-6 * np.maximum(np.abs(low), 1))
        ranges = ", ".join(
            f"{a:.5g} to {b:.5g}" for a, b in zip(self.low.flat, self.high.flat, strict=True)
        )
        self.note = (
            f"{self.path}: {kind} becomes 8 bits between the percentiles {PERCENTILES[0]} and "
            f"{PERCENTILES[1]} of each band ({ranges}); --scale LOW,HIGH fixes it"
        )

    def read(self, top: int, bottom: int) -> tuple[Bytes, Bools]:
        """Return rows (3, n, W) and where they have data (n, W)."""
        window = ((top, bottom), (0, self.grid.width))
        distinct = list(dict.fromkeys(self.bands))  # a grey band is read once
        order = [distinct.index(b) for b in self.bands]
        try:
            rows = self.source.read(distinct, window=window)
            valid = self.source.read_masks(distinct, window=window).any(0)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if rows.dtype.kind == "f":
            valid &= np.isfinite(rows).all(0)
            rows = np.where(valid, rows, 0)
        if self.palette is not None:
            return self.palette[rows[0]].transpose(2, 0, 1), valid
        rows = rows[order]
        if not self.is_scaled:
            return rows, valid
        factor = (255 / (self.high - self.low)).astype(np.float32)
        scaled = (rows.astype(np.float32) - self.low.astype(np.float32)) * factor
        return np.clip(np.rint(scaled), 0, 255).astype(np.uint8), valid


class Scene:
    """Two dates on one grid.

    Attributes:
        grid: of the first date, and so of everything that is written.
        is_plain: neither date went through GDAL.
        notes: what the user should know of how the files are read.
    """

    def __init__(self, before: PlainImage | Raster, after: PlainImage | Raster) -> None:
        self.before, self.after = before, after
        self.grid = before.grid
        self.is_plain = isinstance(before, PlainImage) and isinstance(after, PlainImage)
        self.notes = [date.note for date in (before, after) if date.note]
        if self.grid.transform is not None and not self.grid.has_place:
            self.notes.append(f"{before.path}: has no CRS of the Earth, so there are no polygons")
        self._top, self._strip = 0, self._nothing()

    def _nothing(self) -> tuple[Bytes, Bytes, Bools]:
        empty = np.zeros((3, 0, self.grid.width), dtype=np.uint8)
        return empty, empty, np.zeros((0, self.grid.width), dtype=bool)

    def read(self, top: int, bottom: int) -> tuple[Bytes, Bytes, Bools]:
        """Return rows of both dates (3, n, W), and where both have data (n, W).

        Rows of the strip that was read last come from memory.
        """
        held = len(self._strip[2])
        if not self._top <= top <= bottom <= self._top + held:
            before, valid_before = self.before.read(top, bottom)
            after, valid_after = self.after.read(top, bottom)
            valid = valid_before & valid_after
            if not valid.all():
                before, after = before * valid, after * valid
            self._top, self._strip = top, (before, after, valid)
        first, last = top - self._top, bottom - self._top
        before, after, valid = self._strip
        return before[:, first:last], after[:, first:last], valid[first:last]


@contextmanager
def open_scene(
    before: Path,
    after: Path,
    *,
    bands: Sequence[int] | None = None,
    scale: Sequence[float] | None = None,
    align: bool = False,
) -> Iterator[Scene]:
    """Open both dates; they stay open until the `with` ends.

    Args:
        before: the earlier date, whose grid is the scene's.
        after: the later date.
        bands: red, green and blue counted from 1, or one band.
        scale: (low, high), the values that become 0 and 255.
        align: resample the later date onto the grid of the earlier one, bilinearly.

    Raises:
        UserError: a file that cannot be read, two grids that differ, or rasterio is needed and
            not installed.
    """
    with ExitStack() as stack:
        first = _open(before, stack, bands, scale)
        second = _open(after, stack, bands, scale)
        if not first.grid.matches(second.grid):
            second = _aligned(first, second, stack, align)
        yield Scene(first, second)


def check_readable(*paths: Path) -> None:
    """Look at the header of each file.

    Raises:
        UserError: one is not there, or is no image; or rasterio is needed and not installed.
    """
    for path in paths:
        _check_there(path)
        if reason := _why_raster(path):
            with ExitStack() as stack:
                _open_raster(path, reason, stack)
        else:
            read_size(path)


def import_rasterio(path: Path, reason: str) -> Any:
    """Return rasterio.

    Raises:
        UserError: it is not installed.
    """
    # GDAL keeps decoded blocks in 5 % of the machine's memory; two strips need far less
    os.environ.setdefault("GDAL_CACHEMAX", "256")
    try:
        import rasterio
    except ImportError:
        raise UserError(
            f"{path}: {reason}, which needs rasterio: pip install -r requirements-geo.txt"
        ) from None
    return rasterio


def _open(
    path: Path,
    stack: ExitStack,
    bands: Sequence[int] | None,
    scale: Sequence[float] | None,
) -> PlainImage | Raster:
    _check_there(path)
    reason = "--bands" if bands else "--scale" if scale else _why_raster(path)
    if not reason:
        return PlainImage(path)
    return Raster(path, _open_raster(path, reason, stack), bands, scale)


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")


def _open_raster(path: Path, reason: str, stack: ExitStack) -> Any:
    """Return a rasterio dataset, open until the `with` of the stack ends."""
    rasterio = import_rasterio(path, reason)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            source = stack.enter_context(rasterio.open(path))
    except rasterio.errors.RasterioError as error:
        raise UserError(f"{path}: cannot be opened ({str(error).splitlines()[0]})") from None
    if not source.count:
        raise UserError(f"{path}: holds several rasters; name one of {source.subdatasets[:3]}")
    return source


def _why_raster(path: Path) -> str:
    """Return why a file has to go through GDAL, or "" if Pillow reads it whole."""
    if path.suffix.lower() not in {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}:
        return f"a {path.suffix or 'raster'} file"
    try:
        with Image.open(path) as image:
            tags = getattr(image, "tag_v2", {})
            num_pixels, mode = image.width * image.height, image.mode
    except Image.DecompressionBombError:
        return f"more than {2 * MAX_PIXELS / 1e6:.0f} megapixels"
    except Exception:
        # many bands, or floats in tiles: GDAL knows more TIFFs; else image_io says what is wrong
        return "a kind of TIFF" if path.suffix.lower() in {".tif", ".tiff"} else ""
    if _GEO_TAGS & set(tags):
        return "a GeoTIFF"
    if mode not in ("RGB", "RGBA", "L", "LA", "1", "P", "PA", "CMYK", "YCbCr"):
        return f"{mode} pixels"
    if num_pixels > MAX_PIXELS:
        return f"{num_pixels / 1e6:.0f} megapixels"
    is_large = num_pixels > MAX_PLAIN and mode in ("RGB", "RGBA", "L", "P")
    return "a large image" if is_large and importlib.util.find_spec("rasterio") else ""


def _unreadable(path: Path, error: OSError) -> UserError:
    """Rasterio's errors of reading are OSErrors without a file; GDAL's reason is their cause."""
    reason = str(error.__cause__ or error).splitlines()[0]
    return UserError(f"{path}: cannot be read ({reason}); replace it")


def _choose_bands(path: Path, source: Any, asked: Sequence[int] | None) -> list[int]:
    count = source.count
    if asked is not None:
        if len(asked) not in (1, 3) or not all(1 <= band <= count for band in asked):
            raise UserError(
                f"--bands {','.join(map(str, asked))}: give one or three numbers from 1 to "
                f"{count}, the bands of {path}"
            )
        return list(asked) * (3 // len(asked))
    meaning = [interpretation.name for interpretation in source.colorinterp]
    if {"red", "green", "blue"} <= set(meaning):
        return [1 + meaning.index(color) for color in ("red", "green", "blue")]
    colors = [1 + i for i, name in enumerate(meaning) if name != "alpha"]
    if len(colors) not in (1, 3):
        raise UserError(
            f"{path}: has {count} bands ({', '.join(meaning)}); say which are red, green and "
            f"blue, such as --bands {','.join(map(str, range(min(3, count), 0, -1)))}"
        )
    return colors * (3 // len(colors))


def _palette_of(source: Any) -> Bytes | None:
    """Return the colours (256, 3) of a raster with a palette."""
    if source.colorinterp[0].name != "palette":
        return None
    table = np.zeros((256, 3), dtype=np.uint8)
    for value, color in source.colormap(1).items():
        table[value] = color[:3]
    return table


def _grid_of(source: Any) -> Grid:
    if source.crs is None and source.transform.is_identity:
        return Grid(source.height, source.width)
    return Grid(source.height, source.width, source.crs, source.transform)


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
    if not can_align:
        raise UserError(
            f"{sides} have different pixels, and not both say where they lie, so they cannot be "
            "aligned; give two images of one size, or two georeferenced ones"
        )
    if not align:
        raise UserError(f"{sides} have different grids; --align puts the second on the first's")
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT
    from rasterio.warp import transform_bounds

    assert isinstance(second, Raster)
    source, grid = second.source, first.grid
    left, bottom, right, top = transform_bounds(source.crs, grid.crs, *source.bounds)
    here = first.source.bounds  # type: ignore[union-attr]
    if left >= here.right or right <= here.left or bottom >= here.top or top <= here.bottom:
        raise UserError(f"{sides} do not overlap")
    has_alpha = any(c.name == "alpha" for c in source.colorinterp)
    warped = stack.enter_context(
        WarpedVRT(
            source,
            crs=grid.crs,
            transform=grid.transform,
            height=grid.height,
            width=grid.width,
            resampling=Resampling.nearest if second.palette is not None else Resampling.bilinear,
            add_alpha=source.nodata is None and not has_alpha,
        )
    )
    second.note = "\n".join(
        [*([second.note] if second.note else []), f"{second.path}: resampled, from {second.grid}"]
    )
    second.source, second.grid = warped, grid
    return second


@dataclass(frozen=True)
class ScenePair:
    """Both dates of a scene, and what its maps are called after."""

    name: str
    before: Path
    after: Path


def find_scenes(before: Path, after: Path) -> list[ScenePair]:
    """Return the scene of two files, or those of two folders.

    Raises:
        UserError: a file that is not there or cannot be opened, one without a partner, or nothing
            at all.
    """
    if before.is_dir() != after.is_dir() and before.exists() and after.exists():
        raise UserError(f"{before} and {after}: give two files or two folders")
    if not before.is_dir():
        check_readable(before, after)
        return [ScenePair(before.stem, before, after)]
    first, second = _by_stem(before), _by_stem(after)
    alone = [first[s] for s in first if s not in second]
    alone += [second[s] for s in second if s not in first]
    if alone:
        names = ", ".join(str(path) for path in sorted(alone)[:5])
        raise UserError(f"{len(alone)} files have no partner of their stem: {names}")
    if not first:
        raise UserError(f"{before}: holds no image ({', '.join(sorted(ENDINGS))})")
    check_readable(*first.values(), *second.values())
    return [ScenePair(stem, first[stem], second[stem]) for stem in sorted(first)]


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in ENDINGS or path.name.startswith("."):
            continue
        if path.stem in found:
            raise UserError(f"{folder}: {found[path.stem].name} and {path.name}; keep one")
        found[path.stem] = path
    return found
