"""Class maps on a grid become polygons with area and mean probability: GeoJSON and GeoPackage.

    outline       along the pixels' edges; pixels that touch at a corner alone are two polygons
    GeoJSON       longitude and latitude of WGS 84 (RFC 7946), cut at 180 degrees into a feature
                  for each side; as many decimals as a hundredth of a pixel needs, at least 7
    GeoPackage    the scene's own CRS
    area_m2       on the ground: in a Lambert azimuthal projection, which keeps areas, of the WGS 84
                  ellipsoid around the scene's middle, whatever the raster's own CRS is

Polygons are held in memory, some hundred bytes a corner: a map of single pixels takes gigabytes.
A metre of UTM or Web Mercator is not a metre on the ground, and a degree is none at all, so areas
are never taken in the raster's own coordinates. A straight edge of the raster is a curve in
longitude and latitude: long ones get points between, a tenth of a pixel from the curve at most.
"""

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapping.grids import Grid, place, to_lon_lat
from mapping.rings import (
    Points,
    densified,
    each,
    pixel_areas,
    signed_area,
    transformed,
    upright_edges,
)
from pairs.labels import MIN_PIXELS
from runtime.errors import UserError

_AT_ONCE = 2000  # polygons whose coordinates are transformed in one call
_ROWS = 512  # of the raster that are held for the mean probabilities
_EARTH = 6.4e6  # metres, the radius
_DEGREE = 111320.0  # metres, of latitude
_SQUARE = np.array([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]])  # a pixel's corners
# how much larger a pixel may be than the largest of a scene's middle, sides and corners
_MAX_STRETCH = 1.1

Describe = Callable[[int], dict[str, object]]


