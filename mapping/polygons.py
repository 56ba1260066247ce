"""Class maps on a grid become polygons: GeoJSON with area and mean probability.

    outline       along the pixels' edges; pixels that touch at a corner alone are two polygons
    coordinates   longitude and latitude of WGS 84, seven decimals (a centimetre): RFC 7946
    area_m2       on the ground: in a Lambert azimuthal projection, which keeps areas, of the WGS 84
                  ellipsoid around the scene's middle, whatever the raster's own CRS is

Polygons are held in memory, some hundred bytes a corner: a map of single pixels takes gigabytes.
A metre of UTM or Web Mercator is not a metre on the ground, and a degree is none at all, so areas
are never taken in the raster's own coordinates.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mapping.rasters import place
from pairs.labels import MIN_PIXELS

_AT_ONCE = 2000  # polygons whose coordinates are transformed in one call
_ROWS = 512  # of the raster that are held for the mean probabilities

Points = NDArray[np.float64]  # (n, 2): x, y


@dataclass
class Polygon:
    """One polygon: rings in the raster's CRS, the outer one first; the last point is the first."""

    value: int
    rings: list[Points]
    area: float  # square metres
    lon_lat: list[Points]
    probability: float = float("nan")


def write_polygons(
    path: Path,
    classes: Path,
    probability: Path,
    *,
    describe: Callable[[int], dict[str, object]],
    unit: float = 1.0,
    min_area: float | None = 0.0,
    fill_holes: float = 0.0,
) -> tuple[int, int]:
    """Write the polygons of a class map.

    Args:
        path: of the GeoJSON.
        classes: a raster of class values; 0 and its nodata are no polygons.
        probability: a raster on the same grid.
        describe: gives the properties of a class value.
        unit: what a step of the probability's values is.
        min_area: of a polygon, in square metres; smaller ones are left out. None is that of as many
            pixels as an object has that `objects.py` counts.
        fill_holes: holes of up to so many square metres are filled, unless they hold other change
            or pixels without data.

    Returns:
        The number of polygons, and of those left out.
    """
    import rasterio

    with rasterio.open(classes) as source, rasterio.open(probability) as chances:
        found, num_left_out = _polygons(source, min_area, fill_holes)
        _add_probabilities(found, source, chances, unit)
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for number, polygon in enumerate(found):
            feature = {
                "type": "Feature",
                "properties": {
                    **describe(polygon.value),
                    "area_m2": round(polygon.area, 2),
                    "mean_probability": round(polygon.probability, 3),
                },
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [np.round(ring, 7).tolist() for ring in polygon.lon_lat],
                },
            }
            file.write(f"{',' if number else ''}\n{json.dumps(feature)}")
        file.write("\n]}\n")
    return len(found), num_left_out


def _polygons(source: Any, min_area: float | None, fill_holes: float) -> tuple[list[Polygon], int]:
    """Return the polygons that are large enough, and the number of the others."""
    import rasterio
    from rasterio.features import shapes

    band = rasterio.band(source, 1)  # GDAL goes along its lines; the raster is never held whole
    mask = band if source.dtypes[0] == "uint8" else None  # spares the polygon of class 0
    outlines = (
        (int(value), [np.array(ring) for ring in shape["coordinates"]])
        for shape, value in shapes(band, mask=mask, connectivity=4, transform=source.transform)
        if value not in (0, source.nodata)
    )
    equal_area = equal_area_crs(source)
    if min_area is None:  # half a pixel less, as a pixel is not the same size all over a scene
        min_area = (MIN_PIXELS - 0.5) * _pixel_area(source, equal_area)
    found: list[Polygon] = []
    num_left_out = 0
    while chunk := list(islice(outlines, _AT_ONCE)):
        flat = _transformed([r for _, rings in chunk for r in rings], source.crs, equal_area)
        kept: list[Polygon] = []
        for value, rings in chunk:
            areas = [signed_area(next(flat)) for _ in rings]
            holes = zip(rings[1:], areas[1:], strict=True)
            is_kept = [
                True,
                *(abs(a) > fill_holes or not _is_unchanged(source, ring) for ring, a in holes),
            ]
            area = sum(abs(a) * (1 if i == 0 else -1) for i, a in enumerate(areas) if is_kept[i])
            if area >= min_area:
                left = [ring for ring, keep in zip(rings, is_kept, strict=True) if keep]
                kept.append(Polygon(value, left, area, []))
        flat = _transformed([r for p in kept for r in p.rings], source.crs, "EPSG:4326")
        for polygon in kept:
            polygon.lon_lat = [_turned(next(flat), i == 0) for i in range(len(polygon.rings))]
        found += kept
        num_left_out += len(chunk) - len(kept)
    return found, num_left_out


