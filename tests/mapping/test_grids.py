import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mapping.grids import Grid, overlap
from mapping.maps import GeoTiffMap
from mapping.rasters import open_scene
from runtime.errors import UserError

rasterio = pytest.importorskip("rasterio")
from geo_helpers import UTM, write_tif  # noqa: E402
from rasterio.control import GroundControlPoint  # noqa: E402
from rasterio.crs import CRS  # noqa: E402
from rasterio.rpc import RPC  # noqa: E402
from rasterio.transform import Affine, from_origin  # noqa: E402


def pixels(height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (3, height, width), dtype=np.uint8)


def placed(path: Path, crs: Any, transform: Any, shape: tuple[int, int] = (40, 50)) -> Path:
    return write_tif(path, pixels(*shape), crs=crs, transform=transform)


@pytest.mark.fault("U8")
@pytest.mark.parametrize(
    ("driver", "end", "options"),
    [
        ("PNG", "png", {"WORLDFILE": "YES"}),
        ("JPEG", "jpg", {"WORLDFILE": "YES"}),
        ("BMP", "bmp", {"WORLDFILE": "YES"}),
        ("GTiff", "tif", {"PROFILE": "BASELINE", "TFW": "YES"}),
    ],
)
def test_a_place_in_sidecars_counts(
    tmp_path: Path, driver: str, end: str, options: dict[str, str]
) -> None:
    for name, east in (("a", 0), ("b", 0), ("moved", 40)):
        write_tif(
            tmp_path / f"{name}.{end}", pixels(), driver=driver,
            transform=from_origin(5e5 + east, 5.2e6, 0.5, 0.5), **options,
        )  # fmt: skip
    with open_scene(tmp_path / f"a.{end}", tmp_path / f"b.{end}") as scene:
        assert scene.grid.crs == CRS.from_string(UTM) and scene.grid.transform.c == 5e5
    with pytest.raises(UserError, match="different grids; --align"):
        open_scene(tmp_path / f"a.{end}", tmp_path / f"moved.{end}").__enter__()


@pytest.mark.fault("U8")
def test_a_world_file_alone_places_pixels_and_a_prj_gives_the_crs(tmp_path: Path) -> None:
    files = [
        write_tif(tmp_path / f"{n}.png", pixels(), driver="PNG", crs=None, transform=None)
        for n in "ab"
    ]
    for path, east in zip(files, (5e5, 5e5 + 40), strict=True):
        lines = (0.5, 0, 0, -0.5, east + 0.25, 5.2e6 - 0.25)
        path.with_suffix(".pgw").write_text("\n".join(map(str, lines)))
    with pytest.raises(UserError, match="different pixels"):
        open_scene(*files).__enter__()
    with open_scene(files[0], files[0]) as scene:
        assert not scene.grid.has_place and "no CRS of the Earth" in scene.notes[-1]
    for path in files:
        path.with_suffix(".prj").write_text("nonsense")
    with pytest.raises(UserError, match=r"a\.prj: names no CRS"):
        open_scene(files[0], files[0]).__enter__()
    for path in files:
        path.with_suffix(".prj").write_text(CRS.from_string(UTM).to_wkt(version="WKT1_ESRI"))
    with open_scene(files[0], files[0]) as scene:
        assert scene.grid.has_place and scene.grid.crs.to_epsg() == 32632