@dataclass
class Polygon:
    """One polygon: rings in pixels, the outer one first; the last point is the first.

    Attributes:
        value: its class.
        rings: columns and rows of the corners, whole numbers.
        area: in square metres.
        num_pixels: of its class, without those of holes that are filled.
        outline: in the raster's CRS, a shapely geometry.
        probability: the mean over its pixels.
    """

    value: int
    rings: list[Points]
    area: float
    num_pixels: int
    outline: Any = None
    probability: float = float("nan")

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Its left, top, right and bottom, in pixels."""
        (left, top), (right, bottom) = self.rings[0].min(0), self.rings[0].max(0)
        return int(left), int(top), int(right), int(bottom)


@dataclass(frozen=True)
class Ground:
    """The ground under a raster.

    Attributes:
        crs: of the raster.
        transform: from pixels to the CRS.
        equal_area: a projection around its middle, as PROJ writes it.
        pixel_area: square metres of the pixel in its middle.
        max_pixel_area: of the largest of its corners, sides and middle.
        latitude: the one next to a pole of its corners and middle.
    """

    crs: Any
    transform: Any
    equal_area: str
    pixel_area: float
    max_pixel_area: float
    latitude: float

    @classmethod
    def of(cls, source: Any) -> "Ground":
        """Return that of an open rasterio dataset."""
        grid = Grid(source.height, source.width, source.crs, source.transform)
        lat = to_lon_lat(source.crs, *grid.lattice())[1]
        equal_area = _equal_area_crs(source)
        corners = [
            (column, row)
            for row in (source.height // 2, 0, source.height - 1)
            for column in (source.width // 2, 0, source.width - 1)
        ]
        outlines = [place(source.transform, x + _SQUARE[0], y + _SQUARE[1]).T for x, y in corners]
        flat = transformed(outlines, source.crs, equal_area)
        areas = [abs(signed_area(outline)) for outline in flat]
        return cls(
            source.crs, source.transform, equal_area, areas[0], max(areas), float(abs(lat).max())
        )

    @property
    def max_edge(self) -> float:
        """The pixels of an edge whose chord stays within a tenth of a pixel of its curve."""
        pixel = math.sqrt(self.pixel_area)
        bend = max(1.0, math.tan(math.radians(min(self.latitude, 89.999999))))
        return max(1.0, math.sqrt(0.8 * _EARTH / (pixel * bend)))

    @property
    def decimals(self) -> int:
        """Of longitude and latitude, for a hundredth of a pixel."""
        return _decimals(math.sqrt(self.pixel_area) / _DEGREE / 100, 7)

    @property
    def area_decimals(self) -> int:
        """Of square metres, for a hundredth of a pixel."""
        return _decimals(self.pixel_area / 100, 2)

    def points(self, rings: Sequence[Points]) -> list[Points]:
        """Turn rings in pixels into rings of the CRS, with points between far corners."""
        rings = densified(rings, self.max_edge)
        return each(lambda x, y: place(self.transform, x, y), rings)


def _decimals(step: float, at_least: int) -> int:
    return min(max(at_least, math.ceil(-math.log10(step))), 13)


def write_polygons(
    path: Path, classes: Path, probability: Path, *, describe: Describe, **options: Any
) -> tuple[int, int]:
    """Write the polygons of a class map as GeoJSON.

    Args:
        path: of the GeoJSON.
        classes: a raster of class values; 0 and its nodata are no polygons.
        probability: a raster on the same grid.
        describe: gives the properties of a class value.
        options: of `find_polygons`.

    Returns:
        The number of polygons, and of those left out.
    """
    found, num_left_out, ground = find_polygons(classes, probability, **options)
    write_geojson(path, found, ground, describe)
    return len(found), num_left_out


def find_polygons(
    classes: Path,
    probability: Path,
    *,
    unit: float = 1.0,
    min_area: float | None = 0.0,
    fill_holes: float = 0.0,
    simplify: float = 0.0,
) -> tuple[list[Polygon], int, Ground]:
    """Return the polygons of a class map, the number of those left out, and the ground.

    Args:
        classes: a raster of class values; 0 and its nodata are no polygons.
        probability: a raster on the same grid.
        unit: what a step of the probability's values is.
        min_area: of a polygon, in square metres; smaller ones are left out. None is that of
            `MIN_PIXELS` pixels.
        fill_holes: holes of up to so many square metres are filled, unless they hold other change
            or pixels without data.
        simplify: metres; outlines lose corners of triangles smaller than its square. Borders that
            two polygons share stay shared. Polygons that shrink to a line are left out. 0 keeps
            all corners.
    """
    import rasterio

    with rasterio.open(classes) as source, rasterio.open(probability) as chances:
        ground = Ground.of(source)
        found, num_left_out = _polygons(source, ground, min_area, fill_holes)
        _add_probabilities(found, source, chances, unit)
    _draw(found, ground, simplify)
    drawn = [polygon for polygon in found if polygon.area > ground.pixel_area / 100]
    return drawn, num_left_out + len(found) - len(drawn), ground


def write_geojson(path: Path, found: Sequence[Polygon], ground: Ground, describe: Describe) -> None:
    """Write polygons in longitude and latitude."""
    import shapely

    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        comma = ""
        for polygon, outline in zip(found, _in_lon_lat(found, ground), strict=True):
            parts = shapely.get_parts(outline)
            areas = [polygon.area]
            if len(parts) > 1:
                areas = _areas(parts, "EPSG:4326", ground.equal_area).tolist()
            for number, (part, area) in enumerate(zip(parts, areas, strict=True), 1):
                properties = {
                    **describe(polygon.value),
                    "area_m2": round(area, ground.area_decimals),
                    "mean_probability": round(polygon.probability, 3),
                    **({"part": f"{number} of {len(parts)}"} if len(parts) > 1 else {}),
                }
                geometry = shapely.geometry.mapping(part)
                feature = {"type": "Feature", "properties": properties, "geometry": geometry}
                file.write(f"{comma}\n{json.dumps(feature)}")
                comma = ","
        file.write("\n]}\n")


def write_geopackage(
    path: Path, found: Sequence[Polygon], ground: Ground, describe: Describe, layer: str
) -> None:
    """Write polygons in the raster's own CRS, as one layer."""
    import shapely
    from pyogrio.raw import write

    about = [describe(polygon.value) for polygon in found]
    columns: dict[str, NDArray[Any]] = {}
    for name in describe(1):
        values = [properties[name] for properties in about]
        columns[name] = np.array(values, dtype=None if values and name == "class" else object)
    columns["area_m2"] = np.array([round(p.area, ground.area_decimals) for p in found], float)
    columns["mean_probability"] = np.array([round(p.probability, 3) for p in found], float)
    write(
        str(path),
        geometry=shapely.to_wkb([polygon.outline for polygon in found]),
        field_data=list(columns.values()),
        fields=list(columns),
        geometry_type="MultiPolygon",
        promote_to_multi=True,
        crs=ground.crs.to_wkt(),
        driver="GPKG",
        layer=layer,
    )