def _is_unchanged(source: Any, hole: Points) -> bool:
    """Whether a hole holds class 0 alone: neither a polygon of its own nor pixels without data."""
    from rasterio.features import geometry_mask
    from rasterio.windows import Window

    columns, rows = np.round(place(~source.transform, *hole.T))
    left, top = int(columns.min()), int(rows.min())
    window = Window(left, top, int(columns.max()) - left, int(rows.max()) - top)
    inside = source.read(1, window=window)
    is_outside = geometry_mask(
        [{"type": "Polygon", "coordinates": [hole.tolist()]}],
        out_shape=inside.shape,
        transform=source.window_transform(window),
    )
    return not inside[~is_outside].any()


def _pixel_area(source: Any, equal_area: str) -> float:
    """Return the square metres on the ground of the pixel in a raster's middle."""
    row, column = source.height // 2, source.width // 2
    x = column + np.array([0, 0, 1, 1, 0])
    y = row + np.array([0, 1, 1, 0, 0])
    outline = place(source.transform, x, y).T
    return abs(signed_area(next(_transformed([outline], source.crs, equal_area))))


def equal_area_crs(source: Any) -> str:
    """Return the equal-area projection around a raster's middle, as PROJ writes it."""
    from rasterio.warp import transform

    middle = place(source.transform, source.width / 2, source.height / 2)
    (lon,), (lat,) = transform(source.crs, "EPSG:4326", [middle[0]], [middle[1]])
    return f"+proj=laea +lat_0={lat:.6f} +lon_0={lon:.6f} +ellps=WGS84 +datum=WGS84 +units=m"


def signed_area(ring: Points) -> float:
    """Return the area of a closed ring, positive if it runs counter-clockwise."""
    x, y = (ring - ring[0]).T  # near 0, where floats are dense
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def _transformed(rings: Iterable[Points], crs: Any, to: str) -> Iterator[Points]:
    """Transform many rings in one call, which is a hundred times faster than one by one."""
    from rasterio.warp import transform

    rings = list(rings)
    if not rings:
        return
    x, y = np.concatenate(rings).T
    moved = np.stack(transform(crs, to, x, y), axis=1)
    yield from np.split(moved, np.cumsum([len(ring) for ring in rings])[:-1])


def _turned(ring: Points, is_outer: bool) -> Points:
    """Outer rings run counter-clockwise, holes clockwise, as RFC 7946 wants it."""
    return ring if (signed_area(ring) > 0) == is_outer else ring[::-1]


def _add_probabilities(found: list[Polygon], source: Any, chances: Any, unit: float) -> None:
    """Average the probability over the pixels of each polygon's class, block of rows by block."""
    from rasterio.features import rasterize
    from rasterio.windows import Window

    counts, sums = np.zeros((2, len(found) + 1))
    rows_of = [_rows(polygon, source) for polygon in found]
    for top in range(0, source.height, _ROWS):
        bottom = min(top + _ROWS, source.height)
        here = [i for i, (low, high) in enumerate(rows_of) if low < bottom and high > top]
        if not here:
            continue
        window = Window(0, top, source.width, bottom - top)
        ids = rasterize(
            (
                ({"type": "Polygon", "coordinates": [r.tolist() for r in found[i].rings]}, i + 1)
                for i in here
            ),
            out_shape=(bottom - top, source.width),
            transform=source.window_transform(window),
            dtype="int32",
        )
        values = np.array([0, *(polygon.value for polygon in found)])
        classes, chance = source.read(1, window=window), chances.read(1, window=window)
        is_inside = (ids > 0) & (classes == values[ids])  # filled holes do not count
        counts += np.bincount(ids[is_inside], minlength=len(counts))
        sums += np.bincount(ids[is_inside], chance[is_inside] * unit, minlength=len(sums))
    for polygon, total, count in zip(found, sums[1:], counts[1:], strict=True):
        polygon.probability = total / count


def _rows(polygon: Polygon, source: Any) -> tuple[float, float]:
    """Return the first row of a polygon and the one behind its last."""
    _, rows = place(~source.transform, *polygon.rings[0].T)
    return float(rows.min()) - 0.5, float(rows.max()) + 0.5
