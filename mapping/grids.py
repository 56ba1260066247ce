"""Where the pixels of a raster lie on the Earth, and whether those of two rasters are the same.

A transform is taken from tags, .aux.xml or a world file; a CRS without one is no place. Control
points and RPCs bend a grid: two dates that share them are mapped pixel by pixel, and the maps keep
them; for all else a warp has to come first. Coordinates that do not fit their CRS are found before
any work.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError

_MAX_SHIFT = 0.05  # pixels between two grids that count as one
_SAMPLES = 21  # points along each side of a grid that are looked at
# degrees that a scene may lie outside of the area that its CRS is made for; UTM zone 33 is used for
# all of Norway, up to 13 degrees outside
_MAX_OUTSIDE = 15.0
_ZONE = 6.5  # so far outside, axes that fit when swapped are swapped
_WORLD = 2 * np.pi * 6378137.0  # metres: where Web Mercator begins again

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """What places an image without a grid.

    Attributes:
        gcps: rasterio's ground control points and their CRS.
        rpcs: rasterio's rational polynomials.
    """

    gcps: Any = None
    rpcs: Any = None

    def __str__(self) -> str:
        if self.rpcs is not None:
            return "placed by rational polynomials (RPCs)"
        return f"placed by {len(self.gcps[0])} ground control points (GCPs)"

    @property
    def remedy(self) -> str:
        """How a grid is made of it."""
        if self.rpcs is not None:
            return "gdalwarp -rpc -t_srs EPSG:... IN.tif OUT.tif makes a grid of each"
        code = self.gcps[1].to_epsg() if self.gcps[1] else None
        return f"gdalwarp -t_srs EPSG:{code or '...'} IN.tif OUT.tif makes a grid of each"

    def matches(self, other: "Points") -> bool:
        """Whether both place the same pixels alike."""
        if self.rpcs is not None or other.rpcs is not None:
            known = self.rpcs is not None and other.rpcs is not None
            return known and self.rpcs.to_gdal() == other.rpcs.to_gdal()
        if self.gcps[1] != other.gcps[1] or len(self.gcps[0]) != len(other.gcps[0]):
            return False
        own, others = (
            np.array([(g.row, g.col, g.x, g.y) for g in each.gcps[0]]) for each in (self, other)
        )
        return np.allclose(own, others, rtol=1e-12, atol=1e-9)


@dataclass(frozen=True)
class Grid:
    """Where a scene's pixels lie.

    Attributes:
        height, width: in pixels.
        crs: rasterio's CRS, None where there is none.
        transform: of pixel corners to the CRS's coordinates, an `affine.Affine`; None as well.
        points: what places it where there is no transform.
        remark: what the user should know of it.
    """

    height: int
    width: int
    crs: Any = None
    transform: Any = None
    points: Points | None = None
    remark: str = field(default="", compare=False)

    def __str__(self) -> str:
        size = f"{self.width} x {self.height} pixels"
        if self.points is not None:
            return f"{size}, {self.points}"
        if self.transform is None:
            return f"{size}, not georeferenced"
        t = self.transform
        name = self.crs.to_string() if self.crs else "no CRS"
        name = name if len(name) < 60 else f"{name[:57]}..."
        corner = f"upper left corner ({t.c:.10g}, {t.f:.10g})"
        return f"{size} of {t.a:.6g} x {-t.e:.6g}, {corner}, {name}"

    @property
    def has_place(self) -> bool:
        """Whether its pixels lie on the Earth: a drawing's own coordinates do not."""
        is_of_earth = self.crs is not None and (self.crs.is_geographic or self.crs.is_projected)
        return is_of_earth and self.transform is not None

    def matches(self, other: "Grid") -> bool:
        """Whether both have the same pixels, to a twentieth of one."""
        if (self.height, self.width, self.crs) != (other.height, other.width, other.crs):
            return False
        if self.points is not None or other.points is not None:
            if self.points is None or other.points is None:
                return False
            return self.points.matches(other.points)
        if self.transform is None or other.transform is None:
            return self.transform is other.transform
        corners = np.array([(x, y) for x in (0, self.width) for y in (0, self.height)], float).T
        there = place(~self.transform, *place(other.transform, *corners))
        return bool(np.abs(there - corners).max() < _MAX_SHIFT)

    def lattice(self) -> Doubles:
        """Return coordinates (2, n) all over the grid, its edges and corners among them."""
        x, y = np.meshgrid(*(np.linspace(0, n, _SAMPLES) for n in (self.width, self.height)))
        return place(self.transform, x.ravel(), y.ravel())

    def middle(self) -> tuple[float, float]:
        """Return the coordinates of its middle."""
        x, y = place(self.transform, self.width / 2, self.height / 2)
        return float(x), float(y)