def check_installed(path: Path, form: str) -> None:
    """Raise UserError, naming a scene, if what draws polygons in a form is not installed."""
    needed = {"shapely": "none"}
    if form in ("gpkg", "both"):
        needed["pyogrio"] = "geojson"
    for name, other in needed.items():  # imported where they are used: pyogrio takes a second
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{path}: --polygons {form} needs {name}: pip install -r requirements-geo.txt, "
                f"or --polygons {other}"
            )


def _polygons(
    source: Any, ground: Ground, min_area: float | None, fill_holes: float
) -> tuple[list[Polygon], int]:
    """Return the polygons that are large enough, and the number of the others."""
    import rasterio
    from rasterio.features import shapes

    band = rasterio.band(source, 1)  # GDAL goes along its lines; the raster is never held whole
    mask = band if source.dtypes[0] == "uint8" else None  # spares the polygon of class 0
    if min_area is None:  # half a pixel less, as a pixel is not the same size all over a scene
        min_area = (MIN_PIXELS - 0.5) * ground.pixel_area
    # in the raster's own units; a metre of UTM is hardly one on the ground
    too_small = min_area / (_MAX_STRETCH * ground.max_pixel_area)
    too_small *= abs(source.transform.determinant)
    back = ~source.transform
    num_left_out = 0

    def outlines() -> Iterator[tuple[int, list[Any]]]:
        """Yield those that may be large enough: most of a map's are not, so this is cheap."""
        nonlocal num_left_out
        for shape, value in shapes(band, mask=mask, connectivity=4, transform=source.transform):
            if value in (0, source.nodata):
                continue
            if _quick_area(shape["coordinates"][0]) < too_small:
                num_left_out += 1
            else:
                yield int(value), shape["coordinates"]

    found: list[Polygon] = []
    large = outlines()
    while chunk := list(islice(large, _AT_ONCE)):
        corners = [np.array(ring) for _, rings in chunk for ring in rings]
        whole = iter(each(lambda x, y: np.round(place(back, x, y)), corners))
        pixels = [[next(whole) for _ in rings] for _, rings in chunk]
        every_ring = [ring for rings in pixels for ring in rings]
        sizes = iter(np.abs(pixel_areas(every_ring)).tolist())
        points = ground.points(every_ring)
        flat = iter(transformed(points, ground.crs, ground.equal_area))
        for (value, _), rings in zip(chunk, pixels, strict=True):
            areas = [signed_area(next(flat)) for _ in rings]
            size, *without = [next(sizes) for _ in rings]
            holes = zip(rings[1:], areas[1:], strict=True)
            is_kept = [
                True,
                *(abs(a) > fill_holes or not _is_unchanged(source, ring) for ring, a in holes),
            ]
            area = sum(abs(a) * (1 if i == 0 else -1) for i, a in enumerate(areas) if is_kept[i])
            if area >= min_area:
                left = [ring for ring, keep in zip(rings, is_kept, strict=True) if keep]
                found.append(Polygon(value, left, area, int(size - sum(without))))
            else:
                num_left_out += 1
    return found, num_left_out


