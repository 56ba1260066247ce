"""The files of a scene's maps: a plain image, or a cloud-optimised GeoTIFF; and the overlay."""

import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mapping.grids import Grid
from mapping.rasters import Bytes
from pairs.images import IGNORE
from runtime.errors import UserError

SINGLE = (255, 0, 170)  # of change in the overlay, where there is one kind: a colour of no land
PREVIEW_SIDE = 2048  # pixels of the overlay's longer side
_TINT = 0.45  # how much of a changed pixel's colour is its class's
_TILE = 512

Color = Sequence[int]


def channels_last(image: Bytes) -> Bytes:
    """Turn (3, H, W) into (H, W, 3) in memory, five times as fast as a copy of the transpose."""
    turned = np.empty((*image.shape[1:], len(image)), dtype=image.dtype)
    for number, channel in enumerate(image):
        turned[..., number] = channel
    return turned


def thinned(classes: Bytes, step: int) -> Bytes:
    """Return the largest value of each block of step x step, so that a changed pixel stays seen.

    A hundred times as fast as `np.maximum.reduceat`.
    """
    for _ in range(2):  # rows, then columns as rows of the transpose
        kept = classes[::step].copy()
        for shift in range(1, step):
            others = classes[shift::step]
            np.maximum(kept[: len(others)], others, out=kept[: len(others)])
        classes = kept.swapaxes(0, 1)
    return classes


class PngMap:
    """A map of a plain image, in memory until it is saved.

    Args:
        path: the ending says how: .png, or .tif for float32.
        grid: its size.
        dtype: "uint8" or "float32".
        palette: the colour of each class value, for masks.
    """

    def __init__(
        self, path: Path, grid: Grid, dtype: str, palette: Sequence[Color] | None = None
    ) -> None:
        self.path = path
        self.pixels = np.zeros((grid.height, grid.width), dtype=dtype)
        self.palette = palette

    def write(self, top: int, rows: NDArray[Any]) -> None:
        """Take rows (n, W) from `top` on."""
        self.pixels[top : top + len(rows)] = rows

    def finish(self) -> None:
        """Save the file."""
        image = Image.fromarray(self.pixels)
        if self.palette is not None:
            image.putpalette(bytes(_full_palette(self.palette)), "RGB")
        image.save(self.path)


class GeoTiffMap:
    """A map on a grid, on the disk from the first band on: a tiled GeoTIFF, then a COG of it.

    Args:
        path: of the cloud-optimised GeoTIFF.
        grid: of the scene.
        dtype: "uint8", "uint16" or "float32".
        palette: the colour of each class value, for masks.
        nodata: the value of pixels without data.
        unit: what a step of the value means, told to GDAL.
        tags: of the file.
    """

    def __init__(
        self,
        path: Path,
        grid: Grid,
        dtype: str,
        palette: Sequence[Color] | None = None,
        *,
        nodata: float = IGNORE,
        unit: float = 1.0,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        import rasterio

        self.path = path
        self.draft = path.with_suffix(".draft.tif")
        # thinned-out copies: the mean of probabilities, the most frequent of classes
        self.resampling = "MODE" if palette is not None else "AVERAGE"
        self.is_float = dtype == "float32"
        with ignored_place_warnings(), _writing(path):
            self.file = rasterio.open(
                self.draft,
                "w",
                driver="GTiff",
                height=grid.height,
                width=grid.width,
                count=1,
                dtype=dtype,
                crs=grid.crs,
                transform=grid.transform,
                nodata=nodata,
                tiled=True,
                blockxsize=_TILE,
                blockysize=_TILE,
                compress="deflate",
                zlevel=1,
                bigtiff="if_safer",
            )
        if palette is not None:
            table = _full_palette(palette).reshape(-1, 3).tolist()
            self.file.write_colormap(1, {v: (*c, 255) for v, c in enumerate(table)})
        if unit != 1:
            self.file.scales = (unit,)
        self.file.update_tags(**(tags or {}))
        if grid.points is not None and grid.points.rpcs is not None:
            self.file.rpcs = grid.points.rpcs
        elif grid.points is not None:
            self.file.gcps = grid.points.gcps

    def write(self, top: int, rows: NDArray[Any]) -> None:
        """Take rows (n, W) from `top` on."""
        with _writing(self.path):
            self.file.write(rows, 1, window=((top, top + len(rows)), (0, self.file.width)))

    def close(self) -> None:
        """Complete the draft, which polygons are drawn from."""
        with _writing(self.path):
            self.file.close()

    def finish(self) -> None:
        """Write the cloud-optimised file from the draft, which stays."""
        import rasterio.shutil

        with _writing(self.path):
            rasterio.shutil.copy(
                self.draft,
                self.path,
                driver="COG",
                compress="DEFLATE",
                level=1,  # half the time of the default 6, and 3 % more bytes
                predictor="YES" if self.is_float else "NO",  # of bytes it saves none
                blocksize=_TILE,
                overview_resampling=self.resampling,
                bigtiff="IF_SAFER",
                num_threads="ALL_CPUS",
            )
            self._read_back()

    def _read_back(self) -> None:
        """Read the whole file: GDAL does not always say that the disk was full."""
        import rasterio

        with rasterio.open(self.path) as whole:
            levels = [{}, *({"overview_level": i} for i in range(len(whole.overviews(1))))]
        for level in levels:
            with rasterio.open(self.path, **level) as file:
                for top in range(0, file.height, _TILE):
                    rows = (top, min(top + _TILE, file.height))
                    file.read(1, window=(rows, (0, file.width)))


@contextmanager
def ignored_place_warnings() -> Iterator[None]:
    """Ignore rasterio's warning of a map without a place; not in threads, which share filters."""
    with warnings.catch_warnings():
        if importlib.util.find_spec("rasterio"):
            from rasterio.errors import NotGeoreferencedWarning

            warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn GDAL's errors into one line; of a full disk they speak in many ways."""
    from rasterio._err import CPLE_BaseError  # what `shutil.copy` raises has no public name
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, CPLE_BaseError) as error:
        raise UserError(f"{path}: cannot be written whole ({error}); make room") from None


