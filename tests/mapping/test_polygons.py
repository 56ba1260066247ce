import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mapping.polygons import check_installed, signed_area, write_polygons
from runtime.errors import UserError

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
    parts = [f["properties"].get("part", "1 of 1") for f in features]
    assert sum(part.startswith("1 of") for part in parts) == number
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


def check_by_shapely(features: list[dict[str, Any]]) -> float:
    """Check geometries as RFC 7946 wants them; return their area in square metres."""
    shapely = pytest.importorskip("shapely")
    from rasterio.warp import transform

    total = 0.0
    for feature in features:
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.geom_type == "Polygon" and shape.is_valid, shapely.is_valid_reason(shape)
        assert shape.exterior.is_ccw and not any(ring.is_ccw for ring in shape.interiors)
        west, south, east, north = shape.bounds
        assert -180 <= west < east <= 180 and -90 <= south < north <= 90
        assert east - west < 180 or abs(south + north) > 179
        middle = shape.representative_point()
        to = f"+proj=laea +lat_0={middle.y} +lon_0={middle.x} +ellps=WGS84"
        flat = shapely.transform(
            shape, lambda p, to=to: np.stack(transform("EPSG:4326", to, *p.T), axis=1)
        )
        area = feature["properties"]["area_m2"]
        assert flat.area == pytest.approx(area, rel=1e-3, abs=flat.length * flat.area**0.5 / 100)
        total += area
    return total


def noise(share: float = 0.5, side: int = 28) -> np.ndarray:
    return (np.random.default_rng(3).random((side, side)) < share).astype(np.uint8)


@pytest.mark.fault("U12")
@pytest.mark.parametrize("pixel", [1e-5, 0.005, 0.02, 0.5, 30.0, 1000.0])
@pytest.mark.parametrize("share", [0.35, 0.65])
def test_polygons_of_any_pixel_size_are_valid(tmp_path: Path, pixel: float, share: float) -> None:
    classes = noise(share)
    for place in (
        {"transform": from_origin(500000.123, 5200000.456, pixel, pixel)},
        {"crs": "EPSG:4326", "transform": from_origin(9.1, 46.2, pixel / 111000, pixel / 111000)},
    ):
        total = check_by_shapely(polygons_of(tmp_path, classes, min_area=0, **place))
        scale = 0.9996**2 if "crs" not in place else 111000**2 / 111200 / 77000
        assert total == pytest.approx(classes.sum() * pixel**2 / scale, rel=0.02)