def _quick_area(ring: Sequence[tuple[float, float]]) -> float:
    """Return the area in a ring of few points, ten times as fast as with arrays."""
    x0, y0 = ring[0]  # near 0 floats are dense
    near = [(x - x0, y - y0) for x, y in ring]
    return abs(sum(x * v - u * y for (x, y), (u, v) in pairwise(near))) / 2


def _is_unchanged(source: Any, hole: Points) -> bool:
    """Whether a hole holds class 0 alone: neither a polygon of its own nor pixels without data."""
    from rasterio.features import geometry_mask
    from rasterio.transform import Affine
    from rasterio.windows import Window

    (left, top), (right, bottom) = hole.min(0).astype(int), hole.max(0).astype(int)
    inside = source.read(1, window=Window(left, top, right - left, bottom - top))
    is_outside = geometry_mask(
        [{"type": "Polygon", "coordinates": [hole.tolist()]}],
        out_shape=inside.shape,
        transform=Affine.translation(left, top),
    )
    return not inside[~is_outside].any()


def _draw(found: Sequence[Polygon], ground: Ground, simplify: float) -> None:
    """Give each polygon its outline, simplified if that is asked for, with the area of that."""
    import shapely

    if not found:
        return
    rings = [ring for polygon in found for ring in polygon.rings]
    owners = np.repeat(np.arange(len(found)), [len(polygon.rings) for polygon in found])
    if simplify <= 0:
        for polygon, outline in zip(found, _drawn(ground.points(rings), owners), strict=True):
            polygon.outline = outline
        return
    # a border is only shared where both sides have the same points: all corners of all pixels
    dense = each(lambda x, y: place(ground.transform, x, y), densified(rings, 1.0))
    drawn = _drawn(transformed(dense, ground.crs, ground.equal_area), owners)
    simple = shapely.coverage_simplify(drawn, simplify)
    outlines = _moved(simple, ground.equal_area, ground.crs)
    for polygon, area, outline in zip(found, shapely.area(simple), outlines, strict=True):
        polygon.area, polygon.outline = float(area), outline


def _drawn(rings: Sequence[Points], owners: NDArray[np.int64]) -> Any:
    """Return the polygon of each owner of rings, whose outer one comes first."""
    import shapely

    numbers = np.repeat(np.arange(len(rings)), [len(ring) for ring in rings])
    return shapely.polygons(
        shapely.linearrings(np.concatenate(rings), indices=numbers), indices=owners
    )


def _in_lon_lat(found: Sequence[Polygon], ground: Ground) -> Iterator[Any]:
    """Yield outlines in longitude and latitude, valid, cut at 180 degrees, as RFC 7946 wants."""
    import shapely

    for first in range(0, len(found), _AT_ONCE):
        outlines = np.array([polygon.outline for polygon in found[first : first + _AT_ONCE]])
        there = _moved(outlines, ground.crs, "EPSG:4326")
        west, _, east, _ = shapely.bounds(there).T
        for i in np.flatnonzero((west < -180) | (east > 180) | (east - west > 180)):
            there[i] = _cut(there[i])
        # corners that coincide stay so; `pointwise` moves each, and no more
        there = shapely.transform(there, lambda points: np.round(points, ground.decimals))
        for i in np.flatnonzero(~shapely.is_valid(there)):
            there[i] = _only_areas(shapely.make_valid(there[i]))
        yield from shapely.orient_polygons(there)


def _cut(polygon: Any) -> Any:
    """Cut a polygon that crosses 180 degrees, or lies beyond, into parts from -180 to 180.

    Its edges may jump from one side of the map to the other, and it may hold a pole.
    """
    import shapely

    rings = [shapely.get_coordinates(ring) for ring in (polygon.exterior, *polygon.interiors)]
    shell, *holes = (_within(ring) for ring in rings)
    return _only_areas(shapely.difference(shell, shapely.union_all(holes)))


