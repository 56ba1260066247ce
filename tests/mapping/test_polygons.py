import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapping.polygons import signed_area, write_polygons

rasterio = pytest.importorskip("rasterio")
from geo_helpers import write_tif  # noqa: E402
from rasterio.features import rasterize  # noqa: E402
from rasterio.transform import from_origin  # noqa: E402


def polygons_of(
    folder: Path, classes: np.ndarray, chance: np.ndarray | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Write class values (H, W) and probabilities, and read the polygons of them back."""
    grid = {k: options.pop(k) for k in ("crs", "transform") if k in options}
    chance = np.full(classes.shape, 0.75, np.float32) if chance is None else chance
    a = write_tif(folder / "classes.tif", classes[None], nodata=255, **grid)
    b = write_tif(folder / "chance.tif", chance[None], **grid)
    path = folder / "polygons.geojson"
    number, _ = write_polygons(path, a, b, describe=lambda value: {"class": value}, **options)
    features = json.loads(path.read_text())["features"]
    assert len(features) == number
    return features


def of_quadrangle(lat: float, height: float, width: float) -> float:
    """Area between parallels and meridians of WGS 84, in closed form (Snyder 1987, 3-12)."""
    a, flattening = 6378137.0, 1 / 298.257223563
    e = math.sqrt(flattening * (2 - flattening))

    def q(degrees: float) -> float:
        s = math.sin(math.radians(degrees))
        return s / (1 - (e * s) ** 2) + math.log((1 + e * s) / (1 - e * s)) / (2 * e)

    strip = abs(q(lat) - q(lat - height))
    return math.radians(width) * a**2 * (1 - e**2) / 2 * strip


@pytest.mark.parametrize("lat", [0.002, 46.0, -33.0, 80.0])
def test_area_of_degrees_is_that_of_the_ellipsoid(tmp_path: Path, lat: float) -> None:
    classes = np.zeros((60, 80), dtype=np.uint8)
    classes[20:30, 10:30] = 1
    side = 1e-5
    (feature,) = polygons_of(
        tmp_path, classes, crs="EPSG:4326", transform=from_origin(9, lat, side, side)
    )
    expected = of_quadrangle(lat - 20 * side, 10 * side, 20 * side)
    assert feature["properties"]["area_m2"] == pytest.approx(expected, rel=1e-5, abs=0.01)


def test_area_of_a_projection_is_on_the_ground(tmp_path: Path) -> None:
    """UTM shrinks its middle meridian by 0.9996; Web Mercator stretches by 1 / cos(latitude)."""
    classes = np.zeros((40, 40), dtype=np.uint8)
    classes[10:30, 10:30] = 1
    (in_utm,) = polygons_of(tmp_path, classes, transform=from_origin(5e5, 5.1e6, 10, 10))
    assert in_utm["properties"]["area_m2"] == pytest.approx(200**2 / 0.9996**2, rel=1e-5)
    place = {"crs": "EPSG:3857", "transform": from_origin(1e6, 8399737.89, 10, 10)}  # 60 N
    (in_mercator,) = polygons_of(tmp_path, classes, **place)
    assert in_mercator["properties"]["area_m2"] == pytest.approx(200**2 / 4, rel=0.01)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95))
def test_polygons_and_mask_agree(
    tmp_path_factory: pytest.TempPathFactory, seed: int, share: float
) -> None:
    draw = np.random.default_rng(seed)
    classes = (draw.random((20, 30)) < share) * draw.integers(1, 3, (20, 30))
    classes = classes.astype(np.uint8)
    classes[draw.random((20, 30)) < 0.1] = 255
    chance = draw.random((20, 30)).astype(np.float32)
    grid = from_origin(9, 46, 0.001, 0.001)
    features = polygons_of(
        tmp_path_factory.mktemp("map"), classes, chance, crs="EPSG:4326", transform=grid
    )
    shown = np.where(classes == 255, 0, classes)
    again = np.zeros_like(shown)
    pairs = [(f["geometry"], f["properties"]["class"]) for f in features]
    if pairs:
        again = rasterize(pairs, out_shape=shown.shape, transform=grid, dtype="uint8")
    assert np.array_equal(again, shown)
    for feature in features:
        shape = feature["geometry"]
        inside = rasterize([(shape, 1)], out_shape=shown.shape, transform=grid, dtype="uint8") > 0
        mean = feature["properties"]["mean_probability"]
        assert mean == pytest.approx(chance[inside].mean(), abs=6e-4)
        outer, *holes = (np.array(ring) for ring in shape["coordinates"])
        assert signed_area(outer) > 0 and all(signed_area(hole) < 0 for hole in holes)


def test_small_polygons_and_holes(tmp_path: Path) -> None:
    classes = np.zeros((60, 60), dtype=np.uint8)
    classes[5:25, 5:25] = 1
    classes[10:14, 10:14] = 0  # a hole of 4 m^2
    classes[16:22, 14:22] = 0  # a hole of 12 m^2
    classes[40:42, 40:42] = 1  # 1 m^2
    chance = np.where(classes == 1, 0.9, 0.1).astype(np.float32)

    def areas(**options: Any) -> list[tuple[int, int, float]]:
        found = polygons_of(tmp_path, classes, chance, **options)
        return [
            (
                round(f["properties"]["area_m2"]),
                len(f["geometry"]["coordinates"]) - 1,
                f["properties"]["mean_probability"],
            )
            for f in found
        ]

    assert areas() == [(84, 2, 0.9), (1, 0, 0.9)]
    assert areas(min_area=2) == [(84, 2, 0.9)]
    assert areas(min_area=None) == [(84, 2, 0.9)]
    assert areas(min_area=2, fill_holes=5) == [(88, 1, 0.9)]
    assert areas(min_area=2, fill_holes=50) == [(100, 0, 0.9)]
    assert areas(min_area=99) == [] and areas(min_area=99, fill_holes=50) == [(100, 0, 0.9)]
    classes[18:20, 16:18] = 1  # an island in the large hole
    assert sorted(areas(fill_holes=50)) == [(1, 0, 0.1), (1, 0, 0.9), (88, 1, 0.9)]
    classes[11, 11] = 255  # no data in the small one
    assert max(areas(fill_holes=50)) == (84, 2, 0.9)


@pytest.mark.parametrize("lat", [0.5, 60.0])
def test_by_default_fewer_than_ten_pixels_are_left_out(tmp_path: Path, lat: float) -> None:
    classes = np.zeros((60, 60), dtype=np.uint8)
    classes[2, 2:11] = 1
    classes[58, 2:12] = 1
    grid = {"crs": "EPSG:4326", "transform": from_origin(10, lat, 1e-3, 1e-3)}
    (feature,) = polygons_of(tmp_path, classes, min_area=None, **grid)
    assert feature["properties"]["area_m2"] == pytest.approx(
        of_quadrangle(lat - 0.058, 0.001, 0.01), rel=1e-4
    )
    assert len(polygons_of(tmp_path, classes, **grid)) == 2


def test_pixels_that_touch_at_a_corner_are_two_polygons(tmp_path: Path) -> None:
    assert len(polygons_of(tmp_path, np.eye(5, dtype=np.uint8))) == 5


def test_no_change_is_an_empty_collection(tmp_path: Path) -> None:
    assert polygons_of(tmp_path, np.zeros((5, 5), dtype=np.uint8)) == []