def place(transform: Any, x: Any, y: Any) -> Doubles:
    """Apply an `affine.Affine`: (2, ...) of x and y. Its own operator changes with its version."""
    t = transform
    return np.stack([t.a * x + t.b * y + t.c, t.d * x + t.e * y + t.f])


def grid_of(path: Path, source: Any) -> Grid:
    """Return the grid of an open rasterio dataset.

    Raises:
        UserError: it lies nowhere on the Earth, or is placed by arrays.
    """
    height, width, transform = source.height, source.width, source.transform
    if transform.is_identity and (points := _points_of(path, source)):
        remark = (
            f"{path}: {points}, which make no grid: the maps keep them, and there are no polygons; "
            f"{points.remedy}"
        )
        return Grid(height, width, points=points, remark=remark)
    if _is_made_up(transform, height):
        remark = ""
        if source.crs is not None:
            remark = f"{path}: has a CRS and no geotransform, so it is taken as not georeferenced"
        return Grid(height, width, remark=remark)
    grid = Grid(height, width, source.crs or _crs_beside(path), transform)
    if grid.has_place:
        check_place(path, grid)
        return grid
    remark = f"{path}: has no CRS of the Earth, so there are no polygons"
    return Grid(height, width, grid.crs, transform, remark=remark)


def _is_made_up(transform: Any, height: int) -> bool:
    """Whether it is what programs write that know of no place: pixels of 1 from the origin on."""
    t = transform
    is_unit = (t.a, t.b, t.d, abs(t.e)) == (1, 0, 0, 1)
    return t.is_identity or (is_unit and t.c == 0 and t.f in (0, height))