def _within(ring: Points) -> Any:
    """Return the area in a ring of longitudes and latitudes, between -180 and 180."""
    import shapely

    lon, lat = ring.T
    lon = lon + 360 * np.concatenate([[0], -np.cumsum(np.round(np.diff(lon) / 360))])
    if abs(lon[-1] - lon[0]) > 180:  # once around: the pole is inside
        pole = math.copysign(90.0, lat.mean())
        lon = np.concatenate([lon, [lon[-1], lon[0], lon[0]]])
        lat = np.concatenate([lat, [pole, pole, lat[0]]])
    whole = shapely.make_valid(shapely.Polygon(np.stack([lon, lat], axis=1)))
    parts = []
    for turn in range(math.floor((lon.min() + 180) / 360), math.ceil((lon.max() + 180) / 360)):
        world = shapely.box(-180 + 360 * turn, -90, 180 + 360 * turn, 90)
        here = shapely.intersection(whole, world)
        parts.append(shapely.transform(here, lambda points, by=turn: points - [360 * by, 0]))
    return _only_areas(shapely.union_all(parts))


def _only_areas(geometry: Any) -> Any:
    """Return the polygons of a geometry, without points and lines where parts touch."""
    import shapely

    parts = shapely.get_parts(geometry)
    parts = parts[shapely.area(parts) > 0]
    return parts[0] if len(parts) == 1 else shapely.multipolygons(shapely.get_parts(parts))


def _moved(geometries: Any, crs: Any, to: str | Any) -> Any:
    """Transform shapely geometries from one CRS to another, all points in one call."""
    import shapely
    from rasterio.warp import transform

    def there(points: Points) -> Points:
        return np.stack(transform(crs, to, *points.T), axis=1) if len(points) else points

    return shapely.transform(geometries, there)


def _areas(geometries: Any, crs: Any, equal_area: str) -> Any:
    import shapely

    return shapely.area(_moved(geometries, crs, equal_area))


def _equal_area_crs(source: Any) -> str:
    """Return the equal-area projection around a raster's middle, as PROJ writes it."""
    from rasterio.warp import transform

    middle = place(source.transform, source.width / 2, source.height / 2)
    (lon,), (lat,) = transform(source.crs, "EPSG:4326", [middle[0]], [middle[1]])
    return f"+proj=laea +lat_0={lat:.6f} +lon_0={lon:.6f} +ellps=WGS84 +datum=WGS84 +units=m"


def _add_probabilities(found: list[Polygon], source: Any, chances: Any, unit: float) -> None:
    """Average the probability over the pixels of each polygon's class, block of rows by block.

    The sum over a row's pixels inside is that up to the right edge less that up to the left one.
    """
    from rasterio.windows import Window

    if not found:
        return
    spots, signs, owners = upright_edges([polygon.rings for polygon in found], source.width)
    totals = np.zeros(len(found))
    is_float = chances.dtypes[0] == "float32"
    for top in range(0, source.height, _ROWS):
        bottom = min(top + _ROWS, source.height)
        here = slice(*np.searchsorted(spots, (np.array([top, bottom]) * (source.width + 1))))
        if here.start == here.stop:
            continue
        window = Window(0, top, source.width, bottom - top)
        classes, chance = source.read(1, window=window), chances.read(1, window=window)
        chance[(classes == 0) | (classes == source.nodata)] = 0  # in holes that are filled, too
        up_to = np.zeros((len(chance), source.width + 1), np.float64 if is_float else np.int32)
        np.cumsum(chance, axis=1, out=up_to[:, 1:])
        sums = up_to.ravel()[spots[here] - top * (source.width + 1)]
        np.add.at(totals, owners[here], sums * signs[here])
    for polygon, total in zip(found, totals, strict=True):
        polygon.probability = float(total) * unit / polygon.num_pixels
