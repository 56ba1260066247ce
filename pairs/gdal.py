"""Files that rasterio reads (requirements-geo.txt): whole ones here, strips of scenes in mapping.

rasterio is an extra and is imported where a file needs it. `sealed.py` opens the files.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairs.bands import AS_STORED, Bools, Bytes, Kind, Reading, Rendering
from pairs.headers import GREY, OTHER, Header
from pairs.sealed import open_sealed, open_virtual
from runtime.errors import UserError

_SAMPLE_SIDE = 1024  # of the thinned-out image that percentiles are taken from

Window = tuple[tuple[int, int], tuple[int, int]]


def open_raster(
    path: Path, reason: str, stack: ExitStack, reading: Reading, *, allow_vrt: bool = False
) -> Any:
    """Return a rasterio dataset whose alpha is that of the reading, until the stack ends.

    Args:
        path: of the file.
        reason: why Pillow does not do, for the error.
        stack: closes it.
        reading: with `bands` or `alpha`, no band is alpha but the one that it names.
        allow_vrt: see `open_sealed`.

    Raises:
        UserError: it cannot be opened, or rasterio is not installed.
    """
    source = stack.enter_context(open_sealed(path, reason, allow_vrt=allow_vrt))
    if reading.bands is not None or reading.alpha is not None:
        source = _with_alpha(path, source, stack, reading.alpha)
    return source


def unreadable(path: Path, error: OSError) -> UserError:
    """Rasterio's errors of reading are OSErrors without a file; GDAL's reason is their cause."""
    reason = str(error.__cause__ or error).splitlines()[0]
    return UserError(f"{path}: cannot be read ({reason}); replace it")


class RasterBands:
    """The pixels of an open raster: RGB bytes, and where there is data.

    Args:
        path: named in errors.
        source: an open rasterio dataset; may be replaced by one of the same bands.
        reading: how its bands become RGB.
        header: of a PNG or a TIFF.
    """

    def __init__(self, path: Path, source: Any, reading: Reading, header: Header) -> None:
        self.path, self.source = path, source
        self.rendering = Rendering(path, kind_of(source, header), reading)

    def thinned(self) -> tuple[NDArray[Any], Bools]:
        """Return the needed bands and their mask, thinned out."""
        factor = max(1.0, max(self.source.shape) / _SAMPLE_SIDE)
        return self._read(out_shape=[max(1, int(side / factor)) for side in self.source.shape])

    def read(self, window: Window | None = None) -> tuple[Bytes, Bools]:
        """Return RGB (3, h, w) and where there is data (h, w), of a window or of all."""
        return self.rendering.render(*self._read(window=window))

    def _read(self, window: Window | None = None, out_shape: Any = None) -> Any:
        bands = self.rendering.needed
        colors = list(dict.fromkeys(self.rendering.colors))
        shape = None if out_shape is None else (len(bands), *out_shape)
        masks = None if out_shape is None else (len(colors), *out_shape)
        try:
            rows = self.source.read(bands, window=window, out_shape=shape)
            flags = [self.source.mask_flag_enums[band - 1] for band in colors]
            if all(len(of) == 1 and of[0].name == "all_valid" for of in flags):
                valid = np.ones(rows.shape[1:], dtype=bool)
            else:
                valid = self.source.read_masks(colors, window=window, out_shape=masks).any(0)
            if self.source.count > len(self.rendering.kind.names):
                # resampling has added an alpha band, which GDAL takes for one of 2 or 4 alone
                valid &= self.source.read(self.source.count, window=window, out_shape=out_shape) > 0
        except OSError as error:
            raise unreadable(self.path, error) from None
        return rows, valid


def kind_of(source: Any, header: Header) -> Kind:
    """Return what the samples of an open raster are."""
    names = [interpretation.name for interpretation in source.colorinterp]
    bits = int(source.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
    dtype = source.dtypes[0] if len(set(source.dtypes)) == 1 else _widest(source.dtypes)
    is_white_zero = header.is_white_zero or (
        header.kind == OTHER and source.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES"
    )
    if names[0] == "palette" and (is_white_zero or header.colors == GREY):
        names[0] = "gray"  # GDAL's way of turning what counts from white
    if header.kind != OTHER and is_white_zero:
        bits = header.bits
    elif is_white_zero and bits == 8:
        bits = np.dtype(dtype).itemsize * 8
    table = None
    if names[0] == "palette":
        table = np.zeros((256, 4), dtype=np.uint8)
        for value, color in source.colormap(1).items():
            if value < len(table):
                table[value] = color
    return Kind(tuple(names), dtype, bits, is_white_zero, table)


def read_raster(path: Path, header: Header) -> tuple[NDArray[Any], Kind, Bools | None]:
    """Return all samples (n, h, w) of a file as stored, what they are, and its mask.

    Raises:
        UserError: it cannot be read, or rasterio is not installed.
    """
    with ExitStack() as stack:
        source = open_raster(path, header.odd or "a band", stack, AS_STORED)
        try:
            flags = source.mask_flag_enums[0]
            mask = None
            if any(flag.name == "per_dataset" for flag in flags) and "alpha" not in {
                flag.name for flag in flags
            }:
                mask = source.read_masks(1) > 0
            return source.read(), kind_of(source, header), mask
        except OSError as error:
            raise unreadable(path, error) from None


@contextmanager
def open_bands(path: Path, header: Header, reading: Reading) -> Iterator[RasterBands]:
    """Open a PNG or a TIFF for the length of a `with`.

    Raises:
        UserError: it cannot be opened, or rasterio is not installed.
    """
    with ExitStack() as stack:
        source = open_raster(path, header.odd or "a band", stack, reading)
        yield RasterBands(path, source, reading, header)


def _widest(dtypes: Iterable[str]) -> str:
    return str(np.result_type(*dtypes))


def _with_alpha(path: Path, source: Any, stack: ExitStack, alpha: int | None) -> Any:
    """Return a dataset of the same pixels that calls one band alpha, or none.

    Masks and resampling then follow it as they follow the alpha of any file.
    """
    import rasterio
    from rasterio.shutil import copy

    names = [interpretation.name for interpretation in source.colorinterp]
    if names == ["alpha" if i == alpha else n for i, n in enumerate(names, 1)] and not (
        alpha is None and "alpha" in names
    ):
        return source
    with rasterio.MemoryFile(ext=".vrt") as memory:
        copy(source, memory.name, driver="VRT")
        xml = memory.read().decode("utf-8")
    xml = xml.replace("<ColorInterp>Alpha</ColorInterp>", "<ColorInterp>Undefined</ColorInterp>")
    if alpha is not None:
        band = rf'(<VRTRasterBand [^>]*band="{alpha}"[^>]*>)(.*?)(</VRTRasterBand>)'

        def tag(found: re.Match[str]) -> str:
            inner = re.sub(r"<ColorInterp>\w*</ColorInterp>", "", found[2])
            return f"{found[1]}<ColorInterp>Alpha</ColorInterp>{inner}{found[3]}"

        xml = re.sub(band, tag, xml, count=1, flags=re.DOTALL)
    return stack.enter_context(open_virtual(path, xml, source))