class Overlay:
    """The later date with the change tinted in its class's colour and outlined, thinned out.

    A pixel of the picture shows change if any pixel that it stands for does.

    Args:
        path: of the PNG.
        grid: of the scene.
        palette: the colour of each class value.
    """

    def __init__(self, path: Path, grid: Grid, palette: Sequence[Color]) -> None:
        self.path = path
        self.palette = np.array(palette, dtype=np.uint8)
        if len(palette) == 2:
            self.palette[1] = SINGLE  # a mask's white is lost on bright roofs
        self.step = -(-max(grid.height, grid.width) // PREVIEW_SIDE)
        shape = (-(-grid.height // self.step), -(-grid.width // self.step))
        self.picture = np.zeros((*shape, 3), dtype=np.uint8)
        self.classes = np.zeros(shape, dtype=np.uint8)

    def write(self, top: int, after: Bytes, classes: Bytes) -> None:
        """Take rows of the later date (3, n, W) and their classes (n, W), 0 or 255 = none."""
        step = self.step
        first = -(-top // step) * step  # the first row that is shown
        picked = after[:, first - top :: step, ::step]
        self.picture[first // step : first // step + picked.shape[1]] = channels_last(picked)
        change = classes * (classes != IGNORE)
        if not change.any():
            return
        if missing := top % step:  # rows of the first block that came before
            change = np.pad(change, ((missing, 0), (0, 0)))
        change = thinned(change, step)
        shown = self.classes[top // step : top // step + len(change)]
        np.maximum(shown, change, out=shown)

    def finish(self) -> None:
        """Save the picture."""
        is_change = self.classes > 0
        color = self.palette[self.classes[is_change]]
        mixed = (1 - _TINT) * self.picture[is_change] + _TINT * color
        padded = np.pad(is_change, 1, mode="edge")
        inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        is_edge = ~inside[is_change]
        self.picture[is_change] = np.where(is_edge[:, None], color, np.rint(mixed)).astype(np.uint8)
        # half the time of the default level 6, and as many bytes
        Image.fromarray(self.picture).save(self.path, compress_level=1)


def _full_palette(palette: Sequence[Color]) -> Bytes:
    """Return 256 colours in a row; those of no class are grey."""
    table = np.full((256, 3), 96, dtype=np.uint8)
    table[: len(palette)] = palette
    return table.reshape(-1)