def _crs_beside(path: Path) -> Any:
    """Return the CRS of a .prj beside an image with a world file, which GDAL passes over."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    beside = path.with_suffix(".prj")
    if not beside.is_file():
        return None
    try:
        text = beside.read_text("utf-8", errors="replace")
        return CRS.from_wkt(text)
    except CRSError:
        raise UserError(f"{beside}: names no CRS; mend it or move it away") from None


def _points_of(path: Path, source: Any) -> Points | None:
    """Return what places an image without a grid."""
    gcps = source.gcps
    if gcps[0]:
        return Points(gcps=gcps)
    if source.rpcs:
        return Points(rpcs=source.rpcs)
    if source.tags(ns="GEOLOCATION"):
        raise UserError(
            f"{path}: is placed by geolocation arrays, which make no grid; warp both dates first: "
            f"gdalwarp -geoloc -t_srs EPSG:... {path.name} warped.tif"
        )
    return None


def to_lon_lat(crs: Any, x: Doubles, y: Doubles) -> Doubles:
    """Return longitude and latitude (2, n) of WGS 84.

    Raises:
        ValueError: a point lies nowhere on the Earth.
    """
    from rasterio._err import CPLE_BaseError  # which has no public name
    from rasterio.warp import transform

    try:
        there = np.stack(transform(crs, "EPSG:4326", x, y))
    except CPLE_BaseError as error:
        raise ValueError(str(error)) from None
    if not np.isfinite(there).all():
        raise ValueError("a point lies nowhere on the Earth")
    return there


def check_place(path: Path, grid: Grid) -> None:
    """Raise UserError for coordinates that do not fit the CRS."""
    x, y = grid.lattice()
    why = _why_not_degrees(grid, x, y) if grid.crs.is_geographic else _why_not_metres(grid, x, y)
    if why:
        raise UserError(f"{path} ({grid}): {why}; mend its georeference, as with gdal_edit.py")


def _why_not_degrees(grid: Grid, x: Doubles, y: Doubles) -> str:
    """Return what is wrong with longitudes and latitudes; half a pixel beyond a pole is not."""
    t = grid.transform
    pixel_x, pixel_y = abs(t.a) + abs(t.b), abs(t.d) + abs(t.e)
    if np.abs(x).max() > 540 + pixel_x or np.ptp(x) > 360 + pixel_x:
        return "no longitudes and latitudes in degrees: are they metres?"
    if np.abs(y).max() > 90 + pixel_y:
        swapped = np.abs(x).max() <= 90 and np.abs(y).max() <= 360
        return f"latitudes beyond a pole{': are the axes swapped?' if swapped else ''}"
    return ""


def _why_not_metres(grid: Grid, x: Doubles, y: Doubles) -> str:
    """Return what is wrong with coordinates of a projection."""
    from rasterio._err import CPLE_BaseError
    from rasterio.warp import transform

    crs = grid.crs
    area = _area_of_use(crs)
    try:
        lon, lat = to_lon_lat(crs, x, y)
        again = np.stack(transform("EPSG:4326", crs, lon, lat))
    except (ValueError, CPLE_BaseError) as error:
        return f"part of it lies nowhere on the Earth ({str(error).splitlines()[0]})"
    pixel = np.sqrt(abs(grid.transform.determinant))
    shift = np.abs(again - (x, y)).max(0)
    once_around = np.abs(np.abs(again[0] - x) * crs.linear_units_factor[1] - _WORLD) < 1
    if (np.where(once_around, np.abs(again[1] - y), shift) > max(pixel, 1.0)).any():
        return "part of it lies nowhere on the Earth"
    middle = np.array([lon[len(lon) // 2], lat[len(lat) // 2]])
    outside = _outside(area, *middle)
    is_small = np.abs(x).max() <= 360 and np.abs(y).max() <= 90
    is_worldwide = area is not None and area[1] < -45 and area[3] > 45  # its origin is in the sea
    if is_small and (outside > 0 or is_worldwide or pixel < 1e-3):
        return "looks like degrees in a CRS of metres"
    if outside > _ZONE and _fits_swapped(grid, area):
        return "are the axes swapped?"
    if outside > _MAX_OUTSIDE:
        return (
            f"lies at {middle[0]:.4g} E, {middle[1]:.4g} N, {outside:.0f} degrees outside of the "
            "area of its CRS"
        )
    return ""


def _area_of_use(crs: Any) -> tuple[float, float, float, float] | None:
    """Return west, south, east and north of the area that an EPSG code is made for."""
    from rasterio.crs import CRS

    code = crs.to_epsg()
    box = CRS.from_epsg(code).to_dict(projjson=True).get("bbox") if code else None
    if not box:
        return None
    west, east = box["west_longitude"], box["east_longitude"]
    return west, box["south_latitude"], east + 360 * (east < west), box["north_latitude"]


def _outside(area: tuple[float, float, float, float] | None, lon: float, lat: float) -> float:
    """Return by how many degrees a point lies outside of an area, 0 inside."""
    if area is None:
        return 0.0
    west, south, east, north = area
    off = abs((lon - (west + east) / 2 + 180) % 360 - 180) - (east - west) / 2
    return float(max(0.0, off, south - lat, lat - north))


def _fits_swapped(grid: Grid, area: tuple[float, float, float, float] | None) -> bool:
    x, y = grid.middle()
    try:
        (lon,), (lat,) = to_lon_lat(grid.crs, np.array([y]), np.array([x]))
    except ValueError:
        return False
    return _outside(area, lon, lat) == 0


def shift_of_longitudes(first: Grid, second: Grid) -> float:
    """Return how many degrees, 0 or 360 or -360, bring the second beside the first.

    Longitudes past 180 degrees name the same places as those before -180.
    """
    if not second.crs.is_geographic:
        return 0.0
    x, y = first.middle()
    if not first.crs.is_geographic:
        x = to_lon_lat(first.crs, np.array([x]), np.array([y]))[0, 0]
    return 360.0 * round((x - second.middle()[0]) / 360)


def pixels_of(first: Grid, second: Grid) -> Doubles:
    """Return where points of the second lie, in pixels (2, n) of the first."""
    from rasterio._err import CPLE_BaseError
    from rasterio.warp import transform

    x, y = second.lattice()
    if first.crs != second.crs:
        try:
            x, y = map(np.array, transform(second.crs, first.crs, x, y))
        except CPLE_BaseError:
            return np.zeros((2, 0))
    if first.crs.is_geographic:
        x = x + 360 * np.round((first.middle()[0] - x) / 360)
    return place(~first.transform, x, y)


def overlap(first: Grid, second: Grid) -> bool:
    """Whether two grids have ground in common, whichever way their axes run."""
    for one, other in ((first, second), (second, first)):
        points = pixels_of(one, other)
        points = points[:, np.isfinite(points).all(0)]
        if not points.size:
            continue
        x, y = points
        if x.max() <= 0 or y.max() <= 0 or x.min() >= one.width or y.min() >= one.height:
            return False
    return True


def warped(source: Any, second: Grid, first: Grid, **options: Any) -> Any:
    """Return the second raster on the grid of the first, a rasterio `WarpedVRT`."""
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.transform import Affine
    from rasterio.vrt import WarpedVRT

    t, shift = second.transform, shift_of_longitudes(first, second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return WarpedVRT(
            source,
            src_crs=second.crs,
            src_transform=Affine(t.a, t.b, t.c + shift, t.d, t.e, t.f),
            crs=first.crs,
            transform=first.transform,
            height=first.height,
            width=first.width,
            **options,
        )