def with_points(path: Path, **tags: Any) -> Path:
    write_tif(path, pixels(), crs=None, transform=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        file = rasterio.open(path, "r+")
    with file:
        for key, value in tags.items():
            setattr(file, key, value)
    return path


def gcps(east: float = 0) -> dict[str, Any]:
    corners = [(r, c) for r in (0, 40) for c in (0, 50)]
    points = [GroundControlPoint(r, c, 5e5 + east + c / 2, 5.2e6 - r / 2, 0) for r, c in corners]
    return {"gcps": (points, CRS.from_string(UTM))}


def rpcs(east: float = 0) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for axis in ("height", "lat", "line", "long", "samp"):
        numbers |= {f"{axis}_off": 20.0, f"{axis}_scale": 1.0}
    for axis in ("line", "samp"):
        numbers |= {f"{axis}_{part}_coeff": [1.0, *[0.0] * 19] for part in ("num", "den")}
    return {"rpcs": RPC(**{**numbers, "long_off": 20.0 + east})}


@pytest.mark.fault("U8")
@pytest.mark.parametrize("kind", [gcps, rpcs])
def test_points_in_place_of_a_grid_are_shared_or_refused(tmp_path: Path, kind: Any) -> None:
    a, b = (with_points(tmp_path / f"{n}.tif", **kind()) for n in "ab")
    moved = with_points(tmp_path / "moved.tif", **kind(40))
    plain = write_tif(tmp_path / "plain.tif", pixels(), crs=None, transform=None)
    with open_scene(a, b) as scene:
        assert not scene.grid.has_place and "the maps keep them" in scene.notes[-1]
        path = tmp_path / "map.tif"
        layer = GeoTiffMap(path, scene.grid, "uint8", [(0, 0, 0)])
        layer.write(0, pixels()[0])
        layer.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path) as file, rasterio.open(a) as date:
            assert len(file.gcps[0]) == len(date.gcps[0]) and file.rpcs == date.rpcs
    for other in (moved, plain, placed(tmp_path / "c.tif", UTM, from_origin(5e5, 5.2e6, 0.5, 0.5))):
        for align in (False, True):
            with pytest.raises(UserError, match="makes no grid; gdalwarp"):
                open_scene(a, other, align=align).__enter__()


@pytest.mark.fault("U8")
@pytest.mark.parametrize(
    "transform", [Affine.identity(), Affine(1, 0, 0, 0, -1, 0), Affine(1, 0, 0, 0, -1, 40)]
)
@pytest.mark.parametrize("crs", [UTM, "EPSG:4326"])
def test_a_crs_alone_is_no_place_and_it_is_said(
    tmp_path: Path, crs: str, transform: Affine
) -> None:
    path = placed(tmp_path / "a.tif", crs, transform)
    with open_scene(path, path) as scene:
        assert not scene.grid.has_place and scene.grid.transform is None
        assert "CRS and no geotransform" in scene.notes[-1]


GEOSTATIONARY = CRS.from_string("+proj=geos +h=35785831 +lon_0=0 +sweep=y")
MISPLACED = {
    "degrees as UTM": (UTM, from_origin(9.1, 46.2, 5e-6, 5e-6)),
    "degrees as Web Mercator": ("EPSG:3857", from_origin(9.1, 46.2, 1e-3, 1e-3)),
    "metres as degrees": ("EPSG:4326", from_origin(5e5, 5.2e6, 0.5, 0.5)),
    "axes swapped in degrees": ("EPSG:4326", from_origin(46, 109, 1e-4, 1e-4)),
    "axes swapped in UTM": (UTM, from_origin(5.2e6, 5e5, 0.5, 0.5)),
    "axes swapped in UTM near the equator": (UTM, from_origin(2.2e6, 5e5, 0.5, 0.5)),
    "axes swapped in LV95": ("EPSG:2056", from_origin(1.2e6, 2.6e6, 0.5, 0.5)),
    "beyond the pole": ("EPSG:4326", from_origin(9, 90.5, 1e-2, 1e-2)),
    "off the Earth": ("EPSG:3857", from_origin(2e9, 0, 10, 10)),
    "geostationary disc": (GEOSTATIONARY, from_origin(-5.5e6, 5.5e6, 220000, 275000)),
    "not finite": (UTM, Affine(0.5, 0, float("nan"), 0, -0.5, 5.2e6)),
}


@pytest.mark.fault("U8", "U11")
@pytest.mark.parametrize("kind", MISPLACED)
def test_coordinates_that_do_not_fit_their_crs_are_refused(tmp_path: Path, kind: str) -> None:
    path = placed(tmp_path / "a.tif", *MISPLACED[kind])
    with pytest.raises(UserError, match="a.tif"):
        open_scene(path, path).__enter__()


