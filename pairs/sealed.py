"""The one place where a raster file is opened through GDAL: it and its sidecars, and no other.

GDAL goes by a file's content, not by its name: a text called x.tif may be a VRT that shows another
file, or an address that a server learns of. So formats come from a list, and what a sidecar or a
tag names is not followed. rasterio is an extra (requirements-geo.txt), imported where a file needs
it.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import UserError

# How a file of each format begins, and GDAL's name of what reads it: that file and its sidecars
FORMATS = {
    b"II*\0": "GTiff", b"MM\0*": "GTiff", b"II+\0": "GTiff", b"MM\0+": "GTiff",
    b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"BM": "BMP", b"GIF8": "GIF", b"RIFF": "WEBP",
    b"\0\0\0\x0cjP  ": "JP2OpenJPEG", b"\xff\x4f\xff\x51": "JP2OpenJPEG", b"EHFA_HEADER": "HFA",
}  # fmt: skip
TIFF_SIDECARS = (".ovr", ".OVR", ".msk", ".MSK")  # overviews and mask: GDAL takes any format there
SIDECARS = (
    ".aux.xml", ".AUX.XML", ".aux", ".AUX", ".wld", ".WLD", ".hdr", ".HDR", ".prj", ".PRJ",
    ".tab", ".TAB", ".RPB", ".rpb", "_RPC.TXT", "_rpc.txt", ".IMD", ".imd", ".rrd", ".ige",
)  # fmt: skip


def import_rasterio(path: Path, reason: str) -> Any:
    """Return rasterio.

    Raises:
        UserError: it is not installed.
    """
    # GDAL keeps decoded blocks in 5 % of the machine's memory; two strips need far less
    os.environ.setdefault("GDAL_CACHEMAX", "128")
    # it looks for sidecars by name, not by listing a folder of 100,000 files for each of them
    os.environ.setdefault("GDAL_DISABLE_READDIR_ON_OPEN", "TRUE")
    try:
        import rasterio
    except ImportError:
        raise UserError(
            f"{path}: {reason}, which needs rasterio: pip install -r requirements-geo.txt"
        ) from None
    return rasterio


@contextmanager
def open_sealed(
    path: Path, reason: str = "a raster", *, allow_vrt: bool = False, **options: Any
) -> Iterator[Any]:
    """Open a raster file to read; no other file is opened but its sidecars, and no address.

    Args:
        path: of a regular file.
        reason: why rasterio is needed, for the error where it is missing.
        allow_vrt: take every format of GDAL, VRTs too, whose parts may be any file or address.
        options: of `rasterio.open`.

    Yields:
        The rasterio dataset.

    Raises:
        UserError: it cannot be opened, or would open others.
    """
    rasterio = import_rasterio(path, reason)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with ExitStack() as stack:
        if not allow_vrt:
            _check_sidecars(path)
            options["driver"] = _format(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
                # an absolute path is a file to GDAL, whatever a relative one looks like
                source = stack.enter_context(rasterio.open(path.absolute(), **options))
        except rasterio.errors.RasterioError as error:
            reason = str(error).splitlines()[0].replace(str(path.absolute()), "it")
            raise UserError(f"{path}: cannot be opened ({reason})") from None
        if not allow_vrt:
            _check_no_other(path, source)
        if not source.count:
            raise UserError(f"{path}: holds several rasters; save the one that is meant as a TIFF")
        yield source


@contextmanager
def open_virtual(path: Path, xml: str, source: Any) -> Iterator[Any]:
    """Open a VRT that shows a file in another way; it opens no more files than that one does.

    Args:
        path: of the file, which `open_sealed` has opened.
        xml: the VRT, as GDAL made it of the file.
        source: the dataset of the file.

    Raises:
        UserError: it would open others.
    """
    import rasterio

    if "<" in str(path.absolute()):  # GDAL takes a name that holds <VRTDataset for one
        raise UserError(f"{path}: rename it without '<', or leave out --bands and --alpha")
    with ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            virtual = stack.enter_context(rasterio.open(xml, driver="VRT"))
        if others := set(virtual.files) - set(source.files):
            raise UserError(f"{path}: would open another file, {min(others)}")
        yield virtual


def sidecars(path: Path) -> list[Path]:
    """Return what lies beside an image and tells GDAL more of it."""
    ends = [*SIDECARS, *_world_endings(path)]
    places = [Path(f"{path}{end}") for end in (*ends, *TIFF_SIDECARS)]
    places += [path.with_name(path.stem + end) for end in ends]
    return [place for place in dict.fromkeys(places) if os.path.lexists(place)]


def world_file(path: Path) -> Path | None:
    """Return the world file of an image: x.pgw, x.pngw or x.wld of x.png."""
    places = [path.with_name(path.stem + end) for end in (*_world_endings(path), ".wld", ".WLD")]
    return next((place for place in places if place.is_file()), None)


def _world_endings(path: Path) -> list[str]:
    end = path.suffix
    short = [f"{end[:2]}{end[-1]}w"] if len(end) > 1 else []
    return [variant for w in (*short, f"{end}w") for variant in (w, w.lower(), w.upper())]


def _check_sidecars(path: Path) -> None:
    """Raise UserError for a neighbour that would make GDAL wait, or open more than TIFFs."""
    for beside in sidecars(path):
        if not beside.is_file():
            raise UserError(f"{beside}: no regular file, but GDAL would read it; move it away")
        if beside.name.endswith(TIFF_SIDECARS):
            with beside.open("rb") as file:
                if file.read(2) not in (b"II", b"MM"):
                    raise UserError(f"{beside}: no TIFF, but GDAL would open it; move it away")
            with open_sealed(beside):  # which may name others in turn
                pass


def _check_no_other(path: Path, source: Any) -> None:
    """Raise UserError if a dataset names files that are not beside it under its own name."""
    # before anything asks for overviews: only then GDAL follows the name
    named = source.tags(ns="OVERVIEWS").get("OVERVIEW_FILE")
    home, foreign = path.absolute().parent, []
    if not named:
        files = [Path(file) for file in source.files]
        foreign = [f for f in files if f.parent != home or not f.name.startswith(path.stem)]
    if named or foreign:
        raise UserError(
            f"{path}: names another file, {named or foreign[0]}, which is not opened; "
            "remove the name, or --allow-vrt where you trust it"
        )


def _format(path: Path) -> str:
    """Return GDAL's name of a file's format.

    Raises:
        UserError: it is none of `FORMATS`.
    """
    with path.open("rb") as file:
        head = file.read(4096)
    for beginning, name in FORMATS.items():
        if head.startswith(beginning):
            return name
    if b"<VRTDataset" in head:
        raise UserError(
            f"{path}: a VRT, which may open any file or address; --allow-vrt where you trust it, "
            "or make a TIFF of it"
        )
    names = ", ".join(dict.fromkeys(FORMATS.values()))
    raise UserError(f"{path}: cannot be opened, it is none of {names}; save it as a TIFF")