@pytest.mark.fault("U12")
def test_rings_in_rings_and_corners_that_touch_are_valid(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:42, :42]
    rings = (np.maximum(abs(columns - 21), abs(rows - 21)) // 3) % 2 == 0
    touching = np.ones((42, 42), dtype=bool)
    touching[10:20, 10:20] = touching[20:30, 20:30] = touching[:10, 20:30] = False
    for mask in (rings, touching, (rows + columns) % 2 == 0, rows >= 0):
        features = polygons_of(tmp_path, mask.astype(np.uint8))
        assert check_by_shapely(features) == pytest.approx(mask.sum() / 4 / 0.9996**2, rel=1e-3)


def test_long_edges_follow_the_ground(tmp_path: Path) -> None:
    """An edge of 30 km bends by 18 m in longitude and latitude; what lies close stays outside."""
    shapely = pytest.importorskip("shapely")
    classes = np.zeros((30, 3000), dtype=np.uint8)
    classes[10:12], classes[13, ::7] = 1, 1
    transform = from_origin(3e5, 7.2e6, 10, 10)
    features = polygons_of(tmp_path, classes, transform=transform)
    check_by_shapely(features)
    shapes = [shapely.geometry.shape(f["geometry"]) for f in features]
    long = max(shapes, key=lambda shape: shape.area)
    assert not any(long.intersects(other) for other in shapes if other is not long)


ACROSS_180 = {
    "UTM 60": ("EPSG:32760", from_origin(819437 - 20, 8118000, 1, 1)),
    "degrees past 180": ("EPSG:4326", from_origin(180 - 2e-4, -17, 1e-5, 1e-5)),
    "degrees past -180": ("EPSG:4326", from_origin(-180 - 2e-4, -17, 1e-5, 1e-5)),
    "Pacific": ("EPSG:3832", from_origin(3339584.7 - 20, -1.9e6, 1, 1)),
    "Web Mercator": ("EPSG:3857", from_origin(20037508.3 - 20, -1.9e6, 1, 1)),
    "north pole": ("EPSG:3413", from_origin(-20.5, 20.5, 1, 1)),
    "south pole": ("EPSG:3031", from_origin(-20.5, 20.5, 1, 1)),
}


@pytest.mark.fault("U10")
@pytest.mark.parametrize("kind", ACROSS_180)
def test_polygons_are_cut_at_180_degrees(tmp_path: Path, kind: str) -> None:
    crs, transform = ACROSS_180[kind]
    block = np.zeros((40, 40), dtype=np.uint8)
    block[5:35, 5:35] = 1
    block[15:25, 15:25] = 0
    whole = np.ones((40, 40), dtype=np.uint8)
    for classes in (block, whole, noise(side=40)):
        features = polygons_of(tmp_path, classes, crs=crs, transform=transform)
        total = check_by_shapely(features)
        pixels = polygons_of(tmp_path, whole, crs=crs, transform=transform)
        one = sum(f["properties"]["area_m2"] for f in pixels) / 1600
        assert total == pytest.approx(classes.sum() * one, rel=5e-3)
    sides = {math.copysign(1, x) for f in features for x, _ in f["geometry"]["coordinates"][0]}
    assert sides == {-1, 1}
    parts = [f["properties"]["part"] for f in features if "part" in f["properties"]]
    assert "1 of 2" in parts and "2 of 2" in parts


def classes_in_blocks() -> np.ndarray:
    """Three classes whose borders are stairs, so that simplifying has something to do."""
    rows, columns = np.mgrid[:60, :60]
    classes = 1 + (columns + (rows // 2) % 3 > 30).astype(np.uint8)
    classes[(rows - 30) ** 2 + (columns - 30) ** 2 < 150] = 3
    classes[:3] = 0
    return classes.astype(np.uint8)


def test_simplified_neighbours_share_their_borders(tmp_path: Path) -> None:
    shapely = pytest.importorskip("shapely")
    classes = classes_in_blocks()
    exact = polygons_of(tmp_path, classes)
    simple = polygons_of(tmp_path, classes, simplify=1.0)
    check_by_shapely(simple)

    def corners(features: list[dict[str, Any]]) -> int:
        return sum(len(ring) for f in features for ring in f["geometry"]["coordinates"])

    assert corners(simple) < corners(exact) / 2
    shapes = [shapely.geometry.shape(f["geometry"]) for f in simple]
    assert shapely.coverage_is_valid(shapes)
    whole = shapely.union_all([shapely.geometry.shape(f["geometry"]) for f in exact])
    assert shapely.union_all(shapes).area == pytest.approx(whole.area, rel=2e-3)


def test_a_polygon_of_which_simplifying_leaves_nothing_costs_no_other(tmp_path: Path) -> None:
    pytest.importorskip("shapely")
    rows = ("23311", "33323", "33333", "31132", "32313")
    classes = np.array([list(row) for row in rows]).astype(np.uint8)
    place = {"crs": "EPSG:32633", "transform": from_origin(4e5, 5e6, 0.5, 0.5)}
    exact = polygons_of(tmp_path, classes, **place)
    assert len(polygons_of(tmp_path, classes, simplify=1.0, **place)) == len(exact) - 1


@pytest.mark.parametrize(
    ("form", "missing", "remedy"),
    [
        ("geojson", "pyogrio", None),
        ("gpkg", "pyogrio", "geojson"),
        ("both", "pyogrio", "geojson"),
        ("geojson", "shapely", "none"),
        ("both", "shapely", "none"),
    ],
)
def test_polygons_ask_for_what_their_form_needs(
    form: str, missing: str, remedy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mapping.polygons.importlib.util.find_spec", lambda name: None if name == missing else name
    )
    if remedy is None:
        check_installed(Path("x.tif"), form)
        return
    with pytest.raises(UserError, match=rf"{form} needs {missing}: .*--polygons {remedy}$"):
        check_installed(Path("x.tif"), form)


def test_a_geopackage_holds_the_same_in_the_scenes_own_crs(tmp_path: Path) -> None:
    shapely, raw = pytest.importorskip("shapely"), pytest.importorskip("pyogrio.raw")
    from mapping.polygons import find_polygons, write_geopackage

    classes = classes_in_blocks()
    a = write_tif(tmp_path / "classes.tif", classes[None], nodata=255)
    b = write_tif(tmp_path / "chance.tif", np.full((1, 60, 60), 0.75, np.float32))
    found, _, ground = find_polygons(a, b)
    path = tmp_path / "x.gpkg"
    write_geopackage(path, found, ground, lambda v: {"class": v, "name": f"k{v}"}, "change")
    about, _, geometry, fields = raw.read(path)
    assert about["crs"] == "EPSG:32632" and list(about["fields"]) == [
        "class", "name", "area_m2", "mean_probability",
    ]  # fmt: skip
    shapes = shapely.from_wkb(geometry)
    assert shapely.is_valid(shapes).all()
    assert shapely.area(shapes).sum() == (classes > 0).sum() * 0.25
    assert sorted(fields[0]) == [1, 2, 3] and set(fields[1]) == {"k1", "k2", "k3"}
    assert (fields[3] == 0.75).all()
    write_geopackage(tmp_path / "no.gpkg", [], ground, lambda v: {"class": v, "name": ""}, "change")
    assert raw.read(tmp_path / "no.gpkg")[2].size == 0