LOCAL = CRS.from_string("+proj=tmerc +lat_0=46 +lon_0=9 +ellps=WGS84")
SOUND = {
    "UTM": (UTM, from_origin(5e5, 5.2e6, 0.5, 0.5)),
    "UTM 33 in the north of Norway": ("EPSG:25833", from_origin(1.1e6, 7.8e6, 10, 10)),
    "a centimetre": (UTM, from_origin(5e5, 5.2e6, 0.01, 0.01)),
    "its own small grid": (LOCAL, from_origin(0, 1, 0.02, 0.02)),
    "degrees past 180": ("EPSG:4326", from_origin(179.99, -17, 1e-3, 1e-3)),
    "Web Mercator past 180": ("EPSG:3857", from_origin(20037500, 0, 1, 1)),
    "Pacific": ("EPSG:3832", from_origin(3.3e6, -1.9e6, 1, 1)),
    "south-up": (UTM, Affine(0.5, 0, 5e5, 0, 0.5, 5.2e6)),
    "the pole": ("EPSG:3413", from_origin(-25, 20, 1, 1)),
    "the world": ("EPSG:4326", from_origin(-180, 90, 7.2, 4.5)),
    "feet": ("EPSG:2263", from_origin(980000, 200000, 1, 1)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SOUND)
def test_sound_places_are_taken(tmp_path: Path, kind: str) -> None:
    path = placed(tmp_path / "a.tif", *SOUND[kind])
    with open_scene(path, path) as scene:
        assert scene.grid.has_place


# Both lie at one place; axes run otherwise, or longitudes are told otherwise
NORTH_UP = (UTM, from_origin(5e5, 5.2e6, 0.5, 0.5))
EAST = ("EPSG:4326", from_origin(179.99, -17, 4e-4, 4e-4))
WEST = ("EPSG:4326", from_origin(-180.01, -17, 4e-4, 4e-4))
TURNED = {
    "south-up": (*NORTH_UP, UTM, Affine(0.5, 0, 5e5, 0, 0.5, 5.2e6 - 20)),
    "east to west": (*NORTH_UP, UTM, Affine(-0.5, 0, 5e5 + 25, 0, -0.5, 5.2e6)),
    "past 180": (*EAST, *WEST),
    "past 180, zone": (*WEST, "EPSG:32760", from_origin(818386, 8118014, 42.5, 45)),
}


@pytest.mark.fault("U10")
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("kind", TURNED)
def test_align_whichever_way_the_axes_run(tmp_path: Path, kind: str, back: bool) -> None:
    """Draw a smooth ground in places, not in pixels: aligned, both dates show the same."""
    from rasterio.warp import transform

    one, where, other, there = TURNED[kind]
    paths = []
    for name, crs, at in (("a", one, where), ("b", other, there)):
        x, y = np.meshgrid(np.arange(50) + 0.5, np.arange(40) + 0.5)
        lon, lat = transform(crs, "EPSG:4326", at.a * x.ravel() + at.c, at.e * y.ravel() + at.f)
        scale = 8e5 if crs == UTM else 8e3
        ground = 128 + 100 * np.sin(np.radians(np.array(lon) % 360) * scale / 4) * np.cos(
            np.radians(lat) * scale / 4
        )
        image = np.repeat(ground.reshape(1, 40, 50), 3, 0).round().astype(np.uint8)
        paths.append(write_tif(tmp_path / f"{name}.tif", image, crs=crs, transform=at))
    first, second = reversed(paths) if back else paths
    with open_scene(first, second, align=True) as scene:
        before, after, valid = scene.read(0, 40)
    assert valid.mean() > (0.3 if "zone" in kind else 0.9)
    difference = np.abs(before.astype(int) - after)[:, valid]
    assert np.median(difference) <= 4, difference.mean()


@pytest.mark.fault("U10")
def test_grids_that_lie_apart_do_not_overlap() -> None:
    crs = CRS.from_string("EPSG:4326")
    here = Grid(10, 10, crs, from_origin(179.995, 0, 1e-3, 1e-3))
    assert overlap(here, Grid(10, 10, crs, from_origin(-180.005, 0, 1e-3, 1e-3)))
    assert not overlap(here, Grid(10, 10, crs, from_origin(-179.99, 0, 1e-3, 1e-3)))
    assert not overlap(here, Grid(10, 10, crs, from_origin(9, 46, 1e-3, 1e-3)))
    assert not overlap(here, Grid(10, 10, CRS.from_string(UTM), from_origin(5e5, 5.2e6, 1, 1)))
